"""The work of `python -m benchmarks.win_rate`: check everything, make videos, ask judges, say what came out."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.gain_checks import Finding
from alignment.generation import whole
from alignment.startup import quiet_loading
from alignment.versions import versions
from rewards.arguments import RewardArgument

from ..pictures import pyplot
from .judges import read_judges, relations
from .models import BASE, Contender, check_models, contenders
from .motion import load_flow
from .page import render
from .plot import plot
from .prompt_sets import prompt_set
from .scoring import OVERALL, Answers, Scoring, load_judge
from .summary import Comparison, as_json, compare
from .vbench import VBenchScores, aggregate, read_scores
from .videos import Video, claim, free_memory, make_videos, paths_of, planned, together, videos_of, write_json
from .voting import QUESTIONS, key_of, read_votes, tally, write_voting_page
from .voting import Comparison as Duel

VOTING = "voting.html"
MAX_DUELS = 40  # on the page for voting, of each tuned model


def compare_models(options: argparse.Namespace) -> None:
    """Run the command. Raises: UserError for bad input; RewardError, RewardFailed and OSError for what fails midway."""
    pyplot()  # refuses now what would be missing in the end
    models = contenders(options.base, options.tuned, options.settings, options.overrides)
    judges = read_judges(options.judge)
    names = [model.name for model in models]
    ties = read_ties(options.tie_eps, list(judges))
    vbench = read_vbench(options.vbench, names)
    prompts = prompt_set(options.prompts)[: options.limit]
    votes = read_people(options.votes, options.out, names, len(prompts), options.samples)
    check_models(models, prompts)
    recipe = models[0].recipe
    processes = Processes(cpu=recipe.model.device == "cpu")
    try:
        flow = load_flow(options.flow, processes.device)
        console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not processes.is_main)
        quiet_loading()
        out: Path = options.out
        settings = claim(out, models, prompts, options.samples, processes) | {"flow": flow.name, "tie_eps": ties}
        videos = videos_of(prompts, options.samples)
        answers, plan = Answers(out, judges, flow.name), planned(out, models, videos)
        processes.wait()  # nobody writes before all have looked
        if any(plan.values()):
            together(processes, lambda: try_judges(judges, answers, processes))
        together(processes, lambda: make_videos(out, models, plan, processes, console))
        processes.wait()
        scoring = Scoring(out, answers, names, videos, recipe.fps, options.batch, processes, console)
        compares: dict[str, bool] = {}

        def score() -> None:
            compares.update({name: scoring.judge(name, judge) for name, judge in judges.items()})
            scoring.measure(flow)

        together(processes, score)
        answers.read()
        if processes.is_main:
            related, found = relations(judges, models), []
            for model in models[1:]:
                own = related[model.name], ties, votes.get(model.name, {}), remarks(model, models[0])
                found.append(compare(model.name, answers, videos, compares, *own))
            report(out, settings, found, answers, videos, compares, judges, vbench, options.command)
            console.print("\n".join([*(c.verdict for c in found), f"written: {out / 'index.html'}"]))
    finally:
        processes.close()


def try_judges(judges: Mapping[str, RewardArgument], answers: Answers, processes: Processes) -> None:
    """Load every new judge once, so that one that cannot be loaded is refused before hours of sampling."""
    for name, judge in judges.items() if processes.is_main else ():
        if answers.compares(name) is None:
            load_judge(name, judge, processes.device)
            free_memory()


def report(
    out: Path,
    settings: Mapping[str, Any],
    found: Sequence[Comparison],
    answers: Answers,
    videos: Sequence[Video],
    compares: Mapping[str, bool],
    judges: Mapping[str, RewardArgument],
    vbench: Mapping[str, VBenchScores],
    command: str,
) -> None:
    """Write result.json, index.html, result.png and voting.html."""
    made_with = versions()
    scores = [
        {
            judge: tuple(answers.column(judge, OVERALL, model, "", videos) for model in (BASE, comparison.name))
            for judge, pairwise in compares.items()
            if not pairwise
        }
        for comparison in found
    ]
    content = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "versions": made_with,
        "settings": settings,
        "judges": {name: {"use": judge.use, "options": judge.options} for name, judge in judges.items()},
        "comparisons": {comparison.name: as_json(comparison) for comparison in found},
        "vbench": {name: each._asdict() for name, each in vbench.items()},
    }
    write_json(out / "result.json", content)
    page = render(settings, found, scores, videos, vbench, out, command, made_with)
    whole(out / "index.html", lambda path: path.write_text(page, "utf-8"))
    whole(out / "result.png", lambda path: plot(found, scores, path))
    if not key_of(out / VOTING).exists():  # its videos take long, and stay the same
        write_voting_page(out / VOTING, duels(out, [c.name for c in found], videos), settings["seed"])


def duels(out: Path, tuned: Sequence[str], videos: Sequence[Video]) -> list[Duel]:
    """What people are asked: the first sample of prompts spread over all of them."""
    firsts = [video for video in videos if video.sample == 0]
    places = np.unique(np.linspace(0, len(firsts) - 1, min(MAX_DUELS, len(firsts))).round().astype(int))
    asked = []
    for name in tuned:
        for video in (firsts[place] for place in places):
            files = [paths_of(out, model, video.name)[1] for model in (BASE, name)]
            asked.append(Duel(f"{name}/{video.name}", video.prompt.text, BASE, name, *files))
    return asked


def read_people(
    paths: Sequence[Path], out: Path, names: Sequence[str], num_prompts: int, samples: int
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Exported votes: tuned model -> dimension -> answers, each the place of its prompt and an outcome.

    Raises: UserError where a file is of another comparison, or given twice.
    """
    if paths and not key_of(out / VOTING).is_file():
        raise UserError(f"--votes: {out} holds no {VOTING} to have voted on yet; leave --votes out at first")
    votes = [vote for path in paths for vote in read_votes(path, key_of(out / VOTING))]
    tally(votes)  # which refuses a person who votes twice on the same
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for vote in sorted(votes, key=lambda vote: QUESTIONS.index(vote.question)):
        name, _, video = vote.id.rpartition("/")
        match = re.fullmatch(r"(\d+)_(\d+)", video)
        if name not in names[1:] or not match or int(match[1]) >= num_prompts or int(match[2]) >= samples:
            raise UserError(f"--votes: {vote.id} is no pair of this comparison")
        outcome = {name: 1.0, BASE: 0.0}.get(vote.winner, 0.5)
        found.setdefault(name, {}).setdefault(vote.question, []).append((int(match[1]), outcome))
    return found


def read_ties(texts: Sequence[str], judges: Sequence[str]) -> dict[str, float]:
    """`[JUDGE=]X`: judge -> the difference up to which two scores are a tie. Raises: UserError."""
    found = {}
    for text in texts:
        judge, _, value = text.rpartition("=")
        try:
            size = float(value)
        except ValueError:
            size = -1.0
        if not 0 <= size < float("inf") or (judge and judge not in judges):
            raise UserError(
                f"--tie-eps: {text}: expected a number of 0 or more, or JUDGE=NUMBER; judges: {', '.join(judges)}"
            )
        found |= dict.fromkeys([judge] if judge else judges, size)
    return found


def read_vbench(texts: Sequence[str], names: Sequence[str]) -> dict[str, VBenchScores]:
    """`NAME=SCORES.json`: model -> VBench's totals. Raises: UserError."""
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in names:
            raise UserError(f"--vbench: {text}: expected MODEL=SCORES.json; models: {', '.join(names)}")
        found[name] = aggregate(read_scores(path))
    return found


def remarks(model: Contender, base: Contender) -> list[Finding]:
    """What the run's own recipe says about how fair this comparison is."""
    recipe, found = model.recipe, []
    if model.run is None:
        return []
    if Path(recipe.model.path).resolve() != Path(base.path).resolve():
        text = f"It was trained from {recipe.model.path}, and the base here is {base.path}."
        found.append(Finding("warning", "Another base", text))
    if recipe.data.preferences:
        text = f"It learned from {recipe.data.preferences}: who labelled these is no stranger to it, and unknown here."
        found.append(Finding("note", "Given preferences", text))
    return found
