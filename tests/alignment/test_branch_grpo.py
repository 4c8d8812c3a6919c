"""BranchGRPO: its gradient against an independent computation on a tiny random WanPipeline, its work, and its loop.

Most tests grow two trees of five steps that split in two at steps 0 and 2: 2, 2, 4 and 4 trained edges a tree.
"""

import contextlib
import json
import math

import diffusers
import pytest
import torch
from PIL import Image
from torch.distributions import Normal

from alignment.algorithms import branch_grpo
from alignment.algorithms.branch_grpo import Config, own_signal, plan
from alignment.config import (
    BatchConfig,
    EvaluationConfig,
    LoRAConfig,
    OptimizerConfig,
    Recipe,
    RewardConfig,
)
from alignment.tally import Tally
from alignment.tree_advantages import counts
from alignment.trees import TreeShape, sample_trees
from alignment.windows import Window
from tests.alignment.tiny import GUIDANCE, NOISE, make_policy, make_run, shake
from tests.alignment.two_processes import joined, spawned
from tests.pipelines import STEPS

NAN = math.nan
REWARDS = torch.tensor([[1.0, 4.0, 2.0, 9.0], [5.0, 3.0, 8.0, 7.0]])
WIDTHS = [1, 2, 2, 4, 4, 4]  # nodes of a tree, by depth


def branch_run(folder, sampler=None, call=None, recipe=None, **algorithm):
    """A run in its first iteration, its weights off the reference."""
    options = {"kernel": "dance", "noise_level": NOISE, **(sampler or {})}
    policy = make_policy(sampler=options, call={"guidance_scale": GUIDANCE, **(call or {})})
    shake(policy)
    sizes = {"prompts_per_iteration": 2, "splits": [0, 2], "clip": 10.0}
    run = make_run(folder, policy, Config(**{**sizes, **algorithm}), **(recipe or {}))
    run.iteration, run.row = 1, {}
    return run


def sample(run):
    config = run.recipe.algorithm
    shape = TreeShape(run.recipe.sampler.steps, config.splits, config.branching, config.spread)
    return sample_trees(run, run.next_prompts(config.prompts_per_iteration), shape, lambda at: plan(run, at))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return branch_run(tmp_path_factory.mktemp("branch"))


@pytest.fixture(scope="module")
def segments(run):
    return sample(run)[0]


@contextlib.contextmanager
def change(run, batch=None, **algorithm):
    """Other settings for the same run, for a while."""
    config = run.recipe.algorithm
    with pytest.MonkeyPatch.context() as patch:
        for name, value in algorithm.items():
            patch.setattr(config, name, value)
        patch.setattr(run.recipe, "batch", batch or run.recipe.batch)
        yield


@contextlib.contextmanager
def moved(policy):
    """Weights that are not those of the rollout, for a while."""
    kept = {n: p.detach().clone() for n, p in policy.parameters.items()}
    shake(policy, 0.01, seed=1)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in policy.parameters.items():
                p.copy_(kept[name])


def gradient(run, segments, rewards=REWARDS, part=0, tally=None):
    """The gradient of one update, which is not taken, and its number of edges."""
    prompts = [prompt for _, prompt in run.next_prompts(run.recipe.algorithm.prompts_per_iteration)]
    signal, found = own_signal(run, segments, rewards.flatten()), {}

    def keep():
        found.update({n: p.grad.clone() for n, p in run.policy.parameters.items()})
        run.optimizer.zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "apply_update", keep)
        edges = branch_grpo.update(run, prompts, segments, signal, part, tally or Tally())
    return torch.cat([g.flatten() for g in found.values()]), edges


def log_probs(run, segments):
    """Step -> (trees, edges) log-probabilities, from DanceGRPO's paper over the bare transformer, parent by parent."""
    pipe, found = run.policy.pipe, {}
    stock = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    stock.set_timesteps(STEPS)
    texts = [prompt.text for _, prompt in run.next_prompts(2)]
    with torch.no_grad():
        embedded = [e.chunk(2) for e in pipe.encode_prompt(texts, max_sequence_length=32)]
    for recorded in (step for rows in segments for step in rows.trajectory.steps):
        x, now, after = recorded.x, float(stock.sigmas[recorded.index]), float(stock.sigmas[recorded.index + 1])
        width = len(x) // 2
        positive, negative = (torch.cat([part.expand(width, -1, -1) for part in parts]) for parts in embedded)
        timestep = stock.timesteps[recorded.index].expand(len(x))
        v, v_negative = (pipe.transformer(x, timestep, text)[0] for text in (positive, negative))
        v = v_negative + GUIDANCE * (v - v_negative)
        mean = x + (after - now) * (v + NOISE**2 / (2 * now) * (x + (1 - now) * v))
        children = recorded.x_next.view(len(x), -1, *x.shape[1:])
        density = Normal(mean.unsqueeze(1), NOISE * math.sqrt(now - after)).log_prob(children)
        found[recorded.index] = density.flatten(2).mean(2).view(2, -1)
    return found


def advantages(rewards=REWARDS):
    """Step -> (trees, edges): how many deviations the child's leaves lie above those of its depth and tree."""
    found = {}
    for step in range(STEPS - 1):
        values = rewards.view(2, WIDTHS[step + 1], -1).nanmean(2)
        mean = values.nanmean(1, keepdim=True)
        std = (values - mean).square().nanmean(1, keepdim=True).sqrt()
        found[step] = ((values - mean) / std).nan_to_num(0.0)
    return found


def expected(run, segments, rewards=REWARDS, old=None, clip=10.0, kept=None):
    """Autograd of the mean over kept edges of max(-A r, -A clip(r)); kept: step -> (trees, edges) bool."""
    now, worth = log_probs(run, segments), advantages(rewards)
    losses = []
    for step in worth:
        ratio = (now[step] - (now[step].detach() if old is None else old[step])).exp()
        surrogate = torch.maximum(-worth[step] * ratio, -worth[step] * ratio.clamp(1 - clip, 1 + clip))
        losses.append(surrogate[kept[step]] if kept and step in kept else surrogate.flatten())
    losses = torch.cat(losses)
    found = torch.autograd.grad(losses.mean(), list(run.policy.parameters.values()))
    return torch.cat([g.flatten() for g in found]), len(losses)


def distance(one, other):
    return float((one - other).norm() / other.norm())


def test_gradient_is_that_of_the_edges(run, segments):
    """At ratio 1: the mean over edges of -A grad log p, every edge with its child's advantage."""
    ours, edges = gradient(run, segments)
    theirs, number = expected(run, segments)
    assert edges == number == 24
    assert distance(ours, theirs) < 1e-5


def test_gradient_away_from_the_rollout(run, segments):
    """Ratios to the policy that sampled, of siblings too; a clip that takes some edges away and leaves others."""
    with torch.no_grad():
        old = log_probs(run, segments)
    for clip in (10.0, 1e-3):
        tally = Tally()
        with change(run, clip=clip), moved(run.policy):
            ours = gradient(run, segments, tally=tally)[0]
            theirs = expected(run, segments, old=old, clip=clip)[0]
        assert distance(ours, theirs) < 1e-3
    assert 0.1 < torch.cat(tally.values["clipped"]).mean() < 0.9


@pytest.mark.parametrize(
    ("settings", "kept", "edges"),
    [
        ({"prune": "parent_top1"}, [[0, 1, 0, 1], [1, 0, 1, 0]], 20),
        ({"prune": "extreme", "extreme": 1}, [[1, 0, 0, 1], [0, 1, 1, 0]], 20),
        ({"prune": "depth", "pruned_steps": 1}, [[0] * 4] * 2, 16),
    ],
)
def test_pruning_takes_edges_out_of_the_gradient_alone(run, segments, settings, kept, edges):
    """Edges of the steps after the last split, step 3; advantages and the other edges stay as they are."""
    with change(run, **settings):
        ours, number = gradient(run, segments)
    theirs, _ = expected(run, segments, kept={3: torch.tensor(kept, dtype=torch.bool)})
    assert number == edges
    assert distance(ours, theirs) < 1e-5


def test_leaves_without_a_reward_are_left_out(run, segments):
    """Of values and spreads; their own edges have no advantage."""
    for rewards in (
        torch.tensor([[1.0, NAN, 2.0, 9.0], [5.0, 3.0, 8.0, 7.0]]),
        REWARDS.index_fill(0, torch.tensor(0), NAN),
    ):
        ours, edges = gradient(run, segments, rewards)
        assert edges == 24
        assert distance(ours, expected(run, segments, rewards)[0]) < 1e-5
    assert run.row["groups/zero_spread"] == 0.5


def test_first_ratio_is_exactly_one(run, segments):
    tally, later = Tally(), Tally()
    gradient(run, segments, tally=tally)
    first = torch.cat(tally.values["first"])
    assert len(first) == 24
    assert first.abs().max() == 0
    with moved(run.policy):
        gradient(run, segments, tally=later)
    assert torch.cat(later.values["first"]).abs().min() > 1e-6


def test_batches_change_nothing(run, segments):
    whole, videos = gradient(run, segments)[0], sample(run)[1]
    for size in (1, 3):
        with change(run, BatchConfig(update=size)):
            assert distance(gradient(run, segments)[0], whole) < 1e-5
    with change(run, BatchConfig(rollout=3)):
        torch.testing.assert_close(sample(run)[1], videos, rtol=0, atol=1e-5)


def test_a_tree_depends_on_its_prompt_and_iteration_alone(run, segments):
    """Not on the process that grows it; another iteration or seed grows another."""
    videos = sample(run)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.processes, "count", 2)
        for rank in (0, 1):
            patch.setattr(run.processes, "rank", rank)
            torch.testing.assert_close(sample(run)[1], videos[4 * rank : 4 * rank + 4], rtol=0, atol=1e-5)
    starts = [segments[0].trajectory.steps[0].x[:1]]
    for owner, name, value in ((run, "iteration", 2), (run.recipe, "seed", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, value)
            starts.append(sample(run)[0][0].trajectory.steps[0].x[:1])
    assert torch.pdist(torch.cat([*starts, segments[0].trajectory.steps[0].x[1:]]).flatten(1)).min() > 1


def test_parts_are_trees(run, segments):
    """Two updates: each on one tree; their gradients add up to that of the whole."""
    whole = gradient(run, segments)[0]
    with change(run, updates_per_rollout=2):
        parts = [gradient(run, segments, part=part) for part in (0, 1)]
    assert [edges for _, edges in parts] == [12, 12]
    assert distance((parts[0][0] + parts[1][0]) / 2, whole) < 1e-5
    assert distance(parts[0][0], parts[1][0]) > 0.1


def test_path_weights(tmp_path):
    """Leaves below a node count as softmax(weight * log-probability of the way from the node to the leaf)."""
    run = branch_run(tmp_path, branching=3, path_weight=40.0)
    segments, rewards = sample(run)[0], torch.arange(18.0).roll(5).square()
    found = own_signal(run, segments, rewards)
    paths = {rows.splits: [s.log_prob.double() for s in rows.trajectory.steps] for rows in segments}
    after = paths[2][0]  # step 3, and step 4 adds no noise
    second = paths[1][1] + after
    first = paths[1][0].repeat_interleave(3) + second
    for depth, path in ((1, first), (2, second), (3, after)):
        nodes = 9 if depth == 3 else 3
        weights = (40.0 * path).view(2, nodes, -1).softmax(2)
        values = (weights * rewards.view(2, nodes, -1)).sum(2)
        theirs = (values - values.mean(1, keepdim=True)) / values.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(found.advantages[depth].view(2, -1), theirs.float(), rtol=0, atol=1e-4)
    with change(run, path_weight=0.0):
        plain = own_signal(run, segments, rewards)
    assert (plain.advantages[1] - found.advantages[1]).abs().max() > 0.01


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The paper's tree, noise on all of its 20 steps."""
    sampler, call = {"steps": 20, "window": [0, 20]}, {"guidance_scale": 1.0}
    recipe = {"evaluation": EvaluationConfig(num_prompts=1, videos=1)}
    splits = {"splits": [0, 3, 6, 9], "prompts_per_iteration": 1}
    run = branch_run(tmp_path_factory.mktemp("published"), sampler, call, recipe, **splits)
    before = run.policy.evaluations
    segments = sample(run)[0]
    assert run.policy.evaluations - before == 203
    return run, segments


@pytest.mark.parametrize(
    ("settings", "edges", "parents"),
    [
        ({}, 218, 203),
        ({"prune": "parent_top1"}, 138, 123),
        ({"prune": "extreme"}, 138, 123),
        ({"prune": "depth"}, 154, 139),
        ({"window": Window(size=4, move="frozen")}, 34, 19),
    ],
    ids=["dense", "parent_top1", "extreme", "depth", "mix"],
)
def test_work_at_the_published_setting(published, settings, edges, parents):
    """Rows through the transformer: those of the rollout once a state, those of the update once a parent."""
    run, segments = published
    with change(run, **settings):
        if "window" in settings:
            before = run.policy.evaluations
            segments = sample(run)[0]
            assert run.policy.evaluations - before == counts(20, [0, 3, 6, 9], 2).forwards
            noisy = [s.index for rows in segments for s in rows.trajectory.steps]
            assert noisy == [0, 1, 2, 3, 6, 9]
            assert {rows.trajectory.stochastic for rows in segments} == {(0, 1, 2, 3, 6, 9)}
        before = run.policy.evaluations
        _, number = gradient(run, segments, torch.randn(16, generator=torch.Generator().manual_seed(0)))
        assert number == edges
        assert run.policy.evaluations - before == parents


def test_depth_pruning_records_only_what_it_trains(run):
    """Its window moves on; with path weights every log-probability is needed."""
    with change(run, prune="depth", pruned_steps=1, prune_every=2):
        assert plan(run, 0).recorded == (0, 1, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "iteration", 3)
            assert plan(run, 0).recorded == (0, 1, 2, 3)  # step 4 is left out now, and adds no noise anyway
        with change(run, path_weight=1.0):
            assert plan(run, 0).recorded == (0, 1, 2, 3)


def metrics(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def trained(run):
    run.open()
    branch_grpo.train(run)
    return metrics(run)


def test_metrics_of_an_iteration(tmp_path):
    run = branch_run(tmp_path, updates_per_rollout=2, clip=1e-4, prune="extreme", extreme=1)
    for row in trained(run):
        assert (row["tree/leaves"], row["tree/edges"]) == (4, 10)
        assert row["nfe/rollout"] == 2 * 2 * (1 + 2 + 2 + 4 + 4)  # guidance doubles
        assert row["nfe/update"] == 2 * 2 * (1 + 2 + 2 + 2)
        assert row["advantage/std"] == pytest.approx(1, rel=1e-4)
        assert row["depth/1/advantage_std"] == row["depth/3/advantage_std"] == pytest.approx(1, rel=1e-4)
        assert 0 < row["depth/1/value_std"] < row["depth/3/value_std"]
        assert row["ratio/first_deviation"] < 1e-6 < row["ratio/max_deviation"]
        assert row["clip_fraction/before_update"] == 0
        assert sum(value for name, value in row.items() if name.startswith("gradient_share/")) == pytest.approx(1)
        assert row["drift/weights"] > 0


def test_pipelines_that_take_no_initial_state(tmp_path):
    """Prompts with images of their own, row by row. Every row that enters a segment runs once more; in a rollout the
    first ones do not."""
    policy = make_policy("ltx_image_to_video", call={"guidance_scale": 1.0})
    shake(policy, 0.02)
    config = Config(prompts_per_iteration=2, splits=[0, 2], clip=1.0)
    run = make_run(tmp_path, policy, config, iterations=1, batch=BatchConfig(rollout=1, update=1))
    for number, prompt in enumerate(run.stream.prompts):
        image = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 64), (60 * number, 80, 30)).save(image)
        run.stream.prompts[number] = prompt._replace(image=str(image))
    row = trained(run)[0]
    assert row["ratio/first_deviation"] == 0
    assert row["tree/edges"] == 12
    assert row["nfe/rollout"] == 2 * (1 + 2 + 2 + 4 + 4 + 2 + 4)
    assert row["nfe/update"] == 2 * (1 + 2 + 2 + 4 + 1 + 2 + 4)
    assert row["grad_norm"] > 0


# Windows differ between prompts, so trees have 6 trained edges or 8.
SHARED = {
    "prompts_per_iteration": 4,
    "updates_per_rollout": 2,
    "clip": 1e-3,
    "path_weight": 0.5,
    "prune": "extreme",
    "extreme": 1,
    "window": Window(size=1, move="random", per_prompt=True),
}


def weights_after_training(folder, **batch):
    run = branch_run(folder, recipe={"iterations": 1, "batch": BatchConfig(**batch)}, **SHARED)
    gradients, busy, add = [], [], run.processes.add_gradients

    def record(parameters):
        parameters = list(parameters)
        busy.append(any(p.grad is not None for p in parameters))
        add(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    run.processes.add_gradients = record
    run.open()
    branch_grpo.train(run)
    row = metrics(run)[0] if run.processes.is_main else None
    weights = torch.cat([p.detach().flatten() for p in run.policy.parameters.values()])
    return {"weights": weights, "gradients": gradients, "busy": busy, "row": row, "processes": run.processes}


def worker(rank, folder, port):
    joined(rank, port)
    found = weights_after_training(folder / "shared" if rank == 0 else folder / "other", update=3)
    processes = found.pop("processes")
    torch.save(found, folder / f"{rank}.pt")
    processes.wait()
    processes.close()


def test_two_processes_train_as_one(tmp_path):
    spawned(worker, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = weights_after_training(tmp_path / "alone", rollout=5, update=2)
    assert 6 < alone["row"]["tree/edges"] < 8
    assert first["busy"] == second["busy"] == [True, True]  # every part has trees in every process
    assert torch.equal(first["weights"], second["weights"])
    for ours, theirs in zip(first["gradients"], alone["gradients"], strict=True):
        assert distance(ours, theirs) < 1e-2
    assert distance(first["weights"], alone["weights"]) < 1e-3
    assert first["row"].keys() == alone["row"].keys()
    for name in ("tree/edges", "nfe/rollout", "nfe/update", "groups/spread_share", "depth/1/value_std", "loss"):
        assert first["row"][name] == pytest.approx(alone["row"][name], rel=1e-2, abs=2e-6), name


def test_it_learns(tmp_path):
    """Brightness rises by many times its spread, on held-out noise too."""
    policy = make_policy(
        "stable_diffusion_3",
        model={"lora": LoRAConfig(rank=8, alpha=16, targets=["to_v", "to_out.0", "proj_out"])},
        sampler={"noise_level": 0.7},
        call={"guidance_scale": 1.0},
    )
    run = make_run(
        tmp_path,
        policy,
        Config(prompts_per_iteration=2, splits=[0, 1, 2]),
        iterations=5,
        rewards={"brightness": RewardConfig(use="tests.alignment.tiny:brightness")},
        optimizer=OptimizerConfig(lr=0.03),
        evaluation=EvaluationConfig(num_prompts=4, videos=1),
    )
    rows = trained(run)
    assert rows[-1]["reward/mean"] - rows[0]["reward/mean"] > 3 * rows[0]["reward/std"]
    before, after = (json.loads((run.folder / f"samples/{i:06d}/scores.json").read_text()) for i in (0, 5))
    pairs = zip(before["values"]["reward/mean"], after["values"]["reward/mean"], strict=True)
    assert all(b < a for b, a in pairs)


def refused(**sections):
    """Lines about a recipe that differs from a good one in these values."""
    recipe = Recipe(name="x", algorithm=Config())
    for name, values in sections.items():
        for key, value in values.items():
            setattr(getattr(recipe, name), key, value)
    return branch_grpo.check(recipe, processes=2)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, None),
        ({"sampler": {"window": [0, 20]}, "algorithm": {"splits": [0, 18], "window": Window(size=4)}}, None),
        ({"algorithm": {"prune": "extreme", "extreme": 8}}, None),
        ({"algorithm": {"prune": "depth", "pruned_steps": 10}}, None),
        ({"sampler": {"kernel": "ode"}}, "sampler: "),
        ({"sampler": {"noise_level": 0.0}}, "sampler: "),
        ({"sampler": {"window": [3, 3]}}, "sampler.window"),
        ({"sampler": {"window": [3, 21]}}, "sampler.window"),
        ({"sampler": {"kernel": "cps", "window": [0, 20]}}, "sampler.window"),
        ({"sampler": {"kernel": "ddim", "window": [0, 20]}}, "sampler.window"),
        ({"sampler": {"shared_noise": False}}, "sampler.shared_noise"),
        ({"sampler": {"tail": 0.5}}, "sampler.tail"),
        ({"sampler": {"window": [1, 19]}}, "algorithm.splits: [0] "),
        ({"sampler": {"window": [0, 9]}}, "algorithm.splits: [9] "),
        ({"sampler": {"window": [0, 20]}, "algorithm": {"splits": [0, 19]}}, "algorithm.splits: [19] "),
        ({"algorithm": {"splits": [-1, 3]}}, "algorithm.splits: [-1] "),
        ({"algorithm": {"splits": []}}, "algorithm.splits"),
        ({"algorithm": {"splits": [3, 0]}}, "algorithm.splits"),
        ({"algorithm": {"splits": [3, 3]}}, "algorithm.splits"),
        ({"algorithm": {"branching": 1}}, "algorithm.branching"),
        ({"algorithm": {"prompts_per_iteration": 3}}, "algorithm.prompts_per_iteration"),
        ({"algorithm": {"updates_per_rollout": 5}}, "algorithm.updates_per_rollout"),
        ({"algorithm": {"updates_per_rollout": 0}}, "algorithm.updates_per_rollout"),
        ({"algorithm": {"window": Window(size=20)}}, "algorithm.window.size"),
        ({"algorithm": {"clip": 0.0}}, "algorithm: "),
        ({"algorithm": {"spread": 0.0}}, "algorithm: "),
        ({"algorithm": {"path_weight": -1.0}}, "algorithm: "),
        ({"algorithm": {"prune": "width"}}, "algorithm.prune: "),
        ({"algorithm": {"prune": "extreme", "extreme": 9}}, "algorithm.extreme"),
        ({"algorithm": {"prune": "extreme", "extreme": 0}}, "algorithm.extreme"),
        ({"algorithm": {"prune": "depth", "pruned_steps": 11}}, "algorithm.pruned_steps"),
        ({"algorithm": {"prune": "depth", "prune_every": 0}}, "algorithm.prune_every"),
        ({"model": {"dtype": "float16"}}, "model.dtype"),
    ],
)
def test_impossible_combinations_are_refused(sections, named):
    lines = refused(**sections)
    assert lines == [] if named is None else any(line.startswith(named) for line in lines)
