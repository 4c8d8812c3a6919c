"""The work of `python -m alignment.generate`: a list of tasks that follows from the recipe, and their files.

B rows of a pipeline call
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from samplers import Segment, seed_for

from .checkpoint import checkpoints, load_state, restore
from .config import Recipe
from .data import Prompt, conditions, read_preferences, read_prompts
from .data.latents import LatentCache, save_latent
from .distributed import Processes
from .errors import UserError
from .evaluation import as_bytes
from .given import encode, encoder_of
from .noised import check_flow
from .policy import Policy, as_videos, load_policy
from .samples import chunks
from .startup import quiet_loading, try_out

SETTINGS = "generate.json"  # what a folder was made with
CALL = 32  # videos a pipeline call, where the recipe does not say
WRITERS = 4  # videos that are written at a time
CRF = "10"  # of libx264 without chroma subsampling: rewards change by a thousandth


class Task(NamedTuple):
    """One video to be made."""

    name: str  # of its files
    record: str  # id of the pair or group that it belongs to
    prompt: Prompt
    seed: int  # of its noise
    source: Path | None = None  # the real video that it starts from
    eta: float | None = None  # share of noise that it starts with
    start: int = 0  # the step that it starts with


class Made(NamedTuple):
    """What B tasks gave."""

    states: Tensor  # (B, ...) clean
    noises: Tensor  # (B, ...)
    videos: Tensor  # (B, F, C, H, W) in [0, 1]


def generate_all(recipe: Recipe, options: argparse.Namespace, processes: Processes) -> None:
    """Make what is missing, then write the index.

    Raises: UserError where the folder was made otherwise, or an input cannot be used.
    """
    out: Path = options.out
    claim(out, recipe, options, processes)
    policy = sampling_policy(recipe, options.weights, processes, out / "embeddings")
    if options.guided:
        first = read_preferences(options.guided, "--guided")[0].prompt
        try_out(policy, first)
        tasks = guided_tasks(recipe, options, grid_of(policy, first))
        make = guided(policy, source_latents(policy, recipe, options, processes))
    else:
        tasks, make = candidate_tasks(recipe, options.candidates), candidates(policy)
    own = set(processes.share(list(dict.fromkeys(task.record for task in tasks))))
    mine = [task for task in tasks if task.record in own]
    left = [task for task in mine if not all(path.is_file() for path in files_of(out, task))]
    console = Console(highlight=False, soft_wrap=True, quiet=not processes.is_main)
    if len(left) < len(mine):
        console.print(f"{len(mine) - len(left)} of {len(mine)} videos are there already")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("videos"))
    terminal = console.is_terminal
    with ThreadPoolExecutor(WRITERS) as pool, Progress(*columns, console=console, disable=not terminal) as bar:
        shown = bar.add_task("", total=len(left))
        for part in calls(left, recipe.batch.rollout or CALL):
            rows = zip(part, *(tensor.cpu() for tensor in make(part)), strict=True)
            # Each video takes an encoder's process of its own, which leaves the others something to do.
            written = pool.map(lambda row: write(files_of(out, row[0]), Made(*row[1:]), recipe.fps), rows)
            for _ in written:
                bar.update(shown, advance=1)
    processes.wait()
    if processes.is_main:
        lines = [json.dumps(row) for row in index(tasks, out, recipe.fps)]
        whole(out / "index.jsonl", lambda path: path.write_text("\n".join([*lines, ""]), "utf-8"))
    console.print(f"{len(tasks)} videos in {len({task.record for task in tasks})} records: {out / 'index.jsonl'}")


def claim(out: Path, recipe: Recipe, options: argparse.Namespace, processes: Processes) -> None:
    """Note in the folder how its videos are made. Raises: UserError where others are there."""
    asked = {
        "model": [recipe.model.path, recipe.model.dtype],
        "call": recipe.call,
        "sampler": vars(recipe.sampler),
        "seed": recipe.seed,
        "fps": recipe.fps,
        "prompts": recipe.data.prompts,
        "weights": options.weights and str(options.weights),
    }
    if options.guided:
        asked |= {"guided": str(options.guided), "eta": [*options.eta, options.eta_space], "pairs": options.pairs}
    else:
        asked |= {"candidates": options.candidates}
    asked = json.loads(json.dumps(asked))
    path = out / SETTINGS
    processes.wait()
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        if other := [key for key in {**asked, **before} if before.get(key) != asked.get(key)]:
            raise UserError(f"--out: {out} holds videos made with other settings ({', '.join(other)}); choose another")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty, and not made by this command; choose another folder")
    processes.wait()  # nobody writes before all have looked
    if processes.is_main:
        for folder in (out / "videos", out / "latents"):
            folder.mkdir(parents=True, exist_ok=True)
        whole(path, lambda new: new.write_text(json.dumps(asked, indent=1) + "\n", "utf-8"))
    processes.wait()


def sampling_policy(recipe: Recipe, weights: Path | None, processes: Processes, embeddings: Path) -> Policy:
    """The recipe's pipeline, with the newest weights of a run if one is named."""
    quiet_loading()
    policy = load_policy(recipe, processes.device)
    if weights is not None:
        found = checkpoints(weights / "checkpoints")
        if not found:
            raise UserError(f"--weights: {weights} holds no checkpoint; name a run folder")
        restore(policy.parameters, load_state(found[-1]).trained, str(found[-1]))
    policy.cache_embeddings(Path(recipe.model.embeddings or embeddings))
    return policy


def candidate_tasks(recipe: Recipe, number: int) -> list[Task]:
    """So many videos for each of the recipe's prompts."""
    if recipe.data.prompts is None:
        raise UserError("data.prompts: candidates need prompts; name a file of them, or use --guided")
    tasks = []
    for i, prompt in enumerate(read_prompts(recipe.data.prompts)):
        for member in range(number):
            seed = seed_for(recipe.seed, "candidate", i, member)
            tasks.append(Task(f"{i:06d}_{member:02d}", f"{i:06d}", prompt, seed))
    return tasks


def guided_tasks(recipe: Recipe, options: argparse.Namespace, levels: Sequence[float]) -> list[Task]:
    """Pairs from real videos: one eta, and so one first step, for both of a pair."""
    tasks = []
    for i, record in enumerate(read_preferences(options.guided, "--guided")):
        for pair in range(options.pairs):
            low, high = options.eta
            draw = torch.Generator().manual_seed(seed_for(recipe.seed, "eta", i, pair))
            eta = low + (high - low) * float(torch.rand((), generator=draw, dtype=torch.float64))
            start = first_step(levels, eta, options.eta_space)
            name = f"{i:06d}_{pair:02d}"
            for member in "ab":
                seed = seed_for(recipe.seed, "guided", i, pair, member)
                source = record.members[0].video
                if source is None:
                    raise UserError(f"--guided: {options.guided}: line {record.line}: has no video to start from")
                tasks.append(Task(f"{name}{member}", name, record.prompt, seed, source, eta, start))
    return tasks


def first_step(levels: Sequence[float], eta: float, space: str) -> int:
    """The step that a chain with this share of noise starts with.

    Args:
        levels: T + 1 noise levels, falling to 0.
        eta: in (0, 1]; of "sigma" the first level at or below it, of "index" that share of the steps is left.
    """
    steps = len(levels) - 1
    if space == "index":
        return steps - max(1, round(eta * steps))
    return min(steps - 1, next(i for i, level in enumerate(levels) if level <= eta + 1e-6))


def source_latents(
    policy: Policy, recipe: Recipe, options: argparse.Namespace, processes: Processes
) -> Callable[[Path], Tensor]:
    """Encode the real videos; what gives the state of each."""
    records = read_preferences(options.guided, "--guided")
    cache = LatentCache(options.out / "sources", encoder_of(policy, records[0].prompt), recipe.fps)
    videos = {r.members[0].video: f"--guided: {options.guided} line {r.line}" for r in records if r.members[0].video}
    encode(cache, videos, processes, recipe.batch.rollout or 1, print)
    return cache.load


def grid_of(policy: Policy, prompt: Prompt) -> list[float]:
    """The sampler's noise levels, T + 1, for the recipe's call. Raises: UserError where the pipeline is no flow."""
    check_flow(policy)
    policy.rollout([prompt.text], [0], [0], [], segment=Segment([0]), output_type="latent", **conditions([prompt]))
    return list(policy.scheduler.levels)


def candidates(policy: Policy) -> Callable[[Sequence[Task]], Made]:
    """What samples tasks from noise."""

    def make(tasks: Sequence[Task]) -> Made:
        seeds = [task.seed for task in tasks]
        noises = [seed_for(seed, "steps") for seed in seeds]
        drawn = policy.rollout(texts(tasks), seeds, noises, record=(0,), **conditions([t.prompt for t in tasks]))
        return Made(drawn.state, drawn.trajectory.steps[0].x, as_videos(drawn.frames))

    return make


def guided(policy: Policy, state_of: Callable[[Path], Tensor]) -> Callable[[Sequence[Task]], Made]:
    """What noises real videos and samples on from there, without noise in the steps."""

    def make(tasks: Sequence[Task]) -> Made:
        start = tasks[0].start
        level = policy.scheduler.levels[start]
        clean = torch.stack([state_of(task.source) for task in tasks]).to(policy.device)
        drawn = [torch.Generator().manual_seed(task.seed) for task in tasks]
        noises = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in drawn]).to(clean.device)
        segment = Segment(range(start, policy.sampler.steps), (1 - level) * clean + level * noises, policy.injectable)
        seeds = [task.seed for task in tasks]
        call = conditions([task.prompt for task in tasks])
        rolled = policy.rollout(texts(tasks), seeds, seeds, record=(), stochastic=(), segment=segment, **call)
        return Made(rolled.state, noises, as_videos(rolled.frames))

    return make


def texts(tasks: Sequence[Task]) -> list[str]:
    return [task.prompt.text for task in tasks]


def calls(tasks: Sequence[Task], size: int | None) -> Iterator[list[Task]]:
    """Tasks that a pipeline call can hold together, at most `size` of them: one first step, one condition image."""
    kinds: dict[Any, list[int]] = {}
    for i, task in enumerate(tasks):
        kinds.setdefault((task.start, task.prompt.image), []).append(i)
    for alike in kinds.values():
        for part in chunks(alike, size):
            yield [tasks[i] for i in part]


def files_of(out: Path, task: Task) -> tuple[Path, Path]:
    """Where a task's video and latent go."""
    return out / "videos" / f"{task.name}.mp4", out / "latents" / f"{task.name}.safetensors"


def write(paths: tuple[Path, Path], made: Made, fps: int) -> None:
    """Write a task's files: `made` without the batch."""
    video, latent = paths
    save_latent(latent, made.states, made.noises)
    whole(video, lambda path: write_video(path, made.videos, fps))


def write_video(path: Path, frames: Tensor, fps: int) -> None:
    """Write (F, C, H, W) in [0, 1] as an mp4 to learn from: as large as it is, hardly compressed."""
    encoding = {"codec": "libx264", "pixelformat": "yuv444p", "output_params": ["-crf", CRF], "macro_block_size": 1}
    iio.imwrite(path, as_bytes(frames).numpy(), fps=fps, **encoding)


def whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let a file appear when all of it is written."""
    aside = path.with_name(f".new.{path.name}")
    write(aside)
    aside.replace(path)


def index(tasks: Sequence[Task], out: Path, fps: int) -> list[dict[str, Any]]:
    """One record for each pair or group, paths relative to the index."""
    records: dict[str, list[Task]] = {}
    for task in tasks:
        records.setdefault(task.record, []).append(task)
    rows = []
    for name, members in records.items():
        first = members[0]
        files = [
            {"video": str(video.relative_to(out)), "latent": str(latent.relative_to(out)), "seed": task.seed}
            for task in members
            for video, latent in [files_of(out, task)]
        ]
        image = {"image": str(Path(first.prompt.image).resolve())} if first.prompt.image else {}
        row = {"id": name, "prompt": first.prompt.text, **image}
        if first.source is None:
            rows.append({**row, "members": files})
        else:
            source = {"fps": fps, "eta": first.eta, "source": str(first.source)}
            rows.append({**row, "a": files[0], "b": files[1], **source})
    return rows
