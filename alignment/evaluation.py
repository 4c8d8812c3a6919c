"""Held-out evaluation: fixed prompts and seeds, the pipeline's own deterministic scheduler, every reward.

Evaluations of one run are paired: the same prompts and the same initial noise before, during and after training. A
reward of scope "group" compares each video with the one of the first evaluation, so that a win rate is one against the
model that training began with.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v3 as iio
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from samplers import seed_for

from .data import Prompt, by_image, conditions
from .files import replacing_folder
from .gains import first_and_last, number, paired, percent
from .metrics import number_or_null
from .samples import chunks
from .scoring import Readings, as_matrix, joined

if TYPE_CHECKING:
    from .training import Run

START = "start.safetensors"  # the first evaluation's videos as bytes, kept for rewards of scope "group"
SMALLEST_SIDE = 256  # videos whose shorter side is smaller than this are enlarged by a whole factor


def evaluate(run: Run, iteration: int) -> dict[str, float]:
    """Write samples/<iteration>/ (scores.json and videos) and return the means, named eval/<...>.

    The main process adds what the trained reward gained so far.
    """
    folder = run.folder / "samples" / f"{iteration:06d}"
    config = run.recipe.evaluation
    prompts, seeds = run.evaluation_prompts, [seed_for(config.seed, "evaluation", i) for i in range(config.num_prompts)]
    tasks = run.processes.share(list(zip(prompts, seeds, strict=True)))
    start = run.folder / START
    rivals = run.processes.share(load_file(start)["videos"]) if start.exists() else None
    readings, films = run.together(lambda: _own_part(run, tasks, rivals))
    names, matrix = as_matrix(readings, run.processes)
    values = _columns(run, names, run.processes.gather(matrix).cpu())
    films = run.processes.gather(films)
    means = {f"eval/{name}": float(torch.tensor(column).double().nanmean()) for name, column in values.items()}
    if run.processes.is_main:
        record = {
            "iteration": iteration,
            "prompts": [p.text for p in prompts],
            "seeds": seeds,
            "values": {name: [number_or_null(v) for v in c] for name, c in values.items()},
            "trained": run.scorer.weights,
            "held_out": run.recipe.held_out_rewards,
            "watched": config.watch,
            "videos": [f"{i:02d}.mp4" for i in range(min(config.videos, len(films)))],
        }
        with replacing_folder(folder) as new:
            for name, film in zip(record["videos"], films.cpu(), strict=False):
                write_video(new / name, film, run.recipe.fps)
            (new / "scores.json").write_text(json.dumps(record), "utf-8")
        if run.scorer.compares and rivals is None:
            aside = start.with_suffix(".new")
            save_file({"videos": films.cpu().contiguous()}, aside)
            aside.replace(start)
        means |= gain_so_far(folder.parent, record)
    return means


def gain_so_far(samples: Path, record: dict[str, Any]) -> dict[str, float]:
    """What the trained reward gained since the run's first evaluation, with its 95 % interval over prompts.

    Nothing where this is the first evaluation, or where the first one had other prompts or seeds.
    """
    first = min(samples.glob("[0-9]*/scores.json"))
    before = json.loads(first.read_text("utf-8"))
    if before["iteration"] >= record["iteration"] or first_and_last([before, record]) is None:
        return {}
    gain = paired(before["values"]["reward/mean"], record["values"]["reward/mean"])
    return {"eval/gain": gain.change, "eval/gain/low": gain.low, "eval/gain/high": gain.high}


def evaluation_words(found: dict[str, float]) -> str:
    """`reward 0.7812  gain +0.231 (95 % +0.201 to +0.262)`, or `held-out pairs ranked right 87 %`."""
    if "eval/accuracy/mean" in found:
        return f"held-out pairs ranked right {percent(found['eval/accuracy/mean'])}"
    words = f"reward {found['eval/reward/mean']:.4f}"
    if "eval/gain" in found:
        change, low, high = (number(found[f"eval/gain{end}"], signed=True) for end in ("", "/low", "/high"))
        words += f"  gain {change} (95 % {low} to {high})"
    if "eval/pairs/implicit_accuracy" in found:
        words += f"  held-out pairs told apart {percent(found['eval/pairs/implicit_accuracy'])}"
    return words


def _own_part(run: Run, tasks: list[tuple[Prompt, int]], rivals: Tensor | None) -> tuple[Readings, Tensor]:
    """Readings of this process's (prompt, seed) pairs, and those of its videos that are kept, as bytes.

    Without `rivals`, which are the first evaluation's videos as bytes, each video is compared with itself.
    """
    config, processes = run.recipe.evaluation, run.processes
    size = config.batch or run.recipe.batch.rollout or len(tasks)
    parts, order, kept = [], [], {}
    for rows in (part for alike in by_image([prompt for prompt, _ in tasks]) for part in chunks(alike, size)):
        prompts, seeds = zip(*(tasks[i] for i in rows), strict=True)
        texts = [prompt.text for prompt in prompts]
        videos = run.policy.generate(texts, seeds, config.steps, config.trained_share, **conditions(prompts))
        shown = as_bytes(videos)
        duels = from_bytes(shown), from_bytes(shown if rivals is None else rivals[rows].to(videos.device))
        parts.append(run.scorer(videos, prompts, rows, duels))
        order += rows
        # Prompt i of process r is prompt i * count + r of all.
        limit = len(tasks) * processes.count if run.scorer.compares and rivals is None else config.videos
        kept |= {i: film for i, film in zip(rows, shown, strict=True) if i * processes.count + processes.rank < limit}
    places = torch.tensor(order).argsort()
    readings = Readings(*({name: v[places.to(v.device)] for name, v in part.items()} for part in joined(parts)))
    return readings, torch.stack([kept[i] for i in sorted(kept)]) if kept else shown[:0]


def as_bytes(video: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 from (..., 3, H, W) in [0, 1]."""
    return (video.clamp(0, 1) * 255).round().byte().movedim(-3, -1)


def from_bytes(films: Tensor) -> Tensor:
    """(..., 3, H, W) in [0, 1] from (..., H, W, 3) uint8."""
    return films.movedim(-1, -3).float() / 255


def write_video(path: Path, frames: Tensor, fps: int) -> None:
    """Write (F, H, W, 3) uint8 as an mp4 that browsers play; small videos are enlarged by a whole factor."""
    factor = math.ceil(SMALLEST_SIDE / min(frames.shape[1:3]))
    large = frames.numpy().repeat(factor, axis=1).repeat(factor, axis=2)
    large = large[:, : large.shape[1] // 2 * 2, : large.shape[2] // 2 * 2]  # yuv420p wants even sides
    iio.imwrite(path, large, fps=fps, codec="libx264", macro_block_size=2)


def _columns(run: Run, names: list[str], matrix: Tensor) -> dict[str, list[float]]:
    columns = dict(zip(names, matrix.unbind(1), strict=True))
    total = run.scorer.combined({name: columns[f"reward/{name}"] for name in run.scorer.rewards})
    return {"reward/mean": total.tolist()} | {name: column.tolist() for name, column in columns.items()}
