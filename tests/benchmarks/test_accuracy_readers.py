"""Every published layout becomes the same items and pairs, and what is wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignment.errors import Problems, UserError
from benchmarks.accuracy.readers import read_benchmark

BENCH = "path_A,path_B,A_model,B_model,prompt,VQ,MQ,TA,Overall,fps_A,fps_B,num_frames_A,num_frames_B\n"


def put(folder: Path, *names: str) -> None:
    """Files that are there; what is in them is not read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def as_json(folder: Path, rows: Any, name: str = "test.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)), "utf-8")
    return path


def test_videogen_rewardbench(tmp_path):
    put(tmp_path, "videos/a.mp4", "videos/b.mp4")
    table = tmp_path / "videogen-rewardbench.csv"
    rows = ['videos/a.mp4,./videos/b.mp4,kling,luma,"a cat, asleep",A,B,same,A,24.0,30.0,120,150']
    rows += ['videos/b.mp4,videos/a.mp4,luma,kling,"a cat, asleep",,unsure,A,same,30.0,24.0,150,120']
    table.write_text(BENCH + "\n".join(rows), "utf-8")
    found = read_benchmark(table)
    assert found.format == "videogen_rewardbench"
    assert found.dims == ["Overall", "VQ", "MQ", "TA"]
    assert [(item.prompt, item.fps, item.model) for item in found.items] == [
        ("a cat, asleep", 24, "kling"),
        ("a cat, asleep", 30, "luma"),
    ]
    assert [(pair.a, pair.b) for pair in found.pairs] == [(0, 1), (1, 0)]
    assert found.pairs[0].labels == {"VQ": 1, "MQ": -1, "TA": 0, "Overall": 1}
    assert found.pairs[1].labels == {"VQ": None, "MQ": None, "TA": 1, "Overall": 0}


def test_video_align_has_no_overall(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    table = tmp_path / "train.csv"
    table.write_text("path_A,path_B,prompt,VQ,MQ,TA\na.mp4,b.mp4,a cat,A,B,same\n", "utf-8")
    found = read_benchmark(table)
    assert (found.format, found.dims, found.items[0].fps) == ("video_align", ["VQ", "MQ", "TA"], None)


def test_genai_bench(tmp_path):
    """The exported list, and the hub's table of addresses, of which the last part is on disk, or model_last part."""
    put(tmp_path, "l.mp4", "videos/r.mp4", "videos/vc2_l.mp4")
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote"]
    rows = [
        {"id": i, "prompt": "p", "video_left": "l.mp4", "video_right": "r.mp4", "vote_type": v}
        for i, v in enumerate(votes)
    ]
    found = read_benchmark(as_json(tmp_path, rows))
    assert [pair.labels["Overall"] for pair in found.pairs] == [1, -1, 0, 0]
    assert len(found.items) == 2
    row = {
        "prompt": "p",
        "left_video": "https://x.y/z/l.mp4",
        "right_video": "https://x.y/r.mp4",
        "vote_type": votes[0],
    }
    (tmp_path / "l.mp4").unlink()
    found = read_benchmark(as_json(tmp_path, [{**row, "left_model": "vc2", "right_model": "m"}], "hub.jsonl"))
    assert [item.path.name for item in found.items] == ["vc2_l.mp4", "r.mp4"]
    assert found.items[0].model == "vc2"


def test_genai_bench_with_the_videos_inside(tmp_path):
    """Parquet may hold bytes, or what the hub calls a video: they become files, one each."""
    inside = {"bytes": b"left", "path": "l.mp4"}
    row = {
        "prompt": "p",
        "left_video": inside,
        "right_video": {"bytes": b"right", "path": None},
        "vote_type": "tievote",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "g.parquet")
    found = read_benchmark(tmp_path / "g.parquet", store=tmp_path / "store")
    assert [item.path.read_bytes() for item in found.items][:2] == [b"left", b"right"]
    assert {item.path.suffix for item in found.items} == {".mp4"}
    assert len(list((tmp_path / "store").iterdir())) == 2


def test_mj_bench_video_in_any_case_of_letters(tmp_path):
    put(tmp_path, "videos/test/0_0.mp4", "videos/test/0_1.mp4")
    words = ["Video 1 better", "Video 1 Better", "Video 2 better", "Same", "Hard to judge"]
    rows = [
        {
            "caption": "a beaver",
            "video_0_path": "test/0_0.mp4",
            "video_1_path": "test/0_1.mp4",
            "category_preference": {"Alignment": "Video 2 Better", "Coherence & Consistency": "Same"},
            "overall_preference": word,
        }
        for word in words
    ]
    found = read_benchmark(as_json(tmp_path, rows))
    assert [pair.labels["Overall"] for pair in found.pairs] == [1, 1, -1, 0, None]
    assert found.pairs[0].labels["Alignment"] == -1
    assert found.dims == ["Overall", "Alignment", "Coherence & Consistency"]


@pytest.mark.parametrize(
    ("files", "ranks", "folder"), [("image_path", "rank", "test"), ("generations", "ranking", "test_images/part-1")]
)
def test_ranked_images(tmp_path, files, ranks, folder):
    """A lower rank is better: 2 1 2 gives 1 > 0, a tie, 1 > 2."""
    names = ["a.jpg", "b.jpg", "c.jpg"]
    put(tmp_path, *(f"{folder}/{name}" for name in names))
    prefix = folder.partition("/")[2]
    row = {"prompt": "p", files: [f"{prefix}/{name}".lstrip("/") for name in names], ranks: [2, 1, 2]}
    found = read_benchmark(as_json(tmp_path, [row]))
    assert [(pair.a, pair.b, pair.labels["Overall"]) for pair in found.pairs] == [(0, 1, -1), (0, 2, 0), (1, 2, 1)]
    assert len({pair.record for pair in found.pairs}) == 1


def test_our_own_pairs_and_groups(tmp_path, monkeypatch):
    """A pair's labels, or what its scores say; a group is all of its pairs. The file is named from where one is."""
    put(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    a, b, c = ({"video": f"{name}.mp4"} for name in "abc")
    rows = [
        {"id": "1", "prompt": "p", "a": a, "b": b, "label": -1, "labels": {"VQ": 0}, "fps": 8},
        {"id": "2", "prompt": "p", "a": a, "b": b, "scores": {"VQ": [1, 0], "MQ": [0, 3]}},
        {"id": "3", "prompt": "q", "members": [a, b, c], "scores": {"VQ": [1, 1, None]}},
    ]
    as_json(tmp_path, rows, "pairs.jsonl")
    monkeypatch.chdir(tmp_path.parent)
    found = read_benchmark(Path(tmp_path.name) / "pairs.jsonl")
    assert [dict(pair.labels) for pair in found.pairs[:3]] == [
        {"VQ": 0, "Overall": -1},
        {"VQ": 1, "MQ": -1, "Overall": -1},
        {"VQ": 0, "Overall": 0},
    ]
    assert len(found.pairs) == 5
    assert {pair.labels.get("Overall") for pair in found.pairs[3:]} == {None}
    assert found.items[0].fps == 8


def test_missing_media_are_reported_together(tmp_path):
    put(tmp_path, "videos/a.mp4", "videos/b.mp4")
    rows = ["a,b", "a,x", "y,z"]
    lines = [",".join(f"{name}.mp4" for name in row.split(",")) + ",m,n,p,A,A,A,A,8,8,9,9" for row in rows]
    (tmp_path / "t.csv").write_text(BENCH + "\n".join(lines), "utf-8")
    with pytest.raises(Problems) as error:
        read_benchmark(tmp_path / "t.csv")
    report = "\n".join(error.value.lines)
    assert "3 of 5 media files are missing, 1 of 3 pairs have both" in report
    assert f"{tmp_path / 'videos'} for x.mp4, y.mp4, z.mp4" in report
    assert "KlingTeam/VideoGen-RewardBench" in report
    assert "--allow-missing" in report
    found = read_benchmark(tmp_path / "t.csv", allow_missing=True)
    assert (len(found.pairs), found.named_pairs, found.missing) == (1, 3, ["x.mp4", "y.mp4", "z.mp4"])
    (tmp_path / "videos").rename(tmp_path / "elsewhere")
    with pytest.raises(Problems, match="5 of 5 media"):
        read_benchmark(tmp_path / "t.csv", allow_missing=True)
    assert len(read_benchmark(tmp_path / "t.csv", media=tmp_path / "elsewhere", allow_missing=True).pairs) == 1
    own = as_json(
        tmp_path, [{"id": "1", "prompt": "p", "a": {"video": "l"}, "b": {"video": "r"}, "label": 1}], "p.jsonl"
    )
    with pytest.raises(Problems, match="2 of 2 media"):
        read_benchmark(own)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    lines = ["a.mp4,,m,n,p,A,A,A,A,8,8,9,9", "a.mp4,b.mp4,m,n,,A,A,A,A,8,fast,9,9"]
    (tmp_path / "t.csv").write_text(BENCH + "\n".join(lines), "utf-8")
    with pytest.raises(Problems) as error:
        read_benchmark(tmp_path / "t.csv")
    assert [line.partition(" line ")[2] for line in error.value.lines] == [
        '2: no "path_B", or it is no text',
        "3: \"fps_B\" is 'fast'; it should be a number above 0, or empty",
        '3: no "prompt", or it is no text',
    ]
    rows = [{"prompt": "p", "image_path": ["a.jpg", "b.jpg"], "rank": [1]}, 7]
    with pytest.raises(Problems) as error:
        read_benchmark(as_json(tmp_path, rows))
    assert [line.partition(" line ")[2] for line in error.value.lines] == [
        '1: "rank" has 1 values for 2 media',
        "2: no object, but 7",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "video,text\na,b\n", "columns text, video are those of no known layout: videogen_rewardbench"),
        ("t.csv", BENCH + "a,b,c,d,e,f,g,h,i,1,1,1,1,more\n", "line 2: more cells than columns"),
        ("t.json", "{", "not JSON"),
        ("t.json", "{}", "holds no list"),
        ("t.jsonl", '{"a": 1}\n{\n', "line 2: not JSON"),
        ("t.jsonl", '{"id": "1", "prompt": "p", "members": 5}', '"members"'),
        ("t.json", '[{"prompt": "\\ud800", "generations": ["a"], "ranking": [1]}]', "no Unicode text"),
        ("t.parquet", "PAR", "not a parquet file"),
        ("t.txt", "", "unknown format '.txt'"),
    ],
)
def test_a_file_of_something_else(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_benchmark(tmp_path / name)
