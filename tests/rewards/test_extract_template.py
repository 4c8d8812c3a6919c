"""The prompt of a published model, read from its authors' file."""

import pytest

from rewards.extract_template import main

SOURCE = '''
import os
os.mkdir({ran!r})
OTHER = 3
UNHASHABLE = {{[]: 1}}
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """
Line with two spaces  
- {{text_prompt}}
"""
DETAILED_PROMPT = OTHER * "no"
'''


def test_the_string_is_written_byte_for_byte_and_nothing_is_run(tmp_path, capsys):
    source = tmp_path / "prompt_template.py"
    source.write_text(SOURCE.format(ran=str(tmp_path / "ran")))
    out = tmp_path / "prompt_template.txt"
    assert main([str(source), "--out", str(out)]) == 0
    assert out.read_bytes() == b"\nLine with two spaces  \n- {text_prompt}\n"
    assert not (tmp_path / "ran").exists()
    assert "characters" in capsys.readouterr().out


def test_the_two_strings_of_hpsv3_are_joined(tmp_path):
    source = tmp_path / "data_collator_qwen.py"
    source.write_text('INSTRUCTION = "first {text_prompt}"\nprompt_with_special_token = " <|Reward|>"\n')
    assert main([str(source), "--out", str(tmp_path / "out.txt")]) == 0
    assert (tmp_path / "out.txt").read_text() == "first {text_prompt} <|Reward|>"


def test_a_constant_of_another_name(tmp_path):
    source = tmp_path / "a.py"
    source.write_text('MINE = "text"\n')
    assert main([str(source), "--name", "MINE", "--out", str(tmp_path / "out.txt")]) == 0
    assert (tmp_path / "out.txt").read_text() == "text"


@pytest.mark.parametrize(("text", "message"), [("x = (", "not a Python file"), ("x = 1\n", "holds no string")])
def test_a_file_without_it_is_one_line(tmp_path, capsys, text, message):
    source = tmp_path / "a.py"
    source.write_text(text)
    assert main([str(source), "--out", str(tmp_path / "out.txt")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out.txt").exists()
