"""A run: everything an algorithm's loop works with, and everything that is the same for every algorithm.

Order of an iteration: the algorithm's own loop body, its metrics, then evaluation and checkpoint when they are due.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rewards import RewardError
from samplers import seed_for

from .alarms import Alarms
from .checkpoint import State, checkpoints, load_state, restore, save_state
from .config import Recipe, algorithm_of, save_recipe, trains_reward
from .data import Prompt, PromptStream, read_preferences, read_prompts
from .distributed import Processes
from .early_stop import best_weights, past_peak, peak_words, watch
from .errors import TrainingStopped
from .evaluation import evaluate, evaluation_words
from .given import Given
from .metrics import Display, MetricsFile, Timer, Tracker, plain
from .optimization import WeightAverage, build_optimizer, clip_gradients, learning_rate, set_rate
from .policy import Policy
from .scoring import Readings, Scorer, as_matrix, summary
from .versions import versions

T = TypeVar("T")


class Run:
    """One training run. Algorithms use `iterations`, `next_prompts`, `score`, `apply_update` and `log`.

    Attributes:
        recipe, policy, scorer, processes, folder, timer: what their names say. Where a reward is trained, it is what
            `policy` stands for, and the scorer has nothing to ask (see config.algorithm_of).
        iteration: the one in progress, from 1.
        updates: optimiser steps so far, of all iterations.
        snapshots: other values of the trained weights that an algorithm keeps, by name; checkpoints hold them.
        memory: what else it keeps from one iteration to the next, fit for JSON; checkpoints hold it, too.
    """

    def __init__(self, recipe: Recipe, policy: Policy, scorer: Scorer, processes: Processes):
        self.recipe, self.policy, self.scorer, self.processes = recipe, policy, scorer, processes
        self.folder: Path = recipe.folder
        self.iteration = self.completed = 0
        self.saved = -1  # iteration of the newest checkpoint
        self.stream = PromptStream(training_prompts(recipe), recipe.seed, recipe.data.shuffle)
        self.evaluation_prompts = evaluation_prompts(recipe)
        self.given = Given(self)
        rates = getattr(algorithm_of(recipe), "learning_rates", lambda *_: {})(recipe, policy.parameters)
        self.optimizer = build_optimizer(policy.parameters, recipe.optimizer, rates)
        self.average = WeightAverage(policy.parameters, recipe.ema)
        self.timer = Timer(policy.device, lambda: policy.evaluations)
        self.display = Display(recipe.iterations, processes.is_main)
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.memory: dict[str, Any] = {}
        self.start = {name: _sampled(p) for name, p in policy.parameters.items()}
        self.stopping = False
        self.also_evaluated: Callable[[], dict[str, float]] | None = None  # what an algorithm adds to evaluations
        self.gradient_norms: list[float] = []
        self.metrics: MetricsFile | None = None
        self.alarms: Alarms | None = None
        self.tracker: Tracker | None = None

    def resume(self) -> bool:
        """Load the newest checkpoint; False where there is none."""
        found = checkpoints(self.folder / "checkpoints")
        if not found:
            return False
        state = load_state(found[-1])
        restore(self.policy.parameters, state.trained, str(found[-1]))
        # Betas and weight decay are the recipe's, which may have changed; the moments are the saved ones.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.optimizer["state"], "param_groups": groups})
        if self.average.weights:
            self.average.weights = {n: t.to(self.policy.device) for n, t in (state.ema or state.trained).items()}
        self.average.updates = state.updates
        device = self.policy.device
        self.snapshots = {n: {k: t.to(device) for k, t in w.items()} for n, w in state.snapshots.items()}
        self.memory = state.memory
        self.completed = self.saved = state.iteration
        return True

    def open(self) -> None:
        """Start writing: recipe, metrics, trackers. Lines of `completed` iterations are kept, later ones dropped."""
        main = self.processes.is_main
        if main:
            save_recipe(self.recipe, self.folder / "config.yaml", versions())
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.completed or -1) if main else None
        self.alarms = Alarms(self.recipe, self.memory.setdefault("said", [])) if main else None
        self.tracker = Tracker(self.recipe.tracker if main else None, self.folder, self.recipe.name)

    def iterations(self) -> Iterator[int]:
        """Iterations still to do. Each seeds itself, so that a resumed run repeats the one left alone.

        What an algorithm finds wrong with its data before it comes here leaves no run behind.
        """
        self.open()
        if self.completed == 0:
            found = self.evaluate(0)
            if self.metrics and trains_reward(self.recipe):  # samples/ holds the others'
                self.metrics.append({"iteration": 0, **plain(found)})
        elif self._evaluation_due(self.completed) and self._lacks_evaluation():
            found = plain(self.evaluate(self.completed))
            if self.metrics:
                self.metrics.extend_last(found)
            if best_weights(self):  # which may be those that were just evaluated
                self.saved = -1
                self.save()
        if past_peak(self) or "ended" in self.memory:  # a resumed run had ended
            self.display.say(self.memory.get("ended") or peak_words(self))
            return
        with _graceful_stop(self):
            for iteration in range(self.completed + 1, self.recipe.iterations + 1):
                self._begin(iteration)
                with self.timer("iteration"):
                    yield iteration
                self._finish()
                if self._ended():
                    break
                if self.processes.any(self.stopping):
                    self.save()
                    raise TrainingStopped(f"stopped by a signal after iteration {self.iteration}; --resume goes on")

    def _begin(self, iteration: int) -> None:
        self.iteration = iteration
        _seed_globally(seed_for(self.recipe.seed, "iteration", iteration, self.processes.rank))
        rate = learning_rate(self.recipe.optimizer, iteration, self.recipe.iterations)
        set_rate(self.optimizer, rate)
        self.row: dict[str, float] = {}
        self.num_samples = 0
        self.timer.clear()
        self.gradient_norms.clear()
        self.policy.decode_seconds = 0.0

    def _finish(self) -> None:
        """Write the iteration's metrics; evaluate and save when due."""
        self.completed = self.iteration
        row = {"iteration": self.iteration, **plain({**self.row, **self._own_metrics()})}
        try:
            if self._evaluation_due(self.iteration):
                row |= plain(self.evaluate(self.iteration))
        finally:  # the iteration counts even if its evaluation fails; a resume makes up for that
            if self.metrics:
                self.metrics.append(row)
        self.tracker.log({k: v for k, v in row.items() if k != "iteration"}, self.iteration)
        self.display.show(self.iteration, row)
        if self.metrics:
            rows = [row for row in self.metrics.rows if row["iteration"] > 0]
            for line in self.alarms.new(rows, self._ended()):
                self.display.say(line)
        if self._ended() or self.iteration % self.recipe.checkpoint.every == 0:
            self.save()
        if "ended" in self.memory:
            self.display.say(self.memory["ended"])
        if self._ended() and best_weights(self):
            self.display.say(peak_words(self))

    def _ended(self) -> bool:
        return self.completed == self.recipe.iterations or past_peak(self) or "ended" in self.memory

    def end(self, reason: str) -> None:
        """Let this iteration be the last one."""
        self.memory["ended"] = reason

    def _evaluation_due(self, iteration: int) -> bool:
        every = self.recipe.evaluation.every
        return "ended" in self.memory or iteration == self.recipe.iterations or (every > 0 and iteration % every == 0)

    def _lacks_evaluation(self) -> bool:
        """Whether the last iteration's evaluation failed, or was interrupted."""
        if trains_reward(self.recipe):
            rows = self.metrics.rows if self.metrics else []
            return self.processes.any(any("eval/accuracy/mean" not in row for row in rows[-1:]))
        return not (self.folder / "samples" / f"{self.completed:06d}").exists()

    def _own_metrics(self) -> dict[str, float]:
        seconds = self.timer.seconds
        rollout = seconds["rollout"] - self.policy.decode_seconds
        names = ["iteration", "rollout", "update"]
        counted = torch.tensor([self.timer.counts[name] for name in names], device=self.policy.device)
        counts = dict(zip(names, self.processes.sum(counted).tolist(), strict=True))
        return {
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(np.mean(self.gradient_norms)) if self.gradient_norms else float("nan"),
            "nfe": counts["iteration"],
            "nfe/rollout": counts["rollout"],
            "nfe/update": counts["update"],
            "time/rollout": rollout,
            "time/decode": self.policy.decode_seconds,
            **{f"time/{phase}": s for phase, s in seconds.items() if phase != "rollout"},
            **({"samples_per_second": self.num_samples / seconds["iteration"]} if self.num_samples else {}),
            "drift/weights": self._drift(),
        }

    def _drift(self) -> float:
        """Norm of the change of the trained weights over the norm at the start, on a sample of every tensor."""
        moved = sum(float((_sampled(p) - self.start[n]).square().sum()) for n, p in self.policy.parameters.items())
        size = sum(float(t.square().sum()) for t in self.start.values())
        return (moved / size) ** 0.5

    def next_prompts(self, count: int) -> list[tuple[int, Prompt]]:
        """This process's share of the iteration's `count` prompts, each with its position in the stream."""
        start = (self.iteration - 1) * count
        return self.processes.share(list(enumerate(self.stream.take(start, count), start)))

    def score(self, videos: Tensor, prompts: list[Prompt], groups: list[int], group_size: int) -> Readings:
        """Score this process's samples and return those of all processes, whole groups in stream order.

        Raises: RewardError where a reward fails; TrainingStopped where more than `max_invalid` of the samples are
            masked.
        """
        with self.timer("reward"):
            names, local = as_matrix(self.together(lambda: self.scorer(videos, prompts, groups)), self.processes)
            rows = self.processes.gather(local.view(-1, group_size, len(names))).flatten(0, 1)
        columns = dict(zip(names, rows.unbind(1), strict=True))
        totals = {name: columns[f"reward/{name}"] for name in self.scorer.rewards}
        combined = self.scorer.combined(totals)
        valid = combined[~combined.isnan()]
        invalid = len(combined) - len(valid)
        masked = {name: int(total.isnan().sum()) for name, total in totals.items()}  # held-out rewards, too
        self.num_samples = len(rows)
        self.log(
            {
                **summary(names, rows),
                "reward/mean": float(valid.mean()),
                "reward/std": float(valid.std(correction=0)) if len(valid) else float("nan"),
                "reward/invalid": invalid,
                **{f"reward/{name}/invalid": count for name, count in masked.items() if count},
            }
        )
        if invalid > self.recipe.max_invalid * len(combined):
            worst = max(masked, key=masked.__getitem__)
            raise TrainingStopped(
                f"reward {worst} gave no finite number for {invalid} of {len(combined)} samples "
                f"(max_invalid is {self.recipe.max_invalid}); mend the reward, then --resume"
            )
        return Readings(totals, columns)

    def together(self, work: Callable[[], T]) -> T:
        """Run work that asks rewards in every process; where one fails all raise, so that none waits for it."""
        failure = None
        try:
            result = work()
        except RewardError as error:
            failure = error
        if self.processes.any(failure is not None):
            raise failure or RewardError("a reward failed in another process")
        return result

    def apply_update(self) -> None:
        """Sum the gradients over processes, clip, step, average the weights."""
        parameters = self.policy.parameters
        self.processes.add_gradients(parameters.values())
        self.gradient_norms.append(clip_gradients(parameters, self.recipe.optimizer.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()

    @property
    def updates(self) -> int:
        return self.average.updates

    def snapshot(self, name: str, renew: bool = False) -> dict[str, Tensor]:
        """The trained weights as they were when this snapshot was taken: now, if it is new or to be renewed."""
        if renew or name not in self.snapshots:
            self.snapshots[name] = {n: p.detach().clone() for n, p in self.policy.parameters.items()}
        return self.snapshots[name]

    def log(self, metrics: dict[str, float]) -> None:
        """Add to this iteration's line of metrics.jsonl."""
        self.row |= metrics

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Held-out evaluation with the weights that will be saved, unless earlier ones stay the best."""
        _seed_globally(seed_for(self.recipe.evaluation.seed, "evaluation", self.processes.rank))
        with self._averaged():
            own = trains_reward(self.recipe)
            found = (algorithm_of(self.recipe).evaluate if own else evaluate)(self, iteration)
            if self.also_evaluated:
                found |= self.also_evaluated()
            if self.recipe.evaluation.patience:
                watched = f"eval/{'accuracy' if own else 'reward'}/{self.recipe.evaluation.watch}"
                watch(self, iteration, found[watched])
        self.display.say(f"evaluation at iteration {iteration}: {evaluation_words(found)}")
        return found

    def _averaged(self) -> AbstractContextManager[None]:
        """The weights that are evaluated: the moving average where there is one."""
        return self.policy.using(self.average.weights) if self.average.weights else nullcontext()

    def save(self) -> None:
        """Write the weights that plain diffusers loads, then a checkpoint, unless it is there already.

        After a failure in the middle of an iteration, updates that it has made are in the weights that are saved.
        """
        if not self.processes.is_main or self.saved == self.completed:
            return
        best = best_weights(self)
        with self.policy.using(best) if best else self._averaged():
            self.policy.save(self.folder)
        trained = {n: p.detach() for n, p in self.policy.parameters.items()}
        averages = self.average.weights, self.average.updates
        state = State(self.completed, trained, self.optimizer.state_dict(), *averages, self.snapshots, self.memory)
        save_state(self.folder / "checkpoints", state, self.recipe.checkpoint.keep)
        self.saved = self.completed

    def close(self) -> None:
        self.display.close()
        if self.tracker:
            self.tracker.close()


def evaluation_prompts(recipe: Recipe) -> list[Prompt]:
    """The held-out prompts, repeated (with other seeds) where there are fewer than asked for."""
    config = recipe.evaluation
    prompts = read_prompts(config.prompts, "evaluation.prompts") if config.prompts else training_prompts(recipe)
    return [prompts[i % len(prompts)] for i in range(config.num_prompts)]


def training_prompts(recipe: Recipe) -> list[Prompt]:
    """Those of the recipe's prompts, or of its preferences."""
    if recipe.data.prompts:
        return read_prompts(recipe.data.prompts)
    prompts = [record.prompt for record in read_preferences(recipe.data.preferences)]
    return list({(prompt.text, prompt.image): prompt for prompt in prompts}.values())


def _sampled(p: Tensor) -> Tensor:
    """Some 4096 entries, evenly spaced: a copy of all weights would be as large as the model."""
    return p.detach().flatten()[:: max(1, p.numel() // 4096)].clone()


def _seed_globally(seed: int) -> None:
    """For rewards and pipelines that use the global generators; the toolkit's own draws do not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def _graceful_stop(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the iteration end and saves; the second one interrupts at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True
        run.display.say("stopping after this iteration; once more to stop at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
