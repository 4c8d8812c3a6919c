"""What is written: whole tables, and nothing lost or mixed when a run goes on."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rewards.scoring.folder import LOGGED, REWARDS, calls, refused, rows, run, table, write

ROOT = Path(__file__).parents[3]


def test_a_broken_video_is_masked_and_tried_again(place, capsys):
    whole = Path("clips/clip_2.mp4").read_bytes()
    Path("clips/clip_2.mp4").write_bytes(whole[:-200])
    run(*LOGGED, code=1)
    row = rows()["clip_2.mp4"]
    assert (row["logged"], row["logged:valid"], row["frames"]) == (None, False, None)
    assert row["error"].startswith("clips/clip_2.mp4: not a video, or damaged")
    assert "2 of 3 videos have every score" in capsys.readouterr().out
    assert len(calls()) == 2
    run(*LOGGED, code=1)  # tried again, alone
    assert (len(rows()), calls()) == (3, [])
    Path("clips/clip_2.mp4").write_bytes(whole)
    run(*LOGGED)
    assert (len(rows()), len(calls())) == (3, 1)


def test_killed_and_gone_on_with(place):
    table("prompts.txt", "one", "two", "ten")
    arguments = ("--videos", "clips", "--prompts", "prompts.txt", "--out", "scores.jsonl")
    reward = "logged=my.py:Logged:die=ten"
    command = [sys.executable, "-m", "rewards.score", "--reward", reward, *arguments]
    killed = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == 9
    assert list(rows()) == ["clip_1.mp4", "clip_2.mp4"]
    whole = Path("scores.jsonl").read_bytes()
    with Path("scores.jsonl").open("ab") as file:
        file.write(whole.splitlines(keepends=True)[1][:40])  # as a crash in the middle of a line leaves it
    assert calls() == [["one"], ["two"], ["ten"]]
    table("prompts.txt", "one", "two", "10")  # the last may be changed, it has no row yet
    run("--reward", reward, *arguments)
    assert calls() == [["10"]]
    assert list(rows()) == ["clip_1.mp4", "clip_2.mp4", "clip_10.mp4"]
    assert Path("scores.jsonl").read_bytes().startswith(whole)
    before = Path("scores.jsonl").read_bytes()
    run("--reward", reward, *arguments)
    assert (calls(), Path("scores.jsonl").read_bytes()) == ([], before)


def test_an_output_belongs_to_its_rewards_and_videos(place, capsys):
    run(*LOGGED)
    before = Path("scores.jsonl").read_bytes()
    rest = LOGGED[2:]
    for reward in ("logged=my.py:Logged:refuse=x", "other=my.py:Logged", "my.py:bright"):
        assert "holds scores of other rewards" in refused(capsys, "--reward", reward, *rest)[0]
    assert (
        "line 1 is of other videos (clip_1.mp4 with another prompt"
        in refused(capsys, *LOGGED[:5], "white", *LOGGED[6:])[0]
    )
    Path("my.py").write_text(REWARDS.replace("clip.video[0].mean()", "clip.video[-1].mean()"))
    assert "holds scores of other rewards" in refused(capsys, *LOGGED)[0]
    Path("my.py").write_text(REWARDS)
    Path("clips/clip_2.mp4").rename("kept.mp4")
    assert "line 2 is of other videos" in refused(capsys, *LOGGED)[0]
    write(Path("clips/clip_2.mp4"), 77)
    assert "line 2 is of other videos" in refused(capsys, *LOGGED)[0]
    assert Path("scores.jsonl").read_bytes() == before
    Path("kept.mp4").rename("clips/clip_2.mp4")
    write(Path("clips/clip_3.mp4"), 160)  # more videos are welcome
    calls()
    run(*LOGGED)
    assert (len(calls()), len(rows())) == (1, 4)
    for notes in ("precious notes\n", "precious notes"):
        Path("scores.jsonl").write_text(notes)
        assert "line 1 was not written by this command" in refused(capsys, *LOGGED)[0]
        assert Path("scores.jsonl").read_text() == notes


def test_a_part_of_ones_own_is_known_by_its_text(place, capsys):
    judged = ("--reward", "win=win_rate:judge={use: my.py:Logged}", "--videos", "clips", "--prompts", "gray")
    run(*judged, "--out", "scores.jsonl")
    assert [row["win"] for row in rows().values()] == [0, 0.5, 1]  # the brighter one wins
    Path("my.py").write_text(REWARDS.replace("clip.video[0].mean()", "-clip.video[0].mean()"))
    assert "holds scores of other rewards" in refused(capsys, *judged, "--out", "scores.jsonl")[0]
    run(*judged, "--out", "others.jsonl")
    assert [row["win"] for row in rows("others.jsonl").values()] == [1, 0.5, 0]


def test_csv(place):
    table("prompts.txt", "one, two", 'said "odd"', "zwoelf")
    arguments = (
        "--reward",
        "my.py:undecided",
        "--reward",
        "logged=my.py:Logged",
        "--videos",
        "clips",
        "--prompts",
        "prompts.txt",
    )
    run(*arguments, "--out", "out/scores.csv", code=1)
    with open("out/scores.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["prompt"] for row in found] == ["one, two", 'said "odd"', "zwoelf"]
    assert [row["undecided"] for row in found] == ["1.0", "", "1.0"]
    assert [row["undecided:valid"] for row in found] == ["True", "False", "True"]
    assert [float(row["logged/frames"]) for row in found] == [2, 2, 2]
    assert sorted(path.name for path in Path("out").iterdir()) == ["scores.csv", "scores.csv.partial.jsonl"]
    calls()
    run(*arguments, "--out", "out/scores.csv", code=1)
    assert calls() == [['said "odd"']]  # what failed, and nothing else
    with open("out/scores.csv", newline="") as file:
        assert list(csv.DictReader(file)) == found  # in the order of the videos again


def test_a_table_that_is_not_ours_is_not_overwritten(place, capsys):
    table("scores.csv", "precious", "notes")
    message = refused(capsys, *LOGGED[:-1], "scores.csv")[0]
    assert "scores.csv exists, and nothing beside it to go on from" in message
    assert Path("scores.csv").read_text() == "precious\nnotes\n"


def test_parquet(place):
    parquet = pytest.importorskip("pyarrow.parquet")
    Path("clips/clip_1.mp4").write_text("not a video")  # the first row lacks the dims
    run(*LOGGED[:-1], "scores.parquet", code=1)
    found = parquet.read_table("scores.parquet").to_pylist()
    assert [row["path"] for row in found] == ["clip_1.mp4", "clip_2.mp4", "clip_10.mp4"]
    assert [row["logged/frames"] for row in found] == [None, 2.0, 2.0]
    assert [row["logged:valid"] for row in found] == [False, True, True]
    assert [row["frames"] for row in found] == [None, 6, 6]


def test_parquet_without_pyarrow(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = refused(capsys, *LOGGED[:-1], "scores.parquet")
    assert found == ['--out: .parquet needs pyarrow: pip install "reelign[parquet]"']
