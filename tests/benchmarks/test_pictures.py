"""What needs matplotlib says so before it looks at anything else."""

import sys
from collections.abc import Callable

import pytest

from benchmarks import latent_reward, reward_accuracy, win_rate
from benchmarks.pictures import INSTALL

MISSING = "no_such_file"
COMMANDS = {
    "win_rate": (win_rate.main, ["--base", MISSING, "--tuned", MISSING, "--prompts", MISSING, "--judge", MISSING]),
    "reward_accuracy": (reward_accuracy.main, ["--data", MISSING, "--reward", "sprite_motion"]),
    "latent_reward": (latent_reward.main, [MISSING, "--pairs", MISSING]),
}


@pytest.mark.parametrize(("command", "arguments"), COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_early(
    command: Callable[[list[str]], int],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command([*arguments, "--out", "out"]) == 2
    assert capsys.readouterr().err == f"error: the picture needs matplotlib: {INSTALL}\n"
