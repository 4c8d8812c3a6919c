"""Complete training states: written aside and renamed, the last few kept, loaded without unpickling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError, one_line
from .files import replacing_folder

SNAPSHOT = "snapshot_"  # what the names of their files begin with


class State(NamedTuple):
    """What a run needs to go on. Random numbers need no entry: every iteration seeds itself from the run's seed."""

    iteration: int  # completed
    trained: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor]
    updates: int  # optimiser steps so far
    snapshots: dict[str, dict[str, Tensor]] = {}  # other values of the trained weights that an algorithm keeps
    memory: dict[str, Any] = {}  # what else it keeps, fit for JSON


def save_state(folder: Path, state: State, keep: int) -> Path:
    """Write checkpoints/<iteration>/ and delete all but the last `keep`."""
    target = folder / f"{state.iteration:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_folder(target) as new:
        save_file(_detached(state.trained), new / "trained.safetensors")
        if state.ema:
            save_file(_detached(state.ema), new / "ema.safetensors")
        for name, weights in state.snapshots.items():
            save_file(_detached(weights), new / f"{SNAPSHOT}{name}.safetensors")
        torch.save(state.optimizer, new / "optimizer.pt")
        text = json.dumps({"iteration": state.iteration, "updates": state.updates, "memory": state.memory})
        (new / "state.json").write_text(text, "utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((p.parent for p in folder.glob("[0-9]*/state.json")), key=lambda path: int(path.name))


def load_state(path: Path) -> State:
    """Read one checkpoint."""
    try:
        meta = json.loads((path / "state.json").read_text("utf-8"))
        ema = path / "ema.safetensors"
        return State(
            meta["iteration"],
            load_file(path / "trained.safetensors"),
            torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
            load_file(ema) if ema.exists() else {},
            meta["updates"],
            {p.stem.removeprefix(SNAPSHOT): load_file(p) for p in sorted(path.glob(f"{SNAPSHOT}*.safetensors"))},
            meta["memory"],
        )
    except Exception as error:  # safetensors, torch and json each raise their own for a damaged file
        raise UserError(
            f"{path}: damaged checkpoint ({one_line(error)}); delete it to resume from the one before"
        ) from error


def restore(parameters: dict[str, torch.nn.Parameter], saved: dict[str, Tensor], path: str) -> None:
    """Copy saved values into the trained weights."""
    if saved.keys() != parameters.keys():
        raise UserError(f"{path}: holds {len(saved)} trained tensors, this recipe trains {len(parameters)} others")
    with torch.no_grad():
        for name, p in parameters.items():
            if saved[name].shape != p.shape:
                raise UserError(f"{path}: {name} has shape {tuple(saved[name].shape)}, expected {tuple(p.shape)}")
            p.copy_(saved[name])


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
