"""Prompt files of three formats, and a stream that depends on seed and position alone."""

import json

import pytest

from alignment.data import Prompt, PromptStream, read_prompts
from alignment.errors import UserError


def test_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff  a red circle \r\n\r\n\tzwei Kreise, größer\n".encode())
    assert read_prompts(path) == [Prompt("a red circle", {}), Prompt("zwei Kreise, größer", {})]


def test_json_lines_keep_the_other_columns(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "two cups", "include": [{"class": "cup", "count": 2}]}, {"tag": "x", "prompt": "a\u2028b"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_prompts(path) == [
        Prompt("two cups", {"include": [{"class": "cup", "count": 2}]}),
        Prompt("a\u2028b", {"tag": "x"}),
    ]


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes('\ufeffprompt,tag\n"a ""big"" cat,\non a mat",animals\na dog,\n'.encode())
    assert read_prompts(path) == [Prompt('a "big" cat,\non a mat', {"tag": "animals"}), Prompt("a dog", {"tag": ""})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine\n\xff\xfe\n", "not UTF-8 text"),
        ("a.txt", b"", "holds no prompt"),
        ("a.jsonl", b'["prompt"]\n', 'line 1 has no "prompt"'),
        ("a.jsonl", b'{"prompt": 3}\n', 'line 1 has no "prompt"'),
        ("a.jsonl", b'{"prompt": "  "}\n', 'line 1 has no "prompt"'),
        ("a.csv", b"prompt\n" + b"x" * 140_000 + b"\n", "field larger than field limit"),
        ("a.csv", b"", "holds no prompt"),
        ("a.tsv", b"prompt\n", "unknown format '.tsv'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name, "evaluation.prompts")
    assert str(caught.value).startswith(f"evaluation.prompts: {tmp_path / name}")
    assert words in str(caught.value)


PROMPTS = [Prompt(str(i), {}) for i in range(10)]


def test_an_epoch_holds_every_prompt_once():
    stream = PromptStream(PROMPTS, seed=1)
    first, second = stream.take(0, 10), stream.take(10, 10)
    assert sorted(first) == sorted(second) == PROMPTS
    assert first != second
    assert first != PROMPTS


def test_a_position_does_not_depend_on_how_it_is_reached():
    stream = PromptStream(PROMPTS, seed=1)
    whole = stream.take(0, 35)
    assert [stream.take(i, 1)[0] for i in range(35)] == whole
    assert PromptStream(PROMPTS, seed=1).take(17, 9) == whole[17:26]
    assert PromptStream(PROMPTS, seed=2).take(0, 35) != whole


def test_order_of_the_file():
    assert PromptStream(PROMPTS, seed=1, shuffle=False).take(8, 4) == [PROMPTS[i] for i in (8, 9, 0, 1)]
