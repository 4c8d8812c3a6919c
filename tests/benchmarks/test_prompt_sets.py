"""Prompt sets by name, in the layout of VideoAlign's files, and a user's own file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from alignment.errors import UserError
from benchmarks.winning import prompt_sets
from benchmarks.winning.prompt_sets import prompt_set


def write_set(path: Path, num: int, shorter: bool = True) -> None:
    columns = ["prompt", *(["prompt_shorter"] if shorter else []), "prompt_zh"]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows([[f"a long {i}, with a comma", *([f"short {i}"] if shorter else []), "x"] for i in range(num)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prompt_sets, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file", "num"),
    [("vbench", "vbench.csv", 946), ("ta_hard", "TA_hard.csv", 72), ("videogen_eval", "videogen_eval.csv", 400)],
)
def test_sets_hold_as_many_prompts_as_they_are_published_with(folder: Path, name: str, file: str, num: int) -> None:
    write_set(folder / file, num, shorter=name != "ta_hard")
    prompts = prompt_set(name)
    assert len(prompts) == num
    assert prompts[1].text == "a long 1, with a comma"
    assert prompts[1].meta == ({} if name == "ta_hard" else {"prompt_shorter": "short 1"})
    write_set(folder / file, num - 1)
    with pytest.raises(UserError, match=f"holds {num - 1} prompts, not {num}"):
        prompt_set(name)


def test_vbench_dimensions_come_from_its_own_file(folder: Path) -> None:
    write_set(folder / "vbench.csv", 946)
    info = [{"prompt_en": f"short {i}", "dimension": ["scene"] if i else ["color", "scene"]} for i in range(946)]
    (folder / "VBench_full_info.json").write_text(json.dumps(info))
    prompts = prompt_set("vbench")
    assert prompts[0].meta == {"prompt_shorter": "short 0", "dimensions": ["color", "scene"]}
    assert prompts[945].meta["dimensions"] == ["scene"]
    for broken, reason in ((info[::-1], "are not those of the set"), ([{}], "is not VBench's list")):
        (folder / "VBench_full_info.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=reason):
            prompt_set("vbench")


def test_own_file_and_what_is_missing(folder: Path) -> None:
    (folder / "mine.txt").write_text("a cat\n\na dog\n")
    assert [p.text for p in prompt_set(str(folder / "mine.txt"))] == ["a cat", "a dog"]
    with pytest.raises(UserError, match=r"--prompts: 'vbnech' is neither a file nor one of vbench, ta_hard"):
        prompt_set("vbnech")
    with pytest.raises(UserError, match=r"--prompts ta_hard: no .*TA_hard.csv; .*README.md says how to get it"):
        prompt_set("ta_hard")
