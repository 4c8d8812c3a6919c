"""The SDE schedulers against the stock ones: noise levels, configuration, windows, slices and random numbers."""

import diffusers
import numpy as np
import pytest
import torch

from samplers import DDIMSDEScheduler, FlowSDEScheduler, sde_scheduler, transitions
from samplers.rollout import generators
from samplers.schedulers import Moment
from samplers.stock import stock_scheduler
from tests.pipelines import FAMILIES

from . import grids

EULER, UNIPC = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.UniPCMultistepScheduler
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
COGVIDEOX = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
PASSED = np.linspace(1, 0.1, 10)  # levels that a pipeline hands over
STOCK = {
    "euler": (EULER(shift=3.0), {"num_inference_steps": 10}),
    "euler, levels of the pipeline": (EULER(shift=7.0), {"sigmas": PASSED}),
    "dynamic shift": (
        EULER(use_dynamic_shifting=True, shift_terminal=0.1),
        {"sigmas": PASSED, "mu": 0.9},
    ),
    "inverted": (EULER(invert_sigmas=True), {"sigmas": PASSED}),
    "unipc": (UNIPC(**FLOW, flow_shift=3.0), {"num_inference_steps": 20}),
    "dpm": (diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=8.0), {"num_inference_steps": 10}),
    "ddim": (diffusers.DDIMScheduler(clip_sample=False), {"num_inference_steps": 10}),
    "cogvideox": (diffusers.CogVideoXDDIMScheduler(**COGVIDEOX), {"num_inference_steps": 10}),
}
KERNELS = {"ode": 0.0, "dance": 0.3, "flow": 0.7, "wan_linear": 1.0, "sage": 0.7, "cps": 0.8, "ddim": 0.9}


def flow(steps: int = 10, **options) -> FlowSDEScheduler:
    scheduler = FlowSDEScheduler.from_config(EULER(shift=3.0).config, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def same_grid(scheduler, stock) -> bool:
    return torch.equal(scheduler.timesteps, stock.timesteps) and torch.equal(scheduler.sigmas, stock.sigmas)


@pytest.mark.parametrize("name", STOCK)
def test_grid_is_the_stock_one(name, tmp_path):
    """Bit for bit, from a configuration built in Python, from one loaded from disk and from our scheduler's own."""
    stock, call = STOCK[name]
    stock.set_timesteps(device="cpu", **call)
    stock.save_pretrained(tmp_path)
    scheduler = sde_scheduler(stock.config)
    for config in (stock.config, type(stock).load_config(tmp_path), scheduler.config):
        scheduler = sde_scheduler(config)
        scheduler.set_timesteps(device="cpu", **call)
        assert type(scheduler.stock) is type(stock)
        assert torch.equal(scheduler.timesteps, stock.timesteps)
        if isinstance(scheduler, FlowSDEScheduler):
            assert torch.equal(scheduler.sigmas, stock.sigmas)
            down = 1 - stock.sigmas if name == "inverted" else stock.sigmas
            torch.testing.assert_close(torch.tensor(scheduler.levels), down, atol=1e-7, rtol=0)


def test_stock_levels_written_out():
    """The grids that the kernels are tested on are those of the installed diffusers; its DPM solver still has the one
    that UniPC had before."""
    dpm, unipc = diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0), UNIPC(**FLOW, flow_shift=3.0)
    for stock, ours in [(EULER(shift=3.0), grids.euler), (unipc, grids.new_unipc), (dpm, grids.old_unipc)]:
        scheduler = FlowSDEScheduler(stock)
        scheduler.set_timesteps(20)
        assert scheduler.levels == pytest.approx(ours(20, 3.0), abs=1e-6)


@pytest.mark.parametrize(("stock", "call", "shift", "inverted"), [
    (EULER(shift=3.0), {"num_inference_steps": 4}, 3.0, False),
    (UNIPC(**FLOW, flow_shift=5.0), {"num_inference_steps": 4}, 5.0, False),
    (EULER(use_dynamic_shifting=True), {"sigmas": [1, 0.8, 0.5, 0.2], "mu": 0.9}, np.exp(0.9), False),
    (EULER(use_dynamic_shifting=True, time_shift_type="linear"), {"sigmas": [1, 0.8, 0.5, 0.2], "mu": 0.9}, 0.9, False),
    (EULER(invert_sigmas=True), {"sigmas": [1, 0.8, 0.5, 0.2]}, 1.0, True),
])  # fmt: skip
def test_uniform_grid(stock, call, shift, inverted):
    """k u / (1 + (k - 1) u) at u = 1, 3/4, 1/2, 1/4, 0, whatever levels the pipeline proposes."""
    scheduler = FlowSDEScheduler.from_config(stock.config, grid="uniform")
    scheduler.set_timesteps(**call)
    expected = [shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25, 0)]
    assert scheduler.levels == pytest.approx(expected, abs=1e-6)
    known = [1 - s for s in expected] if inverted else expected
    assert scheduler.sigmas.tolist() == pytest.approx(known, abs=1e-6)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in known[:-1]], abs=1e-3)


def test_configuration_and_overrides(tmp_path):
    """flow_shift is UniPC's own key: it must not get lost, and it can be overridden; a wrong key is an error."""
    config = UNIPC(**FLOW, flow_shift=3.0).config
    scheduler = FlowSDEScheduler.from_config(config, flow_shift=8.0)
    stock = UNIPC(**FLOW, flow_shift=8.0)
    scheduler.set_timesteps(10)
    stock.set_timesteps(10)
    assert same_grid(scheduler, stock)
    assert scheduler.config.flow_shift == 8.0
    with pytest.raises(ValueError, match="UniPCMultistepScheduler has no parameter shift"):
        FlowSDEScheduler.from_config(config, shift=8.0)
    with pytest.raises(ValueError, match="no parameter eta"):
        DDIMSDEScheduler.from_config(STOCK["ddim"][0].config, eta=0.5)
    scheduler.save_pretrained(tmp_path)
    assert UNIPC.from_pretrained(tmp_path).config.flow_shift == 8.0


def test_variance_preserving_configurations():
    """Stable Diffusion's and CogVideoX's other stock schedulers give DDIM with the same alphas."""
    pndm = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = sde_scheduler(pndm.config, clip_sample=False)
    assert type(scheduler.stock) is diffusers.DDIMScheduler
    assert torch.equal(scheduler.stock.alphas_cumprod, pndm.alphas_cumprod)
    dpm = diffusers.CogVideoXDPMScheduler(**COGVIDEOX, snr_shift_scale=1.0)
    scheduler = sde_scheduler(dpm.config)
    assert type(scheduler.stock) is diffusers.CogVideoXDDIMScheduler
    assert torch.equal(scheduler.stock.alphas_cumprod, dpm.alphas_cumprod)
    with pytest.raises(ValueError, match="clip_sample"):
        sde_scheduler(pndm.config, clip_sample=True)
    with pytest.raises(ValueError, match="not a flow's"):
        stock_scheduler(pndm.config)


def test_refusals():
    config = EULER().config
    for options, message in [
        ({"kernel": "unknown"}, "known: ode, dance"),
        ({"grid": "unknown"}, "known: stock, uniform"),
        ({"noise_level": -1.0}, "expected >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            FlowSDEScheduler.from_config(config, **options)
    with pytest.raises(ValueError, match="eta lies in"):
        DDIMSDEScheduler.from_config(STOCK["ddim"][0].config, noise_level=1.5)
    with pytest.raises(ValueError, match="takes no sigmas"):
        sde_scheduler(STOCK["ddim"][0].config).set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="noise levels must fall"):
        FlowSDEScheduler(diffusers.EulerDiscreteScheduler()).set_timesteps(5)


@pytest.mark.parametrize(("given", "stochastic"), [(None, range(9)), ((2, 3, 7), (2, 3, 7)), ((), ())])
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_stochastic_steps(name, given, stochastic):
    """Noise in the named steps, the deterministic sampler elsewhere; by default all but the last are stochastic."""
    scheduler = sde_scheduler(STOCK[name][0].config, stochastic=given)
    scheduler.set_timesteps(10)
    assert scheduler.stochastic_steps == tuple(stochastic)
    still = sde_scheduler(STOCK[name][0].config, noise_level=0.0)
    still.set_timesteps(10)
    for index in range(10):
        step = scheduler.step_coefficients(index)
        assert (step.std > 0) == (index in stochastic)
        assert (step == still.step_coefficients(index)) == (index not in stochastic)


def test_stochastic_steps_outside_the_grid():
    for steps in [(3, 10), (-1, 2)]:
        with pytest.raises(ValueError, match="do not fit a grid of 10 steps"):
            flow(stochastic=steps).step_coefficients(0)


@pytest.mark.parametrize("name", ["euler", "mochi"])
def test_visited_levels_have_their_timesteps_and_step_to_the_clean_estimate(name):
    config = STOCK["euler"][0].config if name == "euler" else FAMILIES["mochi"]()[0].scheduler.config
    scheduler = FlowSDEScheduler.from_config(config)
    scheduler.levels_visited = (0.8, 0.25)
    scheduler.set_timesteps(10)
    inverted = name == "mochi"
    assert scheduler.timesteps.tolist() == pytest.approx([200, 750] if inverted else [800, 250])
    clean, noise = torch.randn(2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity = noise - clean
    for level in (0.8, 0.25):
        x = (1 - level) * clean + level * noise
        estimate = scheduler.step(-velocity if inverted else velocity, None, x).prev_sample
        torch.testing.assert_close(estimate, clean)
    ddim = sde_scheduler(STOCK["ddim"][0].config)
    ddim.levels_visited = (0.5,)
    with pytest.raises(ValueError, match="needs a flow pipeline"):
        ddim.set_timesteps(10)


@pytest.mark.parametrize("grid", ["stock", "uniform"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_slice_keeps_the_coefficients_of_the_rollout(kernel, grid):
    """A replay runs some steps of the grid only; their levels, timesteps and constants stay those of the whole."""
    whole = flow(kernel=kernel, noise_level=KERNELS[kernel], grid=grid)
    part = flow(kernel=kernel, noise_level=KERNELS[kernel], grid=grid)
    part.steps = [3, 4, 7]
    part.set_timesteps(10)
    assert torch.equal(part.timesteps, whole.timesteps[[3, 4, 7]])
    assert torch.equal(part.sigmas, whole.sigmas[[3, 4, 7, 8]])
    assert part.num_inference_steps == 3
    seen: list[Moment] = []
    part.on_step = lambda moment: seen.append(moment) or moment.x
    x = torch.zeros(1, 4)
    for t in part.timesteps:
        part.step(x, t, x)
    assert [m.index for m in seen] == [3, 4, 7]
    assert [m.step for m in seen] == [whole.step_coefficients(i) for i in (3, 4, 7)]


def test_slice_outside_the_grid():
    scheduler = flow()
    scheduler.steps = [8, 10]
    with pytest.raises(ValueError, match="outside the grid of 10 steps"):
        scheduler.set_timesteps(10)


def test_begin_index():
    """Image-to-image pipelines drop the first timesteps and say so."""
    scheduler, seen = flow(), []
    scheduler.on_step = lambda moment: seen.append(moment.index) or moment.x
    scheduler.set_begin_index(4)
    for t in scheduler.timesteps[4:]:
        scheduler.step(torch.zeros(1, 2), t, torch.zeros(1, 2))
    assert seen == [4, 5, 6, 7, 8, 9]


def run(scheduler, x, rows) -> torch.Tensor:
    """The last state of these rows under a velocity that treats every sample alike."""
    scheduler.generators = [torch.Generator().manual_seed(100 + row) for row in rows]
    scheduler.set_timesteps(10)
    x = x[rows]
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * x, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_a_sample_does_not_depend_on_its_batch(name):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    scheduler = sde_scheduler(STOCK[name][0].config)
    together = run(scheduler, x, [0, 1, 2, 3])
    torch.testing.assert_close(together[[2, 0]], run(scheduler, x, [2, 0]), atol=0, rtol=0)
    assert (together - run(scheduler, x, [0, 1, 2, 3])).abs().max() == 0
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="4 generators for a batch of 3"):
        scheduler.step(x[:3], scheduler.timesteps[0], x[:3])


def test_draw_has_the_mean_and_the_spread_of_the_step():
    scheduler = flow(kernel="dance", noise_level=0.5)
    x = torch.full((4, 50_000), 0.3)
    scheduler.generators = generators(range(4))
    levels = scheduler.levels
    x_next = scheduler.step(2 * x, scheduler.timesteps[0], x).prev_sample
    moment_mean = transitions.mean(scheduler.step_coefficients(0), x, 2 * x)
    assert x_next.std(1).numpy() == pytest.approx(0.5 * (levels[0] - levels[1]) ** 0.5, rel=0.01)
    assert (x_next - moment_mean).mean(1).abs().max() < 0.003


def test_rounding_comes_before_the_log_probability():
    """A bf16 pipeline stores what it rounds. Scored before rounding, the same state has another log-prob in the replay
    (by xi delta / std on average, 1e-5 and more, where clip ranges are 1e-4); scored after, the ratio is exactly 1."""
    scheduler, generator = flow(kernel="dance", noise_level=0.3), torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 4096, generator=generator).bfloat16() for _ in range(2))
    moment = Moment(3, scheduler.timesteps[3], scheduler.step_coefficients(3), x, v, generator)
    assert moment.mean.dtype == torch.float32
    state, std = generator.get_state(), moment.step.std
    stored = scheduler.draw(moment)
    assert stored.dtype == torch.bfloat16
    assert transitions.log_ratio(stored, moment.mean, moment.mean, std).abs().max() == 0
    generator.set_state(state)
    unrounded = moment.mean + std * torch.randn(moment.mean.shape, generator=generator)
    assert torch.equal(unrounded.bfloat16(), stored)
    shift = transitions.log_prob(unrounded, moment.mean, std) - transitions.log_prob(stored, moment.mean, std)
    assert shift.abs().min() > 1e-5
