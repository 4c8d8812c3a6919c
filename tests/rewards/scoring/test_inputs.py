"""What is scored: prompts and paths as a user means them, and every mistake listed at once."""

import json
import os
from pathlib import Path

import pytest

from tests.rewards.scoring.folder import refused, rows, run, table

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
        ("a.jsonl", ["[" * 100_000], "a.jsonl line 1: not JSON"),
        (
            "a.jsonl",
            ['{"path": "clips/clip_1.mp4", "prompt": "a \\ud800"}'],
            r"the prompt 'a \ud800' is not Unicode text",
        ),
        ("a.csv", ["path,prompt", f"{'x' * 300}.mp4,p"], "a.csv line 2: no such file"),
        ("a.csv", ["path,prompt", "~nobody_here/x.mp4,p"], "a.csv line 2: no such file"),
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
        (["--videos", "n" * 300], "no such file or folder: nnn"),
        (["--videos", "clips", "--prompts", "p" * 300 + ".txt"], "--prompts: no such file: ppp"),
        (["--videos", "clips", "--prompts", "p", "--out", "two.txt/s.csv"], "nothing can be written in"),
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


def test_a_name_that_is_no_text_is_refused(place, capsys):
    os.link("clips/clip_1.mp4", b"clips/caf\xe9.mp4")
    found = refused(capsys, "--reward", "my.py:bright", "--videos", "clips", "--prompts", "p")
    assert found == [r"--videos: the name 'caf\udce9.mp4' is not Unicode text; change it"]


def test_a_long_list_of_mistakes_is_cut(place, capsys):
    found = refused(capsys, "--reward", "my.py:bright", "--videos", table("a.csv", "path,prompt", *["x.mp4,p"] * 30))
    assert len(found) == 21
    assert found[-1] == "and 10 more"
