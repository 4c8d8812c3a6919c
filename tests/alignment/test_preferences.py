"""Preference files: what is read is what was written, and all that is wrong with a file is said at once, by line."""

import copy
import json
import random
import re

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alignment.data import (
    Group,
    Member,
    Pair,
    Prompt,
    Stream,
    check_media,
    parse_record,
    read_preferences,
    read_videos,
    to_json,
)
from alignment.errors import Problems, UserError

PAIR = {"id": "1", "prompt": "a kite", "a": {"video": "a.mp4"}, "b": {"video": "b.mp4"}}
GROUP = {"id": "2", "prompt": "a kite", "members": [{"video": "a.mp4"}, {"video": "b.mp4"}]}
SEGMENTS = {"fps": 16, "frames": 81, "seg_sec": 1}  # (81 - 1) / 16 = 5 segments


@pytest.fixture
def folder(tmp_path):
    """Files that are there; what is in them is read by `check_media` alone."""
    for name in ("a.mp4", "b.mp4", "c.mp4", "a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    iio.imwrite(tmp_path / "first.png", np.zeros((4, 4, 3), np.uint8))
    return tmp_path


def written(folder, rows, name="pairs.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def problems_of(path, **options):
    with pytest.raises(Problems) as caught:
        read_preferences(path, **options)
    return caught.value.lines


FULL = {
    **{"id": "x", "prompt": "  two kites,\u2028 größer ", "image": "first.png", "meta": {"count": 2}},
    **{"a": {"video": "a.mp4", "latent": "a.safetensors", "seed": 7}, "b": {"latent": "b.safetensors"}},
    **{"label": 1, "scores": {"VQ": [1, -0.25], "MQ": [0.0, 1e-3]}, "labels": {"VQ": 1, "TA": -1}},
    **{"seg_sec": 1.0, "fps": 16.0, "frames": 81, "seg_labels": [1, 0, -1, 0, 1], "eta": 0.7},
    **{"source": "wan", "annotator": "video_reward", "order_consistent": False},
}


def test_a_pair_with_everything(folder):
    record, problems = parse_record(FULL, folder, 3)
    assert problems == []
    image = str(folder / "first.png")
    assert record == Pair(
        id="x",
        prompt=Prompt("  two kites,\u2028 größer ", {"count": 2, "image": image}, image),
        a=Member(folder / "a.mp4", folder / "a.safetensors", 7),
        b=Member(None, folder / "b.safetensors", None),
        label=1,
        scores={"VQ": (1.0, -0.25), "MQ": (0.0, 0.001)},
        labels={"VQ": 1, "TA": -1},
        fps=16.0,
        frames=81,
        segment_seconds=1.0,
        segment_labels=(1, 0, -1, 0, 1),
        eta=0.7,
        source="wan",
        annotator="video_reward",
        order_consistent=False,
        line=3,
    )
    assert to_json(record, folder) == FULL


@pytest.mark.parametrize(
    "row",
    [
        FULL,
        PAIR,
        {**PAIR, "label": 0},
        GROUP,
        {**GROUP, "source": "ltx", "scores": {"VQ": [None, 2.5]}, "meta": {"image": "no file but a word"}},
    ],
)
def test_round_trip(folder, row):
    record, _ = parse_record(row, folder, 5)
    before = copy.deepcopy(record)
    text = json.dumps(to_json(record, folder), allow_nan=False)
    assert json.loads(text) == row
    assert parse_record(json.loads(text), folder, 5) == (record, [])
    assert record == before


def test_files_outside_of_the_folder_keep_their_path(folder):
    (folder / "index").mkdir()
    record, _ = parse_record(PAIR, folder, 1)
    row = to_json(record, folder / "index")
    assert row["a"]["video"] == str(folder / "a.mp4")
    assert parse_record(row, folder / "index", 1)[0] == record


def test_order_and_lines_are_the_files(folder):
    rows = [{**GROUP, "id": "z"}, b"", {**PAIR, "prompt": "a\u2028b\u0085c"}, {**PAIR, "id": "0"}]
    records = read_preferences(written(folder, rows))
    assert [(record.id, record.line, type(record)) for record in records] == [
        ("z", 1, Group),
        ("1", 3, Pair),
        ("0", 4, Pair),
    ]
    assert records[1].prompt.text == "a\u2028b\u0085c"
    inside = json.dumps(PAIR).replace(" ", "\r").encode().replace(b"a\rkite", b"a kite")  # space, to JSON
    assert [record.line for record in read_preferences(written(folder, [inside, {**PAIR, "id": "3"}]))] == [1, 2]


def test_windows_file_with_a_mark_in_front(folder):
    path = folder / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n")
    assert len(read_preferences(path)) == 1


WRONG = [
    ({**PAIR, "lable": 1}, 'unknown key "lable"; did you mean "label"?'),
    ({**PAIR, "zzz": 1}, 'unknown key "zzz"; known: id, prompt'),
    ({**PAIR, "members": GROUP["members"]}, 'unknown key "a"'),
    ({**PAIR, "a": {"vido": "a.mp4"}}, 'unknown key "a.vido"; did you mean "video"?'),
    ({k: v for k, v in PAIR.items() if k != "id"}, 'no "id"'),
    ({**PAIR, "id": 3}, '"id" is 3; it should be text'),
    ({k: v for k, v in PAIR.items() if k != "b"}, 'no "b"'),
    ({k: v for k, v in PAIR.items() if k != "prompt"}, 'no "prompt"'),
    ({**PAIR, "prompt": "  "}, "\"prompt\" is '  '; it should be text"),
    ({**PAIR, "prompt": None}, 'no "prompt"'),
    (b'{"id": "1", "prompt": "half \\ud800", "a": {"video": "a.mp4"}, "b": {"video": "b.mp4"}}', "it should be text"),
    ({**PAIR, "a": "a.mp4"}, "\"a\" is 'a.mp4'; it should be an object"),
    ({**PAIR, "a": {"seed": 1}}, '"a" names no file'),
    ({**PAIR, "a": {"video": "gone.mp4"}}, '"a.video": no such file'),
    ({**PAIR, "a": {"video": "a\0.mp4"}}, '"a.video": no such file'),
    ({**PAIR, "b": {"latent": "gone.safetensors"}}, '"b.latent": no such file'),
    ({**PAIR, "b": {"latent": "a.mp4"}}, "\"b.latent\" is 'a.mp4'; it should be one of .safetensors"),
    ({**PAIR, "a": {"video": "first.txt"}}, "it should be one of .mp4"),
    ({**PAIR, "a": {"video": "a.mp4", "seed": 1.5}}, '"a.seed" is 1.5; it should be a whole number'),
    ({**PAIR, "image": "gone.png"}, "cannot read the image"),
    ({**PAIR, "image": "a.mp4"}, "cannot read the image"),
    ({**PAIR, "b": {"video": "./a.mp4"}}, "a and b are the same file"),
    ({**PAIR, "b": {"video": "link.mp4"}}, "a and b are the same file"),
    (
        {**GROUP, "members": [{"video": "a.mp4"}, {"video": "b.mp4"}, {"video": "a.mp4"}]},
        "members[0] and members[2] are",
    ),
    ({**GROUP, "members": []}, '"members" is []; it should be a list'),
    ({**GROUP, "members": ["a.mp4"]}, "\"members[0]\" is 'a.mp4'; it should be an object"),
    ({**GROUP, "members": [{"video": "a.mp4"}, {"video": "gone.mp4"}]}, '"members[1].video": no such file'),
    ({**GROUP, "label": 1}, 'unknown key "label"'),
    ({**GROUP, "scores": {"VQ": [1.0]}}, '"scores.VQ" has 1 values; it should have 2'),
    ({**GROUP, "scores": {"VQ": [1.0, "2"]}}, "\"scores.VQ[1]\" is '2'; it should be a finite number, without quotes"),
    ({**PAIR, "label": 2}, '"label" is 2; it should be 1'),
    ({**PAIR, "label": True}, '"label" is True'),
    ({**PAIR, "label": "1"}, "\"label\" is '1'"),
    ({**PAIR, "labels": {"VQ": "A"}}, "\"labels.VQ\" is 'A'"),
    ({**PAIR, "scores": {"VQ": [float("nan"), 1.0]}}, '"scores.VQ[0]" is nan; it should be a finite number'),
    (
        b'{"id": "1", "prompt": "p", "a": {"video": "a.mp4"}, "b": {"video": "b.mp4"}, "scores": {"V": [1e999, 1]}}',
        "is inf",
    ),
    ({**PAIR, "scores": {"VQ": [10**400, 1]}}, "it should be a finite number"),
    ({**PAIR, "scores": {"VQ": ["10", "9"]}}, "\"scores.VQ[0]\" is '10'"),
    ({**PAIR, "scores": {"VQ": [None, 1]}}, '"scores.VQ[0]" is None'),
    ({**PAIR, "scores": [1, 2]}, '"scores" is [1, 2]; it should be an object'),
    ({**PAIR, "scores": {"VQ": [1, 2, 3]}}, '"scores.VQ" has 3 values; it should have 2'),
    ({**PAIR, "label": 1, "scores": {"VQ": [1, 2]}, "annotator": "vq"}, "\"label\" is 1, but 'vq' scored a 1 and b 2"),
    ({**PAIR, "label": -1, "scores": {"VQ": [1, 1]}, "annotator": "vq"}, '"label" is -1'),
    (
        {**PAIR, "label": 1, "scores": {"VQ": [3, 1], "MQ": [0, 2.5]}, "annotator": "vq"},  # 3 against 3.5
        '"label" is 1',
    ),
    ({**PAIR, "labels": {"VQ": 1}, "scores": {"VQ": [1, 2]}, "annotator": "vq"}, '"labels.VQ" is 1'),
    (
        {**PAIR, **SEGMENTS, "seg_labels": [1, 1, 1, 1, 1, 1]},
        '"seg_labels" has 6 values, but 81 frames at 16 fps have 5',
    ),
    ({**PAIR, "seg_labels": [1]}, '"seg_labels" needs "seg_sec", "fps" and "frames"'),
    ({**PAIR, **SEGMENTS, "seg_labels": [1, 2, 0, 0, 0]}, '"seg_labels[1]" is 2'),
    ({**PAIR, **SEGMENTS, "seg_labels": [1, 0.5, 0, 0, 0]}, '"seg_labels[1]" is 0.5'),
    ({**PAIR, **SEGMENTS, "seg_sec": 0.01, "seg_labels": [1]}, "shorter than a frame"),
    ({**PAIR, "fps": True}, '"fps" is True; it should be a finite number'),
    ({**PAIR, "fps": 0}, '"fps" is 0; it should be a finite number above 0'),
    ({**PAIR, "frames": 81.0}, '"frames" is 81.0; it should be a whole number of at least 1'),
    ({**PAIR, "eta": 1.5}, '"eta" is 1.5'),
    ({**PAIR, "order_consistent": 1}, '"order_consistent" is 1; it should be true or false'),
    (b"[1, 2]", "no JSON object"),
    (b'{"id": "1"', "not JSON: Expecting ',' delimiter at column 11"),
    (b"[" * 100_000, "not JSON"),
    (b'{"id": "\xff"}', "not UTF-8 text"),
]


@pytest.mark.parametrize(("row", "words"), WRONG)
def test_every_fault_is_named_with_its_line(folder, row, words):
    path = written(folder, [{**PAIR, "id": "fine"}, row])
    lines = problems_of(path, key="data.held_out")
    assert any(words in line for line in lines), lines
    assert all(line.startswith(f"data.held_out: {path} line 2: ") for line in lines)
    assert not any("\n" in line for line in lines)


def test_all_faults_at_once_in_the_order_of_the_file(folder):
    rows = [
        {**PAIR, "label": 7, "fps": -1, "a": {"video": "gone.mp4"}},
        {**PAIR, "id": "fine"},
        b"no JSON",
        b"\xff",
        {**PAIR, "id": "fine", "scores": {"VQ": [float("nan"), "1"]}},
        {**PAIR, "id": "1"},
    ]
    lines = problems_of(written(folder, rows))
    found = [int(re.search(r" line (\d+): ", line)[1]) for line in lines]
    assert found == [1, 1, 1, 3, 4, 5, 5, 5, 6]
    assert 'the id "fine" is that of line 2, too' in lines[-2]
    assert 'the id "1" is that of line 1, too' in lines[-1]  # though that line is wrong in other ways


@pytest.mark.parametrize("annotator", [None, "human", "Human raters, batch 2"])
def test_people_may_differ_from_the_scores(folder, annotator):
    row = {**PAIR, "label": 1, "scores": {"VQ": [1, 2]}, "annotator": annotator}
    assert parse_record(row, folder, 1)[1] == []


def test_the_annotators_own_score_is_what_a_label_follows(folder):
    row = {**PAIR, "label": 1, "scores": {"VQ": [2, 1], "MQ": [0, 5]}, "annotator": "VQ"}
    assert parse_record(row, folder, 1)[1] == []
    assert "'MQ' scored a 0 and b 5" in parse_record({**row, "annotator": "MQ"}, folder, 1)[1][0]
    assert "'both' scored a 1 and b 3" in parse_record({**row, "annotator": "both"}, folder, 1)[1][0]


def test_a_reward_may_call_close_scores_a_tie(folder):
    assert parse_record({**PAIR, "label": 0, "scores": {"VQ": [1, 1.2]}, "annotator": "vq"}, folder, 1)[1] == []
    assert parse_record({**PAIR, "label": -1, "scores": {"VQ": [1, 1.2]}, "annotator": "vq"}, folder, 1)[1] == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, "no such file"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.csv", b"path_A,path_B,prompt\n", "is empty"),
        ("a.tsv", b"", "unknown format '.tsv'"),
    ],
)
def test_files_that_hold_nothing(folder, name, content, words):
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_preferences(folder / name)
    assert str(caught.value).startswith(f"data.preferences: {'no such' if content is None else folder / name}")


HEADER = b"path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B"


def test_video_align(folder):
    (folder / "videos").mkdir()
    for name in ("1 A.mp4", "1 B.mp4"):
        (folder / "videos" / name).write_bytes(b"-")
    rows = [
        b"\xef\xbb\xbf" + HEADER + b",A_model",
        b'videos/1 A.mp4,./videos/1 B.mp4,"A girl, running, ""fast""\nand far",B,same,A,24.0,126.0,30.0,126.0,wan',
        b"a.mp4,b.mp4,  a kite ,A,,,16.0,81.0,16.0,80.0,",
    ]
    first, second = read_preferences(written(folder, rows, "votes.csv"))
    assert first.prompt == Prompt('A girl, running, "fast"\nand far', {})
    assert first.members == (Member(folder / "videos/1 A.mp4", None), Member(folder / "videos/1 B.mp4", None))
    assert (first.id, first.line, first.label) == ("votes:3", 3, None)
    assert (first.labels, first.scores) == ({"VQ": -1, "MQ": 0, "TA": 1}, {})
    assert (first.fps, first.frames) == (None, 126)  # kept where they are those of both
    assert (second.prompt.text, second.labels, second.fps, second.frames) == ("a kite", {"VQ": 1}, 16.0, None)


def test_video_align_with_one_label_for_all(folder):
    rows = [b"path_A,path_B,prompt,Overall", b"a.mp4,b.mp4,a kite,B", b"a.mp4,c.mp4,a kite,"]
    first, second = read_preferences(written(folder, rows, "votes.csv"))
    assert (first.label, first.labels, second.label) == (-1, {}, None)


def test_all_faults_of_a_table(folder):
    rows = [
        HEADER,
        b"a.mp4,gone.mp4,a kite,b,A,tie,24,81,24,81",
        b"a.mp4,b.mp4,,A,A,A,fast,80.5,nan,-1",
        b"a.mp4,b.mp4,a kite, a dog,A,A,A,24,81,24,81",
        b"a.mp4,a.mp4,a kite",
        b",b.mp4,a kite",
    ]
    expected = [
        (2, "\"VQ\" is 'b'; it should be one of A, B, same"),
        (2, "\"TA\" is 'tie'"),
        (2, '"b.video": no such file'),
        (3, "\"fps_A\" is 'fast'; it should be a number above 0"),
        (3, "\"fps_B\" is 'nan'"),
        (3, "\"num_frames_A\" is '80.5'; it should be a whole number above 0"),
        (3, "\"num_frames_B\" is '-1'"),
        (3, 'no "prompt"'),
        (4, "more cells than columns"),
        (5, "a and b are the same file"),
        (6, '"a" names no file'),
    ]
    lines = problems_of(written(folder, rows, "votes.csv"))
    for line, (number, words) in zip(lines, expected, strict=True):
        assert f"votes.csv line {number}: {words}" in line


@pytest.mark.parametrize(
    ("rows", "number", "words"),
    [
        ([b"path_A,prompt,VQ", b"a.mp4,a kite,A"], 1, 'no column "path_B"'),
        ([b"path_A,path_B,prompt,vq", b"a.mp4,b.mp4,a kite,A"], 1, 'unknown column "vq"; did you mean "VQ"?'),
        ([HEADER, b"a.mp4,b.mp4,caf\xe9,A,A,A,,,,"], 2, "not UTF-8 text"),
        ([HEADER, b"a.mp4,b.mp4," + b"x" * 140_000 + b",A,A,A,,,,"], 2, "field larger than field limit"),
    ],
)
def test_tables_that_cannot_be_understood(folder, rows, number, words):
    assert f" line {number}: {words}" in problems_of(written(folder, rows, "votes.csv"))[0]


@pytest.fixture
def videos(tmp_path):
    place = tmp_path / "videos"
    place.mkdir()
    for name in ("clip_10.mp4", "clip_2.mp4", "clip_1.webm", "notes.md"):
        (place / name).write_bytes(b"-")
    return place


def test_a_folder_of_videos_with_lines_of_prompts(videos):
    (videos / "prompts.txt").write_text("one\n\ntwo\nten\n")
    groups = read_preferences(videos)
    assert [(g.id, g.prompt.text, g.line) for g in groups] == [
        ("clip_1.webm", "one", 1),
        ("clip_2.mp4", "two", 3),
        ("clip_10.mp4", "ten", 4),
    ]
    assert groups[1] == Group("clip_2.mp4", Prompt("two", {}), (Member(videos / "clip_2.mp4", None),), {}, None, 3)
    assert groups == read_videos(videos, videos / "prompts.txt")


def test_a_folder_of_videos_with_a_table_elsewhere(videos, folder):
    table = folder / "captions.csv"
    table.write_text("prompt,path,image,tag\ntwo,clip_2.mp4,first.png,x\nten,./clip_10.mp4,,y\none,clip_1.webm,,\n")
    groups = read_preferences(videos, prompts=table)
    assert [g.id for g in groups] == ["clip_2.mp4", "clip_10.mp4", "clip_1.webm"]
    image = str(folder / "first.png")
    assert groups[0].prompt == Prompt("two", {"tag": "x", "image": image}, image)
    assert groups[1].prompt == Prompt("ten", {"tag": "y"})
    lines = [{"video": g.id, "prompt": g.prompt.text} for g in groups]
    again = read_videos(videos, written(folder, lines, "captions.jsonl"))
    assert [g.members for g in again] == [g.members for g in groups]


def test_all_faults_of_a_folder(videos, folder):
    rows = [
        {"video": "clip_1.webm", "prompt": ""},
        {"video": "clip_3.mp4", "prompt": "three"},
        {"prompt": "lost"},
        {"video": "clip_2.mp4", "prompt": "two", "image": "gone.png"},
        {"path": "./clip_2.mp4", "prompt": "two"},
        ["clip_10.mp4"],
    ]
    lines = problems_of(videos, prompts=written(folder, rows, "captions.jsonl"))
    assert "captions.jsonl: no prompt for clip_10.mp4" in lines[0]
    expected = [
        '"prompt" is',
        '"members[0].video": no such file',
        'no "video"',
        "cannot read the image",
        "the id",
        "no JSON",
    ]
    for number, (line, words) in enumerate(zip(lines[1:], expected, strict=True), 1):
        assert f"captions.jsonl line {number}: {words}" in line


def test_folders_without_what_it_takes(videos, tmp_path):
    with pytest.raises(UserError, match=r"needs one of prompts\.txt, prompts\.csv, prompts\.jsonl; it has 0"):
        read_preferences(videos)
    (videos / "prompts.txt").write_text("one\ntwo\n")
    assert "2 prompts for the 3 videos" in problems_of(videos)[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no video in"):
        read_videos(tmp_path / "empty", videos / "prompts.txt")


def video(path, frames=4):
    iio.imwrite(path, np.random.default_rng(0).integers(0, 255, (frames, 32, 32, 3), np.uint8), fps=8, codec="libx264")
    return path


def latent(path, shape=(2, 3), dtype=torch.float32, **others):
    save_file({"state": torch.zeros(shape, dtype=dtype), **others}, path)
    return path


def pair(a, b, line, **fields):
    return Pair(str(line), Prompt("p", {}), Member(*a), Member(*b), None, {}, {}, line=line, **fields)


def test_media_that_can_be_read(tmp_path):
    members = [
        (video(tmp_path / f"{i}.mp4"), latent(tmp_path / f"{i}.safetensors", dtype=torch.bfloat16)) for i in (0, 1)
    ]
    own = latent(tmp_path / "own.safetensors", noise=torch.ones(2, 3))
    check_media([pair(*members, 1, frames=4), Group("g", Prompt("p", {}), (Member(None, own),), {})], deep=True)


def test_all_media_that_cannot_be_read(tmp_path):
    fine, whole = video(tmp_path / "fine.mp4"), video(tmp_path / "whole.mp4", 30).read_bytes()
    cut, text, empty = tmp_path / "cut.mp4", tmp_path / "text.mp4", tmp_path / "empty.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("no video")
    empty.write_bytes(b"")
    short, junk = tmp_path / "short.safetensors", tmp_path / "junk.safetensors"
    short.write_bytes(latent(tmp_path / "a.safetensors", (64, 64)).read_bytes()[:-1])
    junk.write_bytes(b"junk")
    save_file({"latents": torch.zeros(2)}, tmp_path / "other.safetensors")
    half = latent(tmp_path / "half.safetensors", dtype=torch.float16)
    noise = latent(tmp_path / "noise.safetensors", noise=torch.zeros(3, 2))
    records = [
        pair((fine, None), (text, None), 8),
        pair((cut, None), (empty, None), 2),
        Group("g", Prompt("p", {}), (Member(None, short), Member(None, junk), Member(fine, None)), {}, line=3),
        pair((None, tmp_path / "other.safetensors"), (text, half), 5),
        pair((None, noise), (fine, None), 6),
        pair((None, latent(tmp_path / "b.safetensors", (2, 4))), (None, tmp_path / "a.safetensors"), 7),
    ]
    before = copy.deepcopy(records)
    with pytest.raises(Problems) as caught:
        check_media(records, "data.preferences: pairs.jsonl")
    expected = [
        (2, "cut.mp4: not a video, or damaged"),
        (2, "empty.mp4: the file is empty"),
        (3, "short.safetensors: not a safetensors file, or cut short"),
        (3, "junk.safetensors: not a safetensors file, or cut short"),
        (5, 'other.safetensors has no tensor "state" but latents'),
        (5, 'half.safetensors: "state" is F16'),
        (6, 'noise.safetensors: "noise" has shape [3, 2], "state" [2, 3]'),
        (7, "the latents of a and b have shapes [2, 4] and [64, 64]"),
        (8, "text.mp4: not a video, or damaged"),  # of the line that comes first among the records
    ]
    assert len(caught.value.lines) == len(expected)
    for line, (number, words) in zip(caught.value.lines, expected, strict=True):
        assert line.startswith(f"data.preferences: pairs.jsonl line {number}: ")
        assert words in line
        assert "\n" not in line
    assert records == before


def test_a_deep_check_reads_to_the_end(tmp_path):
    data = video(tmp_path / "a.mp4", 40).read_bytes()
    # The index comes first, so that the beginning can be shown while the rest is on its way: the start opens, too.
    streamed = tmp_path / "streamed.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), np.uint8)
    iio.imwrite(streamed, noise, fps=8, codec="libx264", output_params=["-movflags", "+faststart"])
    streamed.write_bytes(streamed.read_bytes()[: len(data) // 2])
    check_media([pair((streamed, None), (tmp_path / "a.mp4", None), 1, frames=40)])
    with pytest.raises(Problems, match=r"line 1: .*streamed\.mp4: not a video, or damaged"):
        check_media([pair((streamed, None), (tmp_path / "a.mp4", None), 1)], deep=True)
    with pytest.raises(Problems, match='has 40 frames, "frames" says 41'):
        check_media(
            [pair((tmp_path / "a.mp4", None), (None, latent(tmp_path / "x.safetensors")), 1, frames=41)], deep=True
        )


def test_a_stream_goes_on_at_its_position(folder):
    records = read_preferences(written(folder, [{**PAIR, "id": str(i)} for i in range(7)]))
    whole = Stream(records, seed=3).take(0, 30)
    assert Stream(records, seed=3).take(11, 9) == whole[11:20]
    backwards = Stream(records, seed=3)
    assert [backwards.take(i, 1)[0] for i in reversed(range(30))] == whole[::-1]
    assert sorted(record.id for record in whole[7:14]) == [record.id for record in records]
    assert whole[:7] != whole[7:14]
    assert Stream(records, seed=4).take(0, 30) != whole
    assert Stream(records, seed=3, shuffle=False).take(6, 2) == [records[6], records[0]]


def test_the_order_of_earlier_runs():
    order = list(range(5))
    random.Random("1/2").shuffle(order)  # seed 1, epoch 2: checkpoints rely on it
    assert Stream(range(5), seed=1).take(10, 5) == order
