"""Noised clean states through unmodified pipelines: a replay gives the velocity that the pipeline itself would see."""

import pytest
import torch

from samplers import FlowSDEScheduler, Trajectory, replay, rollout, sde_scheduler
from samplers.stock import is_flow
from samplers.transitions import Step
from tests.pipelines import FAMILIES, PROMPTS, STEPS

SEEDS = [11, 12]
FLOWS = [name for name in FAMILIES if name not in ("cogvideox", "stable_diffusion")]
# Why a pipeline cannot have a level for each sample: what it raises.
EXPERTS = "Boolean value of Tensor"  # it asks which expert the timestep is of
DOUBLED = r"expanded size of the tensor \(4\) must match"  # guidance doubles the batch, but not the timesteps
WITH_GUIDANCE = dict.fromkeys(["sana_video", "ltx", "ltx_image_to_video", "mochi", "stable_diffusion_3"], DOUBLED)
REFUSED = {"wan_two_experts": EXPERTS}
VISITED = [0, 2, STEPS - 1]  # steps of the pipeline's own grid


def stock_run(pipe, call):
    """(state, velocity) of every step of the unmodified pipeline, and the noise levels that it passes."""
    scheduler, seen = pipe.scheduler, []
    step = scheduler.step

    def record(output, timestep, sample, *args, **kwargs):
        seen.append((sample.float(), output.float()))
        return step(output, timestep, sample, *args, **kwargs)

    scheduler.step = record
    try:
        pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS])
    finally:
        del scheduler.step
    if scheduler.config.get("invert_sigmas"):
        return [(x, -output) for x, output in seen], 1 - scheduler.sigmas.double()
    return seen, scheduler.sigmas.double()


def rows_of(call, row):
    """The call for one of its samples; an image for all stays."""
    images = call.get("image", [])
    one = {"image": images[row : row + 1]} if len(images) == len(PROMPTS) else {}
    return {**call, "prompt": PROMPTS[row : row + 1], **one}


def clean_rollout(pipe, call):
    """The last step of an ODE rollout, and its clean state."""
    with torch.no_grad():
        trajectory = rollout(pipe, [STEPS - 1], SEEDS, stochastic=(), **call).trajectory
    return trajectory, trajectory.steps[-1].x_next


@pytest.mark.parametrize("name", FAMILIES)
def test_velocity_is_that_of_the_pipeline(name):
    """The noise is what makes the clean state, noised, the one that the pipeline was in at that level.

    So timesteps, experts, conditions and signs have to be the pipeline's own.
    """
    pipe, call = FAMILIES[name]()
    call["output_type"] = "latent"
    if not is_flow(pipe.scheduler.config):
        pipe.scheduler = sde_scheduler(pipe.scheduler.config)
        trajectory, clean = clean_rollout(pipe, call)
        with pytest.raises(ValueError, match="needs a flow pipeline"):
            replay(pipe, trajectory.noised(clean, [0.5], [clean]), print, **call)
        return
    seen, sigmas = stock_run(pipe, call)
    pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=0.6)
    trajectory, clean = clean_rollout(pipe, call)
    states, velocities = zip(*(seen[i] for i in VISITED), strict=True)
    levels = [float(sigmas[i]) for i in VISITED]
    noises = [(x - (1 - level) * clean) / level for x, level in zip(states, levels, strict=True)]
    noised = trajectory.noised(clean, levels, noises)
    found = []
    with torch.no_grad():
        replay(pipe, noised, lambda now, was: found.append((now, was)), **call)
    assert [(now.index, was.index) for now, was in found] == [(0, 0), (1, 1), (2, 2)]
    for (now, was), x, velocity in zip(found, states, velocities, strict=True):
        torch.testing.assert_close(now.x.float(), x, rtol=0, atol=1e-5)
        torch.testing.assert_close(now.output, velocity, rtol=0, atol=2e-5)
        torch.testing.assert_close(now.mean, x - levels[was.index] * velocity, rtol=0, atol=1e-4)
        assert torch.equal(was.x_next, clean)


@pytest.mark.parametrize("name", ["wan_two_experts", "ltx_image_to_video", "mochi"])
def test_rows_and_one_level(name):
    """One sample, at the last level alone."""
    pipe, call = FAMILIES[name]()
    call["output_type"] = "latent"
    seen, sigmas = stock_run(pipe, call)
    pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=0.6)
    trajectory, clean = clean_rollout(pipe, call)
    (x, velocity), level = seen[STEPS - 1], float(sigmas[STEPS - 1])
    noised = trajectory.noised(clean, [level], [(x - (1 - level) * clean) / level]).rows([1])
    found = visited(pipe, noised, rows_of(call, 1))
    torch.testing.assert_close(found[0].output, velocity[1:], rtol=0, atol=2e-5)


def visited(pipe, trajectory, call):
    """What a replay sees, without gradients."""
    found = []
    with torch.no_grad():
        replay(pipe, trajectory, lambda now, was: found.append(now), **call)
    return found


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_level_for_each_sample_is_a_visit_of_its_own(name, guided):
    """Two visits, in which one sample's level is high and the other's low: each is as if visited alone."""
    pipe, call = FAMILIES[name]()
    call = {**call, "output_type": "latent", **({} if guided else {"guidance_scale": 1.0})}
    pipe.scheduler = sde_scheduler(pipe.scheduler.config)
    trajectory, clean = clean_rollout(pipe, call)
    noises = [torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    levels = [torch.tensor([0.9375, 0.25]), (0.125, 0.75)]
    noised = trajectory.noised(clean, levels, noises)
    if reason := {**REFUSED, **(WITH_GUIDANCE if guided else {})}.get(name):
        with pytest.raises(RuntimeError, match=reason):
            visited(pipe, noised, call)
        assert len(visited(pipe, noised.rows([1]), rows_of(call, 1))) == 2
        return
    together = visited(pipe, noised, call)
    for row, own in enumerate([(0.9375, 0.125), (0.25, 0.75)]):
        alone = visited(pipe, trajectory.noised(clean, own, noises).rows([row]), rows_of(call, row))
        for level, both, one in zip(own, together, alone, strict=True):
            torch.testing.assert_close(both.x[row], one.x[0], rtol=0, atol=0)
            torch.testing.assert_close(both.output[row], one.output[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(both.mean[row], (one.x - level * one.output)[0], rtol=0, atol=1e-5)
    timesteps = torch.stack([seen.timestep for seen in together])
    assert timesteps.shape == (2, 2)
    assert (timesteps[0, 0] > timesteps[0, 1]) == (name != "mochi")


@pytest.mark.parametrize("name", ["wan", "ltx_image_to_video", "hunyuan_video"])
def test_clean_states_without_a_rollout(name):
    """States from elsewhere, and what a rollout of any prompt says of the pipeline, do for a visit."""
    pipe, call = FAMILIES[name]()
    call["output_type"] = "latent"
    pipe.scheduler = sde_scheduler(pipe.scheduler.config)
    trajectory, clean = clean_rollout(pipe, call)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    given = Trajectory.of_clean(clean, trajectory.injectable, SEEDS)
    assert torch.equal(given.rows([1]).steps[-1].x_next, clean[1:])
    made, expected = (visited(pipe, t.noised(clean, [0.8, 0.3], [noise, -noise]), call) for t in (given, trajectory))
    assert trajectory.injectable == (name != "ltx_image_to_video")
    for one, other in zip(made, expected, strict=True):
        assert torch.equal(one.output, other.output)


def test_between_levels_of_the_grid_timesteps_are_too():
    """UniPC truncates: its levels are 0.999999, 0.857327 and 0.600719 here."""
    scheduler = FlowSDEScheduler.from_config(FAMILIES["wan"]()[0].scheduler.config)
    scheduler.set_timesteps(3)
    grid, timesteps = scheduler.levels, scheduler.timesteps.tolist()
    assert timesteps == [999, 857, 600]
    middle = (grid[1] + grid[2]) / 2
    scheduler.levels_visited = (1.0, grid[1], middle, grid[2], grid[2] / 2)
    scheduler.set_timesteps(3)
    expected = [timesteps[0], timesteps[1], (timesteps[1] + timesteps[2]) / 2, timesteps[2], timesteps[2] / 2]
    assert scheduler.timesteps.tolist() == pytest.approx(expected, rel=1e-6)
    assert scheduler.levels == [*scheduler.levels_visited, 0]


def test_noised_states():
    """(1 - level) clean + level noise, kept through rows."""
    clean, noise = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    noised = Trajectory((), True, (1, 2), (0, 1)).noised(clean, [1.0, 0.25], [noise, -noise])
    assert noised.steps[0].x.tolist() == noise.tolist()
    assert noised.steps[1].x.tolist() == [[-1.75, 1.5], [2.25, 0.5]]
    assert (noised.levels, noised.stochastic, noised.latent_seeds) == ((1.0, 0.25), (), (1, 2))
    second = noised.rows([1])
    assert second.steps[1].x.tolist() == [[2.25, 0.5]]
    assert (second.levels, second.latent_seeds) == ((1.0, 0.25), (2,))


def test_states_noised_to_levels_of_their_own():
    """Row 0 of the first visit is noise alone, row 1 half of it; `rows` takes levels and coefficients along."""
    clean, noise = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    levels = [torch.tensor([1.0, 0.5]), 0.25]
    noised = Trajectory.of_clean(clean, True, [1, 2]).noised(clean, levels, [noise, -noise])
    assert noised.steps[0].x.tolist() == [[10.0, 0.0], [1.5, 7.0]]
    assert noised.steps[1].x.tolist() == [[-1.75, 1.5], [2.25, 0.5]]
    assert noised.levels == ((1.0, 0.5), 0.25)
    for second in (noised.rows([1]), noised.rows(slice(1, 2))):
        assert (second.levels, second.latent_seeds) == (((0.5,), 0.25), (2,))
        assert second.steps[0].x.tolist() == [[1.5, 7.0]]
        assert second.steps[0].step == Step(1.0, (-0.5,), 0.0)
    swapped = noised.rows([1, 0, 1])
    assert (swapped.levels, swapped.latent_seeds) == (((0.5, 1.0, 0.5), 0.25), (2, 1, 2))
    with pytest.raises(ValueError, match="3 noise levels for a batch of 2"):
        noised.noised(clean, [(0.5, 0.4, 0.3)], [noise])
    with pytest.raises(ValueError, match="cannot be joined"):
        Trajectory.joined([noised, noised])
