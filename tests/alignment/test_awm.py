"""AWM's and V-GRPO's gradients against their papers' formulas on the bare transformer, levels, anchors, learning."""

import math
import statistics

import pytest
import torch

from alignment.algorithms import awm
from alignment.algorithms.awm import Config
from alignment.config import BatchConfig
from alignment.groups import Signal
from alignment.noised import Noised, noise_seeds, sample_clean
from alignment.tally import Tally
from samplers import seed_for
from tests.alignment.test_grpo import change, distance, flat, restored
from tests.alignment.test_grpo_loop import metrics
from tests.alignment.test_nft import gradient_of, learns, lines_about, looks, mean
from tests.alignment.tiny import ode_run, shake

GROUP, LEVELS = 4, 3
ADVANTAGES = torch.tensor([[-2.0, 1.0, 0.0, -0.5, 1.5, -1.0, 0.7, 0.3]])
SURROGATES = ["matching", "adaptive"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two groups of four, off the reference."""
    return ode_run(tmp_path_factory.mktemp("awm"), Config(prompts_per_iteration=2, group_size=GROUP))


@pytest.fixture(scope="module")
def sampled(run):
    """The weights that drew the samples."""
    return {n: p.detach().clone() for n, p in run.policy.parameters.items()}


@pytest.fixture(scope="module")
def noised(run, sampled):
    samples, _, grid = sample_clean(run, run.next_prompts(2), GROUP)
    return Noised(run.policy, samples, awm.draw_levels(grid, LEVELS, "grid", 0), noise_seeds(run, samples, GROUP))


def gradient(run, noised, sampled=None, advantages=ADVANTAGES, tally=None, **config):
    rows, weights = list(range(advantages.shape[1])), torch.tensor([1.0, 0.5])[: len(advantages)]
    signal = Signal(advantages, weights, rows, GROUP)
    with change(run, algorithm=Config(group_size=GROUP, **config)):
        return gradient_of(run, lambda: awm.update(run, noised, signal, rows, sampled or {}, tally or Tally()))


def surrogates(run, noised, kind, **seeds):
    """(N,) minus the mean over levels of |v - (noise - x0)|^2, or of |x0_hat - x0|^2 over its mean absolute value."""
    own = [seed_for(0, "noised", run.iteration, at, i % GROUP) for i, at in enumerate(noised.samples.groups)]
    values = []
    for level, clean, noise, x, velocity in looks(run, noised, seeds.get("seeds", own)):
        if kind == "matching":
            values.append(-mean((velocity() - (noise - clean)).square()))
        else:
            error = x - level * velocity() - clean
            values.append(-mean(error.square()) / mean(error.abs()).detach())
    return torch.stack(values).mean(0)


def expected_gradient(run, loss):
    weights = run.policy.parameters
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), retain_graph=True), strict=True))


@pytest.mark.parametrize("kind", SURROGATES)
def test_with_one_update_the_gradient_is_reinforce(run, noised, kind):
    expected = expected_gradient(run, -(ADVANTAGES[0] * surrogates(run, noised, kind)).mean())
    ours = gradient(run, noised, surrogate=kind)
    assert distance(ours, expected) < 1e-5
    assert all(g.abs().max() > 0 for g in ours.values())
    assert torch.equal(flat(gradient(run, noised, surrogate=kind, clip=1e-9)), flat(ours))  # the ratio is 1
    assert flat(gradient(run, noised, surrogate=kind, advantages=torch.zeros(1, 8))).abs().max() == 0


@pytest.mark.parametrize("kind", SURROGATES)
def test_later_updates_see_the_ratio_of_the_whole_sample(run, noised, sampled, kind):
    """PPO's loss of exp(mean over levels of new - old), away from the weights that sampled; two rewards, two losses."""
    with torch.no_grad():
        old = surrogates(run, noised, kind)
    advantages = torch.cat([ADVANTAGES, ADVANTAGES.flip(1)])
    with restored(run.policy):
        shake(run.policy, 0.01, seed=5)
        ratio = (surrogates(run, noised, kind) - old).exp()
        clip = float((ratio.detach() - 1).abs().sort().values[3:5].mean())  # half of the samples leave it
        clipped = ratio.clamp(1 - clip, 1 + clip)
        loss = sum(w * torch.maximum(-a * ratio, -a * clipped) for w, a in zip((1.0, 0.5), advantages, strict=True))
        expected = expected_gradient(run, loss.mean())
        tally = Tally()
        tally.updates = 1
        config = {"surrogate": kind, "clip": clip, "updates_per_rollout": 2, "combine": "losses"}
        ours = gradient(run, noised, sampled, advantages, tally, **config)
    assert distance(ours, expected) < 1e-4
    found = torch.cat(tally.values["log_ratio"])
    torch.testing.assert_close(found, ratio.log().detach().double(), rtol=1e-3, atol=1e-6)
    outward = torch.sign(found) * torch.sign(advantages.sum(0)) > 0
    assert torch.equal(torch.cat(tally.values["clipped"]) > 0, ((found.exp() - 1).abs() > clip) & outward)
    torch.testing.assert_close(torch.stack(tally.values["loss"]).mean(0), loss.detach().double(), rtol=1e-4, atol=1e-5)


def test_the_first_update_of_several_is_that_of_one(run, noised, sampled):
    """The ratio is 1 there and is measured all the same."""
    tally = Tally()
    ours = gradient(run, noised, sampled, tally=tally, updates_per_rollout=2)
    assert torch.equal(flat(ours), flat(gradient(run, noised)))
    assert torch.cat(tally.values["first"]).abs().max() == 0
    with restored(run.policy):
        shake(run.policy, 0.01, seed=5)  # as if rollout and update did not have the same weights
        tally = Tally()
        gradient(run, noised, sampled, tally=tally, updates_per_rollout=2)
    assert torch.cat(tally.values["first"]).abs().max() > 1e-4
    alone = Tally()
    gradient(run, noised, tally=alone)
    assert "log_ratio" not in alone.values


def test_anchors(run, noised, sampled):
    """Distances of velocities from the reference and from the average, of clean estimates from the sampler's."""
    policy, names = run.policy, ("kl", "kl_ema", "kl_old")
    run.snapshots["ema"] = {n: 0.5 * t for n, t in sampled.items()}
    own = [seed_for(0, "noised", run.iteration, at, i % GROUP) for i, at in enumerate(noised.samples.groups)]
    with restored(policy):
        shake(policy, 0.02, seed=7)
        distances = {name: [] for name in names}
        for level, _, _, _, velocity in looks(run, noised, own):
            with torch.no_grad():
                policy.pipe.transformer.disable_adapters()
                others = [velocity()]
                policy.pipe.transformer.enable_adapters()
                for weights in (run.snapshots["ema"], sampled):
                    with policy.using(weights):
                        others.append(velocity())
            v = velocity()
            for name, other, scale in zip(names, others, (1, 1, level**2), strict=True):
                distances[name].append(scale * mean((v - other).square()))
        for name in names:
            expected = torch.stack(distances[name])
            tally, none = Tally(), torch.zeros(1, 8)
            given = {name: 2.0, "updates_per_rollout": 2}
            ours = gradient(run, noised, sampled, none, tally, **given)
            assert distance(ours, expected_gradient(run, 2 * expected.mean())) < 1e-4
            logged = torch.stack(tally.values[name.replace("_", "/")])
            torch.testing.assert_close(logged, expected.detach().double(), rtol=1e-4, atol=0)
            torch.testing.assert_close(torch.stack(tally.values["loss"]), 2 * logged)


def test_a_group_shares_its_noise(run, noised):
    shared = noised._replace(seeds=noise_seeds(run, noised.samples, GROUP, shared=True))
    assert [len(set(s)) for s in (noised.seeds, shared.seeds)] == [8, 2]
    seeds = [seed_for(0, "noised", run.iteration, at, 0) for at in noised.samples.groups]
    expected = -(ADVANTAGES[0] * surrogates(run, noised, "matching", seeds=seeds)).mean()
    assert distance(gradient(run, shared), expected_gradient(run, expected)) < 1e-5


def test_micro_batches_change_nothing(run, noised, sampled):
    given = {"updates_per_rollout": 2, "kl": 0.1, "clip": None}
    with restored(run.policy):
        shake(run.policy, 0.01, seed=5)

        def found():
            tally = Tally()
            tally.updates = 1
            return gradient(run, noised, sampled, tally=tally, **given)

        expected = found()
        with change(run, batch=BatchConfig(update=3)):
            assert distance(found(), expected) < 1e-5


GRID = [1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.0]


def draws(count, draw, number=600):
    return torch.tensor([awm.draw_levels(GRID, count, draw, seed) for seed in range(number)])


def test_levels_of_the_grid_are_one_of_each_stratum():
    assert awm.draw_levels(GRID, 6, "grid", 0) == tuple(GRID[:6])
    found = draws(3, "grid")
    for column, stratum in zip(found.T, ([1.0, 0.9], [0.75, 0.5], [0.3, 0.1]), strict=True):
        shares = [(column == torch.tensor(level)).float().mean() for level in stratum]
        assert sum(shares) == 1
        assert shares[0] == pytest.approx(0.5, abs=0.08)
    assert {tuple(x.tolist()) for x in draws(4, "grid").T[0].unique()[:, None]} == {(1.0,)}  # 6 steps in 1, 2, 1, 2


def test_levels_off_the_grid():
    """Uniform: the middle of a stratum is its mean moment. Logit-normal: strata of equal probability, so that the
    standard normal's quartiles separate four of them."""
    found = draws(6, "uniform")
    for i, column in enumerate(found.T):
        high, low = GRID[i], max(GRID[i + 1], awm.LOWEST)
        assert low <= column.min() <= column.max() <= high
        assert column.mean() == pytest.approx((GRID[i] + GRID[i + 1]) / 2, abs=0.01)
    line = [1 - i / 10 for i in range(11)]
    levels = torch.tensor([awm.draw_levels(line, 4, "logit_normal", seed) for seed in range(600)]).double()
    quartile = statistics.NormalDist().inv_cdf(0.75)
    bounds = [1 / (1 + math.exp(-z)) for z in (math.inf, quartile, 0, -quartile)] + [0]
    for i, column in enumerate(levels.T):
        assert bounds[i + 1] <= column.min() <= column.max() <= bounds[i]
    logits = torch.logit(levels.flatten())
    assert logits.mean() == pytest.approx(0, abs=0.05)
    assert logits.std() == pytest.approx(1, abs=0.05)
    assert all(list(row) == sorted(row, reverse=True) for row in levels.tolist())


def test_an_iteration(tmp_path):
    """Function evaluations, guided: old and present velocities where there are several updates; what is logged."""
    config = Config(prompts_per_iteration=2, group_size=GROUP, levels=2, updates_per_rollout=2, soft_clip=3.0)
    config.kl_ema, config.kl_old = 1.0, 0.3
    run = ode_run(tmp_path, config)
    start = {n: p.detach().clone() for n, p in run.policy.parameters.items()}
    run.recipe.iterations = 1
    run.open()
    awm.train(run)
    (row,) = metrics(run)
    rollout, update = 8 * 5, 8 * 2
    # sampler, average and gradient for all, and the present ones for the second half
    assert row["nfe"] == 2 * (rollout + 3 * update + update / 2)
    assert row["ratio/first_deviation"] < 1e-6 < row["ratio/max_deviation"]
    assert min(row["kl/ema"], row["kl/old"], -row["surrogate"], row["grad_norm"]) > 0
    assert {name for name in row if name.startswith("gradient_share/")} == {f"gradient_share/step_{i}" for i in (0, 1)}
    for name, p in run.policy.parameters.items():  # decay 0.001 times two updates
        expected = 0.002 * start[name] + 0.998 * p.detach()
        torch.testing.assert_close(run.snapshots["ema"][name], expected, rtol=1e-5, atol=1e-7)
    assert set(run.snapshots) == {"ema"}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, None),
        ({"algorithm": {"surrogate": "adaptive", "combine": "losses", "clip": None, "levels": 20}}, None),
        ({"algorithm": {"draw": "uniform", "levels": 30, "kl_old": 0.3, "epochs": 2}}, None),
        ({"sampler": {"shared_noise": True}}, "sampler.shared_noise"),
        ({"sampler": {"window": [0, 3]}}, "sampler.window"),
        ({"algorithm": {"group_size": 1}}, "algorithm.group_size"),
        ({"algorithm": {"surrogate": "elbo"}}, "algorithm.surrogate"),
        ({"algorithm": {"draw": "normal"}}, "algorithm.draw"),
        ({"algorithm": {"levels": 21}}, "algorithm.levels"),
        ({"algorithm": {"levels": 0}}, "algorithm.levels"),
        ({"algorithm": {"updates_per_rollout": 9}}, "algorithm.updates_per_rollout"),
        ({"algorithm": {"clip": 0.0}}, "algorithm: clip"),
        ({"algorithm": {"soft_clip": -1.0}}, "algorithm: clip"),
        ({"algorithm": {"kl_ema": -1.0}}, "algorithm: kl"),
        ({"algorithm": {"epochs": 0}}, "algorithm: kl"),
        ({"algorithm": {"kl_old": 0.3}}, "algorithm.kl_old"),
    ],
)
def test_impossible_combinations_are_refused(sections, named):
    lines = lines_about(awm, Config(), sections)
    assert lines == [] if named is None else [line.startswith(named) for line in lines] == [True]


@pytest.mark.parametrize(
    ("weight", "config"),
    [
        (1.0, {"levels": 2, "std": "global"}),
        (-1.0, {"levels": 2, "surrogate": "adaptive", "group_noise": True, "soft_clip": 3.0}),
    ],
    ids=["awm", "vgrpo"],
)
def test_it_learns(tmp_path, weight, config):
    learns(tmp_path, awm, Config(prompts_per_iteration=2, group_size=8, **config), weight)
