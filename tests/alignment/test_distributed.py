"""Two processes (gloo, CPU) against one: the same weights after every update, the same metrics."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from alignment.algorithms import grpo
from alignment.config import BatchConfig
from alignment.distributed import Processes
from alignment.windows import Window
from tests.alignment.tiny import grpo_run
from tests.alignment.two_processes import joined, spawned

PLAIN = {"prompts_per_iteration": 4, "updates_per_rollout": 2, "kl": 0.1, "clip": 1e-3}
# Prompts have windows of their own, so ranks run other steps; half of every group is trained; anchors move.
WINDOWS = {
    "prompts_per_iteration": 4,
    "updates_per_rollout": 2,
    "keep": 2,
    "window": Window(size=2, move="random", per_prompt=True),
    "rectify": True,
    "std": "running",
    "kl_moving": {1: 0.1},
}
TRAININGS = {"plain": PLAIN, "windows": WINDOWS}


def updates(folder: Path, algorithm: dict, **batch) -> list[dict[str, torch.Tensor]]:
    """Train two iterations; the weights after each of the four updates, and the gradients that led there."""
    run, after = grpo_run(folder, **algorithm), []
    run.recipe.batch = BatchConfig(**batch)
    add = run.processes.add_gradients

    def record(parameters):
        parameters = list(parameters)
        add(parameters)
        gradients = {f"grad/{n}": p.grad.clone() for n, p in run.policy.parameters.items()}
        after.append({n: p.detach().clone() for n, p in run.policy.parameters.items()} | gradients)

    run.processes.add_gradients = record
    run.open()
    grpo.train(run)
    after.append({n: p.detach().clone() for n, p in run.policy.parameters.items()})
    return after


def collectives(processes: Processes) -> dict:
    """Every collective once, on data that tells the ranks apart."""
    rank = processes.rank
    deal = processes.share(list(range(7)))  # 4 and 3 of them
    first, second, third = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = torch.tensor([1.0 + rank, 10.0])
    if rank == 1:
        second.grad = torch.tensor([3.0, 4.0])
    processes.add_gradients(p for p in (first, second, third))
    return {
        "share": deal,
        "gather": processes.gather(torch.tensor(deal)[:, None] * torch.ones(1, 2)),
        "one empty": processes.gather(torch.full((rank, 3), 5, dtype=torch.int64)),
        "both empty": processes.gather(torch.zeros(0, 3)),
        "flags": processes.gather(torch.tensor([rank == 1, True])),
        "gradients": [p.grad for p in (first, second, third)],
        "sum": processes.sum(torch.tensor([1.0, rank])),
        "any": [processes.any(rank == 1), processes.any(False)],
        "union": processes.union([["a", "b/c"], ["b/c", "d"]][rank]),
        "main": processes.is_main,
    }


def worker(rank: int, folder: Path, port: int) -> None:
    processes = joined(rank, port)
    found = {"collectives": collectives(processes)}
    processes.wait()
    for name, algorithm in TRAININGS.items():
        found[name] = updates(folder / name if rank == 0 else folder / f"other {name}", algorithm, update=3)
    torch.save(found, folder / f"{rank}.pt")
    processes.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    spawned(worker, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module", params=TRAININGS)
def training(request):
    return request.param


@pytest.fixture(scope="module")
def alone(tmp_path_factory, training):
    """The same training in one process, accumulated over batches of another size.

    Rollouts of as many rows as a rank has, so that rewards round alike: their spread is 1e-4 of their size.
    """
    folder = tmp_path_factory.mktemp("alone")
    return folder, updates(folder, TRAININGS[training], rollout=8, update=5)


def test_collectives(ranks):
    first, second = (rank["collectives"] for rank in ranks)
    assert (first["main"], second["main"]) == (True, False)
    assert first["share"] == [0, 2, 4, 6]
    assert second["share"] == [1, 3, 5]
    for found in (first, second):
        assert found["gather"].tolist() == [[i, i] for i in range(7)]
        assert found["one empty"].tolist() == [[5, 5, 5]]
        assert found["both empty"].shape == (0, 3)
        assert found["flags"].tolist() == [False, True, True, True]
        assert found["sum"].tolist() == [2, 1]
        assert found["any"] == [True, False]
        assert found["union"] == ["a", "b/c", "d"]
        assert [g.tolist() for g in found["gradients"][:2]] == [[3, 20], [3, 4]]
        assert found["gradients"][2] is None  # as with one process, where the optimiser passes over it


def test_both_ranks_hold_the_same_weights_after_every_update(ranks, training):
    first, second = (rank[training] for rank in ranks)
    assert len(first) == len(second) == 5
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    for before, after in zip(first, first[1:], strict=False):
        assert all(not torch.equal(before[name], after[name]) for name in after if not name.startswith("grad/"))


def test_two_processes_are_one_with_accumulation(ranks, alone, training):
    """Adam divides by the gradient's size, so rounding shows in entries whose gradient is next to nothing."""
    for ours, theirs in zip(ranks[0][training], alone[1], strict=True):
        for name in theirs:
            difference, size = (ours[name] - theirs[name]).norm(), theirs[name].norm()
            assert difference < (1e-2 if name.startswith("grad/") else 1e-3) * size, name
    first = ranks[0][training][0], alone[1][0]
    assert all((a - b).norm() < 1e-4 * b.norm() for a, b in zip(*(f.values() for f in first), strict=True))


def test_metrics_are_those_of_one_process(folder, alone, training):
    ours, theirs = (
        [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
        for path in (folder / training, alone[0])
    )
    assert len(ours) == len(theirs) == 2
    for two, one in zip(ours, theirs, strict=True):
        assert two.keys() == one.keys()
        for name in one:
            if not name.startswith(("time/", "samples_per_second")):
                assert two[name] == pytest.approx(one[name], rel=1e-2, abs=2e-6), name


def test_one_process_needs_no_group():
    processes = Processes(cpu=True)
    rows = torch.arange(6).view(3, 2)
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gather(rows) is rows
    assert processes.sum(torch.tensor([2.0])).tolist() == [2]
    assert processes.any(True)
    processes.wait()
    processes.close()
