"""Processes: who does what, and the few things that they tell each other.

Every process holds the whole policy, draws whole groups and adds its gradients to those of
the others, so all hold the same weights after every update.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

MAX_NAMES = 2**16  # bytes


class Processes:
    """This process among all; with one process everything is a no-op."""

    def __init__(self, cpu: bool = False):
        state = PartialState(cpu=cpu)
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """This process's part of a list, in turn: process r gets items r, r + count, ..."""
        return items[self.rank :: self.count]

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; where only some have one the others count as zero.

        Where none has, as in an expert that no trained step ran, it stays None: the optimiser passes over it, as it
        does with one process.
        """
        if self.count == 1:
            return
        parameters = list(parameters)
        having = self.sum(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)).tolist()
        for p, number in zip(parameters, having, strict=True):
            if number:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)

    def gather(self, rows: Tensor) -> Tensor:
        """(N, ...) rows of every process, in the order that `share` dealt them out; they may differ in number."""
        if self.count == 1:
            return rows
        rows = rows.to(self.device)  # which is where the backend can send from
        number = torch.tensor([len(rows)], device=rows.device)
        numbers = [torch.zeros_like(number) for _ in range(self.count)]
        dist.all_gather(numbers, number)
        most = int(torch.stack(numbers).max())
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        parts = [torch.zeros_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        dealt = [part[i : i + 1] for i in range(most) for part, n in zip(parts, numbers, strict=True) if i < int(n)]
        return torch.cat(dealt) if dealt else rows

    def union(self, names: list[str]) -> list[str]:
        """The names of all processes, in one order."""
        if self.count == 1:
            return names
        text = json.dumps(names).encode()
        assert len(text) <= MAX_NAMES, f"{len(text)} bytes of names"
        rows = self.gather(torch.tensor([list(text.ljust(MAX_NAMES))], dtype=torch.uint8))
        return list(dict.fromkeys(name for row in rows for name in json.loads(bytes(row.tolist()))))

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def total(self, number: float) -> float:
        """Sum of a number over the processes."""
        return float(self.sum(torch.tensor(number, dtype=torch.float64, device=self.device)))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.total(float(flag)) > 0

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
