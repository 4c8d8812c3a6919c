"""One reward, one thread, one bounded queue: all clients' questions in turn, together where that changes nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from rewards.contract import Clip, Reward, RewardError, Scores, one_line
from rewards.serving.wire import check_indices, restored

log = logging.getLogger("rewards.serve")
MAX_CAUSES = 1000  # remembered, so that each is logged once


class QueueFull(Exception):
    """As many questions wait as may wait."""


class ScoringFailed(Exception):
    """Why one question has no answer, in a line. `refused`: the reward itself refused it, with a RewardError."""

    def __init__(self, line: str, refused: bool):
        super().__init__(line)
        self.refused = refused


@dataclass(eq=False)  # tensors do not compare
class Job:
    """One question and the place for its answer."""

    clips: list[Clip]  # uint8 pixels: a queue of floats would need four times the memory
    answer: Future[Scores] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.shapes = {tuple(clip.video.shape) for clip in self.clips}


class Worker:
    """Calls one reward in a thread of its own.

    Questions that wait are answered by one call of the reward, up to `batch` clips, where their clips have the same
    shapes; other shapes could change what a reward makes of them (a `dense` of one length, a plain function that takes
    one shape). The groups of different questions never mix. A reward of scope "batch" sees one question a call.

    Args:
        capacity: questions that may wait.
        batch: clips that one call may have; a question that has more is a call of its own.
        wait: seconds that a call which is not full waits for further questions.
    """

    def __init__(self, name: str, reward: Reward, *, capacity: int = 32, batch: int = 16, wait: float = 0.01):
        self.name, self.reward = name, reward
        self.capacity, self.batch, self.wait = capacity, 0 if reward.scope == "batch" else batch, wait
        self.waiting: deque[Job] = deque()
        self.counts: Counter[str] = Counter(questions=0, clips=0, calls=0, failed=0)
        self.changed = threading.Condition()
        self._closing = False
        self._since: float | None = None  # when the call that runs now began
        self._causes: set[str] = set()
        self.thread = threading.Thread(target=self._work, name=f"reward {name}", daemon=True)
        self.thread.start()

    def check_room(self) -> None:
        """Raises: QueueFull."""
        if len(self.waiting) >= self.capacity:
            raise QueueFull

    def submit(self, clips: list[Clip]) -> Future[Scores]:
        """Queue a question of uint8 clips. Its future gives Scores on the CPU or raises ScoringFailed.

        A future that is cancelled before its turn costs nothing.

        Raises: QueueFull.
        """
        job = Job(clips)
        with self.changed:
            self.check_room()
            self.waiting.append(job)
            self.changed.notify()
        return job.answer

    def indices(self, length: int, fps: float) -> list[int]:
        """The frames that the reward looks at. Raises: ScoringFailed."""
        try:
            return check_indices(self.reward.indices(length, fps), length)
        except Exception as error:  # of a user's reward
            raise self._failure(error) from error

    def close(self, timeout: float) -> bool:
        """Answer what waits, then end; whether that was done in `timeout` seconds."""
        with self.changed:
            self._closing = True
            self.changed.notify()
        self.thread.join(timeout)
        return not self.alive

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def health(self) -> dict[str, float | int | None]:
        """Counts since the start, questions that wait, and seconds that the call has taken which runs now, or None."""
        since = self._since
        busy = None if since is None else round(time.monotonic() - since, 3)
        return {"waiting": len(self.waiting), "busy_seconds": busy, **self.counts}

    def _work(self) -> None:
        while jobs := self._collect():
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if jobs:
                self._since = time.monotonic()
                self._answer(jobs)
                self._since = None

    def _collect(self) -> list[Job]:
        """The first question that waits and those that fit to it; nothing once the worker is closed and idle."""
        with self.changed:
            while not self.waiting and not self._closing:
                self.changed.wait()
            if not self.waiting:
                return []
            jobs = [self.waiting.popleft()]
            deadline = time.monotonic() + self.wait
            while True:
                room = self.batch - sum(len(job.clips) for job in jobs)
                for job in list(self.waiting):
                    if len(job.clips) <= room and job.shapes == jobs[0].shapes:
                        self.waiting.remove(job)
                        jobs.append(job)
                        room -= len(job.clips)
                left = deadline - time.monotonic()
                if room <= 0 or left <= 0 or self._closing:
                    return jobs
                self.changed.wait(left)

    def _answer(self, jobs: list[Job]) -> None:
        try:
            scores = self._score([clip for job in jobs for clip in job.clips] if len(jobs) == 1 else _joined(jobs))
        except BaseException as error:  # SystemExit too: without its thread the queue would wait for ever
            if len(jobs) > 1:  # one client's clips must not fail its neighbours'
                for job in jobs:
                    self._answer([job])
            else:
                self.counts["failed"] += 1
                jobs[0].answer.set_exception(self._failure(error))
            return
        start = 0
        for job in jobs:
            stop = start + len(job.clips)
            job.answer.set_result(_part(scores, start, stop))
            self.counts.update(questions=1, clips=stop - start)
            start = stop

    def _score(self, clips: Sequence[Clip]) -> Scores:
        self.counts["calls"] += 1
        with torch.no_grad():
            scores = self.reward([restored(clip) for clip in clips])
        dense = None if scores.dense is None else scores.dense.float().cpu()
        return Scores(scores.total.cpu(), {k: v.cpu() for k, v in scores.dims.items()}, dense, scores.valid.cpu())

    def _failure(self, error: BaseException) -> ScoringFailed:
        refused = isinstance(error, RewardError)
        line = one_line(error) if refused else f"reward {self.name}: {type(error).__name__}: {one_line(error)}"
        if line not in self._causes and len(self._causes) < MAX_CAUSES:
            self._causes.add(line)
            log.error("%s (logged once)", line, exc_info=None if refused else error)
        return ScoringFailed(line, refused)


def _joined(jobs: Sequence[Job]) -> list[Clip]:
    """The clips of several questions, with groups of numbers that no two questions share."""
    number: dict[tuple[int, int], int] = {}
    clips = []
    for index, job in enumerate(jobs):
        for clip in job.clips:
            clips.append(replace(clip, group=number.setdefault((index, clip.group), len(number))))
    return clips


def _part(scores: Scores, start: int, stop: int) -> Scores:
    dense = None if scores.dense is None else scores.dense[start:stop]
    dims = {name: values[start:stop] for name, values in scores.dims.items()}
    return Scores(scores.total[start:stop], dims, dense, scores.valid[start:stop])
