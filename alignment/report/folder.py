"""Reads a run folder, whole or cut off: config.yaml, metrics.jsonl and samples/*/scores.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ..gains import finite


class Run(NamedTuple):
    """What a run folder holds."""

    folder: Path
    config: dict[str, Any]  # {} if config.yaml is missing or cannot be read
    config_text: str
    metrics: list[dict[str, Any]]  # by iteration, each iteration once
    evaluations: list[dict[str, Any]]  # by iteration
    unreadable: list[str]  # what was skipped


def load_run(folder: Path) -> Run:
    """Read a run folder; whatever was cut off or damaged is skipped and named.

    Raises: ValueError if the folder has none of config.yaml, metrics.jsonl and samples/.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "samples")):
        raise ValueError(f"{folder} is no run folder: it has no config.yaml, metrics.jsonl or samples/")
    unreadable: list[str] = []
    config, text = {}, ""
    if (folder / "config.yaml").exists():
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        try:
            config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        except Exception as error:  # yaml and omegaconf each have their own; the page shows the text all the same
            unreadable.append(f"config.yaml ({type(error).__name__})")
    config = config if isinstance(config, dict) else {}
    return Run(folder, config, text, _metrics(folder, unreadable), load_evaluations(folder, unreadable), unreadable)


def _metrics(folder: Path, unreadable: list[str]) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    by_iteration: dict[float, dict[str, Any]] = {}
    for i, text in enumerate(lines, 1):
        line = _json(text)
        if line is None:
            if text.strip():
                unreadable.append(f"line {i} of metrics.jsonl")
            continue
        iteration = line.get("iteration")
        line["iteration"] = iteration = iteration if finite(iteration) else i
        by_iteration[iteration] = line  # a resumed run repeats the iterations after its checkpoint: the last counts
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def load_evaluations(folder: Path, unreadable: list[str]) -> list[dict[str, Any]]:
    """The contents of samples/*/scores.json by iteration; what cannot be read is skipped and added to `unreadable`."""
    found = []
    for path in (folder / "samples").glob("*/scores.json"):
        scores = _json(path.read_text(encoding="utf-8", errors="replace"))
        if scores is None or not _complete(scores) or not path.parent.name.isdigit():
            unreadable.append(str(path.relative_to(folder)))
            continue
        found.append({**scores, "iteration": int(path.parent.name), "folder": path.parent})
    return sorted(found, key=lambda scores: scores["iteration"])


def _complete(scores: dict[str, Any]) -> bool:
    """Whether every value has one entry a prompt, which all comparisons rely on."""
    prompts, values = scores.get("prompts"), scores.get("values")
    if not isinstance(prompts, list) or not isinstance(values, dict):
        return False
    return all(isinstance(column, list) and len(column) == len(prompts) for column in values.values())


def _json(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
