"""What the terminal says of a run that is still going on: the report's alarms and warnings, once they are sure."""

from __future__ import annotations

import dataclasses

from .config import Recipe
from .diagnostics import AT_ONCE, AVERAGED, diagnose
from .gain_checks import Finding, check_gain
from .logs import Metrics
from .report.folder import load_evaluations

ENOUGH = 5  # iterations before averages over them count
AT_THE_END = ("No significant gain",)  # true of every run that has just begun


class Alarms:
    """Alarms and warnings, each once a run.

    Args:
        said: the titles of those that were said, to which new ones are added; a resumed run hands over its list.
    """

    def __init__(self, recipe: Recipe, said: list[str]):
        self.config, self.folder, self.said = dataclasses.asdict(recipe), recipe.folder, said

    def new(self, metrics: Metrics, ended: bool) -> list[str]:
        """One line for each that the lines of metrics.jsonl so far justify and that was not said before.

        Args:
            ended: whether the run is over and can be judged as a whole.
        """
        found = [f for f in self._findings(metrics, ended) if f.level in ("alarm", "warning")]
        new = [finding for finding in found if finding.title not in self.said]
        self.said += dict.fromkeys(finding.title for finding in new)
        return [f"{finding.level}: {finding.title}. {finding.text}" for finding in new]

    def _findings(self, metrics: Metrics, ended: bool) -> list[Finding]:
        evaluations = load_evaluations(self.folder, []) if "eval/reward/mean" in metrics[-1] else []
        # A run that was killed and resumed may have left some of iterations that are still to come.
        evaluations = [e for e in evaluations if e["iteration"] <= metrics[-1]["iteration"]]
        if ended:
            return diagnose(metrics, evaluations, self.config)
        checks = (*AT_ONCE, *AVERAGED) if len(metrics) >= ENOUGH else AT_ONCE
        found = [finding for check in checks for finding in check(metrics, self.config)]
        return [*found, *(f for f in check_gain(evaluations, self.config) if f.title not in AT_THE_END)]
