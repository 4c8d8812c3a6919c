"""`python -m alignment.annotate` as its users run it: labels against numbers worked out by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from alignment.annotate import main
from alignment.annotation.labels import BTT_BAND
from alignment.data import btt_label, read_preferences
from tests.rewards.judges.judge_servers import ScriptedServer, content_of, says

ROOT = Path(__file__).parents[2]
FPS = 8
REWARDS = '''
import json, os
from pathlib import Path
import torch
from rewards import Reward, RewardError, Scores
from rewards.comparison import WinRate

HERE = Path(__file__).parent

def log(what):
    with (HERE / "calls.log").open("a") as file:
        print(json.dumps(what), file=file)

def bright(videos, prompts):
    """Mean gray, 0 to 255."""
    return (255 * videos).mean((1, 2, 3, 4)).round()

def dark(videos, prompts):
    return -bright(videos, prompts)

def motion(videos, prompts):
    return 255 * videos.diff(dim=1).abs().mean((1, 2, 3, 4))

def still(videos, prompts):
    return -motion(videos, prompts)

def by_place(videos, prompts):
    """Depends on what else is in the call."""
    return torch.arange(len(videos)).float()

def undecided(videos, prompts):
    return [float("nan") if "odd" in prompt else 1.0 for prompt in prompts]

def broken(videos, prompts):
    if (HERE / "mended").exists() or "two" not in prompts[0]:
        return bright(videos, prompts)
    return videos.no_such_thing

class Logged(Reward):
    """Gray as gray/255, with the dims `late` (the last frame) and `frames`."""
    name = "logged"

    def __init__(self, scope="clip", die=""):
        self.scope, self.die = scope, die
        log("loaded")

    def score(self, clips):
        log([clip.prompt for clip in clips])
        if self.die and any(self.die in clip.prompt for clip in clips):
            os._exit(9)
        gray = lambda videos: torch.stack([(255 * video).mean().round() for video in videos])
        videos = [clip.video for clip in clips]
        dims = {"late": -gray([v[-1] for v in videos]), "frames": torch.tensor([float(len(v)) for v in videos])}
        return Scores(gray(videos), dims)

class Judge(WinRate):
    """Prefers the brighter clip by 30, else the first one that it is shown."""

    def __init__(self):
        super().__init__(self.judge, name="judge")

    def judge(self, first, second):
        grays = [round(255 * float(clip.video.mean())) for clip in (first, second)]
        log(grays)
        return 1.0 if grays[0] > grays[1] - 30 else 0.0
'''


def write(path, grays):
    """A video whose frames have these grays; whatever is written is read back the same, within 1."""
    video = np.stack([np.full((32, 32, 3), gray, np.uint8) for gray in grays])
    settings = {"fps": FPS, "codec": "libx264", "pixelformat": "yuv444p", "macro_block_size": 1}
    iio.imwrite(path, video, plugin="FFMPEG", **settings, output_params=["-crf", "1"], ffmpeg_log_level="error")
    return path


@pytest.fixture(scope="session")
def gray_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grays")
    for gray in (10, 50, 90, 100, 200):
        write(folder / f"{gray}.mp4", [gray] * 5)
    write(folder / "moving.mp4", [40, 80, 40, 80, 40])
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, gray_videos):
    """A folder to work in, with rewards in my.py and the videos in videos/."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(REWARDS)
    Path("videos").symlink_to(gray_videos)
    return tmp_path


def member(name):
    return {"video": f"videos/{name}.mp4"}


def pair(first, second, **more):
    return {"id": f"{first}-{second}", "prompt": "gray", "a": member(first), "b": member(second)} | more


def group(*names, **more):
    return {"id": "g", "prompt": "gray", "members": [member(name) for name in names]} | more


def index(*rows, path="index.jsonl"):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments, code=0):
    command = ["index.jsonl", "--out", "pairs.jsonl", *map(str, arguments)]
    assert main(command) == code


def labelled(*arguments, probes=False):
    """The records that the command wrote, as training reads them."""
    run(*arguments, *([] if probes else ["--no-probes"]))
    return read_preferences("pairs.jsonl") if Path("pairs.jsonl").read_text() else []


def refused(capsys, *arguments, code=2):
    capsys.readouterr()
    run(*arguments, code=code)
    out, err = capsys.readouterr()
    return err.splitlines()


def summary():
    return json.loads(Path("pairs.jsonl.summary.json").read_text())


def calls():
    log = Path("calls.log")
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def test_labels_are_the_signs_of_the_differences(place, capsys):
    index(pair(200, 50), pair(50, 100, source="mine"), pair(200, 100))
    first, second, third = labelled("--reward", "my.py:bright")
    assert [p.label for p in (first, second, third)] == [1, -1, 1]
    assert first.scores == {"bright": (200, 50)}
    assert (first.labels, first.annotator, first.order_consistent) == ({"bright": 1}, "bright", None)
    assert (second.source, second.scores["bright"]) == ("mine", (50, 100))
    assert summary()["mean_gap"] == (150 + 50 + 100) / 3
    assert "3 pairs, 0 of them ties (0.000), mean gap 100.0000" in capsys.readouterr().out


def test_every_video_is_scored_once(place):
    index(pair(200, 50), pair(50, 100), pair(100, 200), group(50, 100, 10))
    labelled("--reward", "my.py:Logged", "--batch", 3)
    assert calls() == ["loaded", ["gray"] * 3, ["gray"]]


def test_output_names_files_from_its_own_folder(place):
    index(pair(200, 50))
    Path("below").mkdir()
    assert main(["index.jsonl", "--reward", "my.py:bright", "--out", "pairs.jsonl", "--no-probes"]) == 0
    assert json.loads(Path("pairs.jsonl").read_text())["a"] == {"video": "videos/200.mp4"}
    assert main(["index.jsonl", "--reward", "my.py:bright", "--out", "below/pairs.jsonl", "--no-probes"]) == 0
    assert read_preferences("below/pairs.jsonl")[0].label == 1


def test_scores_are_compared_as_numbers(place):
    index(pair(100, 90), pair(10, 90))  # as text "100" is before "90", and "10", too
    assert [p.label for p in labelled("--reward", "my.py:bright")] == [1, -1]
    assert json.loads(Path("pairs.jsonl").read_text().splitlines()[0])["scores"] == {"bright": [100.0, 90.0]}


def test_ties(place):
    index(pair(200, 50), pair(100, 90), pair(90, 100))
    assert [p.label for p in labelled("--reward", "my.py:bright", "--tie-eps", 10)] == [1, 0, 0]
    assert (summary()["ties"], summary()["tie_share"]) == (2, 2 / 3)
    assert [p.label for p in labelled("--reward", "my.py:bright", "--tie-eps", 9.5)] == [1, 1, -1]


def test_band_of_ties(place, capsys):
    for difference in (BTT_BAND * 0.999, BTT_BAND * 1.001):
        assert btt_label(difference) == (difference > BTT_BAND)
    assert math.isclose(BTT_BAND, 1.526, abs_tol=1e-3)
    Path("my.py").write_text(REWARDS + "\ndef raw(videos, prompts):\n    return bright(videos, prompts) * 0.0152\n")
    index(pair(200, 100), pair(200, 90))  # differences of 1.520 and 1.672
    assert [p.label for p in labelled("--reward", "my.py:raw", "--btt")] == [0, 1]
    assert any("use_norm=false" in line for line in refused(capsys, "--reward", "video_reward:path=x", "--btt"))


def test_judges_are_asked_in_both_orders(place):
    index(pair(200, 50), pair(50, 200), pair(90, 100), pair(100, 90))
    found = labelled("--reward", "my.py:Judge")
    assert [p.label for p in found] == [1, -1, 0, 0]
    assert [p.order_consistent for p in found] == [True, True, False, False]
    assert [p.scores["Judge"] for p in found] == [(1, 0), (0, 1), (0.5, 0.5), (0.5, 0.5)]
    assert sorted(calls()) == sorted([[200, 50], [50, 200], [90, 100], [100, 90]])  # each once, for all pairs
    assert summary()["order_consistency"] == 0.5


def test_a_vision_language_judge_is_asked_twice_a_pair(place):
    """Not four times, though it would ask in both orders by itself; a call that fails is asked again."""
    script = {"lost": True}

    def answer(request):
        if script.pop("lost", False):
            return says("hard to say")
        first, second = (part.mean() for part in content_of(request) if not isinstance(part, str))
        return says(f"<answer>Video {1 if first > second - 30 else 2} is better</answer>")

    with ScriptedServer(answer) as server:
        reward = f"vlm_pairwise:style=think,url={server.url},model=m,frames=1,retries=0,concurrency=1"
        index(pair(200, 50), pair(90, 100))
        run("--reward", reward, "--no-probes", code=2)
        assert len(server.requests) == 4
        first, second = labelled("--reward", reward)
        assert len(server.requests) == 5
    assert (first.label, first.order_consistent, first.scores) == (1, True, {"vlm_pairwise": (1, 0)})
    assert (second.label, second.order_consistent, second.scores) == (0, False, {"vlm_pairwise": (0.5, 0.5)})


def test_groups_become_pairs(place):
    index(group(50, 200, 100, 10))
    (best,) = labelled("--reward", "my.py:bright")
    assert (best.a.video.stem, best.b.video.stem, best.label) == ("200", "10", 1)
    found = labelled("--reward", "my.py:bright", "--select", "all", "--tie-eps", 45)
    assert {(p.a.video.stem, p.b.video.stem) for p in found} == {
        ("200", "100"),
        ("200", "50"),
        ("200", "10"),
        ("100", "50"),
        ("100", "10"),
    }
    assert {p.label for p in found} == {1}


def test_a_judge_of_groups_compares_every_two(place):
    index(group(50, 90, 200, 10))
    (best,) = labelled("--reward", "my.py:Judge")
    assert len(calls()) == 4 * 3
    # 200 wins against three; 10 ties with none: it loses to 50 (40 apart), 90 and 200.
    assert (best.a.video.stem, best.b.video.stem, best.order_consistent) == ("200", "10", True)
    assert best.scores["Judge"] == (1, 0)


def test_pareto_pairs(place):
    """Bright is meant; of those alike in motion (all but one), the widest gap. The front's winner beats the rest."""
    index(group(50, 200, 100, "moving"))
    rewards = ("--reward", "my.py:bright", "--reward", "my.py:motion")
    found = labelled(*rewards, "--select", "pareto", "--score", "bright", "--tolerance", 1)
    assert {(p.a.video.stem, p.b.video.stem) for p in found} == {("200", "50"), ("moving", "50")}
    assert {p.label for p in found} == {1}
    found = labelled(
        *rewards, "--select", "pareto", "--score", "bright", "--tolerance", 1, "--emphasis", "motion"
    )  # 200 beats nothing by motion
    assert [(p.a.video.stem, p.b.video.stem) for p in found] == [("200", "50"), ("moving", "50")]


def test_one_score_may_decide_against_the_others(place):
    index(pair(200, 50))
    (found,) = labelled("--reward", "my.py:Logged", "--score", "Logged/late")
    assert (found.label, found.annotator) == (-1, "Logged/late")
    assert found.scores == {"Logged": (200, 50), "Logged/late": (-200, -50), "Logged/frames": (5, 5)}
    assert found.labels == {"Logged": 1, "Logged/late": -1, "Logged/frames": 0}


def test_the_mean_of_rewards_decides(place):
    index(pair("moving", 50), pair(200, 50), pair(50, 90))
    first, second, third = labelled(
        "--reward", "my.py:bright", "--reward", "dim=my.py:dark", "--reward", "my.py:motion"
    )
    assert [p.label for p in (first, second, third)] == [1, 0, 0]
    assert first.annotator == "bright + dim + motion"
    assert first.scores["motion"][0] == pytest.approx(40, abs=1)
    assert first.scores[first.annotator] == pytest.approx((40 / 3, 0), abs=0.5)
    agreement = summary()["agreement"]
    assert agreement["bright, dim"] == {"share": 0, "pairs": 3}
    assert agreement["bright, motion"] == {"share": 1, "pairs": 1}  # ties are left out


def test_labels_given_before_are_counted_and_replaced(place):
    Path("index.csv").write_text(
        "path_A,path_B,prompt,Overall,VQ\nvideos/200.mp4,videos/50.mp4,gray,A,B\n"
        "videos/50.mp4,videos/90.mp4,gray,A,A\nvideos/10.mp4,videos/90.mp4,gray,same,A\n"
    )
    assert main(["index.csv", "--reward", "my.py:bright", "--out", "pairs.jsonl", "--no-probes"]) == 0
    assert [p.label for p in read_preferences("pairs.jsonl")] == [1, -1, -1]
    assert summary()["agreement_with_given_labels"] == {"share": 0.5, "pairs": 2}


@pytest.fixture
def cut(tmp_path):
    """Two videos of 13 frames at 8 fps, 1.5 s: segments of 0.5 s are the frames 0-3, 4-7 and 8-12."""
    write(tmp_path / "x.mp4", [100] * 4 + [100] * 4 + [10] * 5)
    write(tmp_path / "y.mp4", [90] * 4 + [50] * 4 + [250] * 5)


def cut_pair(**more):
    return {"id": "cut", "prompt": "gray", "a": {"video": "x.mp4"}, "b": {"video": "y.mp4"}} | more


@pytest.mark.usefixtures("cut")
def test_segments_vote(place):
    index(cut_pair())
    (found,) = labelled("--reward", "my.py:bright", "--segments", 0.5)
    assert found.segment_labels == (1, 1, -1)
    assert (found.segment_seconds, found.fps, found.frames) == (0.5, 8, 13)
    assert found.scores["bright"] == pytest.approx((70, 130), abs=1)  # means over segments, against the vote
    assert found.labels == {"bright": -1}
    assert (found.label, found.annotator) == (1, "bright by segments")
    assert found.scores["bright by segments"] == pytest.approx((2 / 3, 1 / 3))
    (found,) = labelled("--reward", "my.py:bright", "--segments", 0.5, "--tie-eps", 15)
    assert (found.segment_labels, found.label) == ((0, 1, -1), 0)
    assert summary()["tied_segments_share"] == pytest.approx(1 / 3)


@pytest.mark.usefixtures("cut")
def test_segments_of_a_judge_and_of_a_group(place):
    index(cut_pair())
    (found,) = labelled("--reward", "my.py:Judge", "--segments", 0.5)
    assert sorted(calls()) == sorted([[100, 90], [90, 100], [100, 50], [50, 100], [10, 250], [250, 10]])
    assert (found.segment_labels, found.label, found.order_consistent) == ((0, 1, -1), 0, False)
    assert found.scores["Judge"] == (0.5, 0.5)
    index({"id": "g", "prompt": "gray", "members": [{"video": "x.mp4"}, {"video": "y.mp4"}]})
    Path("pairs.jsonl.answers.jsonl").unlink()
    Path("pairs.jsonl").unlink()
    (found,) = labelled("--reward", "my.py:bright", "--segments", 0.5)
    assert (found.a.video.stem, found.segment_labels, found.label) == ("y", (-1, -1, 1), -1)  # y by the means


@pytest.mark.usefixtures("cut")
def test_segments_that_do_not_fit(place, capsys):
    write(Path("z.mp4"), [50] * 9)
    index(cut_pair(), cut_pair(id="unlike", b={"video": "z.mp4"}), cut_pair(id="wrong", frames=81))
    lines = refused(capsys, "--reward", "my.py:bright", "--segments", 0.5)
    assert len(lines) == 2
    assert "line 2: --segments: unlike has videos of 9 frames at 8 fps and 13 frames at 8 fps" in lines[0]
    assert 'line 3: wrong has videos of 13 frames at 8 fps, but "frames" says 81' in lines[1]
    lines = refused(capsys, "--reward", "my.py:bright", "--segments", 0.1)
    assert "segments of 0.1 s at 8.0 fps are shorter than a frame" in lines[0]
    assert not list(Path().glob("pairs*"))


def test_all_that_is_wrong_is_said_at_once(place, capsys):
    Path("torn.mp4").write_bytes(Path("videos/50.mp4").read_bytes()[:-300])
    index(pair(200, 50), pair(200, 50, id="torn", b={"video": "torn.mp4"}))
    lines = refused(
        capsys, "--reward", "nothing_known", "--reward", "my.py:bright", "--score", "sharp", "--tie-eps", -1
    )
    assert all(line.startswith("error: ") for line in lines)
    assert [
        [part in line for line in lines].count(True)
        for part in (
            "unknown name",
            "--score: sharp is not of a reward",
            "--tie-eps",
            "line 2: ",
            "torn.mp4: not a video",
        )
    ] == [1, 1, 1, 1, 1]
    index(
        pair(200, 50),
        pair(200, 51),
        {"id": "latent", "prompt": "x", "a": member(50), "b": {"latent": "no.safetensors"}},
    )
    lines = refused(capsys, "--reward", "my.py:bright")
    assert ["line 2" in lines[0], "line 3" in lines[1]] == [True, True]
    assert not list(Path().glob("pairs*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reward", "human=my.py:bright"), "the name human"),
        (("--reward", "mean=my.py:bright"), "the name mean"),
        (("--reward", "my.py:bright", "--select", "pareto"), "needs --score NAME"),
        (("--reward", "my.py:bright", "--tolerance", 1), "are for --select pareto"),
        (("--reward", "my.py:bright", "--score", "bright/sharp"), "has no score bright/sharp; it has bright"),
        (("--reward", "my.py:Logged:scope=batch"), "has to see all videos at once"),
    ],
)
def test_options_that_do_not_fit(place, capsys, arguments, message):
    index(pair(200, 50))
    assert message in refused(capsys, *arguments)[0]
    assert not Path("pairs.jsonl").exists()


def test_latents_alone_cannot_be_looked_at(place, capsys):
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"state": zeros(1)}, "a.safetensors")
    index(pair(200, 50), pair(200, 50, id="latent", b={"latent": "a.safetensors"}))
    assert "line 2: latent has a latent without its video" in refused(capsys, "--reward", "my.py:bright")[0]


def test_a_reward_without_a_number(place, capsys):
    index(pair(200, 50, prompt="even"), pair(50, 90, prompt="odd"))
    lines = refused(capsys, "--reward", "my.py:undecided")
    assert "--skip-failed" in lines[0]
    assert ["line 2: 50.mp4" in lines[1], "line 2: 90.mp4" in lines[2]] == [True, True]
    assert not Path("pairs.jsonl").exists()
    (found,) = labelled("--reward", "my.py:undecided", "--skip-failed")
    assert (found.id, found.label, summary()["left_out"]) == ("200-50", 0, 1)


def test_a_reward_that_fails_on_the_way(place, capsys):
    index(pair(200, 50, prompt="one"), pair(50, 90, prompt="two"))
    lines = refused(capsys, "--reward", "my.py:broken", "--batch", 2, code=1)
    assert "stopped: reward broken: AttributeError" in lines[0]
    assert "the same command goes on" in lines[0]
    assert not Path("pairs.jsonl").exists()
    Path("mended").touch()
    assert [p.label for p in labelled("--reward", "my.py:broken")] == [1, -1]


def test_killed_and_gone_on_with(place):
    rows = [pair(200, 50, prompt="one"), pair(50, 90, prompt="two"), pair(10, 90, prompt="ten")]
    index(*rows)
    reward = "my.py:Logged:die=ten"
    command = [sys.executable, "-m", "alignment.annotate", "index.jsonl", "--out", "pairs.jsonl", "--reward", reward]
    killed = subprocess.run(
        [*command, "--batch", "2", "--no-probes"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert killed.returncode == 9, killed.stderr
    assert not Path("pairs.jsonl").exists()
    answers = Path("pairs.jsonl.answers.jsonl")
    with answers.open("ab") as file:  # as a crash in the middle of a line leaves it
        file.write(answers.read_bytes().splitlines(keepends=True)[1][:40])
    assert calls() == ["loaded", ["one"] * 2, ["two"] * 2, ["ten"] * 2]
    rows[2]["prompt"] = "10"
    index(*rows)
    found = labelled("--reward", reward, "--batch", 2)
    assert calls() == ["loaded", ["10"] * 2]
    assert [p.label for p in found] == [1, -1, -1]
    assert [json.loads(line)["id"] for line in Path("pairs.jsonl").read_text().splitlines()] == [
        "200-50",
        "50-90",
        "10-90",
    ]
    before = Path("pairs.jsonl").read_bytes()
    assert [p.label for p in labelled("--reward", reward, "--tie-eps", 50)] == [1, 0, -1]  # other labels ask nothing
    labelled("--reward", reward)
    assert (calls(), Path("pairs.jsonl").read_bytes()) == ([], before)


def test_an_output_belongs_to_its_rewards(place, capsys):
    index(pair(200, 50))
    labelled("--reward", "my.py:bright")
    before = Path("pairs.jsonl").read_bytes()
    assert "answers of other rewards (bright)" in refused(capsys, "--reward", "my.py:dark")[0]
    assert Path("pairs.jsonl").read_bytes() == before
    Path("pairs.jsonl.answers.jsonl").write_text("notes\n")
    assert "line 1 was not written by this command" in refused(capsys, "--reward", "my.py:bright")[0]
    Path("pairs.jsonl.answers.jsonl").unlink()
    assert "pairs.jsonl exists" in refused(capsys, "--reward", "my.py:bright")[0]


@pytest.mark.parametrize(("reward", "share"), [("still", 1.0), ("motion", 0.0)])
def test_still_videos_are_probed(place, capsys, reward, share):
    write(place / "other.mp4", [10, 200, 10, 200])
    index(pair("moving", 50, b={"video": "other.mp4"}))
    labelled("--reward", f"my.py:{reward}", probes=True)
    assert summary()["probes"]["static_duplicate"]["share"] == share
    out = capsys.readouterr().out
    assert f"wins or ties in {share:.3f} of 2 cases" in out
    assert ("teach videos to stand still" in out) == (share == 1)


def test_a_still_video_that_ties_counts(place):
    index(pair(200, 50))  # do not move
    labelled("--reward", "my.py:motion", "--reward", "my.py:Judge", probes=True)
    found = summary()["probes"]["static_duplicate"]
    assert (found["videos"], found["share"], found["by_score"]) == (2, 1, {"motion": 1, "Judge": 1})


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(
    ("reward", "share", "segments"),
    [
        ("bright", 1.0, ()),
        ("bright", 1.0, ("--segments", 0.5)),
        ("Judge", 1.0, ()),
        ("Judge", 1.0, ("--segments", 0.5)),
        ("by_place", 0.0, ()),
    ],
)
def test_labels_negate_when_pairs_are_exchanged(place, capsys, reward, share, segments):
    index(cut_pair(), *([] if reward == "by_place" else [pair("moving", 50), group(200, 50, 100)]))
    labelled("--reward", f"my.py:{reward}", *segments, "--batch", 2, probes=True)
    found = summary()["probes"]["label_swap"]
    assert found["share"] == share
    assert ("scores depend on chance" in capsys.readouterr().out) == (share < 1)
    calls()
    labelled("--reward", f"my.py:{reward}", *segments, probes=True)
    assert calls() == []  # probes are answers, too


def test_a_line_a_question_where_there_is_no_terminal(place, capsys):
    index(pair(200, 50))
    run("--reward", "my.py:bright", "--reward", "my.py:Judge", "--no-probes")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "[1/4] 200.mp4  bright 200.0000",
        "[2/4] 50.mp4  bright 50.0000",
        "[3/4] 200.mp4 or 50.mp4  Judge 1.0000:0.0000",
        "[4/4] 50.mp4 or 200.mp4  Judge 0.0000:1.0000",
    ]
    assert lines[-1] == "written: pairs.jsonl"


def test_a_bar_on_a_terminal(place, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich believe in a terminal
    index(pair(200, 50))
    run("--reward", "my.py:bright", "--no-probes")
    out = capsys.readouterr().out
    assert "2/2" in out
    assert "[1/2]" not in out
    assert "1 pairs, 0 of them ties" in out
