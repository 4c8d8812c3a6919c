"""Preferences that cannot be learned from: every fault named at once, by line, and no run left behind."""

import csv

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.metrics import read_metrics
from tests.alignment.preference_data import PROMPTS, recipe_for, rows_of, write_clip, write_recipe, write_rows

ALGORITHM = {"name": "flow_dpo", "beta": 50.0, "batch_size": 2}


@pytest.fixture
def folder(tmp_path, preferences):
    """A preference file of one's own, beside the files of all."""
    folder = tmp_path / "own"
    folder.mkdir()
    for kind in ("video", "latent"):
        (folder / kind).mkdir()
        for path in (preferences / kind).iterdir():
            (folder / kind / path.name).symlink_to(path)
    return folder


@pytest.fixture
def recipe(base, folder):
    return recipe_for(base, dict(ALGORITHM), {"preferences": str(folder / "pairs.jsonl")})


@pytest.fixture
def write(recipe, tmp_path):
    """For the fixture `command`."""
    recipe["output"] = str(tmp_path / "run")
    return lambda: write_recipe(tmp_path / "recipe.yaml", recipe)


def lines(outcome, folder):
    """Of a refusal, without what they all start with."""
    assert outcome.code == 2, outcome
    found = outcome.err.splitlines()
    start = f"error: data.preferences: {folder / 'pairs.jsonl'}"
    assert all(line.startswith(start) for line in found), outcome.err
    return [line.removeprefix(start).lstrip() for line in found]


def only_caches(run):
    return not run.exists() or {path.name for path in run.iterdir()} <= {"embeddings", "latents"}


def mended(command, folder, kind):
    """The same command goes well once the file is right."""
    write_rows(folder / "pairs.jsonl", rows_of(kind))
    outcome = command()
    assert (outcome.code, outcome.err) == (0, "")
    assert len(read_metrics(outcome.folder / "metrics.jsonl")) == 2


def test_a_file_of_many_faults(command, folder):
    """Missing files, numbers that are none, labels against the scores, segments that do not fit, an id twice."""
    rows = rows_of()
    rows[0]["a"] = {"latent": "latent/nowhere.safetensors"}
    rows[1]["scores"]["look"] = [float("nan"), 0.4]
    rows[3]["label"] = -1
    rows[4]["seg_labels"] = [1, 0, -1]
    rows[5]["id"] = "p1"
    write_rows(folder / "pairs.jsonl", rows)
    for arguments in ((), ("--check",)):
        outcome = command(*arguments)
        first, second, third, fourth, fifth = lines(outcome, folder)
        assert first.startswith('line 1: "a.latent": no such file: ')
        assert second.startswith('line 2: "scores.look[0]" is nan')
        assert third.startswith('line 4: "label" is -1')
        assert fourth.startswith('line 5: "seg_labels" has 3 values, but 9 frames at 8 fps have 2 segments')
        assert fifth.startswith('line 6: the id "p1" is that of line 2')
        assert not outcome.folder.exists()


def test_clips_that_cannot_be_opened_or_are_cut_short(command, folder):
    """What shows in the first frame is found before weights are loaded, what is behind it while encoding."""
    head, middle, short = (folder / f"video/{i}.mp4" for i in (0, 3, 6))
    for path in (head, middle, short):
        path.unlink()
    whole = write_clip(folder / "whole.mp4", 0)
    head.write_bytes(whole.read_bytes()[:200])
    write_rows(folder / "pairs.jsonl", rows_of("video"))
    # An index in front and a frame that is not whole: as a download that was broken off.
    write_clip(middle, 3, frames=40, size=64, output_params=["-movflags", "+faststart", "-crf", "5", "-g", "1"])
    middle.write_bytes(middle.read_bytes()[: middle.stat().st_size // 2])
    write_clip(short, 6, frames=8)
    (line,) = lines(command(), folder)
    assert line.startswith(f"line 1: {head}: ")
    head.unlink()
    whole.rename(head)
    outcome = command()
    first, second = lines(outcome, folder)
    assert first.startswith(f"line 2: {middle}: ")
    assert second.startswith(f"line 4: {short} is too short: 8 frames at 8 a second, where 9 at 8 are needed")
    assert only_caches(outcome.folder)
    assert len(list((outcome.folder / "latents").iterdir())) == 11  # the good ones need not be encoded again
    for path, seed in ((middle, 3), (short, 6)):
        write_clip(path, seed)
    mended(command, folder, "video")


def test_latents_of_another_shape(command, folder):
    """Both of a pair are: so only the pipeline tells."""
    for i in (2, 3):
        path = folder / f"latent/{i}.safetensors"
        state = load_file(path)["state"]
        path.unlink()
        save_file({"state": state[:, :2].contiguous()}, path)
    write_rows(folder / "pairs.jsonl", rows_of())
    outcome = command()
    first, second = lines(outcome, folder)
    for i, line in ((2, first), (3, second)):
        assert line.startswith(f'line 2: {folder}/latent/{i}.safetensors: "state" is (16, 2, 2, 2), the states of this')
        assert "(16, 3, 2, 2)" in line
    assert only_caches(outcome.folder)
    rows = rows_of()
    del rows[1]
    write_rows(folder / "pairs.jsonl", rows)
    assert command().code == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flow_dpo", "no pair to learn from: 2 tied and 1 unlabelled"),
        ("gapo", "no pair to learn from: 2 tied and 1 unlabelled"),
        ("dense_dpo", "no pair has more than 20% of its segments labelled for one side"),
        ("sft", "no video to imitate: all records are tied"),
        ("seppo", "no video to imitate: all records are tied"),
    ],
)
def test_nothing_but_ties(command, folder, recipe, name, message):
    """None falls back on samples of its own."""
    recipe["algorithm"] = {"name": name, "batch_size": 2}
    rows = [row for row in rows_of() if row["id"] != "g"]
    for row in rows:
        row |= {"label": 0, "scores": {"look": [0.5, 0.5]}, "labels": {}, "seg_labels": [0, 0]}
    alone = {"id": "g", "prompt": PROMPTS[0], "members": [{"latent": "latent/12.safetensors"}], "scores": {"look": [1]}}
    rows = rows[:2] if name in ("sft", "seppo") else [*rows[:2], alone]
    write_rows(folder / "pairs.jsonl", rows)
    for arguments in ((), ("--check",)):
        outcome = command(*arguments)
        (line,) = lines(outcome, folder)
        assert message in line
        assert not outcome.folder.exists()


def test_rewards_that_nobody_gave(command, folder, recipe):
    recipe["algorithm"] = {"name": "flow_rwr", "batch_size": 2}
    rows = rows_of()
    for row in rows:
        for key in ("label", "labels", "scores", "annotator"):
            row.pop(key, None)
    write_rows(folder / "pairs.jsonl", rows)
    (line,) = lines(command(), folder)
    assert line == ": nothing is scored; annotate it, or use sft"


@pytest.mark.parametrize("algorithm", [{"name": "gapo"}, {"name": "flow_dpo", "gap_beta": True}])
def test_gaps_of_scores_that_lack_or_contradict(command, folder, recipe, algorithm):
    recipe["algorithm"] = {**algorithm, "batch_size": 2}
    rows = rows_of()
    del rows[0]["scores"]
    rows[3] |= {"label": -1, "annotator": "human"}
    write_rows(folder / "pairs.jsonl", rows)
    outcome = command()
    first, second = lines(outcome, folder)
    assert first.startswith("line 1: has no scores")
    assert second.startswith("line 4: scores, 0.3 of the better one and 0.7, contradict the label")
    assert not outcome.folder.exists()


def test_scores_outside_of_gapos_range(command, folder, recipe):
    recipe["algorithm"] = {"name": "gapo", "batch_size": 2, "score_range": [2.0, 3.0]}
    write_rows(folder / "pairs.jsonl", rows_of())
    (line,) = lines(command(), folder)
    assert "no pair has a gap within algorithm.score_range [2.0, 3.0]" in line


def test_noise_that_is_not_known(command, folder, recipe):
    recipe["algorithm"]["noise"] = "own"
    path = folder / "latent/3.safetensors"
    state = load_file(path)["state"]
    path.unlink()
    save_file({"state": state}, path)
    rows = rows_of()
    rows[3]["b"] = {"video": "video/7.mp4"}
    write_rows(folder / "pairs.jsonl", rows)
    outcome = command()
    first, second = lines(outcome, folder)
    assert first.startswith('line 2: has no "noise" in the latents of both videos')
    assert second.startswith("line 4: ")
    recipe["algorithm"]["noise"] = "shared"  # for which it does not matter that one of a pair has it
    outcome = command()
    assert (outcome.code, outcome.err) == (0, "")


def test_segments_beyond_the_frames_that_are_trained_on(command, folder, recipe):
    """A clip judged where the pipeline does not look, or where no latent frame is, teaches nothing; and not NaN."""
    recipe["algorithm"] = {"name": "dense_dpo", "batch_size": 2, "anchor": 0.1}
    rows = rows_of()[:3]
    rows[0] |= {"frames": 17, "seg_labels": [0, 0, 1, 1]}
    rows[2] |= {"seg_sec": 0.875, "seg_labels": [0, 1]}  # 7 frames and 2, the third latent frame's centre is 6.5
    write_rows(folder / "pairs.jsonl", rows)
    outcome = command()
    assert (outcome.code, outcome.err) == (0, "")
    assert all(row["loss"] > 0 for row in read_metrics(outcome.folder / "metrics.jsonl"))
    write_rows(folder / "pairs.jsonl", rows[::2])
    outcome = command(f"output={folder / 'second'}")
    (line,) = lines(outcome, folder)
    assert line == ": all segments of the first 9 frames are ties; raise call.num_frames"
    assert only_caches(outcome.folder)
    rows[1] |= {"frames": 17, "seg_sec": 0.25, "seg_labels": [1] * 8}
    write_rows(folder / "pairs.jsonl", rows)
    (line,) = lines(command(f"output={folder / 'second'}"), folder)
    assert line.startswith("line 2: segments of 0.25 s at 8 fps are shorter than a latent frame")
    write_rows(folder / "pairs.jsonl", rows_of())
    assert command(f"output={folder / 'second'}").code == 0


@pytest.mark.parametrize(
    ("algorithm", "data", "words"),
    [
        ("grpo", {}, "data.preferences: grpo learns from samples of its own; name data.prompts instead"),
        ("flow_dpo", {"prompts": "prompts.txt"}, "leave data.prompts out"),
        ("flow_dpo", {"preferences": None}, "missing key data.prompts, or data.preferences"),
        ("dense_dpo", {"preferences": None, "prompts": "prompts.txt"}, "dense_dpo learns from labelled segments"),
        ("seppo", {"preferences": None, "prompts": "prompts.txt"}, "seppo learns from given videos"),
        ("sft", {"held_out": "pairs.jsonl"}, "data.held_out"),
    ],
)
def test_recipes_that_name_too_much_or_too_little(command, folder, recipe, algorithm, data, words):
    write_rows(folder / "pairs.jsonl", rows_of())
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    recipe["algorithm"] = {"name": algorithm}
    recipe["data"] |= {key: value and str(folder / value) for key, value in data.items()}
    outcome = command()
    assert outcome.code == 2
    assert words in outcome.only_line()
    assert not outcome.folder.exists()


def test_a_table_in_the_layout_of_video_align(command, folder, recipe):
    """Clips of another size and rate are fitted, encoded and learned from, by one of the dimensions."""
    rows = [["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B", "num_frames_B"]]
    for i, labels in enumerate((["A", "same", "B"], ["B", "A", "A"], ["same", "A", "B"])):
        write_clip(folder / f"{i}_A.mp4", 20 + i, frames=40, size=40, fps=30)
        write_clip(folder / f"{i}_B.mp4", 30 + i, frames=30, size=24, fps=24)
        rows.append([f"{i}_A.mp4", f"./{i}_B.mp4", f"{PROMPTS[i]}, slowly", *labels, 30.0, 40.0, 24.0, 30.0])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    recipe["algorithm"]["dimension"] = "VQ"
    arguments = ["iterations=1", f"data.preferences={folder / 'table.csv'}"]
    outcome = command("--check", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    outcome = command(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    (row,) = read_metrics(outcome.folder / "metrics.jsonl")
    assert row["loss"] == pytest.approx(0.6931472)
    assert row["grad_norm"] > 0
    states = [load_file(path)["state"] for path in (outcome.folder / "latents").iterdir()]
    assert len(states) == 6
    assert all(state.shape == (16, 3, 2, 2) and torch.isfinite(state).all() for state in states)
    outcome = command("algorithm.dimension=Overall", *arguments, f"output={folder / 'other'}")
    assert "no pair to learn from: 0 tied and 3 unlabelled by Overall" in outcome.only_line()
