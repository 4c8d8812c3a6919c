"""Videos of every model from the same noise, as files of the folder.

    FOLDER/settings.json              what the videos are made with; other settings are refused
    FOLDER/<model>/NNNN_S.mp4         prompt NNNN, sample S, to look at
    FOLDER/<model>/frames/NNNN_S.mkv  the same without loss (FFV1), in 8 bits a channel

What is judged are the latter, so that a resumed comparison judges what one without interruption would. Calls of the
pipeline are planned before it is known what exists, and a call is made again as a whole: videos depend neither on
interruptions nor on the number of processes, bit for bit, and on the size of a call by rounding alone.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from alignment.data import Prompt, by_image, conditions
from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.evaluation import as_bytes, write_video
from alignment.generation import CALL, WRITERS, whole
from alignment.samples import chunks
from rewards import RewardError
from rewards.scoring.asking import RewardFailed
from rewards.video_files import read_video
from samplers import seed_for

from .models import Contender, Sampler, fingerprint, load_model, try_out

SETTINGS = "settings.json"
LOSSLESS = {"codec": "ffv1", "pixelformat": "bgr0", "macro_block_size": 1}
FAULTS = (RewardError, RewardFailed, UserError, OSError, RuntimeError, ValueError)


class Video(NamedTuple):
    """One video of each model."""

    index: int  # of its prompt
    sample: int
    prompt: Prompt

    @property
    def name(self) -> str:
        return f"{self.index:04d}_{self.sample}"


def videos_of(prompts: Sequence[Prompt], samples: int) -> list[Video]:
    """Prompt by prompt."""
    return [Video(i, sample, prompt) for i, prompt in enumerate(prompts) for sample in range(samples)]


def paths_of(out: Path, model: str, name: str) -> tuple[Path, Path]:
    """The file to look at, and the one that is judged."""
    return out / model / f"{name}.mp4", out / model / "frames" / f"{name}.mkv"


def claim(
    out: Path, models: Sequence[Contender], prompts: Sequence[Prompt], samples: int, processes: Processes
) -> dict[str, Any]:
    """Note in the folder how its videos are made. Raises: UserError where others are there."""
    recipe = models[0].recipe
    asked = {
        "models": {model.name: [model.path, fingerprint(model)] for model in models},
        "dtypes": [recipe.model.dtype, recipe.model.vae_dtype],
        "call": recipe.call,
        "steps": recipe.evaluation.steps or recipe.sampler.steps,
        "shift": recipe.sampler.shift,
        "trained_share": recipe.evaluation.trained_share,
        "fps": recipe.fps,
        "seed": recipe.evaluation.seed,
        "samples": samples,
        "prompts": [[prompt.text, prompt.image] for prompt in prompts],
    }
    asked = json.loads(json.dumps(asked))
    path = out / SETTINGS
    processes.wait()
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        if other := [key for key in asked if before.get(key) != asked[key]]:
            raise UserError(f"--out: {out} holds a comparison with other settings ({', '.join(other)}); choose another")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is not empty, and not made by this command; choose another folder")
    processes.wait()  # nobody writes before all have looked
    if processes.is_main:
        for model in models:
            (out / model.name / "frames").mkdir(parents=True, exist_ok=True)
        whole(path, lambda new: new.write_text(json.dumps(asked, indent=1) + "\n", "utf-8"))
    processes.wait()
    return asked


def planned(out: Path, models: Sequence[Contender], videos: Sequence[Video]) -> dict[str, list[list[Video]]]:
    """Model -> calls of the pipeline in which something is missing."""
    recipe = models[0].recipe
    size = recipe.evaluation.batch or recipe.batch.rollout or CALL
    alike = by_image([video.prompt for video in videos])
    calls = [[videos[i] for i in part] for places in alike for part in chunks(places, size)]
    return {model.name: [call for call in calls if _missing(out, model.name, call)] for model in models}


def make_videos(
    out: Path,
    models: Sequence[Contender],
    plan: Mapping[str, list[list[Video]]],
    processes: Processes,
    console: Console,
) -> None:
    """Make what is planned, one model after the other, each process its share of the calls."""
    for model in models:
        if own := processes.share(plan[model.name]):
            _make(out, model, own, processes, console)


def _missing(out: Path, model: str, call: Sequence[Video]) -> bool:
    return not all(path.is_file() for video in call for path in paths_of(out, model, video.name))


def _make(
    out: Path, model: Contender, calls: Sequence[Sequence[Video]], processes: Processes, console: Console
) -> None:
    evaluation, fps = model.recipe.evaluation, model.recipe.fps
    policy = load_model(model, processes.device, out / "embeddings")
    try_out(policy, calls[0][0].prompt)
    with ThreadPoolExecutor(WRITERS) as pool:
        for call in shown(calls, f"videos of {model.name}", console):
            films = as_bytes(sample(policy, call, evaluation.seed, evaluation.steps, evaluation.trained_share)).cpu()
            files = [paths_of(out, model.name, video.name) for video in call]
            list(pool.map(write, files, films, [fps] * len(call)))
    del policy
    free_memory()


def free_memory() -> None:
    """Give back what nobody refers to any more: the next model needs the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sample(policy: Sampler, call: Sequence[Video], seed: int, steps: int | None, trained_share: float) -> Tensor:
    """(B, F, C, H, W) videos in [0, 1]: the noise depends on the prompt's place and the sample alone."""
    prompts = [video.prompt for video in call]
    seeds = [seed_for(seed, "win rate", video.index, video.sample) for video in call]
    return policy.generate([p.text for p in prompts], seeds, steps, trained_share, **conditions(prompts))


def write(paths: tuple[Path, Path], film: Tensor, fps: int) -> None:
    """Write (F, H, W, 3) uint8 as both files."""
    look, judged = paths
    whole(look, lambda path: write_video(path, film, fps))
    whole(judged, lambda path: iio.imwrite(path, film.numpy(), fps=fps, **LOSSLESS))


def read_frames(out: Path, model: str, name: str) -> Tensor:
    """(F, 3, H, W) uint8, as it was made. Raises: RewardError for a damaged file."""
    return read_video(paths_of(out, model, name)[1], fps=1.0)[0]


def shown(items: Sequence[Any], what: str, console: Console) -> Iterator[Any]:
    """The items one by one, with a bar on a terminal and a line a tenth elsewhere."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"calls, {what}", total=len(items))
        for number, item in enumerate(items, 1):
            yield item
            bar.update(task, advance=1)
            if not console.is_terminal and number * 10 // len(items) > (number - 1) * 10 // len(items):
                console.print(f"{what}: {number} of {len(items)} calls")


def together(processes: Processes, work: Callable[[], None]) -> None:
    """Run work in every process; where one fails all raise, so that none waits for it."""
    failure = None
    try:
        work()
    except FAULTS as error:
        failure = error
    if processes.any(failure is not None):
        raise failure or UserError("another process failed; its line says why")


def write_json(path: Path, content: Any) -> None:
    """A JSON file that appears whole."""
    aside = path.with_name(f".new.{path.name}")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    os.replace(aside, path)
