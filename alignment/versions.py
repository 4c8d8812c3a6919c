"""What a result was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch")


def versions() -> dict[str, str]:
    """Package versions, git revision and device, for config.yaml and benchmark results."""
    import torch

    found = {"reelign": _version("reelign"), "python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)}  # names its CUDA too
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {**found, "device": device, "git": git_revision()}


def git_revision() -> str:
    """The checkout's commit, with a + where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
