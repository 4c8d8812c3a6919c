"""`python -m rewards.list`: all that is known of a reward, readable in a narrow terminal."""

import importlib
import inspect
import json

import pytest

from rewards import KNOWN
from rewards.list import main


def listed(capsys, *arguments, code=0):
    assert main(list(arguments)) == code
    return capsys.readouterr()


def words(text):
    """All letters and digits in order, whatever the lines were broken at."""
    return "".join(character for character in text if character.isalnum())


def cells(table, column):
    """The text of a table's column, row after row."""
    rows = [""]
    for line in table.splitlines():
        if line.startswith("\u251c"):
            rows.append("")
        elif line.startswith("\u2502"):
            rows[-1] += line.strip("\u2502").split("\u2502")[column]
    return [words(row) for row in rows]


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_says_all_of_every_reward(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    table = listed(capsys).out
    assert max(map(len, table.splitlines())) <= width
    assert "\u2026" not in table  # nothing is cut
    assert cells(table, 0) == [words(name) for name in sorted(KNOWN)]
    assert cells(table, 1) == [words(f"{row.inputs}{row.outputs}scale{row.scale}") for _, row in sorted(KNOWN.items())]
    assert cells(table, 3) == [words(row.verified) for _, row in sorted(KNOWN.items())]
    for cell, (_, row) in zip(cells(table, 2), sorted(KNOWN.items()), strict=True):
        assert cell == ("none" if row.memory == "none" else words(row.memory + row.licence))


def test_json(capsys):
    found = json.loads(listed(capsys, "--json").out)
    assert found == {name: row._asdict() for name, row in KNOWN.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_one_reward_with_its_options(capsys, name):
    module, _, attribute = KNOWN[name].target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    found = json.loads(listed(capsys, name, "--json").out)
    parameters = inspect.signature(target).parameters
    assert list(found.pop("options")) == list(parameters)
    assert found == KNOWN[name]._asdict()
    text = listed(capsys, name).out
    assert inspect.getdoc(target) in text
    assert words(KNOWN[name].verified) in words(text)
    for option, parameter in parameters.items():
        row = next(line for line in text.splitlines() if line.startswith(f"option {option} "))
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert ("required" in row) == (parameter.default is parameter.empty)


def test_an_option_is_told_with_its_type_and_default(capsys):
    found = json.loads(listed(capsys, "sprite_motion", "--json").out)
    assert found["options"]["speed"] == "float, default 1.35"
    assert "--reward sprite_motion --videos" in listed(capsys, "sprite_motion").out
    assert "--reward remote:url=...,name=... --videos" in listed(capsys, "remote").out


def test_unknown_name(capsys):
    found = listed(capsys, "sprite_moton", code=2)
    assert found.out == ""
    assert found.err.startswith("error: no reward is called sprite_moton (did you mean sprite_motion?); known: ")
    assert len(found.err.splitlines()) == 1
