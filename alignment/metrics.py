"""What a run writes about itself: metrics.jsonl, trackers, and lines or a progress bar on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .policy import synchronize

SHOWN = {  # metric -> its name on the terminal
    "reward/mean": "reward",
    "reward/std": "spread",
    "loss": "loss",
    "implicit_accuracy": "accuracy",
    "margin": "margin",
    "grad_norm": "grad",
    "time/iteration": "s",
}


class Timer:
    """Seconds and function evaluations by phase, of the iteration in progress.

    `evaluations` counts up as the policy works; a phase gets what was counted while it ran.
    """

    def __init__(self, device: torch.device, evaluations: Callable[[], int] = lambda: 0):
        self.device, self.evaluations = device, evaluations
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        synchronize(self.device)
        start, counted = time.perf_counter(), self.evaluations()
        yield
        synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - start
        self.counts[phase] += self.evaluations() - counted

    def clear(self) -> None:
        self.seconds.clear()
        self.counts.clear()


class MetricsFile:
    """metrics.jsonl: one line an iteration, flushed as it is written; a resume drops what came after its checkpoint."""

    def __init__(self, path: Path, completed: int):
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["iteration"] <= completed]
        self._rewrite()

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def extend_last(self, more: dict[str, Any]) -> None:
        """Add to the last line: an evaluation that was made up for."""
        for row in self.rows[-1:]:
            row |= more
        self._rewrite()

    def _rewrite(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), "utf-8")
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; the last one of a killed run may be cut short or filled with zeros."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "iteration" in row]


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as JSON takes them: floats of 8 digits, with null for what is not finite."""
    return {key: number_or_null(value) for key, value in metrics.items()}


def number_or_null(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


class Display:
    """A progress bar on a terminal, plain lines elsewhere; silent in all but the main process."""

    def __init__(self, total: int, active: bool):
        self.total, self.active, self.bar = total, active, None
        if active and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self.task = self.bar.add_task("training", total=total, note="")
            self.bar.start()

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True) if self.bar is None else self.bar.console.print(text, markup=False, highlight=False)

    def show(self, iteration: int, metrics: dict[str, Any]) -> None:
        shown = {name: metrics[name] for name in SHOWN if metrics.get(name) is not None}
        if "reward/mean" in shown:
            shown.pop("loss", None)  # of samples that are new every time: it says nothing
        note = "  ".join(f"{SHOWN[name]} {value:.3g}" for name, value in shown.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=iteration, note=note)
        else:
            self.say(f"iteration {iteration}/{self.total}  {note}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class Tracker:
    """TensorBoard, wandb or trackio through accelerate; nothing where none is asked for or installed."""

    def __init__(self, kind: str | None, folder: Path, name: str):
        self.tracker = None
        if kind == "auto":
            from accelerate.utils import is_tensorboard_available

            kind = "tensorboard" if is_tensorboard_available() else None
        if kind is None:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[kind]
        where = {"logging_dir": folder / "tracker"} if tracker.requires_logging_directory else {}
        self.tracker = tracker(name, **where)
        self.tracker.start()

    def log(self, metrics: dict[str, Any], iteration: int) -> None:
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in metrics.items() if v is not None}, step=iteration)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()
