"""The page for voting knows no names and lets no prompt out of its text; votes come back as they were given."""

from __future__ import annotations

import base64
import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.errors import UserError
from alignment.generation import write_video
from benchmarks.winning import voting
from benchmarks.winning.voting import Comparison, Vote, key_of, read_votes, tally, write_voting_page
from rewards.video_files import read_video

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & ' \" \u2028 \ud800"


class Elements(HTMLParser):
    """The tags of a page and the text in its scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.scripts and self.cdata_elem == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one colour each: one as the project writes them, one with odd sides; told apart after encoding."""
    folder = tmp_path_factory.mktemp("secretname")
    files = [folder / "red_secretname.mp4", folder / "blue_secretname.mp4"]
    for file, channel, size in zip(files, (0, 2), ((32, 32), (33, 43)), strict=True):
        frames = torch.zeros(3, 3, *size)
        frames[:, channel] = 1
        write_video(file, frames, 8)
    return files


def comparisons(clips: list[Path], num: int, prompt: str = "a cat") -> list[Comparison]:
    return [Comparison(f"secretname/{i}", prompt, "secretname", "secretother", *clips) for i in range(num)]


@pytest.fixture(scope="module")
def page(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "voting.html"
    write_voting_page(path, comparisons(clips, 3, HOSTILE), seed=0)
    return path


def shown(page: Path) -> dict[str, Any]:
    return json.loads(Elements(page.read_text("utf-8")).scripts[0])


def answer(number: str, question: str, choice: str) -> dict[str, str]:
    return {"comparison": number, "question": question, "choice": choice}


def exported(page: Path, folder: Path, votes: Any, /, **more: Any) -> Path:
    content = {"page": shown(page)["page"], "voter": "voter 0a", "name": "Ann", "votes": votes} | more
    path = folder / "votes.json"
    path.write_text(json.dumps(content))
    return path


def test_prompts_stay_text_and_names_stay_out(page: Path) -> None:
    text = page.read_text("utf-8")
    found = Elements(text)
    assert [entry["prompt"] for entry in shown(page)["comparisons"]] == [HOSTILE] * 3
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert "<!--" not in text
    assert "secret" not in text
    assert "://" not in text  # nothing is fetched
    assert sorted(path.name for path in page.parent.iterdir()) == ["voting.html", "voting_key.json"]


def test_embedded_videos_are_those_of_the_key_in_a_form_that_browsers_play(page: Path, tmp_path: Path) -> None:
    rows = json.loads(key_of(page).read_text())["comparisons"]
    for number, entry in enumerate(shown(page)["comparisons"], 1):
        for side, other in (("left", "secretother"), ("right", "secretname")):
            file = tmp_path / f"{number}{side}.mp4"
            file.write_bytes(base64.b64decode(entry[side]))
            frames, fps = read_video(file)
            red = rows[str(number)]["left"] != other
            assert (fps, len(frames)) == (8, 3)
            assert frames.shape[2:] == ((256, 256) if red else (264, 344))  # 8 times each
            assert frames.float().mean((0, 2, 3))[0 if red else 2] > 200
            assert b"avcC\x01\x64\x00" in file.read_bytes()  # H.264 High: 4:2:0 (ISO 14496-15, 5.3.3.1)
            assert b"secret" not in file.read_bytes()


def test_sides_are_balanced_and_reproducible(clips: list[Path]) -> None:
    two = comparisons(clips, 7)
    other = [c._replace(right_name="third") for c in comparisons(clips, 4)]
    mixed = list(itertools.chain(*itertools.zip_longest(two, other)))
    mixed = [c for c in mixed if c]
    sides = [voting._exchanged(mixed, seed) for seed in range(40)]
    for exchanged in sides:
        by_name = [
            sum(e for e, c in zip(exchanged, mixed, strict=True) if c.right_name == name)
            for name in ("secretother", "third")
        ]
        assert by_name[0] in (3, 4)
        assert by_name[1] == 2
    assert sides[3] == voting._exchanged(mixed, 3)
    assert all(0 < sum(column) < 40 for column in zip(*sides, strict=True))  # any of them may be exchanged


def test_votes_come_back_as_models(page: Path, tmp_path: Path) -> None:
    rows = json.loads(key_of(page).read_text())["comparisons"]
    answers = [answer(n, "overall", "left") for n in "123"] + [answer("1", "MQ", "right"), answer("2", "TA", "tie")]
    votes = read_votes(exported(page, tmp_path, answers), key_of(page))
    models = ("secretname", "secretother")
    assert [vote.winner for vote in votes[:3]] == [rows[n]["left"] for n in "123"]
    assert {vote.winner for vote in votes[:3]} == set(models)  # sides differ
    assert votes[3].winner == next(name for name in models if name != rows["1"]["left"])
    assert votes[4] == Vote("secretname/1", "Ann", "TA", models, None)
    assert read_votes(exported(page, tmp_path, answers[:1], name=" \n"), key_of(page))[0].voter == "voter 0a"
    assert (
        read_votes(
            exported(
                page,
                tmp_path,
                answers[:1],
                voter=None,
            ),
            key_of(page),
        )[0].voter
        == "Ann"
    )


@pytest.mark.parametrize(
    ("votes", "reasons"),
    [
        ({}, ["not the votes of a voting page"]),
        (
            [None, {"comparison": ["1"]}],
            ["vote 1: comparison None is not one of", "vote 2: comparison ['1'] is not one of"],
        ),
        ([answer("4", "overall", "left")], ["vote 1: comparison '4' is not one of 1 to 3"]),
        ([answer("1", "all", "left")], ["vote 1: question 'all' is not one of overall, VQ, MQ, TA"]),
        ([answer("1", "VQ", "up\n")], ["vote 1: choice 'up\\n' is not one of left, tie, right"]),
        ([answer("1", "VQ", "tie")] * 2, ["vote 2: 'VQ' of comparison '1' is answered twice"]),
    ],
)
def test_votes_that_cannot_be_are_refused(page: Path, tmp_path: Path, votes: Any, reasons: list[str]) -> None:
    path = exported(page, tmp_path, votes)
    with pytest.raises(UserError) as caught:
        read_votes(path, key_of(page))
    lines = str(caught.value).split("\n")
    assert len(lines) == len(reasons)
    assert all(line.startswith(f"{path}: {reason}") for line, reason in zip(lines, reasons, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"page": "0" * 16}, "votes of another page"), ({"name": 3, "voter": "\x1b"}, 'no "name" and no "voter"')],
)
def test_votes_of_others_are_refused(page: Path, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"votes.json: {reason}"):
        read_votes(exported(page, tmp_path, [], **change), key_of(page))


def test_files_that_are_none(page: Path, tmp_path: Path) -> None:
    path = tmp_path / "votes.json"
    for text in ("{", "[" * 100000, "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=r"votes.json: no votes, as it is not JSON"):
            read_votes(path, key_of(page))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_votes(tmp_path / "none.json", key_of(page))
    for text in ("[]", "{}", '{"page": "x", "comparisons": {"1": {"id": "a", "models": ["a", "b"], "left": "c"}}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="not the key of a voting page"):
            read_votes(exported(page, tmp_path, []), path)


def test_many_videos_lie_beside_the_page(clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voting, "MAX_EMBEDDED", 100)
    write_voting_page(tmp_path / "out" / "p.html", comparisons(clips, 1), seed=0)
    assert shown(tmp_path / "out" / "p.html")["comparisons"] == [
        {"prompt": "a cat", "left": "p_videos/0001_a.mp4", "right": "p_videos/0001_b.mp4"}
    ]
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")]
    assert sorted(files) == ["p.html", "p_key.json", "p_videos", "p_videos/0001_a.mp4", "p_videos/0001_b.mp4"]


def test_a_video_that_is_none_leaves_nothing_behind(clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    broken = comparisons(clips, 1)[0]._replace(right=tmp_path / "bad.mp4")
    with pytest.raises(UserError, match=r"bad.mp4: not a video, or damaged"):
        write_voting_page(tmp_path / "out" / "p.html", [broken], seed=0)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="ids of their own"):
        write_voting_page(tmp_path / "p.html", comparisons(clips, 1) * 2, seed=0)


def test_tally_by_hand() -> None:
    ours = ("tuned", "base")
    ann = dict(zip("abcdef", ["tuned", "tuned", "tuned", "base", None, "tuned"], strict=True))
    bob = dict(zip("abcdx", ["tuned", "tuned", "base", "base", "tuned"], strict=True))
    votes = [Vote(k, who, "overall", ours, w) for who, given in (("Ann", ann), ("Bob", bob)) for k, w in given.items()]
    votes.append(Vote("a", "Ann", "MQ", ours, "base"))
    result = tally(votes)
    counts = {(c.question, c.voter): (c.wins, c.ties, c.losses) for c in result.counts}
    assert counts == {
        ("overall", "Ann"): (4, 1, 1),
        ("overall", "Bob"): (3, 0, 2),
        ("overall", None): (7, 1, 3),
        ("MQ", "Ann"): (0, 0, 1),
        ("MQ", None): (0, 0, 1),
    }
    assert result.counts[0].win_rate == pytest.approx(7.5 / 11)
    # Both saw a, b, c, d and agree on all but c. By chance: 3/4 * 2/4 + 1/4 * 2/4 = 1/2; kappa (3/4 - 1/2) / (1/2).
    assert [tuple(a) for a in result.agreement] == [("overall", ("Ann", "Bob"), 4, 3, 0.5)]
    same = [Vote("a", who, "VQ", ours, None) for who in ("Ann", "Bob")]
    assert tally(same).agreement[0].kappa is None
    with pytest.raises(UserError, match=r"Ann votes twice on 'a' \(VQ\)"):
        tally([same[0], same[0]])
