"""What the terminal says while a run goes on: the report's alarms and warnings, when they are sure, each once."""

import json

from alignment.alarms import ENOUGH, Alarms
from alignment.algorithms.grpo import Config
from alignment.config import Recipe
from tests.alignment.conftest import in_subprocess
from tests.alignment.test_diagnostics import healthy_metrics, noisy, scores

DRIFT = {"ratio/first_deviation": 5e-4}


def recipe(folder) -> Recipe:
    return Recipe(name="x", output=str(folder), iterations=12, algorithm=Config(clip=1e-3))


def titles(lines) -> list[str]:
    return [line.partition(". ")[0] for line in lines]


def said_by(folder, metrics, said=None) -> list[list[str]]:
    """The titles that are new after every iteration."""
    alarms = Alarms(recipe(folder), [] if said is None else said)
    return [titles(alarms.new(metrics[:end], ended=end == 12)) for end in range(1, len(metrics) + 1)]


def evaluated(folder, row, motion, **held_out) -> None:
    """Put an evaluation where a run would, and into its line."""
    place = folder / "samples" / f"{row['iteration']:06d}"
    place.mkdir(parents=True)
    (place / "scores.json").write_text(json.dumps(scores(row["iteration"], motion, **held_out)))
    row["eval/reward/mean"] = 0.0


def test_a_healthy_run_is_quiet(tmp_path):
    assert said_by(tmp_path, healthy_metrics()) == [[]] * 12


def test_each_is_said_once_and_names_the_setting(tmp_path):
    metrics = [line | DRIFT for line in healthy_metrics()]
    first, *later = said_by(tmp_path, metrics)
    assert first == ["warning: The first ratio drifts"]
    assert later == [[]] * 11
    (line,) = Alarms(recipe(tmp_path), []).new(metrics[:1], ended=False)
    assert line.endswith("or raise `algorithm.clip` (now 0.001) to at least 5 times the drift.")
    assert "\n" not in line


def test_what_was_said_before_a_resume_is_not_said_again(tmp_path):
    metrics, said = [line | DRIFT for line in healthy_metrics()], []
    said_by(tmp_path, metrics[:6], said)
    assert said == ["The first ratio drifts"]
    metrics[8] |= {"reward/invalid": 3}
    assert said_by(tmp_path, metrics, said)[8] == ["warning: Rewards were missing"]
    assert said == ["The first ratio drifts", "Rewards were missing"]


def test_averages_wait_until_there_are_some(tmp_path):
    """One iteration shows a missing reward; that most updates are clipped, several, or the whole of a short run."""
    metrics = [line | {"clip_fraction": 0.9} for line in healthy_metrics()]
    found = said_by(tmp_path, metrics)
    assert found[ENOUGH - 1] == ["warning: Most updates are clipped"]
    assert sum(found, []) == found[ENOUGH - 1]
    short = Alarms(recipe(tmp_path), []).new(metrics[:2], ended=True)
    assert titles(short) == ["warning: Most updates are clipped"]


def test_notes_and_praise_are_left_to_the_report(tmp_path):
    slow = {"time/decode": 20.0, "time/iteration": 25.2, "ratio/first_deviation": 1e-4}
    assert said_by(tmp_path, [line | slow for line in healthy_metrics()]) == [[]] * 12


def test_evaluations_are_judged_when_they_are_made(tmp_path):
    """Hacking at once; that there is no gain only when the run is over."""
    metrics = healthy_metrics()
    evaluated(tmp_path, {"iteration": 0}, noisy(0.5, 1), shape=noisy(0.9, 2))
    evaluated(tmp_path, metrics[3], noisy(0.5, 3), shape=noisy(0.9, 4))
    evaluated(tmp_path, metrics[7], noisy(0.7, 5), shape=noisy(0.7, 6))
    evaluated(tmp_path, metrics[11], noisy(0.5, 7), shape=noisy(0.9, 8))
    found = said_by(tmp_path, metrics)
    assert sum(found[:7], []) == []
    assert found[7] == ["alarm: Reward hacking", "warning: Past the peak of shape"]
    assert sum(found[8:11], []) == []
    assert found[11] == ["warning: No significant gain", "warning: Past the peak"]


# --- runs ------------------------------------------------------------------------------------------------------------


def flat(videos, prompts):
    """A dead reward."""
    return [1.0] * len(videos)


def dead_run(recipe) -> list[str]:
    recipe["rewards"]["bright"] = {"use": "tests.alignment.test_alarms:flat"}
    recipe["algorithm"]["prompts_per_iteration"] = 1
    return ["iterations=7"]


def alarms_in(out: str) -> list[str]:
    return [line.partition(". ")[0] for line in out.splitlines() if line.startswith(("alarm: ", "warning: "))]


def test_a_run_says_it_on_the_terminal(command, recipe):
    outcome = command(*dead_run(recipe))
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    at = lines.index(next(line for line in lines if line.startswith("alarm: The reward is dead. In 5 of 5 iterations")))
    assert lines[at - 1].startswith("iteration 5/7")
    assert lines[at + 1].startswith("alarm: The weights did not move") or lines[at + 1].startswith("iteration 6/7")
    assert alarms_in(outcome.out).count("alarm: The reward is dead") == 1


def test_a_resumed_run_does_not_repeat_itself(command, recipe, write):
    arguments = dead_run(recipe)
    recipe["rewards"]["extra"] = {"use": recipe["rewards"]["noisy"]["use"].replace("noisy", "troubled"), "weight": 0}
    killed = in_subprocess(str(write()), *arguments, "rewards.extra.options={at: 7, trouble: SIGKILL}")
    assert killed.returncode == -9
    assert alarms_in(killed.stdout)[0] == "alarm: The reward is dead"
    resumed = command("--resume", *arguments)
    assert resumed.code == 0
    assert "iteration 6/7" in resumed.out
    assert "alarm: The reward is dead" not in alarms_in(resumed.out)
    assert alarms_in(resumed.out).count("alarm: A reward is dead") == 1  # what only the last evaluation shows
