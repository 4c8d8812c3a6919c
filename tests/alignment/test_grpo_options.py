"""What the algorithms of GRPO's family change in an update, each against an independent computation."""

import math

import pytest
import torch

from alignment.algorithms import grpo
from alignment.algorithms.grpo import Config
from alignment.config import BatchConfig
from alignment.groups import Signal
from alignment.lean import ScoreGradients
from alignment.samples import sample_groups
from alignment.tally import Tally
from alignment.windows import Window
from tests.alignment.test_grpo import GROUP, change, distance, flat, gaussians, gradient, restored, sample, signal_of
from tests.alignment.tiny import NOISE, grpo_run, make_policy, make_run, shake
from tests.pipelines import STEPS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return grpo_run(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def samples(run):
    return sample(run)[0]


@pytest.fixture(scope="module")
def advantages():
    return torch.randn(2 * GROUP, generator=torch.Generator().manual_seed(3))


def moved_gradient(run, samples, advantages, **algorithm):
    """The gradient after the weights have moved, so that ratios are not 1."""
    with restored(run.policy), change(run, algorithm=Config(group_size=GROUP, **algorithm)):
        shake(run.policy, 0.02, seed=5)
        tally = Tally()
        return gradient(run, samples, advantages, tally=tally), tally


def expected_gradient(run, samples, loss_of):
    """Autograd over the bare transformer; loss_of(step, normal, std) gives (N,) losses of one step."""
    with restored(run.policy):
        shake(run.policy, 0.02, seed=5)
        losses = [loss_of(step, normal) for step, normal in gaussians(run.policy.pipe, samples)]
        weights = run.policy.parameters
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()))
    return dict(zip(weights, grads, strict=True))


def levels_of(pipe):
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas.double().tolist()


def test_guard_is_its_published_form(run, samples, advantages):
    """-A exp(std (log ratio + bias)) / dt by its own formula, the clip open; dt with the weight of the drift."""
    levels = levels_of(run.policy.pipe)

    def loss_of(step, normal):
        now, after = levels[step.index : step.index + 2]
        std, shift = NOISE * math.sqrt(now - after), normal.mean - step.mean
        old = torch.distributions.Normal(step.mean, std)
        log_ratio = (normal.log_prob(step.x_next) - old.log_prob(step.x_next)).flatten(1).mean(1)
        normalised = std * (log_ratio + shift.square().flatten(1).mean(1) / (2 * std**2))
        return -advantages * normalised.exp() / ((now - after) * (1 + NOISE**2 * (1 - now) / (2 * now)))

    ours, tally = moved_gradient(run, samples, advantages, objective="guard", clip=10.0)
    theirs = expected_gradient(run, samples, loss_of)
    assert distance({n: g / flat(ours).norm() for n, g in ours.items()}, scaled(theirs)) < 1e-4
    assert abs(float(torch.cat(tally.values["log_ratio"]).mean())) < 1e-3


def scaled(gradients):
    norm = flat(gradients).norm()
    return {name: g / norm for name, g in gradients.items()}


def test_rectified_steps_weigh_one_over_c(run, samples, advantages):
    """c = sqrt(dt) / g + g sqrt(dt) (1 - s) / (2 s) (arXiv 2605.15980); the weights have mean 1 over the update."""
    levels = levels_of(run.policy.pipe)
    pairs = [(levels[i], levels[i + 1]) for i in range(STEPS - 1)]
    weights = [1 / (math.sqrt(s - t) / NOISE + NOISE * math.sqrt(s - t) * (1 - s) / (2 * s)) for s, t in pairs]
    mean = sum(weights) / len(weights)

    def loss_of(step, normal):
        log_prob = normal.log_prob(step.x_next).flatten(1).mean(1)
        return -weights[step.index] / mean * advantages * (log_prob - log_prob.detach()).exp()

    with change(run, algorithm=Config(group_size=GROUP, clip=10.0, rectify=True)):
        ours = gradient(run, samples, advantages)
        with change(run, batch=BatchConfig(update=3)):
            assert distance(gradient(run, samples, advantages), ours) < 1e-5
    losses = [loss_of(step, normal) for step, normal in gaussians(run.policy.pipe, samples)]
    weights_of = run.policy.parameters
    theirs = torch.autograd.grad(torch.stack(losses).mean(), list(weights_of.values()))
    assert distance(ours, dict(zip(weights_of, theirs, strict=True))) < 1e-5
    assert max(weights) > 1.5 * min(weights)


def test_dppo_drops_what_leaves_the_trust_region(run, samples, advantages):
    """Samples whose KL from the rollout's policy is above the limit and whose ratio goes the advantage's way."""

    def parts(step, normal):
        old = torch.distributions.Normal(step.mean, normal.stddev)
        ratio = (normal.log_prob(step.x_next) - old.log_prob(step.x_next)).flatten(1).mean(1).exp()
        return ratio, torch.distributions.kl_divergence(normal, old).flatten(1).mean(1)

    with restored(run.policy), torch.no_grad():
        shake(run.policy, 0.02, seed=5)
        found = torch.stack([parts(step, normal)[1] for step, normal in gaussians(run.policy.pipe, samples)])
    limit = float(found.median())

    def loss_of(step, normal):
        ratio, divergence = parts(step, normal)
        outward = ((ratio > 1) & (advantages > 0)) | ((ratio < 1) & (advantages < 0))
        return -advantages * ratio * ~((divergence >= limit) & outward)

    ours, tally = moved_gradient(run, samples, advantages, objective="dppo", clip=limit)
    assert distance(ours, expected_gradient(run, samples, loss_of)) < 1e-4
    assert 0.1 < float(torch.cat(tally.values["clipped"]).mean()) < 0.6
    open_limit, _ = moved_gradient(run, samples, advantages, objective="dppo", clip=1e3)
    assert distance(ours, open_limit) > 0.05


def test_separate_losses_differ_only_where_one_is_clipped(run, samples, advantages):
    """DanceGRPO's loss of every reward: with an open clip the weighted sum of advantages, with a tight one not."""
    other = torch.randn(8, generator=torch.Generator().manual_seed(4))
    signal = Signal(torch.stack([advantages, other]), torch.tensor([0.5, 2.0]), list(range(8)), GROUP)

    def of(signal, clip):
        found = {}
        with restored(run.policy), pytest.MonkeyPatch.context() as patch:
            shake(run.policy, 0.02, seed=5)
            patch.setattr(run.recipe, "algorithm", Config(group_size=GROUP, clip=clip))
            patch.setattr(run, "apply_update", lambda: found.update({n: p.grad.clone() for n, p in weights.items()}))
            weights = run.policy.parameters
            grpo.update(run, samples, signal, signal.rows, Tally())
            run.optimizer.zero_grad()
        return found

    summed = signal_of(0.5 * advantages + 2.0 * other)
    assert distance(of(signal, 10.0), of(summed, 10.0)) < 1e-5
    assert distance(of(signal, 1e-5), of(summed, 1e-5)) > 0.05


def lean_gradient(run, advantages, rows):
    """The gradient of the update that takes its gradients in the rollout."""
    config, found = run.recipe.algorithm, {}
    scores = ScoreGradients(run.policy, lambda step: grpo.step_weight(step, config))
    prompts = run.next_prompts(config.prompts_per_iteration)
    samples, videos = sample_groups(run, prompts, config.group_size, lambda at: grpo.plan(run, at), scores)
    assert all(p.grad is None for p in run.policy.parameters.values())
    evaluations = run.policy.evaluations
    signal = signal_of(advantages, len(rows) // 2, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run, "apply_update", lambda: found.update({n: p.grad.clone() for n, p in run.policy.parameters.items()})
        )
        grpo.lean_update(run, scores, signal)
    run.optimizer.zero_grad()
    assert run.policy.evaluations == evaluations
    return found, samples, videos


@pytest.mark.parametrize("options", [{}, {"rectify": True}, {"trained_steps": 2}, {"keep": 2}])
def test_lean_update_equals_the_plain_one(run, advantages, options):
    """The same videos and, to rounding, the same gradient, without a forward pass of its own."""
    config = Config(prompts_per_iteration=2, group_size=GROUP, clip=1e-4, **options)
    rows = [0, 2, 5, 7] if config.keep else list(range(8))
    with change(run, algorithm=config):
        lean, nothing, videos = lean_gradient(run, advantages, rows)
        prompts = run.next_prompts(2)
        samples, plain_videos = sample_groups(run, prompts, GROUP, lambda at: grpo.plan(run, at))
        found = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                run, "apply_update", lambda: found.update({n: p.grad.clone() for n, p in run.policy.parameters.items()})
            )
            grpo.update(run, samples, signal_of(advantages, len(rows) // 2, rows), rows, Tally())
        run.optimizer.zero_grad()
    assert nothing.lots[0].trajectory.steps == ()
    torch.testing.assert_close(videos, plain_videos, rtol=0, atol=1e-5)
    assert distance(lean, found) < 1e-5
    assert flat(lean).norm() > 0


def test_lean_training_gives_the_weights_of_plain_training(tmp_path):
    """Two iterations of the whole loop."""
    found = []
    for lean in (True, False):
        run = grpo_run(tmp_path / str(lean), lean=lean, trained_steps=2, clip=1e-4)
        run.open()
        grpo.train(run)
        found.append({n: p.detach().clone() for n, p in run.policy.parameters.items()})
    start = {n: p.detach() for n, p in grpo_run(tmp_path / "start").policy.parameters.items()}
    change_of = [{n: w[n] - start[n] for n in w} for w in found]
    assert distance(*change_of) < 2e-2  # Adam's first steps are signs: an entry near 0 may turn


def test_moving_anchors_lag_behind(tmp_path):
    """n: the weights before the last update whose number n divides. With 1 those before the last update."""
    run = grpo_run(tmp_path, kl_moving={1: 0.5, 3: 0.25}, updates_per_rollout=2)
    run.recipe.iterations = 4
    before, apply = [], run.apply_update

    def apply_update():
        before.append({n: p.detach().clone() for n, p in run.policy.parameters.items()})
        apply()
        count = len(before) - 1
        for every in (1, 3):
            expected = before[count // every * every]
            assert all(torch.equal(run.snapshots[f"kl_{every}"][n], w) for n, w in expected.items())

    run.apply_update = apply_update
    run.open()
    grpo.train(run)
    assert len(before) == 8
    assert 0 < run.row["kl/1"] < run.row["kl/3"]


def test_moving_anchor_pulls_with_its_weight(run, samples):
    """The KL to other weights enters the loss as that to the reference does."""
    anchor = {n: 0.9 * p.detach() for n, p in run.policy.parameters.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.recipe, "algorithm", Config(group_size=GROUP, clip=10.0, kl_moving={5: 2.0}))
        patch.setattr(run, "snapshots", {"kl_5": anchor})
        patch.setattr(run.average, "updates", 1)
        tally = Tally()
        ours = gradient(run, samples, torch.zeros(8), tally=tally)
    with run.policy.using(anchor), torch.no_grad():
        theirs = [normal for _, normal in gaussians(run.policy.pipe, samples)]
    pairs = zip(gaussians(run.policy.pipe, samples), theirs, strict=True)
    divergence = torch.stack([torch.distributions.kl_divergence(a, b).flatten(1).mean(1) for (_, a), b in pairs])
    expected = torch.autograd.grad(2.0 * divergence.mean(), list(run.policy.parameters.values()))
    assert distance(ours, dict(zip(run.policy.parameters, expected, strict=True))) < 1e-4
    assert float(torch.cat(tally.values["kl/5"]).mean()) == pytest.approx(divergence.mean().item(), rel=1e-4)


def test_one_stochastic_step_for_all_samples_of_a_prompt(tmp_path):
    """Flash-GRPO: within a group noise comes in one step, which differs between prompts; only it is recorded."""
    policy = make_policy(sampler={"kernel": "wan_linear", "noise_level": 1.0, "window": [0, 4]})
    config = Config(
        prompts_per_iteration=4,
        group_size=2,
        window=Window(size=1, move="random", per_prompt=True),
        rectify=True,
    )
    run = make_run(tmp_path, policy, config)
    run.iteration, run.row = 1, {}
    samples, _ = sample_groups(run, run.next_prompts(4), 2, lambda at: grpo.plan(run, at))
    assert sorted(row for lot in samples.lots for row in lot.rows) == list(range(8))
    assert len(samples.lots) > 1
    for lot in samples.lots:
        (recorded,) = lot.trajectory.steps
        assert lot.trajectory.stochastic == (recorded.index,)
        for row in lot.rows:
            assert row ^ 1 in lot.rows
        pair = recorded.x[:2].flatten(1)
        assert torch.equal(pair[0], pair[1])  # the ODE before the step, from shared noise
    run.open()
    grpo.train(run)
    assert run.row["ratio/first_deviation"] < 1e-6


@pytest.mark.parametrize(
    ("algorithm", "named"),
    [
        ({"objective": "guard", "rectify": True}, "algorithm.rectify"),
        ({"objective": "ppo"}, "algorithm.objective"),
        ({"keep": 1}, "algorithm.keep"),
        ({"keep": 9}, "algorithm.keep"),
        ({"keep": 4, "updates_per_rollout": 5}, "algorithm.updates_per_rollout"),
        ({"combine": "everything"}, "algorithm.combine"),
        ({"kl_moving": {0: 1.0}}, "algorithm.kl_moving"),
        ({"kl_moving": {3: -1.0}}, "algorithm.kl_moving"),
        ({"lean": True, "updates_per_rollout": 2}, "algorithm.lean"),
        ({"lean": True, "epochs": 2}, "algorithm.lean"),
        ({"lean": True, "kl": 0.1}, "algorithm.lean"),
        ({"lean": True, "kl_moving": {1: 0.1}}, "algorithm.lean"),
        ({"lean": True, "objective": "guard"}, "algorithm.lean"),
        ({"window": Window(size=9)}, "algorithm.window.size"),
        ({"window": Window(size=2), "trained_steps": 3}, "algorithm.trained_steps"),
        ({"lean": True, "rectify": True, "keep": 4, "trained_steps": 2}, None),
        ({"kl_moving": {10: 1e-5, 1: 1e-6}, "rectify": True, "objective": "dppo"}, None),
    ],
)
def test_impossible_options_are_refused(run, algorithm, named):
    with change(run, algorithm=Config(prompts_per_iteration=2, **{"group_size": 8, **algorithm})):
        lines = grpo.check(run.recipe)
    assert lines == [] if named is None else any(line.startswith(named) for line in lines)
