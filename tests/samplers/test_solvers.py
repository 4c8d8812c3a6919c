"""The tail: fewer steps after the noise, by DPM-Solver++ (2M). Against closed forms, hand arithmetic and diffusers."""

import math

import diffusers
import pytest
import torch

from samplers import FlowSDEScheduler, replay, rollout, sde_scheduler, transitions
from samplers.solvers import second_order_weight, shortened
from tests.pipelines import FAMILIES

from . import grids

EULER = diffusers.FlowMatchEulerDiscreteScheduler
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
KERNELS = {"dance": 0.3, "flow": 0.7, "wan_linear": 1.0, "sage": 0.7, "cps": 0.8, "ddim": 0.9}
MEAN, TAU, Z = 0.7, 0.4, 1.3  # x0 ~ N(MEAN, TAU^2); the path of the flow that starts at Z


def velocity(x, s):
    """E[eps - x0 | x] of the Gaussian: both are linear in x - (1 - s) MEAN, whose variance is P."""
    variance = (1 - s) ** 2 * TAU**2 + s**2
    centred = x - (1 - s) * MEAN
    return s * centred / variance - (MEAN + (1 - s) * TAU**2 * centred / variance)


def path(s: float) -> float:
    """The flow's own position at level s: so many standard deviations from the mean as at the start."""
    return (1 - s) * MEAN + math.sqrt((1 - s) ** 2 * TAU**2 + s**2) * Z


def scheduler(steps: int = 10, shift: float = 3.0, **options) -> FlowSDEScheduler:
    made = FlowSDEScheduler.from_config(EULER(shift=shift).config, **{"grid": "uniform", **options})
    made.set_timesteps(steps)
    return made


def error(steps: int, first: float, last: float, **options) -> float:
    """Distance from the path after the grid's steps from share `first` to share `last`, started on it."""
    made = scheduler(steps, 1.0, stochastic=range(round(first * steps)), **options)
    made.steps = range(round(first * steps), round(last * made.num_steps))
    made.set_timesteps(steps)
    x = torch.tensor([[path(made.levels[made.indices[0]])]], dtype=torch.float64)
    for index, t in zip(made.indices, made.timesteps, strict=True):
        x = made.step(velocity(x, made.levels[index]), t, x).prev_sample
    return abs(float(x) - path(made.levels[made.indices[-1] + 1]))


def test_order_of_convergence():
    """Between levels 0.8 and 0.4, where log((1 - s) / s) is smooth, half the step is a quarter of the error."""
    euler = [error(steps, 0.2, 0.6) for steps in (20, 40, 80, 160)]
    multistep = [error(steps, 0.2, 0.6, tail=1.0) for steps in (20, 40, 80, 160)]
    assert [a / b for a, b in zip(euler, euler[1:], strict=False)] == pytest.approx([2, 2, 2], abs=0.05)
    assert [a / b for a, b in zip(multistep, multistep[1:], strict=False)] == pytest.approx([4, 4, 4], abs=0.1)
    assert multistep[0] < euler[0] / 5


@pytest.mark.parametrize("first", [0.0, 0.2, 0.6])
def test_a_whole_tail_of_half_the_steps_beats_euler(first):
    """To level 0, where log((1 - s) / s) is infinite, the order is a little lower; so it is from pure noise."""
    euler, half = error(40, first, 1), error(40, first, 1, tail=0.5)
    assert half < euler / 2
    ends = [error(steps, first, 1, tail=1.0) for steps in (80, 160, 320)]
    assert all(2.5 < a / b < 4.5 for a, b in zip(ends, ends[1:], strict=False))


def test_weight_by_hand():
    """Levels 0.8, 0.5, 0.2 lie log 4 apart: h = h_before, so it is half of 0.8 - 0.2 * 0.5 / 0.5."""
    assert second_order_weight(0.8, 0.5, 0.2) == pytest.approx(0.3)
    # 0.9, 0.75, 0.25: h_before = log 3, h = 2 log 3; 0.75 - 0.25 / 3 = 2 / 3.
    assert second_order_weight(0.9, 0.75, 0.25) == pytest.approx(2 / 3)
    assert second_order_weight(1.0, 0.5, 0.2) == second_order_weight(0.8, 0.5, 0.0) == 0


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("steps", [6, 10, 20])
def test_equals_diffusers_on_the_same_levels(steps, start):
    theirs = diffusers.DPMSolverMultistepScheduler(
        **FLOW, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"
    )
    ours = FlowSDEScheduler(theirs, stochastic=range(start), tail=1.0)
    ours.set_timesteps(steps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    begin = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    ends = []
    for solver in (ours, theirs):
        solver.set_begin_index(start)
        x = begin
        for t in theirs.timesteps[start:]:
            x = solver.step(torch.sin(3 * x) + t / 1000 * x, t, x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-5)
    euler = FlowSDEScheduler(theirs, noise_level=0.0)
    euler.set_timesteps(steps)
    euler.set_begin_index(start)
    for t in euler.timesteps[start:]:
        begin = euler.step(torch.sin(3 * begin) + t / 1000 * begin, t, begin, return_dict=False)[0]
    assert (begin - ends[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("steps", "stochastic", "tail", "left"), [
    (20, range(4), 0.4, 7),  # of 16
    (25, range(4), 0.2, 5),  # of 21
    (50, range(25), 0.28, 7),  # of 25: 7.000000000000001 is no 8
    (8, (), 0.5, 4),
    (8, range(7), 0.1, 1),
    (8, range(8), 0.5, 0),
    (8, None, 0.5, 1),
    (8, (2, 5), 1.0, 2),
])  # fmt: skip
def test_length_and_levels(steps, stochastic, tail, left):
    """T~ = e + ceil((T - e) share); what is left lies evenly between the time of level e and 0."""
    made, full = (scheduler(steps, stochastic=stochastic, tail=share) for share in (tail, None))
    start = steps - 1 if stochastic is None else max(stochastic, default=-1) + 1
    assert made.num_steps == made.num_inference_steps == len(made.timesteps) == start + left
    assert len(made.sigmas) == len(made.levels) == start + left + 1
    expected = [1 - start / steps - k * (1 - start / steps) / max(1, left) for k in range(left + 1)]
    assert made.levels[start:] == pytest.approx([3 * u / (1 + 2 * u) for u in expected], abs=1e-6)
    assert made.sigmas.tolist() == pytest.approx(made.levels, abs=1e-7)
    assert made.timesteps.tolist() == pytest.approx([1000 * s for s in made.levels[:-1]], abs=1e-3)
    for name in ("timesteps", "sigmas"):
        assert torch.equal(getattr(made, name)[:start], getattr(full, name)[:start])
    if tail == 1:
        assert torch.equal(made.timesteps, full.timesteps)
        assert made.levels == full.levels


def test_stock_grid_is_read_between_its_own_levels():
    """At whole indices they are the stock scheduler's; between 8 and 10 of these ten steps half way in time."""
    config = diffusers.UniPCMultistepScheduler(**FLOW).config
    full, even, odd = (
        FlowSDEScheduler.from_config(config, stochastic=range(4), tail=tail) for tail in (None, 0.5, 0.34)
    )
    for made in (full, even, odd):
        made.set_timesteps(10)
    assert [len(made.timesteps) for made in (full, even, odd)] == [10, 7, 7]
    torch.testing.assert_close(even.sigmas, full.sigmas[[0, 1, 2, 3, 4, 6, 8, 10]])
    assert even.timesteps.dtype == full.timesteps.dtype == torch.int64
    assert (even.timesteps - full.timesteps[[0, 1, 2, 3, 4, 6, 8]]).abs().max() <= 1
    quarters = shortened(grids.new_unipc(10, 3.0), 6, 0.7, 3.0)  # 3 of 4 steps, at indices 7 1/3 and 8 2/3
    times = [1 - i * 0.999 / 10 for i in (7, 8, 9)]
    expected = [times[0] + (times[1] - times[0]) / 3, times[1] + (times[2] - times[1]) * 2 / 3]
    assert quarters[7:] == pytest.approx([*(3 * u / (1 + 2 * u) for u in expected), 0.0], abs=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_steps_with_noise_are_those_of_the_whole_grid(kernel):
    options = {"kernel": kernel, "noise_level": KERNELS[kernel], "stochastic": (0, 2)}
    whole, made, part = scheduler(**options), scheduler(**options, tail=0.3), scheduler(**options, tail=0.3)
    part.steps = [0, 2]
    part.set_timesteps(10)
    assert [made.step_coefficients(i) for i in range(3)] == [whole.step_coefficients(i) for i in range(3)]
    assert [part.step_coefficients(i) for i in (0, 2)] == [whole.step_coefficients(i) for i in (0, 2)]
    assert torch.equal(part.timesteps, whole.timesteps[[0, 2]])
    assert torch.equal(part.sigmas[:2], whole.sigmas[[0, 2]])


def test_a_run_that_begins_inside_the_tail_has_no_history():
    """Its first step is Euler's, as is the first after a gap; a second run on the same scheduler begins anew."""
    made = scheduler(stochastic=range(2), tail=1.0)
    made.steps = [4, 5, 7, 8]
    seen, x = [], torch.ones(1, 3)
    made.on_step = lambda moment: seen.append(moment) or moment.mean
    for _ in range(2):
        made.set_timesteps(10)
        for t in made.timesteps:
            made.step(0.3 * x, t, x)
    for moment in seen:
        euler = transitions.compose(
            transitions.transition("ode", *made.levels[moment.index : moment.index + 2], 0, None),
            transitions.flow_prediction(made.levels[moment.index]),
        )
        first = moment.index in (4, 7)
        assert (moment.step == euler) == first
        assert isinstance(moment.offset, float) == first


def test_the_mean_carries_the_graph_of_both_outputs():
    """A step of second order depends on the step before: reward gradients run through both."""
    made = scheduler(tail=1.0, stochastic=())
    made.set_begin_index(4)
    outputs, x = [torch.full((1, 2), value, requires_grad=True) for value in (0.2, 0.5)], torch.ones(1, 2)
    after = [made.step(output, t, x).prev_sample for output, t in zip(outputs, made.timesteps[4:], strict=False)]
    weight = second_order_weight(*made.levels[4:7])
    before, now = torch.autograd.grad(after[1].sum(), outputs)
    assert before.tolist() == [pytest.approx([weight * made.levels[4]] * 2)]
    sigma, sigma_next = made.levels[5:7]
    assert now.tolist() == [pytest.approx([sigma_next - sigma - weight * sigma] * 2)]


def test_inverted_levels_and_velocities_give_the_same_states():
    up, down = (FlowSDEScheduler(EULER(invert_sigmas=flag), stochastic=(0,), tail=0.75) for flag in (True, False))
    ends = []
    for made, sign in ((up, -1), (down, 1)):
        made.generators = [torch.Generator().manual_seed(0)]
        made.set_timesteps(sigmas=[1, 0.8, 0.6, 0.4, 0.2])
        x = torch.ones(1, 4)
        for t in made.timesteps:
            x = made.step(sign * torch.sin(x), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)
    assert up.levels == pytest.approx([1, 0.8, 0.8 * 2 / 3, 0.8 / 3, 0], abs=1e-6)
    assert up.sigmas.tolist() == pytest.approx([1 - s for s in up.levels], abs=1e-6)
    assert up.timesteps.tolist() == pytest.approx([1000 * (1 - s) for s in up.levels[:-1]], abs=1e-3)


@pytest.mark.parametrize("name", ["wan", "mochi", "flux"])
def test_through_a_pipeline(name):
    """Two steps of noise, then three of the other five; the replay of the trained ones repeats the rollout exactly."""
    pipe, call = FAMILIES[name]()
    call = {**call, "output_type": "latent", "num_inference_steps": 7}
    pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=0.6, tail=0.5)
    ran = []
    pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        found = rollout(pipe, [0, 1], [1, 2], [3, 4], stochastic=(0, 1), **call)
    assert len(pipe.scheduler.timesteps) == 5
    assert len(ran) == 5 * (2 if name == "wan" else 1)  # guidance is two passes
    assert [step.index for step in found.trajectory.steps] == [0, 1]
    ratios = []

    def visit(now, was):
        assert now.step == was.step
        ratios.append(float(transitions.log_ratio(was.x_next, now.mean, was.mean, was.step.std).abs().max()))

    replay(pipe, found.trajectory, visit, **call)
    assert ratios == [0.0, 0.0]
    with torch.no_grad():
        pipe.scheduler.tail = None
        euler = rollout(pipe, [0, 1], [1, 2], [3, 4], stochastic=(0, 1), **call)
    assert len(pipe.scheduler.timesteps) == 7
    for ours, theirs in zip(found.trajectory.steps, euler.trajectory.steps, strict=True):
        assert torch.equal(ours.x_next, theirs.x_next)
    assert (found.frames - euler.frames).abs().max() > 0


@pytest.mark.parametrize("tail", [0.0, -0.2, 1.1, math.nan])
def test_a_share_outside_its_range_is_refused(tail):
    with pytest.raises(ValueError, match="tail is"):
        scheduler(tail=tail)


def test_no_tail_where_the_path_is_no_flow():
    with pytest.raises(ValueError, match="no parameter tail"):
        sde_scheduler(diffusers.DDIMScheduler(clip_sample=False).config, tail=0.5)
