"""What DiffusionNFT, AWM and V-GRPO share: clean samples and their noises, over batches, processes and breaks."""

from contextlib import nullcontext

import pytest
import torch

from alignment.algorithms import awm, nft
from alignment.checkpoint import checkpoints, load_state
from alignment.config import BatchConfig
from alignment.errors import UserError
from alignment.noised import Noised, noise_seeds, sample_clean
from tests.alignment.test_grpo import change
from tests.alignment.test_resume import assert_same_run
from tests.alignment.tiny import make_policy, make_run, ode_run
from tests.alignment.two_processes import joined, spawned

SIZES = {"prompts_per_iteration": 4, "group_size": 2}
ALGORITHMS = {
    "nft": (nft, nft.Config(**SIZES, trained_steps=1, kl=0.1, updates_per_rollout=2)),
    "awm": (awm, awm.Config(**SIZES, levels=1, kl_ema=1.0, updates_per_rollout=2, surrogate="adaptive")),
}
ALGORITHMS["awm"][1].group_noise = True


def test_samples_and_noises_do_not_depend_on_the_batch(tmp_path):
    run = ode_run(tmp_path, nft.Config(prompts_per_iteration=2, group_size=3))

    def drawn(batch):
        with change(run, batch=batch):
            samples, videos, grid = sample_clean(run, run.next_prompts(2), 3)
            noised = Noised(run.policy, samples, grid[1:3], noise_seeds(run, samples, 3))
            parts = dict(
                row
                for part, trajectory in noised.batches(batch.update, [0, 2, 4])
                for row in zip(part, torch.stack([step.x for step in trajectory.steps], 1), strict=True)
            )
        return grid, parts, samples.lots[0].trajectory.steps[-1].x_next

    grid, states, clean = drawn(BatchConfig())
    assert len(grid) == run.recipe.sampler.steps + 1
    assert states.keys() == {0, 2, 4}
    _, others, _ = drawn(BatchConfig(rollout=2, update=1))
    for row, state in states.items():
        torch.testing.assert_close(others[row], state, rtol=0, atol=1e-5)
        noises = [(x - (1 - level) * clean[row]) / level for x, level in zip(state, grid[1:3], strict=True)]
        assert all(0.8 < float(noise.std()) < 1.2 for noise in noises)
        assert (noises[0] - noises[1]).abs().max() > 0.5
    seeds = []
    for run.iteration in (1, 2):
        seeds += noise_seeds(run, sample_clean(run, run.next_prompts(2), 3)[0], 3)
    assert len(set(seeds)) == 12


def test_a_higher_order_solver_changes_the_samples_alone(tmp_path):
    run = ode_run(tmp_path, nft.Config(prompts_per_iteration=1, group_size=2))
    scheduler, prompts = run.policy.scheduler, run.next_prompts(1)
    euler = sample_clean(run, prompts, 2)[0].lots[0].trajectory.steps[-1].x_next
    scheduler.tail = 1.0
    samples, _, grid = sample_clean(run, prompts, 2)
    assert (samples.lots[0].trajectory.steps[-1].x_next - euler).abs().max() > 1e-3
    noised = Noised(run.policy, samples, grid[:-1], noise_seeds(run, samples, 2))
    ((rows, trajectory),) = noised.batches(None, [0, 1])
    second = noised.velocities(rows, trajectory, nullcontext())
    scheduler.tail = None
    first = noised.velocities(rows, trajectory, nullcontext())
    assert len(first) == len(grid) - 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("algorithm", [nft, awm])
def test_pipelines_that_are_no_flow_are_refused_before_training(tmp_path, algorithm):
    policy = make_policy("cogvideox", sampler={"shared_noise": False})
    with pytest.raises(UserError) as error:
        algorithm.train(make_run(tmp_path, policy, algorithm.Config()))
    assert str(error.value).startswith("algorithm.name: needs a flow pipeline, CogVideoXPipeline runs on CogVideoXDDIM")
    assert "\n" not in str(error.value)


def trained(name, folder, **batch):
    """The weights after two iterations, the other weights that the algorithm keeps, and each update's gradients."""
    algorithm, config = ALGORITHMS[name]
    run = ode_run(folder, config)
    run.recipe.batch, gradients = BatchConfig(**batch), []
    add = run.processes.add_gradients

    def record(parameters):
        add(parameters)
        gradients.append({n: p.grad.clone() for n, p in run.policy.parameters.items()})

    run.processes.add_gradients = record
    run.evaluate = lambda iteration: {}
    run.open()
    algorithm.train(run)
    return {n: p.detach().clone() for n, p in run.policy.parameters.items()}, run.snapshots, gradients


def worker(rank, folder, port):
    processes = joined(rank, port)
    torch.save({name: trained(name, folder / f"{name}{rank}", update=3) for name in ALGORITHMS}, folder / f"{rank}.pt")
    processes.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawned(worker, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def close(ours, theirs, limit):
    return all((ours[n] - theirs[n]).norm() < limit * theirs[n].norm() for n in theirs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_processes_train_as_one(ranks, name, tmp_path):
    """Both hold the same weights, which are those of one process but for rounding, which Adam makes more of."""
    (weights, snapshots, gradients), (others, other_snapshots, _) = (rank[name] for rank in ranks)
    assert all(torch.equal(weights[n], others[n]) for n in weights)
    assert snapshots.keys() == {"old" if name == "nft" else "ema"}
    for kept, other in zip(snapshots.values(), other_snapshots.values(), strict=True):
        assert all(torch.equal(kept[n], other[n]) for n in kept)
    alone, alone_snapshots, alone_gradients = trained(name, tmp_path, rollout=4)
    assert close(gradients[0], alone_gradients[0], 1e-4)
    assert len(gradients) == len(alone_gradients)
    assert close(weights, alone, 1e-3)
    assert all(close(snapshots[k], alone_snapshots[k], 1e-3) for k in snapshots)


RESUMED = {
    "nft": {"name": "nft", "kl": 0.01, "updates_per_rollout": 2},
    "awm": {"name": "awm", "kl_ema": 1.0, "kl": 0.01, "levels": 2, "updates_per_rollout": 2, "std": "running"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_one_left_alone(command, recipe, tmp_path, name):
    recipe["algorithm"] = {"prompts_per_iteration": 2, "group_size": 2, **RESUMED[name]}
    recipe["sampler"] = {"steps": 3, "kernel": "ode", "shared_noise": False}
    alone = command(f"output={tmp_path / 'alone'}")
    assert alone.code == 0, alone.err
    stopped = command("rewards.bright.options.trouble=raise", "rewards.bright.options.at=3")
    assert stopped.code == 1
    assert command("--resume").code == 0
    assert_same_run(stopped.folder, alone.folder)
    one, two = (load_state(checkpoints(f / "checkpoints")[-1]) for f in (stopped.folder, alone.folder))
    assert one.snapshots.keys() == two.snapshots.keys() == {"old" if name == "nft" else "ema"}
    for key, weights in one.snapshots.items():
        assert all(torch.equal(t, two.snapshots[key][n]) for n, t in weights.items())
        assert any(not torch.equal(t, one.trained[n]) for n, t in weights.items())
    assert one.memory == two.memory
