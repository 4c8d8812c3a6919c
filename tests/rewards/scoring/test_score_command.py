"""`python -m rewards.score` as its users run it: the numbers of the rewards, and what fails is masked alone."""

import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import rewards.list
import rewards.serve
from rewards import load
from rewards.score import main
from rewards.video_files import clip_from_file
from tests.rewards.scoring.folder import LOGGED, calls, rows, run, table

ROOT = Path(__file__).parents[3]


def test_numbers_are_those_of_the_rewards_called_directly(place, clip_folder):
    arguments = ("--reward", f"clip:path={clip_folder},frames=3", "--reward", "light=my.py:bright", "--videos", "clips")
    run(*arguments, "--prompts", "a gray wall", "--out", "scores.jsonl")
    found = rows()
    assert list(found) == ["clip_1.mp4", "clip_2.mp4", "clip_10.mp4"]
    rewards = {"clip": load("clip", path=str(clip_folder), frames=3), "light": load("my.py:bright")}
    for name, row in found.items():
        clip = clip_from_file(f"clips/{name}", "a gray wall")
        for column, reward in rewards.items():
            assert row[column] == pytest.approx(reward([clip]).total.item(), abs=1e-6)
            assert row[f"{column}:valid"] is True
        assert (row["prompt"], row["fps"], row["frames"], row["error"]) == ("a gray wall", 8.0, 6, None)
    assert [row["light"] for row in found.values()] == pytest.approx([40 / 255, 120 / 255, 200 / 255], abs=0.02)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_of_clips_of_any_size(place, batch):
    run(*LOGGED, "--batch", batch)
    assert [len(call) for call in calls()] == {1: [1, 1, 1], 2: [2, 1], 5: [3]}[batch]
    assert [row["logged"] for row in rows().values()] == pytest.approx([40 / 255, 120 / 255, 200 / 255], abs=0.02)


def test_a_reward_gets_the_frames_that_it_looks_at(place):
    run(*LOGGED)
    assert {(row["logged/frames"], row["logged/seconds"]) for row in rows().values()} == {(2.0, 0.75)}


def test_dense_scores(place):
    run(*LOGGED, "--dense")
    assert rows()["clip_10.mp4"]["logged:dense"] == pytest.approx([200 / 255] * 2, abs=0.02)


def test_without_out_the_scores_are_shown(place, capsys):
    run("--reward", "my.py:Logged", "--videos", "clips/clip_2.mp4", "--prompts", "gray")
    line = capsys.readouterr().out.splitlines()[0].split()
    assert line[:2] == ["[1/1]", "clip_2.mp4"]
    shown = dict(zip(line[2::2], map(float, line[3::2]), strict=True))
    assert shown["Logged"] == pytest.approx(120 / 255, abs=0.02)
    assert shown["Logged/frames"] == 2


def test_what_a_reward_will_not_judge_is_masked_alone(place):
    table("prompts.txt", "one", "odd", "ten")
    arguments = ("--videos", "clips", "--prompts", "prompts.txt", "--out", "scores.jsonl", "--batch", "3")
    run(
        "--reward",
        "logged=my.py:Logged:refuse=odd",
        "--reward",
        "my.py:undecided",
        "--reward",
        "my.py:bright",
        *arguments,
        code=1,
    )
    found = rows()
    assert [row["logged:valid"] for row in found.values()] == [True, False, True]
    assert [row["undecided"] for row in found.values()] == [1.0, None, 1.0]
    assert [row["undecided:valid"] for row in found.values()] == [True, False, True]
    assert all(row["bright:valid"] for row in found.values())
    assert "will not judge 'odd'" in found["clip_2.mp4"]["error"]
    assert found["clip_1.mp4"]["error"] is None


def test_a_fault_in_a_reward_stops_the_run_in_one_line(place, capsys):
    run("--reward", "my.py:broken", "--videos", "clips", "--prompts", "gray", "--out", "scores.jsonl", code=1)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("stopped: reward broken: AttributeError: ")
    assert "(my.py:11)" in err[0]
    assert err[0].endswith("; the same command goes on")


@pytest.mark.parametrize("frames", ["1 / 0", "[length]"])
def test_a_fault_in_the_choice_of_frames_stops_the_run_in_one_line(place, capsys, frames):
    text = "from rewards import Reward\n\nclass Odd(Reward):\n    def indices(self, length, fps):\n"
    Path("odd.py").write_text(f"{text}        return {frames}\n")
    run("--reward", "odd.py:Odd", "--videos", "clips", "--prompts", "gray", code=1)
    error = capsys.readouterr().err
    assert error.startswith("stopped: reward Odd: ")
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(("scope", "together"), [("group", [["a", "a"], ["b"]]), ("batch", [["a", "b", "a"]])])
def test_clips_that_have_to_be_seen_together(place, scope, together):
    table("prompts.txt", "a", "b", "a")
    arguments = ("--reward", f"logged=my.py:Logged:scope={scope}", "--videos", "clips", "--prompts", "prompts.txt")
    run(*arguments, "--out", "scores.jsonl")
    assert calls() == together
    found = rows()
    assert [found[f"clip_{n}.mp4"]["logged/group"] for n in (1, 2, 10)] == [0, 1, 0]
    kept = [line for line in Path("scores.jsonl").read_text().splitlines() if "clip_10" not in line]
    table("scores.jsonl", *kept)  # one of a group is missing: all of it are compared again
    run(*arguments, "--out", "scores.jsonl")
    assert calls() == together[:1]
    assert rows() == found


def test_a_video_larger_than_allowed_is_masked(place):
    run(*LOGGED, "--max-pixels", 6 * 80 * 32, code=1)
    assert [row["error"] is None for row in rows().values()] == [True, True, False]
    assert "more than 15360 pixels" in rows()["clip_10.mp4"]["error"]


def test_the_summary(place, capsys):
    run(*LOGGED)
    cells = [line.strip("\u2502 ").split() for line in capsys.readouterr().out.splitlines() if "\u2502 logged " in line]
    valid, mean, std, low, high = cells[0][2::2]
    values = [row["logged"] for row in rows().values()]
    assert valid == "3"
    expected = [np.mean(values), np.std(values, ddof=1), min(values), max(values)]
    assert [float(mean), float(std), float(low), float(high)] == pytest.approx(expected, abs=1e-4)


def test_the_readme_runs(place, clip_folder, capsys):
    text = (ROOT / "README.md").read_text("utf-8").partition("## Rewards")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    function = next(block for language, block in blocks if "# my_rewards.py" in block)
    Path("my_rewards.py").write_text(function)
    for folder in ("my_clip", "examples/tiny_world/clip"):
        shutil.copytree(clip_folder, folder)
    table("prompts.txt", "one", "two", "ten")
    table("clips.csv", "path,prompt", "clips/clip_1.mp4,one", "clips/clip_2.mp4,two")
    commands = [
        line.partition("#")[0].split()[2:] for _, block in blocks for line in block.splitlines() if "-m rew" in line
    ]
    assert [module for module, *_ in commands].count("rewards.score") == 2
    for module, *arguments in commands:
        if module == "rewards.serve":  # would run until it is stopped
            assert rewards.serve.load_rewards(rewards.serve._parser().parse_args(arguments).reward)
        else:
            assert {"rewards.list": rewards.list.main, "rewards.score": main}[module](arguments) == 0
    assert Path("scores.csv").read_text().count("clips/clip_") == 2
    script = next(block for _, block in blocks if block.startswith("import rewards"))
    shutil.copy("clips/clip_1.mp4", "a.mp4")
    names = {"videos": torch.rand(2, 3, 3, 32, 32), "prompts": ["a", "b"]}
    exec(script, names)
    assert names["scores"].valid.tolist() == [True]


def test_a_rate_for_files_that_have_none_of_their_own(place):
    run(*LOGGED, "--fps", 2)
    assert {(row["fps"], row["logged/seconds"]) for row in rows().values()} == {(2.0, 3.0)}


@pytest.mark.parametrize("option", ["--fps", "--batch", "--max-pixels"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_numbers_that_cannot_be(place, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        main([*LOGGED, option, value])
    assert ended.value.code == 2
    assert re.search(f"argument {option}: ({value} is not above 0|invalid positive)", capsys.readouterr().err)


def test_images_are_scored_as_well(place):
    iio.imwrite("clips/still.png", np.full((32, 48, 3), 255, np.uint8))
    run(*LOGGED)
    assert (rows()["still.png"]["frames"], rows()["still.png"]["logged"]) == (1, 1.0)


def test_a_terminal_sees_a_bar_and_what_failed(place, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    Path("clips/clip_2.mp4").write_text("not a video")
    run(*LOGGED, code=1)
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", capsys.readouterr().out)
    assert "3/3" in text
    assert "[2/3] clip_2.mp4  clips/clip_2.mp4: not a video" in text
    assert "[1/3]" not in text
