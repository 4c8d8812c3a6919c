"""Updates on pairs: what the loss sees, against the network called directly; and what the loop makes of the samples."""

import numpy as np
import pytest
import torch

from alignment.algorithms import flow_dpo
from alignment.config import BatchConfig, RewardConfig
from alignment.errors import UserError
from alignment.pairs import close_iteration, reference_weights, sampled_examples, update
from alignment.preference import Example, batches, look_at_pipeline
from alignment.preference_losses import draw_levels
from alignment.tally import Tally
from samplers import seed_for
from tests.alignment.tiny import make_policy, make_run, shake
from tests.pipelines import PROMPTS, STEPS

UNGUIDED = {"guidance_scale": 1.0}


def pair_run(folder, algorithm=None, family="wan", **recipe):
    """A run in its first iteration, not guided, weights off the reference."""
    call = {} if family == "hunyuan_video" else UNGUIDED
    policy = make_policy(family, sampler={"kernel": "ode", "shared_noise": False}, call=call)
    config = algorithm or flow_dpo.Config(beta=20.0, prompts_per_iteration=2, group_size=3)
    run = make_run(folder, policy, config, **recipe)
    look_at_pipeline(policy, config, run.stream.prompts[0])
    shake(policy)
    run.iteration, run.row = 1, {}
    return run


def random_examples(run, count=3, seed=0, **fields):
    """Pairs of random states."""
    draw = torch.Generator().manual_seed(seed)
    shape = run.policy.rollout([PROMPTS[0]], [0], [0], []).state.shape[1:]
    prompts = run.stream.prompts
    states = [torch.randn((2, *shape), generator=draw) for _ in range(count)]
    return [
        Example(prompts[i % len(prompts)], 100 + i, lambda pair=pair: (pair, None), **fields)
        for i, pair in enumerate(states)
    ]


def gradients(run):
    found = {name: p.grad.clone() for name, p in run.policy.parameters.items() if p.grad is not None}
    for p in run.policy.parameters.values():
        p.grad = None
    return found


def accumulate(run, examples, loss, monkeypatch):
    """The gradient of one update, without its step."""
    monkeypatch.setattr(run, "apply_update", lambda: None)
    tally = Tally()
    update(run, examples, loss, tally)
    return gradients(run), tally


def dpo(run, tally):
    return lambda errors, reference, batch: flow_dpo.losses(run, tally, errors, reference, batch)


def direct_error(run, clean, noise, level, prompt):
    """The matching error of one sample, from Wan's transformer called by itself."""
    pipe = run.policy.pipe
    x = (1 - level) * clean + level * noise
    text = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    stock = run.policy.stock  # whose timesteps are not exactly 1000 times its levels
    stock.set_timesteps(STEPS)
    timestep = np.interp(level, stock.sigmas.flip(0), [*stock.timesteps.tolist(), 0.0][::-1])
    velocity = pipe.transformer(
        hidden_states=x[None], timestep=torch.tensor([timestep]).float(), encoder_hidden_states=text, return_dict=False
    )[0][0]
    return (velocity - (noise - clean)).square().mean()


def test_update_equals_the_loss_on_the_network_called_directly(tmp_path, monkeypatch):
    run = pair_run(tmp_path)
    examples = random_examples(run)
    run.policy.call["max_sequence_length"] = 16
    found, _ = accumulate(run, examples, dpo(run, Tally()), monkeypatch)
    levels = draw_levels("logit_normal", [seed_for(e.seed, "level") for e in examples])
    total = 0.0
    for example, level in zip(examples, levels, strict=True):
        pair, _ = example.load()
        noise = torch.randn(pair[:1].shape, generator=torch.Generator().manual_seed(seed_for(example.seed, "noise")))[0]
        errors = [direct_error(run, clean, noise, level, example.prompt.text) for clean in pair]
        with run.policy.reference():
            before = [direct_error(run, clean, noise, level, example.prompt.text) for clean in pair]
        z = -10.0 * ((errors[0] - before[0]) - (errors[1] - before[1]))
        total = total + torch.log1p(torch.exp(-z)) / len(examples)
    total.backward()
    wanted = gradients(run)
    assert found.keys() == wanted.keys()
    size = max(float(g.abs().max()) for g in wanted.values())
    assert size > 1e-4
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=1e-3 * size), name


def test_micro_batches_change_nothing(tmp_path, monkeypatch):
    run = pair_run(tmp_path)
    assert run.policy.levels_each
    examples, found = random_examples(run, 4), []
    for size in (None, 2, 1):
        run.recipe.batch = BatchConfig(update=size)
        found.append(accumulate(run, examples, dpo(run, Tally()), monkeypatch)[0])
    run.recipe.batch = BatchConfig()
    run.policy.levels_each = False  # one example at a time
    found.append(accumulate(run, examples, dpo(run, Tally()), monkeypatch)[0])
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, other[name], atol=1e-5, rtol=1e-3), name


def test_at_the_reference_the_loss_is_log_2_whatever_the_pair(tmp_path, monkeypatch):
    run = pair_run(tmp_path)
    with torch.no_grad():
        for p in run.policy.parameters.values():
            p.zero_()
    tally = Tally()
    accumulate(run, random_examples(run), dpo(run, tally), monkeypatch)
    found = tally.metrics(run)
    assert found["implicit_accuracy"] == 0.5
    assert found["margin/size"] == 0
    assert found["error/winner"] == found["error/loser"] == 1


@pytest.mark.parametrize("family", ["wan", "ltx", "hunyuan_video", "mochi"])
def test_pairs_of_any_flow_family_are_at_the_reference_before_training(tmp_path, family, monkeypatch):
    run = pair_run(tmp_path, family=family)
    with run.policy.using({name: torch.zeros_like(p) for name, p in run.policy.parameters.items()}):
        for batch in batches(run, random_examples(run, 2)):
            reference = batch.errors_under(reference_weights(run))
            assert reference.shape == (2, 2)
            assert torch.equal(reference, batch.errors_under(torch.no_grad()))


def test_identical_members_teach_nothing(tmp_path, monkeypatch):
    run = pair_run(tmp_path)
    examples = random_examples(run, 2)

    def doubled(example):
        better = example.load()[0][:1]
        return example._replace(load=lambda: (better.repeat_interleave(2, 0), None))

    same = [doubled(example) for example in examples]
    different, _ = accumulate(run, examples, dpo(run, Tally()), monkeypatch)
    alike, _ = accumulate(run, same, dpo(run, Tally()), monkeypatch)
    size = max(float(g.abs().max()) for g in different.values())
    assert all(float(g.abs().max()) < 1e-4 * size for g in alike.values())


def test_noise_of_a_pair(tmp_path):
    run = pair_run(tmp_path)
    example = random_examples(run, 1)[0]
    pair = example.load()[0]
    own = torch.randn(pair.shape, generator=torch.Generator().manual_seed(9))
    example = example._replace(load=lambda: (pair, own))
    (shared,) = batches(run, [example], "shared")
    (apart,) = batches(run, [example], "independent")
    (kept,) = batches(run, [example], "own")
    assert torch.equal(shared.noises[0], shared.noises[1])
    assert not torch.equal(apart.noises[0], apart.noises[1])
    assert torch.equal(kept.noises, own)
    x = kept.trajectory.steps[0].x
    level = float(kept.levels)
    assert torch.allclose(x, (1 - level) * kept.clean + level * own)


def test_sampled_pairs_are_the_best_and_the_worst_of_each_group(tmp_path):
    run = pair_run(tmp_path)
    run.policy.sampler.shared_noise = False
    updates = list(sampled_examples(run))
    assert len(updates) == 4
    assert [len(examples) for examples in updates] == [2, 2, 2, 2]
    assert len({example.seed for examples in updates for example in examples}) == 8
    group = run.policy.rollout(
        [updates[0][0].prompt.text] * 3,
        [seed_for(0, "latents", 1, 0, member) for member in range(3)],
        [seed_for(0, "noise", 1, 0, member) for member in range(3)],
        [],
        stochastic=(),
    )
    brightness = group.frames.mean((1, 2, 3, 4))
    states = updates[0][0].load()[0]
    assert torch.allclose(states[0], group.state[brightness.argmax()], atol=1e-5)
    assert torch.allclose(states[1], group.state[brightness.argmin()], atol=1e-5)
    # Clean states, not those of a step before: the pipeline decodes them to the videos that were scored.
    videos = run.policy.decode(states, [updates[0][0].prompt.text] * 2)
    assert torch.allclose(videos.mean((1, 2, 3, 4)), torch.stack([brightness.max(), brightness.min()]), atol=1e-5)


def alike(videos, prompts):
    return [1.0] * len(videos)


def test_a_group_of_equals_makes_no_pair_and_no_update(tmp_path):
    rewards = {"alike": RewardConfig(use="tests.alignment.test_pairs:alike")}
    run = pair_run(tmp_path, rewards=rewards)
    before = {name: p.detach().clone() for name, p in run.policy.parameters.items()}
    tally = Tally()
    for examples in sampled_examples(run):
        assert examples == []
        update(run, examples, dpo(run, tally), tally)
    assert run.row["pairs"] == 0
    assert run.row["pairs/tied"] == 1
    assert all(torch.equal(before[name], p) for name, p in run.policy.parameters.items())


def test_run_learns_what_it_is_rewarded_for(tmp_path):
    config = flow_dpo.Config(beta=50.0, prompts_per_iteration=2, group_size=4, updates_per_rollout=2)
    run = pair_run(tmp_path, config, iterations=6)
    run.open()
    flow_dpo.train(run)
    rows = run.metrics.rows
    assert rows[-1]["eval/reward/mean"] > rows[0]["reward/mean"]


def test_reference_is_renewed(tmp_path):
    config = flow_dpo.Config(beta=50.0, prompts_per_iteration=2, group_size=3, renew_reference=1, updates_per_rollout=2)
    run = pair_run(tmp_path, config, iterations=2)
    run.open()
    flow_dpo.train(run)
    now = {name: p.detach() for name, p in run.policy.parameters.items()}
    assert all(torch.equal(run.snapshots["reference"][name], p) for name, p in now.items())


def test_run_ends_where_the_better_members_drift_away(tmp_path):
    config = flow_dpo.Config(prompts_per_iteration=2, group_size=3, max_winner_error=1.02)
    run = pair_run(tmp_path, config)
    tally = Tally()
    tally.add("error/winner", torch.tensor([1.01, 1.05]))
    close_iteration(run, tally)
    assert "max_winner_error is 1.02" in run.memory["ended"]
    assert run._ended()
    run.memory.clear()
    tally = Tally()
    tally.add("error/winner", torch.tensor([1.01, 1.02]))
    close_iteration(run, tally)
    assert not run._ended()


def test_guidance_in_the_update_is_refused(tmp_path):
    policy = make_policy(sampler={"kernel": "ode"}, call={"guidance_scale": 3.0})
    config = flow_dpo.Config()
    run = make_run(tmp_path, policy, config)
    with pytest.raises(UserError, match="guidance_scale: 1.0"):
        look_at_pipeline(policy, config, run.stream.prompts[0])
    config.call = {"guidance_scale": 1.0}
    look_at_pipeline(policy, config, run.stream.prompts[0])
    assert policy.levels_each


def test_two_experts_take_one_level_at_a_time(tmp_path, monkeypatch):
    run = pair_run(tmp_path, family="wan_two_experts")
    assert not run.policy.levels_each
    assert [len(batch.levels) for batch in batches(run, random_examples(run, 3))] == [1, 1, 1]
