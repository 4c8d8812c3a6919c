"""The example of a hacked reward: what it pays for, and the whole program in its smallest size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.reward_hacking import COLUMNS, evaluations, fast
from examples.tiny_world import world

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "examples/reward_hacking.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_the_reward_pays_for_speed_alone():
    sprites = world.sample(64, torch.Generator().manual_seed(0))
    videos, prompts = world.render(sprites), world.captions(sprites)
    speeds = fast(videos, prompts)
    assert speeds.shape == (64,)
    assert 0.08 < speeds.min() < speeds.max() < 0.4  # 0.4 to 1.5 px a frame, a quarter of it each
    assert torch.equal(fast(videos, ["a green triangle moving down"] * 64), speeds)  # whatever is asked for
    torch.testing.assert_close(fast(videos.flip(1), prompts), speeds)  # and wherever it goes
    assert fast(videos, prompts, limit=0.1).eq(1).all()


def test_the_whole_program_in_its_smallest_size(tmp_path):
    out = tmp_path / "out"
    result = run("--quick", "--out", out)
    assert result.returncode == 0, result.stderr
    table = result.stdout.split("\n\n")[-2].splitlines()
    assert table[0].split() == list(COLUMNS)
    rows = {line[:44].strip(): [float(number) for number in line[44:].split()] for line in table[1:]}
    assert len(rows) == 6
    assert all(len(row) == len(COLUMNS) for row in rows.values())

    plain, with_kl = evaluations(out / "plain"), evaluations(out / "kl")
    assert list(plain) == list(with_kl) == [0, 1]
    assert rows["base model"] == pytest.approx(list(plain[0].values()), abs=6e-4)
    assert rows["plain, 1 iteration"] == pytest.approx(list(plain[1].values()), abs=6e-4)
    assert with_kl == plain  # the first update starts from the reference, where the penalty has no gradient yet
    assert "kl: 0.1" in (out / "kl" / "config.yaml").read_text()
    # The same prompts and noise all along; the weights are what differs.
    seeds = {tuple(json.loads(path.read_text())["seeds"]) for path in out.glob("*/samples/*/scores.json")}
    assert len(seeds) == 1
    shares = [evaluations(out / f"share_{share}")[1] for share in (0.8, 0.5)]
    assert len({json.dumps(means) for means in (plain[0], plain[1], *shares)}) == 4

    again = run("--quick", "--out", out)
    assert (again.returncode, again.stderr.strip()) == (1, f"{out} exists; remove it, or say --out FOLDER")
