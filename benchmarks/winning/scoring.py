"""Scores of the videos, kept as they come: FOLDER/scores/<process>.jsonl, one line a video and judge.

A judge of clips sees each video once. One that compares (scope "group") sees the two videos of a pair, the base's and a
tuned model's; what it says of both is kept. Calls are planned before it is known what is there, and a call with
something missing is asked again as a whole, so that scores depend neither on interruptions nor on the number of
processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from rich.console import Console

from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.samples import chunks
from rewards import Clip, Reward, RewardError, load
from rewards.arguments import RewardArgument
from rewards.scoring.asking import RewardFailed, ask
from rewards.scoring.output import fingerprint

from .measures import MEASURES, measure
from .models import BASE
from .motion import Flow
from .videos import Video, read_frames, shown

OVERALL = "overall"  # the column of a judge's total
FOLDER = "scores"


class Key(NamedTuple):
    """Whose answer about which video a line holds."""

    judge: str  # fingerprint of the judge as it was asked for, or the measures'
    model: str
    against: str  # of judges that compare: the tuned model whose pair it was; else ""
    video: str


class Answers:
    """All that the journals hold: key -> {column: number or None}."""

    def __init__(self, out: Path, judges: Mapping[str, RewardArgument], flow: str):
        """
        Args:
            flow: the name of the optical flow that measures rest on.
        """
        self.folder = out / FOLDER
        self.names = {name: fingerprint({"": judge._replace(name="")}, False) for name, judge in judges.items()}
        self.names[MEASURES] = f"{MEASURES} with {flow}"
        self.rows: dict[Key, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """What all processes have written so far. A line torn by a crash is left out."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                try:
                    row = json.loads(line)
                    self.rows[Key(*(row[field] for field in Key._fields))] = dict(row["values"])
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(f"--out: {path} was not written by this command; choose another folder") from error

    def has(self, judge: str, model: str, against: str, video: Video) -> bool:
        """Whether the answer is there and no failure; what failed is asked again."""
        row = self.rows.get(Key(self.names[judge], model, against, video.name))
        return row is not None and row.get(OVERALL, True) is not None

    def column(self, judge: str, column: str, model: str, against: str, videos: Sequence[Video]) -> np.ndarray:
        """(N,) values; nan where there is none."""
        rows = [self.rows.get(Key(self.names[judge], model, against, video.name), {}) for video in videos]
        return np.array([math.nan if row.get(column) is None else row[column] for row in rows], float)

    def columns(self, judge: str) -> list[str]:
        """The total, then the dims in the order in which they came."""
        rows = (row for key, row in self.rows.items() if key.judge == self.names[judge])
        return list(dict.fromkeys([OVERALL, *(column for row in rows for column in row)]))

    def compares(self, judge: str) -> bool | None:
        """Whether the judge compares, as far as its answers say; None where there is none."""
        return next((bool(key.against) for key in self.rows if key.judge == self.names[judge]), None)

    def journal(self, rank: int) -> BinaryIO:
        """The file that a process appends to, opened."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{rank}.jsonl"
        written = path.read_bytes() if path.exists() else b""
        file = path.open("ab", buffering=0)
        file.truncate(written.rfind(b"\n") + 1)
        return file


@dataclass
class Scoring:
    """Videos to be scored, and by which process. Every process holds the same answers when it starts."""

    out: Path
    answers: Answers
    models: Sequence[str]  # the base first
    videos: Sequence[Video]
    fps: int
    batch: int  # videos, or pairs, a call
    processes: Processes
    console: Console

    def judge(self, name: str, argument: RewardArgument) -> bool:
        """Ask a judge for what is missing.

        Returns: whether it compares.
        Raises: RewardError, RewardFailed; UserError for one of scope "batch".
        """
        compares = self.answers.compares(name)
        reward = None
        if compares is None:
            reward = load_judge(name, argument, self.processes.device)
            compares = reward.scope == "group"
        calls = self._calls(name, compares)
        if calls and reward is None:
            reward = load_judge(name, argument, self.processes.device)
        with self.answers.journal(self.processes.rank) as file:
            for model, call in shown(self.processes.share(calls), f"{name}'s scores", self.console):
                self._ask(file, name, reward, [BASE, model] if compares else [model], call)
        return compares

    def _calls(self, name: str, compares: bool) -> list[tuple[str, list[Video]]]:
        calls = []
        for model in self.models[compares:]:
            against = model if compares else ""
            for places in chunks(range(len(self.videos)), self.batch):
                call = [self.videos[i] for i in places]
                if not all(self.answers.has(name, model, against, video) for video in call):
                    calls.append((model, call))
        return calls

    def _ask(self, file: BinaryIO, name: str, reward: Reward, models: Sequence[str], call: Sequence[Video]) -> None:
        asked = [(video, model) for video in call for model in models]
        clips = []
        for video, model in asked:
            frames = read_frames(self.out, model, video.name).to(self.processes.device)
            clips.append(Clip(frames, video.prompt.text, self.fps, call.index(video), video.prompt.meta))
        rows = ask({"": reward}, clips)
        compares = len(models) > 1
        if compares and rows[0]["error"]:  # then nothing is known of the whole call
            raise RewardError(f"--judge {name}: {rows[0]['error']}")
        for (video, model), row in zip(asked, rows, strict=True):
            valid = row.pop(":valid")
            named = {column.removeprefix("/") or OVERALL: value for column, value in row.items() if column != "error"}
            values = {column: value if valid else None for column, value in named.items()}
            self._append(file, name, model, models[-1] if compares else "", video, values)

    def measure(self, flow: Flow) -> None:
        """What no judge is needed for, a prompt at a time: its samples are compared with one another."""
        prompts: dict[int, list[Video]] = {}
        for video in self.videos:
            prompts.setdefault(video.index, []).append(video)
        calls = [
            (model, samples)
            for model in self.models
            for samples in prompts.values()
            if not all(self.answers.has(MEASURES, model, "", video) for video in samples)
        ]
        with self.answers.journal(self.processes.rank) as file:
            for model, samples in shown(self.processes.share(calls), "measures", self.console):
                films = torch.stack([read_frames(self.out, model, video.name) for video in samples])
                rows = measure(films.to(self.processes.device).float().div_(255), self.fps, flow)
                for video, values in zip(samples, rows, strict=True):
                    self._append(file, MEASURES, model, "", video, values)

    def _append(
        self, file: BinaryIO, judge: str, model: str, against: str, video: Video, values: Mapping[str, Any]
    ) -> None:
        key = Key(self.answers.names[judge], model, against, video.name)
        file.write(json.dumps({**key._asdict(), "values": values}, allow_nan=False).encode() + b"\n")


def load_judge(name: str, argument: RewardArgument, device: torch.device) -> Reward:
    """Build a judge on its device. Raises: RewardError, RewardFailed; UserError for one of scope "batch"."""
    try:
        reward = load(argument.use, **argument.options)
    except RewardError as error:
        raise RewardError(f"--judge {name}: {error}") from error
    except Exception as error:  # what a reward's constructor raises is up to its author
        raise RewardFailed(name, error) from error
    if reward.scope == "batch":
        raise UserError(
            f"--judge {name}: compares all videos of a call with one another; a judge sees a clip or a pair"
        )
    inner = getattr(reward, "inner", reward)
    if isinstance(inner, torch.nn.Module):
        inner.to(device)
    return reward
