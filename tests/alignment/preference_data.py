"""Preferences on a saved tiny Wan pipeline: clips of noise with scores and labels, as videos and as latents.

Four decided pairs, a tie and a group of three, one of them not scored; two segments a pair, three latent frames a clip.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import imageio.v3 as iio
import torch
import yaml

from alignment.config import LoRAConfig
from alignment.data import save_latent
from alignment.data.latents import fit_video
from alignment.run import main
from rewards.video_files import read_video
from samplers import Encoder
from tests.alignment.tiny import make_policy, shake

FPS = 8
CALL = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": 16}
PROMPTS = ["a red circle", "a blue square", "a green dot"]
PAIRS = [  # prompt, scores, labels of the segments
    (0, (0.9, 0.2), (1, -1)),
    (1, (0.1, 0.4), (-1, 0)),
    (2, (0.5, 0.5), (0, 0)),
    (0, (0.7, 0.3), (1, 1)),
    (1, (0.0, 1.0), (0, -1)),
]
GROUP = (2, (0.3, 0.8, None))


def bright_unless_blue(videos, prompts):
    """Brightness, but for blue ones, which are all alike."""
    return [0.0 if "blue" in prompt else 100 * float(v.mean()) for v, prompt in zip(videos, prompts, strict=True)]


def write_clip(path: Path, seed: int, frames: int = 9, size: int = 16, fps: float = FPS, **options: Any) -> Path:
    """Blobs of noise: the middle of their range, so that no pixel of a VAE's is at an end."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, frames, 4, 4), generator=draw) * 0.8 + 0.1
    video = torch.nn.functional.interpolate(coarse, (frames, size, size), mode="trilinear")[0]
    pixels = (video * 255).byte().permute(1, 2, 3, 0).numpy()
    iio.imwrite(path, pixels, fps=fps, codec="libx264", macro_block_size=2, **options)
    return path


def make(folder: Path, base: Path) -> Path:
    """Write videos.jsonl and latents.jsonl, the same records by other files; and two LoRAs. Returns: the folder."""
    encoder = Encoder(diffusers.WanPipeline.from_pretrained(base), prompt=PROMPTS[0], **CALL)
    for kind in ("video", "latent"):
        (folder / kind).mkdir(parents=True)
    for i in range(2 * len(PAIRS) + len(GROUP[1])):
        frames, fps = read_video(write_clip(folder / f"video/{i}.mp4", i))
        clip = fit_video(frames, fps, 9, FPS, 16, 16)
        with torch.no_grad():
            state = encoder(clip[None])[0]
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(100 + i))
        save_latent(folder / f"latent/{i}.safetensors", state, noise)
    for kind in ("video", "latent"):
        write_rows(folder / f"{kind}s.jsonl", rows_of(kind))
    for seed, name in enumerate(("look", "motion")):
        expert = make_policy(model={"lora": LoRAConfig(rank=2, alpha=4, targets=["to_q", "to_v"])})
        shake(expert, 0.3, seed)
        expert.save(folder / "experts" / name)
    return folder


def rows_of(kind: str = "latent") -> list[dict[str, Any]]:
    """The records as JSON; their members are named by `kind` of file."""

    def member(i: int) -> dict[str, str]:
        return {kind: f"{kind}/{i}.{'mp4' if kind == 'video' else 'safetensors'}"}

    rows = []
    for i, (prompt, scores, segments) in enumerate(PAIRS):
        files = {"a": member(2 * i), "b": member(2 * i + 1)}
        label = (scores[0] > scores[1]) - (scores[0] < scores[1])
        judged = {"label": label, "scores": {"look": list(scores)}, "labels": {"look": label}, "annotator": "look"}
        dense = {"fps": FPS, "frames": 9, "seg_sec": 0.5, "seg_labels": list(segments)}
        rows.append({"id": f"p{i}", "prompt": PROMPTS[prompt], **files, **judged, **dense})
    prompt, scores = GROUP
    members = [member(2 * len(PAIRS) + i) for i in range(len(scores))]
    rows.append({"id": "g", "prompt": PROMPTS[prompt], "members": members, "scores": {"look": list(scores)}})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def recipe_for(base: Path, algorithm: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Two iterations, a checkpoint after each; evaluations of two prompts."""
    return {
        "name": "tiny",
        "iterations": 2,
        "fps": FPS,
        "model": {"path": str(base), "device": "cpu", "lora": {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]}},
        "call": CALL,
        "sampler": {"steps": 3, "kernel": "ode", "shared_noise": False},
        "rewards": {"bright": {"use": "tests.alignment.preference_data:bright_unless_blue"}},
        "algorithm": algorithm,
        "data": {"shuffle": False, **data},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"num_prompts": 2, "videos": 0, "steps": 2},
        "checkpoint": {"every": 1},
        "tracker": None,
    }


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def ran(recipe: Path, output: Path, *overrides: str) -> Path:
    """Run the command, which has to end well. Returns: the run folder."""
    assert main([str(recipe), f"output={output}", *overrides]) == 0
    return output
