"""DiffusionNFT's gradient against the paper's formulas on the bare transformer, its old policy, and that it learns."""

import json

import diffusers
import pytest
import torch

from alignment.algorithms import nft
from alignment.algorithms.nft import Config
from alignment.config import BatchConfig, EvaluationConfig, LoRAConfig, OptimizerConfig, Recipe, RewardConfig
from alignment.groups import Signal
from alignment.noised import Noised, noise_seeds, sample_clean
from alignment.tally import Tally
from samplers import seed_for
from tests.alignment.test_grpo import change, distance, flat, move, restored
from tests.alignment.test_grpo_loop import metrics
from tests.alignment.tiny import GUIDANCE, make_policy, make_run, ode_run, shake
from tests.pipelines import STEPS

GROUP = 4
ADVANTAGES = torch.tensor([[-7.0, 5.0, 0.0, -3.0, 4.0, -2.0, 2.0, 1.0]])
R = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.9, 0.3, 0.7, 0.6])  # 1/2 + A / 10, within 0..1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two groups of four; the trained weights have moved on from the old ones, and both are off the reference."""
    run = ode_run(tmp_path_factory.mktemp("nft"), Config(prompts_per_iteration=2, group_size=GROUP, beta=0.4, kl=0.3))
    run.snapshot("old")
    shake(run.policy, 0.03, seed=1)
    return run


def noised_samples(run):
    samples, videos, grid = sample_clean(run, run.next_prompts(2), GROUP)
    return Noised(run.policy, samples, nft.trained_levels(run, grid), noise_seeds(run, samples, GROUP)), videos


@pytest.fixture(scope="module")
def noised(run):
    return noised_samples(run)[0]


def signal_of(advantages=ADVANTAGES):
    return Signal(advantages, torch.ones(len(advantages)), list(range(advantages.shape[1])), GROUP)


def gradient_of(run, update):
    """The gradient of one update, which is not taken."""
    found = {}

    def keep():
        found.update({n: p.grad.clone() for n, p in run.policy.parameters.items()})
        run.optimizer.zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "apply_update", keep)
        update()
    return found


def gradient(run, noised, advantages=ADVANTAGES, tally=None):
    rows = list(range(advantages.shape[1]))
    return gradient_of(run, lambda: nft.update(run, noised, signal_of(advantages), rows, tally or Tally()))


def looks(run, noised, seeds):
    """Level, clean samples, noise, noised samples and a function for the velocity of the bare transformer, by level.

    The noise of a sample is one draw for all levels from the generator of its seed; timesteps are stock UniPC's.
    """
    pipe, samples = run.policy.pipe, noised.samples
    stock = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    stock.set_timesteps(STEPS)
    with torch.no_grad():
        texts = pipe.encode_prompt([prompt.text for prompt in samples.prompts], max_sequence_length=32)
    clean = samples.lots[0].trajectory.steps[-1].x_next
    shape = (len(noised.levels), *clean.shape[1:])
    draws = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    for i, level in enumerate(noised.levels):
        at = [float(s) for s in stock.sigmas].index(level)
        x = (1 - level) * clean + level * draws[:, i]

        def velocity(x=x, timestep=stock.timesteps[at]):
            positive, negative = (pipe.transformer(x, timestep.expand(len(x)), text)[0] for text in texts)
            return negative + GUIDANCE * (positive - negative)

        yield level, clean, draws[:, i], x, velocity


def own_seeds(run, noised):
    return [seed_for(0, "noised", run.iteration, at, i % GROUP) for i, at in enumerate(noised.samples.groups)]


def mean(tensor):
    return tensor.flatten(1).mean(1)


def test_gradient_is_that_of_the_paper(run, noised):
    """5 (r |x0+ - x0|^2 / w+ + (1 - r) |x0- - x0|^2 / w-) / beta + kl |v - v_ref|^2, means over elements and pairs."""
    policy, losses = run.policy, []
    for level, clean, _, x, velocity in looks(run, noised, own_seeds(run, noised)):
        with torch.no_grad():
            with policy.using(run.snapshot("old")):
                old = velocity()
            policy.pipe.transformer.disable_adapters()
            reference = velocity()
            policy.pipe.transformer.enable_adapters()
        v = velocity()
        good = (x - level * (0.4 * v + 0.6 * old) - clean).double()
        bad = (x - level * (1.4 * old - 0.4 * v) - clean).double()
        errors = [mean(e.square()) / mean(e.detach().abs()) for e in (good, bad)]
        losses.append(5 * (R * errors[0] + (1 - R) * errors[1]) / 0.4 + 0.3 * mean((v - reference).square()))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(policy.parameters.values()))
    tally = Tally()
    ours = gradient(run, noised, tally=tally)
    assert distance(ours, dict(zip(policy.parameters, expected, strict=True))) < 1e-5
    torch.testing.assert_close(torch.stack(tally.values["loss"]), torch.stack(losses).detach(), rtol=1e-5, atol=0)
    assert all(g.abs().max() > 0 for g in ours.values())


def test_half_good_samples_say_nothing_where_the_policy_is_the_old_one(run, noised):
    with restored(run.policy), change(run, algorithm=Config(group_size=GROUP, kl=0.0)):
        move(run.policy, run.snapshot("old"))
        assert flat(gradient(run, noised, torch.zeros(1, 8))).abs().max() == 0
        assert flat(gradient(run, noised)).abs().max() > 0
    with change(run, algorithm=Config(group_size=GROUP, kl=0.0)):  # elsewhere they lead back to it
        back = gradient(run, noised, torch.zeros(1, 8))
    ahead = {n: p.detach() - run.snapshot("old")[n] for n, p in run.policy.parameters.items()}
    assert sum(float((back[n] * d).sum()) for n, d in ahead.items()) > 0


def test_old_policy_draws_the_samples_and_never_learns(run):
    config = Config(prompts_per_iteration=2, group_size=GROUP)
    seen, before = {}, {n: t.clone() for n, t in run.snapshot("old").items()}
    with restored(run.policy), change(run, algorithm=config, iterations=1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "iterations", lambda: iter([1]))
        patch.setattr(nft, "follow", lambda *_: None)
        patch.setattr(nft, "update", lambda run, noised, *_: seen.update(noised=noised))
        nft.train(run)
        move(run.policy, before)
        by_old, _ = noised_samples(run)
    by_trained, _ = noised_samples(run)
    clean, old, trained = (n.samples.lots[0].trajectory.steps[-1].x_next for n in (seen["noised"], by_old, by_trained))
    assert torch.equal(clean, old)
    assert (clean - trained).abs().max() > 1e-3
    gradient(run, by_old)
    assert all(torch.equal(t, before[n]) and not t.requires_grad for n, t in run.snapshot("old").items())


@pytest.mark.parametrize(("decay", "etas"), [(1, [0.002, 0.004]), (2, [0, 0])])
def test_old_policy_follows_the_schedule(tmp_path, decay, etas):
    """Once an iteration, by the number of updates so far: two in each."""
    config = Config(prompts_per_iteration=2, group_size=GROUP, updates_per_rollout=2, decay=decay, trained_steps=1)
    run = ode_run(tmp_path, config)
    expected = {n: p.detach().clone() for n, p in run.policy.parameters.items()}
    run.evaluate = lambda iteration: {}
    run.open()
    iterations = run.iterations

    def watched():
        for i in iterations():
            yield i
            for name, p in run.policy.parameters.items():
                expected[name] = etas[i - 1] * expected[name] + (1 - etas[i - 1]) * p.detach()
                torch.testing.assert_close(run.snapshots["old"][name], expected[name], rtol=1e-5, atol=1e-7)

    run.iterations = watched
    nft.train(run)
    rows = metrics(run)
    assert [row["old/decay"] for row in rows] == pytest.approx(etas)
    assert run.updates == 4
    assert all(row["drift/old"] > 0 for row in rows)  # the second update is off the old policy


def test_levels_are_those_of_the_rollout(run):
    """All but one, another one from time to time, or as many as asked for; the highest first."""
    grid = (1.0, 0.9, 0.7, 0.4, 0.2, 0.0)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for iteration in range(1, 31):
            patch.setattr(run, "iteration", iteration)
            found.append(nft.trained_levels(run, grid))
        with change(run, algorithm=Config(trained_steps=2)):
            assert len(nft.trained_levels(run, grid)) == 2
    assert {len(levels) for levels in found} == {4}
    assert {level for levels in found for level in set(grid) - set(levels)} == set(grid)
    assert all(list(levels) == sorted(levels, reverse=True) for levels in found)


def test_micro_batches_change_nothing(run, noised):
    """The network's float32 products round otherwise with another number of rows."""
    expected = gradient(run, noised)
    with change(run, batch=BatchConfig(update=3)):
        assert distance(gradient(run, noised), expected) < 1e-5


def lines_about(algorithm, config, sections):
    """What is wrong with a recipe that differs from a good one in these values."""
    recipe = Recipe(name="x", algorithm=config)
    recipe.sampler.shared_noise = False
    for name, values in sections.items():
        for key, value in values.items():
            setattr(getattr(recipe, name), key, value)
    return algorithm.check(recipe)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, None),
        ({"sampler": {"kernel": "dance", "tail": 1.0}, "algorithm": {"trained_steps": 20, "decay": 2}}, None),
        ({"sampler": {"shared_noise": True}}, "sampler.shared_noise"),
        ({"sampler": {"window": [0, 3]}}, "sampler.window"),
        ({"sampler": {"tail": 0.5}}, "sampler.tail"),
        ({"model": {"dtype": "float16"}}, "model.dtype"),
        ({"algorithm": {"group_size": 1}}, "algorithm.group_size"),
        ({"algorithm": {"trained_steps": 21}}, "algorithm.trained_steps"),
        ({"algorithm": {"trained_steps": 0}}, "algorithm.trained_steps"),
        ({"algorithm": {"max_advantage": None}}, "algorithm.max_advantage"),
        ({"algorithm": {"combine": "losses"}}, "algorithm.combine"),
        ({"algorithm": {"updates_per_rollout": 9}}, "algorithm.updates_per_rollout"),
        ({"algorithm": {"decay": 3}}, "algorithm.decay"),
        ({"algorithm": {"beta": 0.0}}, "algorithm: beta"),
        ({"algorithm": {"kl": -1.0}}, "algorithm: beta"),
    ],
)
def test_impossible_combinations_are_refused(sections, named):
    lines = lines_about(nft, Config(), sections)
    assert lines == [] if named is None else [line.startswith(named) for line in lines] == [True]


def learns(folder, algorithm, config, weight=1.0, iterations=7):
    """Mean brightness, wanted or unwanted, rises by many times its spread, on held-out noise too."""
    lora = LoRAConfig(rank=8, alpha=16, targets=["to_v", "to_out.0", "proj_out"])
    policy = make_policy(
        "stable_diffusion_3",
        model={"lora": lora},
        sampler={"kernel": "ode", "shared_noise": False},
        call={"guidance_scale": 1.0},
    )
    run = make_run(
        folder,
        policy,
        config,
        iterations=iterations,
        rewards={"brightness": RewardConfig(use="tests.alignment.tiny:brightness", weight=weight)},
        optimizer=OptimizerConfig(lr=0.03),
        evaluation=EvaluationConfig(num_prompts=4, videos=1),
    )
    run.open()
    algorithm.train(run)
    rows = metrics(run)
    assert rows[-1]["reward/mean"] - rows[0]["reward/mean"] > 3 * rows[0]["reward/std"]
    before, after = (json.loads((run.folder / f"samples/{i:06d}/scores.json").read_text()) for i in (0, iterations))
    pairs = zip(before["values"]["reward/mean"], after["values"]["reward/mean"], strict=True)
    assert all(b < a for b, a in pairs)


def test_it_learns(tmp_path):
    learns(tmp_path, nft, Config(prompts_per_iteration=2, group_size=8, trained_steps=2))
