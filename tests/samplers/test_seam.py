"""Unmodified diffusers pipelines through the scheduler seam: the same tests for every family."""

import re
import weakref

import diffusers
import pytest
import torch

from samplers import Trajectory, replay, rollout, sde_scheduler, transitions
from tests.pipelines import FAMILIES, STEPS, denoisers

LATENT_SEEDS, NOISE_SEEDS = [11, 12], [21, 22]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    pipe, call = FAMILIES[request.param]()
    return pipe, call, pipe.scheduler


@pytest.fixture
def policy(family):
    """(pipe, call) with an SDE scheduler on the pipe and trainable denoisers."""
    pipe, call, stock = family
    pipe.scheduler = sde_scheduler(stock.config, noise_level=0.6)
    for network in denoisers(pipe):
        network.requires_grad_(True).zero_grad()
    yield pipe, call
    pipe.scheduler = stock


def first_order(stock):
    """The stock scheduler as a one-step method: on a flow's levels the first-order multistep rules are Euler's."""
    options = {"solver_order": 1, "lower_order_final": True}
    if isinstance(stock, diffusers.UniPCMultistepScheduler):
        return type(stock).from_config(stock.config, **options, disable_corrector=[*range(100)])
    if isinstance(stock, diffusers.DPMSolverMultistepScheduler):
        return type(stock).from_config(stock.config, **options)
    return type(stock).from_config(stock.config)


def sample(pipe, call, record=range(STEPS), **more):
    with torch.no_grad():
        return rollout(pipe, record, LATENT_SEEDS, NOISE_SEEDS, **{**call, "output_type": "latent", **more})


def log_ratios(pipe, trajectory, call) -> dict[int, torch.Tensor]:
    """index -> (B,) log-ratio of a replay."""
    found = {}

    def visit(now, was):
        ratio = transitions.log_ratio(was.x_next, now.mean, was.mean, was.step.std)
        assert ratio.requires_grad == torch.is_grad_enabled()
        found[now.index] = ratio.detach()

    replay(pipe, trajectory, visit, **call)
    return found


def test_without_noise_it_is_the_stock_pipeline(family, policy):
    pipe, call = policy
    stock = family[2]
    call = {**call, "output_type": "pt"}
    pipe.scheduler.noise_level = 0.0
    ours = rollout(pipe, [], LATENT_SEEDS, **call).frames
    pipe.scheduler = first_order(stock)
    theirs = pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in LATENT_SEEDS])[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_noise_level_and_seeds_decide_the_video(policy):
    pipe, call = policy
    first, again = sample(pipe, call), sample(pipe, call)
    assert torch.equal(first.frames, again.frames)
    with torch.no_grad():
        other = rollout(pipe, [], LATENT_SEEDS, [21, 99], **{**call, "output_type": "latent"}).frames
        shared = rollout(pipe, [0], [11, 11], NOISE_SEEDS, **{**call, "output_type": "latent"}).trajectory
    assert (other[1] - first.frames[1]).abs().max() > 1e-2
    assert torch.equal(other[0], first.frames[0])
    x = shared.steps[0].x
    if shared.injectable:
        assert torch.equal(x[0], x[1])
    assert not torch.equal(shared.steps[0].x_next[0], shared.steps[0].x_next[1])


def test_rollout_records_a_chain(policy):
    pipe, call = policy
    steps = sample(pipe, call, record=range(STEPS - 1)).trajectory.steps
    assert [s.index for s in steps] == list(range(STEPS - 1))
    for step, following in zip(steps, steps[1:], strict=False):
        assert torch.equal(step.x_next, following.x)
    for step in steps:
        noise = (step.x_next - step.mean) / step.step.std
        assert 0.8 < noise.std().item() < 1.2
        assert step.log_prob.shape == (2,)
        assert step.log_prob.tolist() == pytest.approx(
            torch.distributions.Normal(step.mean, step.step.std).log_prob(step.x_next).flatten(1).mean(1).tolist(), 1e-4
        )


@pytest.mark.parametrize("steps", [range(STEPS - 1), [2, 3], [1, 3]], ids=["all", "from the middle", "with a gap"])
def test_replay_repeats_the_rollout_exactly(policy, steps):
    pipe, call = policy
    trajectory = sample(pipe, call, record=steps).trajectory
    found = log_ratios(pipe, trajectory, call)
    assert list(found) == list(steps)
    assert [float(ratio.abs().max()) for ratio in found.values()] == [0.0] * len(steps)
    with torch.no_grad():
        parameters = [p for network in denoisers(pipe) for p in network.parameters()]
        for p in parameters:
            p.mul_(1.01)
        moved = log_ratios(pipe, trajectory, call)
        for p in parameters:
            p.div_(1.01)
    assert list(moved) == list(steps)
    assert all(ratio.abs().min() > 1e-7 for ratio in moved.values())


def rows_of(call, row) -> dict:
    picked = {"prompt": call["prompt"][row : row + 1]}
    if len(call.get("image", [])) == len(call["prompt"]):
        picked["image"] = call["image"][row : row + 1]
    return {**call, **picked}


def test_replay_of_one_row(policy):
    """A micro-batch of one sees the same states; its matrix products may round otherwise."""
    pipe, call = policy
    trajectory = sample(pipe, call, record=[1, 2]).trajectory
    for row in (0, 1):
        found = log_ratios(pipe, trajectory.rows([row]), rows_of(call, row))
        assert list(found) == [1, 2]
        assert all(ratio.shape == (1,) and ratio.abs().max() < 1e-6 for ratio in found.values())


def test_gradients_reach_every_weight(policy):
    """But the text stream's queries in the last block of Mochi and SD3: the stream ends there, no output sees them."""
    pipe, call = policy
    trajectory = sample(pipe, call, record=range(STEPS - 1)).trajectory

    def visit(now, was):
        transitions.log_prob(was.x_next, now.mean, was.step.std).sum().backward()

    replay(pipe, trajectory, visit, **call)
    untouched = [
        name
        for network in denoisers(pipe)
        for name, p in network.named_parameters()
        if p.grad is None or p.grad.abs().max() == 0
    ]
    assert [name for name in untouched if not re.search(r"blocks.1.attn1?.(norm_added_q|add_q_proj)", name)] == []


class Kept:
    """A tensor that some graph keeps for its backward."""

    alive = weakref.WeakSet()
    peak = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        Kept.alive.add(self)
        Kept.peak = max(Kept.peak, len(Kept.alive))


def test_memory_holds_one_graph(policy):
    """What the graphs keep for backward does not grow over the steps, and at no time do two graphs exist."""
    pipe, call = policy
    trajectory = sample(pipe, call, record=range(STEPS - 1)).trajectory
    held = []

    def visit(now, was):
        assert not now.x.requires_grad
        held.append(len(Kept.alive))
        transitions.log_prob(was.x_next, now.mean, was.step.std).sum().backward()

    Kept.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        replay(pipe, trajectory, visit, **call)
    assert len(held) == STEPS - 1
    assert held == [held[0]] * len(held)
    assert Kept.peak < 1.5 * held[0]


def test_pipeline_is_left_as_it_was(policy):
    pipe, call = policy
    scheduler = pipe.scheduler
    before = dict(vars(pipe))
    plain = sample(pipe, call)

    def fail(*_):
        raise RuntimeError("on purpose")

    for action in (lambda: replay(pipe, plain.trajectory, fail, **call), lambda: sample(pipe, call, prompt=None)):
        with pytest.raises((RuntimeError, ValueError)):
            action()
        assert "prepare_latents" not in vars(pipe)
        assert (scheduler.on_step, scheduler.steps, scheduler.generators) == (None, None, None)
        assert pipe.scheduler is scheduler
    assert {name for name in vars(pipe) if not name.startswith("_")} == {k for k in before if not k.startswith("_")}
    assert torch.equal(sample(pipe, call).frames, plain.frames)


def test_saved_pipeline_is_an_ordinary_one(policy, tmp_path):
    """With the stock scheduler back, the whole folder loads in diffusers and gives the video of the stock pipeline."""
    pipe, call = policy
    pipe.scheduler = pipe.scheduler.stock
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {**call, "output_type": "latent"}
    videos = [p(**call, generator=torch.Generator().manual_seed(0))[0] for p in (pipe, loaded)]
    torch.testing.assert_close(*videos, atol=1e-6, rtol=0)


def test_joined_batches_replay_as_one(policy):
    """Two batches of one, joined, are the trajectory of the batch of two, and `rows` takes them apart again."""
    pipe, call = policy
    parts = []
    for row in (0, 1):
        seeds = LATENT_SEEDS[row : row + 1], NOISE_SEEDS[row : row + 1]
        with torch.no_grad():
            parts.append(rollout(pipe, [1, 2], *seeds, **{**rows_of(call, row), "output_type": "latent"}).trajectory)
    joined = Trajectory.joined(parts)
    assert joined.latent_seeds == tuple(LATENT_SEEDS)
    assert joined.rows([1, 0]).latent_seeds == (12, 11)
    assert joined.rows(slice(1, 2)).latent_seeds == (12,)
    assert torch.equal(joined.rows([1]).steps[0].x, parts[1].steps[0].x)
    assert all(ratio.abs().max() < 1e-6 for ratio in log_ratios(pipe, joined, call).values())
    with pytest.raises(ValueError, match="cannot be joined"):
        Trajectory.joined([parts[0], Trajectory(parts[1].steps[::-1], True)])


def test_empty_trajectory_is_refused(policy):
    pipe, call = policy
    with pytest.raises(ValueError, match="no recorded step"):
        replay(pipe, Trajectory((), True), print, **call)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_replay_is_exact_in_bf16(name, autocast):
    """A pipeline in bf16 keeps the state's dtype that its network takes; under autocast states are float32."""
    pipe, call = FAMILIES[name]()
    if not autocast:
        pipe.to(torch.bfloat16)
    for network in denoisers(pipe):
        network.requires_grad_(True)
    pipe.scheduler = sde_scheduler(pipe.scheduler.config, noise_level=0.6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = log_ratios(pipe, sample(pipe, call, record=[1, 2]).trajectory, call)
    assert [float(ratio.abs().max()) for ratio in found.values()] == [0.0, 0.0]
