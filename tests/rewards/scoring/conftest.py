"""The folder that the command is run in."""

import shutil
from pathlib import Path

import pytest

from tests.rewards.scoring.folder import REWARDS, write


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """clip_1.mp4, clip_2.mp4, clip_10.mp4, ever brighter and wider."""
    folder = tmp_path_factory.mktemp("clips")
    for number, gray in ((1, 40), (2, 120), (10, 200)):
        write(folder / f"clip_{number}.mp4", gray, size=(48 + 16 * number, 32))
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, clips):
    """A folder to work in: my.py with rewards, clips/ with three videos."""
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(REWARDS)
    shutil.copytree(clips, "clips")
    return tmp_path
