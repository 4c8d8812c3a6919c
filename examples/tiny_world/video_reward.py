"""How well a reward of the tiny world's videos sees flaws, and the shipped folder of the tiny VideoReward.

    python -m examples.tiny_world.video_reward examples/tiny_world/video_reward
    python -m examples.tiny_world.video_reward runs/tiny_reward_model/reward --save examples/tiny_world/video_reward

The tiny VideoReward is the tiny Qwen2-VL (`qwen2_vl.py`) tuned on pairs of videos (`flawed_videos.py`) by the recipe
tiny_reward_model.yaml.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

import rewards
from rewards.checkpoints import PREFIX, plain_names
from rewards.qwen2_vl import base_weights
from rewards.video_reward import VideoReward, read_settings, read_state

from . import world
from .flaws import motion_flaw, visual_flaw
from .qwen2_vl import name_tokenizer

FPS = 8


@torch.no_grad()
def accuracy(reward: VideoReward, num: int = 384, level: int = 1, seed: int = 1234) -> dict[str, float]:
    """Share of fresh pairs in which the better one scores higher: one flaw apart, everything else the same.

    Args: level: of visual and motion flaws, 1 small, 2 large; of words one is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    sprites, flawed = world.sample(num, generator), torch.full((num,), level)
    clean, right = world.render(sprites), world.captions(sprites)

    def score(video: Tensor, prompts: list[str], dimension: str) -> Tensor:
        return reward(video, prompts, fps=FPS).dims[dimension]

    def won(worse: Tensor, prompts: list[str], dimension: str) -> float:
        return (best[dimension] > score(worse, prompts, dimension)).float().mean().item()

    best = reward(clean, right, fps=FPS).dims
    offset = motion_flaw(sprites, flawed, generator)
    found = {
        "VQ": won(visual_flaw(clean, flawed, generator), right, "VQ"),
        "MQ": won(world.render(sprites, offset), right, "MQ"),
    }
    for place, (name, table) in enumerate(zip(world.Sprites._fields[:5], world.TABLES, strict=True)):
        rows = world.attributes(sprites)
        rows[:, place] = (rows[:, place] + torch.randint(1, len(table), (num,), generator=generator)) % len(table)
        found[f"TA {name}"] = won(clean, [world.describe(row) for row in rows.tolist()], "TA")
    of_words = [share for name, share in found.items() if name.startswith("TA ")]
    return found | {"TA": sum(of_words) / len(of_words)}


def save(trained: Path, folder: Path) -> None:
    """Make the folder of a recipe's run one that stands alone, in fp16: with the weights that were not trained."""
    settings = read_settings(str(trained), None, None, None)
    config = json.loads((trained / "model_config.json").read_text("utf-8"))
    tuned, base = plain_names(read_state(settings)), base_weights("video_reward", settings.frozen)
    shutil.rmtree(folder, ignore_errors=True)
    step = folder / settings.weights.name
    step.mkdir(parents=True)
    torch.save({released(name): tensor.half() for name, tensor in (base | tuned).items()}, step / "model.pth")
    config["model_config"] |= {"model_name_or_path": "base", "frozen_weights": None, "torch_dtype": "float16"}
    (folder / "model_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shutil.copy(trained / "prompt_template.txt", folder)
    shutil.copytree(trained / "base", folder / "base")
    name_tokenizer(folder / "base")


def released(name: str) -> str:
    """The name of a weight under transformers 4.45 and peft, which VideoReward was trained with."""
    name = PREFIX + name.replace("language_model.", "model.")
    factor = name.endswith((".lora_A", ".lora_B"))
    return f"{name}.default.weight" if factor else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a VideoReward")
    parser.add_argument("--num", type=int, default=384, help="pairs of each kind (384)")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="also write the folder so that it stands alone, in fp16"
    )
    args = parser.parse_args()
    folder = args.folder
    if args.save:
        save(folder, args.save)
        folder = args.save
    reward = rewards.load("video_reward", path=str(folder), use_norm=False, device="cpu", batch_size=64)
    for level, name in ((1, "small"), (2, "large")):
        shares = {key: round(value, 3) for key, value in accuracy(reward, args.num, level).items()}
        print(f"{name} flaws: {shares}", flush=True)


if __name__ == "__main__":
    main()
