"""What tells one reward from another, and one file from another: scores are kept by it and results name it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import rewards
from rewards.arguments import RewardArgument
from rewards.known import KNOWN

LIBRARIES = ("torch", "transformers", "open_clip_torch")


def describe(argument: RewardArgument) -> dict[str, Any]:
    """What a reward's scores depend on: what was asked for, files that this names, our code, libraries, the device.

    A model that is named as on the hub counts by its name. Whatever was fetched for it may change: give a folder where
    that matters.
    """
    import torch

    described = {"use": argument.use, "options": argument.options, "files": {}}
    module = argument.use.rpartition(":")[0]  # of a callable of one's own
    for text in _texts([argument.options, argument.use if module else ""]):
        code = text.rpartition(":")[0]
        path = os.path.expanduser(code if code.endswith(".py") else text)
        if path and os.path.exists(path):  # unlike Path.exists, also says so of a text that is too long
            described["files"][path] = hash_of(Path(path))
    if argument.use not in KNOWN and not module.endswith(".py"):
        described["files"][module] = _module(module)
    described["code"] = hash_of(Path(rewards.__file__).parent, "**/*.py")
    described["libraries"] = {name: _version(name) for name in LIBRARIES}
    described["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return described


def fingerprint(described: Any) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_of(path: Path, pattern: str = "**/*") -> str:
    """Of a file's contents, or of the names and contents of all files of a folder."""
    if not path.is_dir():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()[:16]
    files = sorted(file for file in path.glob(pattern) if file.is_file())
    return fingerprint([[file.relative_to(path).as_posix(), hash_of(file)] for file in files])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _module(name: str) -> str:
    found = importlib.util.find_spec(name)
    return hash_of(Path(found.origin)) if found and found.origin and Path(found.origin).is_file() else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
