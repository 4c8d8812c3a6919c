"""`python -m rewards.score` as its users run it: right numbers, whole tables, and nothing lost on the way."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from rewards import load
from rewards.score import main
from rewards.video_files import clip_from_file

ROOT = Path(__file__).parents[2]
REWARDS = '''
import json, os
from pathlib import Path
import torch
from rewards import Reward, RewardError, Scores

def bright(videos, prompts):
    return videos.mean((1, 2, 3, 4))

def broken(videos, prompts):
    return videos.no_such_thing

def undecided(videos, prompts):
    return [float("nan") if "odd" in prompt else 1.0 for prompt in prompts]

class Logged(Reward):
    """Brightness of the first and last frame; a line a call in calls.log."""

    name = "logged"

    def __init__(self, scope="clip", refuse="", die=""):
        self.scope, self.refuse, self.die = scope, refuse, die
        (Path(__file__).parent / "loaded").touch()

    def indices(self, length, fps):
        return sorted({0, length - 1})

    def score(self, clips):
        with (Path(__file__).parent / "calls.log").open("a") as log:
            print(json.dumps([clip.prompt for clip in clips]), file=log)
        for clip in clips:
            if self.die and self.die in clip.prompt:
                os._exit(9)
            if self.refuse and self.refuse in clip.prompt:
                raise RewardError(f"reward logged: will not judge {clip.prompt!r}")
        first = torch.stack([clip.video[0].mean() for clip in clips])
        seen = {"frames": [len(c.video) for c in clips], "mark": [float(c.meta.get("mark", 0)) for c in clips]}
        seen |= {"group": [c.group for c in clips], "seconds": [len(c.video) / c.fps for c in clips]}
        dims = {name: torch.tensor([float(value) for value in values]) for name, values in seen.items()}
        return Scores(first, dims, torch.stack([clip.video.mean((1, 2, 3)) for clip in clips]))
'''


def write(path, gray=100, frames=6, size=(48, 32), fps=8):
    video = np.full((frames, size[1], size[0], 3), gray, np.uint8)
    iio.imwrite(path, video, plugin="FFMPEG", fps=fps, macro_block_size=1, output_params=["-crf", "5"])
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """clip_1.mp4, clip_2.mp4, clip_10.mp4, ever brighter and wider."""
    folder = tmp_path_factory.mktemp("clips")
    for number, gray in ((1, 40), (2, 120), (10, 200)):
        write(folder / f"clip_{number}.mp4", gray, size=(48 + 16 * number, 32))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, clips):
    """A folder to work in: my.py with rewards, clips/ with three videos."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(REWARDS)
    shutil.copytree(clips, "clips")
    return tmp_path


def run(*arguments, code=0):
    found = main([str(argument) for argument in arguments])
    assert found == code
    return found


def rows(path="scores.jsonl"):
    return {row["path"]: row for row in map(json.loads, Path(path).read_text("utf-8").splitlines())}


def calls():
    log = Path("calls.log")
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def table(name, *lines):
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def refused(capsys, *arguments):
    capsys.readouterr()
    run(*arguments, code=2)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


LOGGED = ("--reward", "logged=my.py:Logged", "--videos", "clips", "--prompts", "gray", "--out", "scores.jsonl")


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


def test_prompts_of_a_folder(place, capsys):
    def prompts(*arguments):
        run("--reward", "my.py:bright", "--videos", "clips", *arguments, "--out", "prompts.jsonl")
        found = [row["prompt"] for row in rows("prompts.jsonl").values()]
        Path("prompts.jsonl").unlink()
        return found

    table("lines.txt", "one", "two", "", "ten")  # in natural order of the names: 1, 2, 10
    assert prompts("--prompts", "lines.txt") == ["one", "two", "ten"]
    table(
        "by_path.csv", "prompt,path", "ten,clip_10.mp4", "two,./clip_2.mp4", '"one, or so",clips/clip_1.mp4', "no,x.mp4"
    )
    assert prompts("--prompts", "by_path.csv") == ["one, or so", "two", "ten"]
    table("by_path.jsonl", *(json.dumps({"path": f"clip_{n}.mp4", "prompt": f"p{n}"}) for n in (1, 2, 10)))
    assert prompts("--prompts", "by_path.jsonl") == ["p1", "p2", "p10"]
    assert prompts("--prompts-from-names") == ["clip 1", "clip 2", "clip 10"]
    for number in (1, 2):
        table(f"clips/clip_{number}.txt", f"beside {number}")
    assert prompts("--prompts-from-names") == ["beside 1", "beside 2", "clip 10"]
    message = (
        "--videos: no prompt for clip_10.mp4; give --prompts, or NAME.txt beside NAME.mp4, or --prompts-from-names"
    )
    assert refused(capsys, "--reward", "my.py:bright", "--videos", "clips") == [message]
    table("clips/clip_10.txt", "beside 10")
    assert prompts() == ["beside 1", "beside 2", "beside 10"]


PAIRS = [
    "path_A,path_B,prompt,VQ,MQ,TA,Overall,fps_A,num_frames_A,fps_B,num_frames_B",
    "clips/clip_1.mp4,./clips/clip_2.mp4,gray,A,B,same,B,8.0,6,8.0,6",
    "clips/clip_2.mp4,clips//clip_10.mp4,gray,B,A,A,same,8.0,6,8.0,6",
    "clips/clip_1.mp4,clips/clip_10.mp4,gray,B,B,same,A,8.0,6,8.0,6",
]
JUDGE = """
import torch
from rewards import Scores

class Judge:  # VQ: the brighter; MQ: the darker; no TA; total: the brighter
    name, scope, differentiable = "judge", "clip", False

    def __call__(self, clips):
        bright = torch.stack([clip.video.mean() for clip in clips])
        return Scores(bright, {"VQ": bright, "MQ": -bright})

def TA(videos, prompts):
    return [0.5 for prompt in prompts]  # cannot tell any two apart
"""


def test_pairs_score_each_video_once_and_agree_with_people(place, capsys):
    Path("judge.py").write_text(JUDGE)
    table("pairs.csv", *PAIRS)
    run("--reward", "judge=judge.py:Judge", "--reward", "judge.py:TA", "--videos", "pairs.csv", "--out", "scores.jsonl")
    assert list(rows()) == ["clips/clip_1.mp4", "clips/clip_2.mp4", "clips/clip_10.mp4"]
    lines = [line.strip("\u2502 ").split("\u2502") for line in capsys.readouterr().out.splitlines()]
    found = [[cell.strip() for cell in line] for line in lines if len(line) == 4]
    # By hand, brightness 1 < 2 < 10. VQ: A wrong, B right, B right. MQ = -brightness: B wrong, A right, B wrong.
    # Overall by the total: B right, same left out, A wrong. TA: the one decided pair is not told apart, so wrong.
    assert found == [
        ["judge/VQ", "VQ", "0.667", "3"],
        ["judge/MQ", "MQ", "0.333", "3"],
        ["judge", "Overall", "0.500", "2"],
        ["TA", "TA", "0.000", "1"],
        ["TA", "Overall", "0.000", "2"],
    ]


def test_a_table_with_rates_and_columns_for_rewards(place):
    table(
        "clips.jsonl",
        *(json.dumps({"path": f"clips/clip_{n}.mp4", "prompt": "gray", "fps": 4, "mark": n}) for n in (1, 2)),
    )
    run("--reward", "logged=my.py:Logged", "--videos", "clips.jsonl", "--out", "scores.jsonl")
    assert [(row["fps"], row["logged/mark"], row["logged/seconds"]) for row in rows().values()] == [
        (4, 1, 1.5),
        (4, 2, 1.5),
    ]


def test_every_mistake_is_listed_before_anything_is_loaded(place, capsys):
    table(
        "bad.csv",
        "path,prompt,fps",
        "clips/clip_1.mp4,gray,",
        "clips/gone.mp4,gray,",
        "clips/clip_2.mp4, ,",
        "clips/clip_10.mp4,gray,fast",
        "./clips/clip_1.mp4,red,",
        "clips/clip_2.mp4,a cat, asleep,",
        ",gray,",
    )
    bad = ("--reward", "my.py:Logged:scop=1", "--reward", "clop", "--videos", "bad.csv", "--out", "scores.xlsx")
    found = refused(capsys, *bad)
    assert "did you mean 'scope'?" in found[0]
    assert "did you mean 'clip'?" in found[1]
    assert "unknown format '.xlsx'" in found[2]
    assert found[3:] == [
        "bad.csv line 7: more cells than columns; a cell with a comma needs quotes",
        "bad.csv line 3: no such file: clips/gone.mp4",
        'bad.csv line 4: no "prompt"',
        "bad.csv line 5: fps is 'fast', expected a positive number or nothing",
        "bad.csv line 6: clips/clip_1.mp4 has prompt 'red' here and 'gray' at bad.csv line 2",
        'bad.csv line 8: no "path"',
    ]
    assert not Path("loaded").exists()


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.csv", ["video,prompt", "x.mp4,y"], "no column path (nor path_A and path_B)"),
        ("a.csv", ["path,text", "x.mp4,y"], "no column prompt; add it, or give one --prompts for all"),
        ("a.csv", ["path,prompt"], "no video in a.csv"),
        ("a.jsonl", ['{"path": "clips/clip_1.mp4", "prompt": "p"}', "{nonsense"], "a.jsonl line 2: not JSON"),
        ("a.jsonl", ["[1, 2]"], "a.jsonl line 1: not a JSON object"),
        (
            "a.csv",
            ["path_A,path_B,prompt,VQ", "clips/clip_1.mp4,clips/clip_2.mp4,p,left"],
            "VQ is 'left', expected one of",
        ),
        ("a.csv", ["path_A,prompt", "clips/clip_1.mp4,p"], 'a.csv line 2: no "path_B"'),
        ("a.xml", ["<a/>"], "neither a folder nor one of .csv"),
    ],
)
def test_a_table_that_is_none(place, capsys, name, lines, message):
    found = refused(capsys, "--reward", "my.py:bright", "--videos", table(name, *lines))
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos", "nowhere"], "no such file or folder: nowhere"),
        (["--videos", "clips", "--prompts", "gone.txt"], "--prompts: no such file: gone.txt"),
        (["--videos", "clips", "--prompts", "two.txt"], "two.txt has 2 lines for 3 videos"),
        (["--videos", "clips", "--prompts", "p", "--reward", "path=my.py:bright"], "path is a column of every table"),
        (["--videos", "clips", "--prompts", "p", "--reward", "my.py:bright"], "the name bright is taken"),
        (["--videos", "clips", "--prompts", "p", "--out", "s.csv", "--dense"], "need a .jsonl file"),
        (["--videos", "clips", "--prompts", "p", "--out", "clips"], "unknown format"),
        (["--videos", "own.csv", "--prompts", "p"], "own.csv has prompts of its own; leave --prompts away"),
        (["--videos", "empty", "--prompts", "p"], "no video in empty"),
    ],
)
def test_arguments_that_cannot_be_meant(place, capsys, arguments, message):
    table("two.txt", "one", "two")
    table("own.csv", "path,prompt", "clips/clip_1.mp4,p")
    Path("empty").mkdir()
    found = refused(capsys, "--reward", "my.py:bright", *arguments)
    assert len(found) == 1
    assert message in found[0]


def test_a_long_list_of_mistakes_is_cut(place, capsys):
    found = refused(capsys, "--reward", "my.py:bright", "--videos", table("a.csv", "path,prompt", *["x.mp4,p"] * 30))
    assert len(found) == 21
    assert found[-1] == "and 10 more"


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
    table("scores.jsonl", "precious notes")
    assert "line 1 was not written by this command" in refused(capsys, *LOGGED)[0]
    assert Path("scores.jsonl").read_text() == "precious notes\n"


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
