"""GRPO's gradient against independent computations, on a tiny random WanPipeline."""

import contextlib
import math
from dataclasses import replace

import diffusers
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from alignment.advantages import group_advantages
from alignment.algorithms import grpo
from alignment.algorithms.grpo import Config
from alignment.config import BatchConfig
from alignment.groups import Signal, own_signal
from alignment.samples import Lot, Plan, sample_groups
from alignment.tally import Tally
from tests.alignment.tiny import GUIDANCE, NOISE, grpo_run, shake
from tests.pipelines import STEPS

PROMPTS_PER_ITERATION, GROUP = 2, 4


def sample(run, steps=None):
    prompts = run.next_prompts(run.recipe.algorithm.prompts_per_iteration)
    noisy = tuple(run.policy.stochastic_steps)
    plan = Plan(noisy, tuple(steps or noisy))
    return sample_groups(run, prompts, run.recipe.algorithm.group_size, lambda position: plan)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return grpo_run(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def samples(run):
    return sample(run)[0]


@pytest.fixture(scope="module")
def advantages():
    return torch.randn(PROMPTS_PER_ITERATION * GROUP, generator=torch.Generator().manual_seed(3))


def signal_of(advantages, group=GROUP, rows=None):
    rows = list(range(len(advantages))) if rows is None else rows
    return Signal(advantages[None], torch.ones(1), rows, group)


def gradient(run, samples, advantages, part=0, tally=None):
    """The gradient of one update, which is not taken."""
    found, signal = {}, signal_of(advantages, len(advantages) // len(set(samples.groups)))
    rows = signal.rows_of_part(part, run.recipe.algorithm.updates_per_rollout)

    def keep():
        found.update({n: p.grad.clone() for n, p in run.policy.parameters.items()})
        run.optimizer.zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "apply_update", keep)
        grpo.update(run, samples, signal, rows, tally or Tally())
    return found


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


def distance(one, other):
    """Relative."""
    return float((flat(one) - flat(other)).norm() / flat(other).norm())


@contextlib.contextmanager
def change(run, **sections):
    """Another recipe for the same run, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sections.items():
            patch.setattr(run.recipe, name, value)
        yield


@contextlib.contextmanager
def restored(policy):
    """Whatever happens to the trained weights here is undone, bit for bit."""
    kept = {n: p.detach().clone() for n, p in policy.parameters.items()}
    try:
        yield
    finally:
        move(policy, kept)


def move(policy, weights):
    with torch.no_grad():
        for name, p in policy.parameters.items():
            p.copy_(weights[name])


def gaussians(pipe, samples, dtype=torch.float32):
    """The steps' Gaussians, written from DanceGRPO's paper over the bare transformer in one full batch.

    Stock UniPC levels; v = unconditional + guidance (conditional - unconditional);
    mean = x + (s' - s) (v + g^2 / (2 s) (x + (1 - s) v)), std = g sqrt(s - s').
    """
    stock = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    stock.set_timesteps(STEPS)
    texts = [prompt.text for prompt in samples.prompts]
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(texts, max_sequence_length=32)
    for step in samples.lots[0].trajectory.steps:
        x, now, after = step.x.to(dtype), float(stock.sigmas[step.index]), float(stock.sigmas[step.index + 1])
        timestep = stock.timesteps[step.index].expand(len(x))
        v, v_negative = (pipe.transformer(x, timestep, text.to(dtype))[0] for text in (positive, negative))
        v = v_negative + GUIDANCE * (v - v_negative)
        mean = x + (after - now) * (v + NOISE**2 / (2 * now) * (x + (1 - now) * v))
        yield step, Normal(mean, NOISE * math.sqrt(now - after))


def surrogate(pipe, samples, advantages, old, dtype=torch.float32):
    """Mean over samples and steps of -A exp(log p - old), and the log-probs themselves (steps, N)."""
    logs = torch.stack(
        [normal.log_prob(step.x_next.to(dtype)).flatten(1).mean(1) for step, normal in gaussians(pipe, samples, dtype)]
    )
    return -(advantages * (logs - (logs.detach() if old is None else old)).exp()).mean(), logs.detach()


def test_gradient_is_reinforce(run, samples, advantages):
    """The mean over samples and steps of -A grad log p, from autograd on one batch."""
    weights = run.policy.parameters
    logs = torch.stack(
        [normal.log_prob(step.x_next).flatten(1).mean(1) for step, normal in gaussians(run.policy.pipe, samples)]
    )
    expected = torch.autograd.grad(-(advantages * logs).mean(), list(weights.values()))
    ours = gradient(run, samples, advantages)
    assert distance(ours, dict(zip(weights, expected, strict=True))) < 1e-5
    assert all(g.abs().max() > 0 for g in ours.values())


def test_gradient_by_finite_differences(run, samples, advantages):
    """Away from ratio 1: the slope of the surrogate along random directions of the weights."""
    policy, step = run.policy, 2e-3
    _, old = surrogate(policy.pipe, samples, advantages, None)
    with restored(policy):
        shake(policy, 0.01, seed=1)
        here = {n: p.detach().clone() for n, p in policy.parameters.items()}
        ours = gradient(run, samples, advantages)
        draw = torch.Generator().manual_seed(2)
        policy.pipe.transformer.double()
        try:
            for _ in range(3):
                direction = {n: torch.randn(p.shape, generator=draw) for n, p in here.items()}
                values = []
                for way in (-2, -1, 1, 2):
                    move(policy, {n: here[n].double() + way * step * d for n, d in direction.items()})
                    with torch.no_grad():
                        values.append(float(surrogate(policy.pipe, samples, advantages, old, torch.float64)[0]))
                numeric = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
                assert sum(float((ours[n] * d).sum()) for n, d in direction.items()) == pytest.approx(numeric, rel=2e-3)
        finally:
            policy.pipe.transformer.float()


def test_first_ratio_is_exactly_one(run, samples, advantages):
    tally = Tally()
    gradient(run, samples, advantages, tally=tally)
    assert torch.cat(tally.values["first"]).abs().max() == 0
    assert len(torch.cat(tally.values["first"])) == 8 * (STEPS - 1)
    moved = Tally()
    with restored(run.policy):
        shake(run.policy, 0.01)
        gradient(run, samples, advantages, tally=moved)
    assert torch.cat(moved.values["first"]).abs().max() > 1e-5


def test_with_one_update_the_clip_has_no_effect(run, samples, advantages):
    expected = gradient(run, samples, advantages)
    with change(run, algorithm=Config(group_size=GROUP, clip=1e-4)):
        assert torch.equal(flat(gradient(run, samples, advantages)), flat(expected))


def test_micro_batches_change_nothing(run, samples, advantages):
    """The network's float32 products round otherwise with another number of rows: measured 2e-6."""
    expected = gradient(run, samples, advantages)
    for size in (1, 3, 8):
        with change(run, batch=BatchConfig(update=size)):
            assert distance(gradient(run, samples, advantages), expected) < 1e-5


def test_parts_cover_every_sample_once(run, samples, advantages):
    """At fixed weights the gradients of the parts add up to that of the whole, weighted by their sizes."""
    whole = gradient(run, samples, advantages)
    for parts, sizes in ((2, [4, 4]), (3, [4, 2, 2]), (4, [2, 2, 2, 2])):
        with change(run, algorithm=Config(group_size=GROUP, clip=10.0, updates_per_rollout=parts)):
            tallies = [Tally() for _ in range(parts)]
            found = [gradient(run, samples, advantages, part=i, tally=tally) for i, tally in enumerate(tallies)]
        assert [len(torch.cat(tally.values["first"])) // (STEPS - 1) for tally in tallies] == sizes
        total = {n: sum(size / 8 * g[n] for size, g in zip(sizes, found, strict=True)) for n in whole}
        assert distance(total, whole) < 1e-5
        assert distance(found[0], found[1]) > 0.1


def test_samples_without_advantage_do_not_count(run, samples, advantages):
    assert flat(gradient(run, samples, torch.zeros(8))).abs().max() == 0
    some = advantages * torch.tensor([1, 0, 1, 0, 1, 0, 1, 0])
    rows = [0, 2, 4, 6]
    lot = Lot([0, 1, 2, 3], samples.lots[0].trajectory.rows(rows))
    half = samples._replace(prompts=[samples.prompts[i] for i in rows], lots=[lot], groups=[0] * 4)
    expected = {n: g / 2 for n, g in gradient(run, half, some[rows]).items()}
    assert distance(gradient(run, samples, some), expected) < 1e-5


def redrawn(samples, noise_scale, draw):
    """The same states with other actions."""
    steps = [
        replace(s, x_next=s.mean + noise_scale * s.step.std * torch.randn(s.mean.shape, generator=draw))
        for s in samples.lots[0].trajectory.steps
    ]
    lot = samples.lots[0]
    return samples._replace(lots=[lot._replace(trajectory=replace(lot.trajectory, steps=tuple(steps)))])


def test_action_without_noise_has_no_gradient(run, samples):
    draw = torch.Generator().manual_seed(0)
    assert flat(gradient(run, redrawn(samples, 0.0, draw), torch.ones(8))).abs().max() == 0


def test_score_has_mean_zero(run, samples):
    """The mean of grad log p over actions vanishes, and only if they have the noise whose density is taken."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.stack([flat(gradient(run, redrawn(samples, 1.0, draw), torch.ones(8))) for _ in range(24)])
    assert scores.mean(0).norm() < 2 * scores.norm(dim=1).mean() / math.sqrt(24)


def pull(run, samples):
    """KL of every (step, sample), and the gradient of its weighted mean alone."""
    config, tally = Config(group_size=GROUP, clip=10.0, kl=2.0), Tally()
    with change(run, algorithm=config):
        found = gradient(run, samples, torch.zeros(8), tally=tally)
    divergence = torch.stack(tally.values["kl"])
    torch.testing.assert_close(torch.stack(tally.values["loss"]), 2.0 * divergence)
    return divergence, found


def test_kl_is_zero_at_the_reference(run):
    with restored(run.policy):
        for name, p in run.policy.parameters.items():
            if "lora_B" in name:
                p.data.zero_()
        divergence, found = pull(run, sample(run)[0])
    assert divergence.abs().max() == 0
    assert flat(found).abs().max() == 0


def test_kl_is_that_of_the_steps_and_pulls_back(run, samples):
    policy = run.policy
    divergence, found = pull(run, samples)
    ours = [normal for _, normal in gaussians(policy.pipe, samples)]
    policy.pipe.transformer.disable_adapters()
    with torch.no_grad():
        theirs = [normal for _, normal in gaussians(policy.pipe, samples)]
    policy.pipe.transformer.enable_adapters()
    expected = torch.stack([kl_divergence(a, b).flatten(1).mean(1) for a, b in zip(ours, theirs, strict=True)])
    assert expected.min() > 1e-4
    torch.testing.assert_close(divergence, expected.detach().double(), rtol=1e-4, atol=0)
    gradients = torch.autograd.grad(2.0 * expected.mean(), list(policy.parameters.values()))
    assert distance(found, dict(zip(policy.parameters, gradients, strict=True))) < 1e-4
    with restored(policy):
        move(policy, {n: p - 0.05 * found[n] / flat(found).norm() for n, p in policy.parameters.items()})
        closer, _ = pull(run, samples)
    assert closer.mean() < 0.99 * divergence.mean()


def test_reference_means_do_not_depend_on_the_batch(run, samples):
    whole, parts = Tally(), Tally()
    for size, tally in ((None, whole), (3, parts)):
        with change(run, algorithm=Config(group_size=GROUP, kl=1.0), batch=BatchConfig(update=size)):
            gradient(run, samples, torch.zeros(8), tally=tally)
    one, other = (torch.cat(t.values["kl"]).sort().values for t in (whole, parts))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_samples_do_not_depend_on_batch_or_process(run, samples):
    _, videos = sample(run)
    for size in (1, 3):
        with change(run, batch=BatchConfig(rollout=size)):
            other, other_videos = sample(run)
        torch.testing.assert_close(other_videos, videos, rtol=0, atol=1e-5)
        for a, b in zip(other.lots[0].trajectory.steps, samples.lots[0].trajectory.steps, strict=True):
            torch.testing.assert_close(a.x_next, b.x_next, rtol=0, atol=1e-5)
        assert other.lots[0].trajectory.latent_seeds == samples.lots[0].trajectory.latent_seeds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.processes, "count", 2)
        for rank in (0, 1):
            patch.setattr(run.processes, "rank", rank)
            own, own_videos = sample(run)
            assert own.groups == [rank] * GROUP
            torch.testing.assert_close(own_videos, videos[GROUP * rank : GROUP * (rank + 1)], rtol=0, atol=1e-5)


def noises(run):
    """A number for each sample's first noise, and one for its initial noise."""
    first = sample(run)[0].lots[0].trajectory.steps[0]
    step = (first.x_next - first.mean) / first.step.std
    return [[round(float(row.sum()), 2) for row in rows] for rows in (step, first.x)]


def test_every_sample_has_noise_of_its_own(run):
    """Over members, groups, iterations and run seeds; only the initial noise is shared, within a group."""
    steps, starts = noises(run)
    assert (len(set(steps)), len(set(starts))) == (PROMPTS_PER_ITERATION * GROUP, PROMPTS_PER_ITERATION)
    for owner, name, value in ((run, "iteration", 2), (run.recipe, "seed", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, value)
            other_steps, other_starts = noises(run)
        assert not set(steps) & set(other_steps)
        assert not set(starts) & set(other_starts)


@pytest.mark.parametrize("shared", [True, False])
def test_shared_noise_is_shared_within_a_group(run, shared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.recipe.sampler, "shared_noise", shared)
        starts = sample(run)[0].lots[0].trajectory.steps[0].x.view(PROMPTS_PER_ITERATION, GROUP, -1)
    assert len({float(x.sum()) for x in starts[0]}) == (1 if shared else GROUP)
    assert not torch.equal(starts[0, 0], starts[1, 0])


def test_own_signal_is_that_of_this_process(run):
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0, float("nan"), 0.0, 1.0, 5.0])
    config = Config(group_size=4, std="global", keep=2)
    expected = group_advantages(rewards, torch.arange(12) // 4, std="global").view(3, 4)

    def signal():
        return own_signal(run, {"brightness": rewards}, config)

    found = signal()
    assert torch.equal(found.advantages, expected.flatten()[None])
    assert found.rows == [0, 3, 4, 7, 9, 11]
    assert [found.rows_of_part(part, 2) for part in (0, 1)] == [[0, 4, 9], [3, 7, 11]]
    assert run.row["groups/zero_spread"] == pytest.approx(1 / 3)
    assert run.row["advantage/std"] == pytest.approx(float(expected.std(correction=0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.processes, "count", 2)
        patch.setattr(run.processes, "rank", 0)
        assert torch.equal(signal().advantages[0], expected[[0, 2]].flatten())
        assert signal().rows == [0, 3, 5, 7]
        patch.setattr(run.processes, "rank", 1)
        assert torch.equal(signal().advantages[0], expected[1])
