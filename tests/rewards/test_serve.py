"""The options of `python -m rewards.serve`."""

import socket

import pytest

from rewards.serve import main
from tests.rewards import served_rewards
from tests.rewards.servers import start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --reward"),
        (["--reward", "clipp"], "reward clipp: unknown name (did you mean 'clip'?)"),
        (["--reward", "sprite_motion:sped=1"], "reward sprite_motion: no option 'sped' (did you mean 'speed'?)"),
        (["--reward", "clip:path=nowhere"], "reward clip: no nowhere/open_clip_config.json"),
        (["--reward", "sprite_motion", "--reward", "sprite_motion"], "the name sprite_motion is taken"),
        (["--reward", "a=b=c"], "expected [NAME=]use[:key=value,...]"),
        (["--reward", f"{served_rewards.__file__}:Shows:seconds=1,scope=x,name={{"], "is not a YAML value"),
        (["--reward", "sprite_motion:speed=fast", "--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--reward", "sprite_motion", "--queue", "0"], "argument --queue: 0 is not above 0"),
        (["--reward", "sprite_motion", "--batch", "x"], "argument --batch: invalid positive int value: 'x'"),
        (["--reward", "sprite_motion", "--wait-ms", "nan"], "argument --wait-ms: nan is not above 0"),
        (["--reward", "sprite_motion", "--port", "70000"], "cannot listen at 127.0.0.1 port 70000"),
        (
            ["--reward", "sprite_motion", "--host", "0.0.0.0"],
            "--host 0.0.0.0 is open to other machines; give --token-env",
        ),
        (["--reward", "sprite_motion", "--host", "::"], "--host :: is open to other machines"),
        (["--reward", "sprite_motion", "--host", "example.org"], "--host example.org is open to other machines"),
        (["--reward", "sprite_motion", "--host", ""], "--host  is open to other machines"),
        (
            ["--reward", "sprite_motion", "--token-env", "REWARDS_TEST_UNSET"],
            "environment variable REWARDS_TEST_UNSET: ",
        ),
        (["--reward", "sprite_motion", "more"], "unrecognized arguments: more"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(capsys, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_port_that_is_taken_is_named_before_weights_are_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--reward", "sprite_motion", "--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen at 127.0.0.1 port {port}: ")


def test_a_constructor_that_raises_is_one_line(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Breaks:\n    def __init__(self):\n        raise KeyError('weights\\nmissing')\n")
    assert main(["--reward", f"{file}:Breaks", "--port", "0"]) == 2
    assert capsys.readouterr().err == "error: reward Breaks: KeyError: 'weights\\nmissing'\n"


def test_the_process_itself_says_one_line():
    process = start("--reward", "clipp")
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors.count("\n")) == (2, "", 1)
