"""A tiny CLIP that knows the tiny world, in open_clip's own folder format.

It sees single frames, so it judges colour, shape and background; the words of motion and speed it learns to ignore.

    B batch, K captions
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from rewards.sprite import BACKGROUNDS, COLOURS, SHAPES, SPEEDS

from . import models, world
from .optim import Budget, Muon, Training, low_precision

CONFIG = {
    "embed_dim": 64,
    # A ResNet, since it learns shapes within 200 steps.
    "vision_cfg": {"image_size": world.SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 3 + len(world.vocabulary()),
        "hf_tokenizer_name": "local",  # open_clip takes the folder's own
        "width": 64,
        "heads": 2,
        "layers": 2,
        "eos_id": 1,
        "pool_type": "eos",
    },
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
LOOKS = list(itertools.product(BACKGROUNDS, COLOURS, SHAPES))  # all 72 that a frame can show


def build() -> open_clip.CLIP:
    """0.45M parameters."""
    return open_clip.CLIP(**CONFIG)


def tokenise(tokenizer, texts: list[str]) -> Tensor:
    return tokenizer(
        texts, padding="max_length", max_length=CONFIG["text_cfg"]["context_length"], return_tensors="pt"
    ).input_ids


def look_index(sprites: world.Sprites) -> Tensor:
    """Index into LOOKS of what each clip shows: (N,)."""
    return (sprites.background * len(COLOURS) + sprites.colour) * len(SHAPES) + sprites.shape


def all_captions(generator: torch.Generator) -> list[str]:
    """One caption of each look, half of them with random words of motion."""

    def pick(table) -> str:
        return list(table)[int(torch.randint(len(table), (), generator=generator))]

    moving = torch.rand(len(LOOKS), generator=generator) < 0.5
    motions = [(pick(world.DIRECTIONS), pick(SPEEDS)) if m else (None, None) for m in moving.tolist()]
    return [world.caption(*look, *motion) for look, motion in zip(LOOKS, motions, strict=True)]


def partial_captions(num: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """N captions that leave out some attributes, and which looks they fit: (N, 72) bool."""
    kept = torch.rand(num, 3, generator=generator) < 0.5
    kept[~kept.any(-1), 0] = True
    picks = torch.randint(len(LOOKS), (num,), generator=generator).tolist()
    wanted = [
        [w if k else None for w, k in zip(LOOKS[i], row, strict=True)] for i, row in zip(picks, kept, strict=True)
    ]
    fits = [[all(w in (None, v) for w, v in zip(words, look, strict=True)) for look in LOOKS] for words in wanted]
    return [world.caption(*words, None, None) for words in wanted], torch.tensor(fits)


def contrastive_loss(scale: Tensor, image: Tensor, text: Tensor, fits: Tensor) -> Tensor:
    """Softmax both ways, with all fitting pairs as equal targets.

    Args:
        image: (B, C), text: (K, C), unit length.
        fits: (B, K) whether a frame fits a caption. The first 72 captions name one look each, so a frame fits one.
    """
    logits = scale.exp() * image @ text.T
    looks = len(LOOKS)
    of_image = F.cross_entropy(logits[:, :looks], fits[:, :looks].float().argmax(-1))
    some = fits.any(0)
    target = fits[:, some].float() / fits[:, some].sum(0)
    return of_image - (target * logits[:, some].log_softmax(0)).sum(0).mean()


def frames(num: int, generator: torch.Generator) -> tuple[Tensor, world.Sprites]:
    """Random frames (N, 3, H, W) of fresh clips, a little noisy, normalised."""
    sprites = world.sample(num, generator)
    when = torch.randint(world.FRAMES, (num,), generator=generator)
    frame = world.render(sprites)[torch.arange(num), when]
    frame = frame + 0.05 * torch.rand(num, 1, 1, 1, generator=generator) * torch.randn(frame.shape, generator=generator)
    return (frame.clamp(0, 1) - 0.5) / 0.5, sprites


def train(folder: Path, budget: Budget, seed: int = 0, batch: int = 128, device: str = "cpu") -> open_clip.CLIP:
    """Train on random frames against the captions of all looks; a `state.pt` in `folder` is continued."""
    torch.manual_seed(seed)
    clip, tokenizer = build().to(device), models.tokenizer()
    kernels = [m.weight for m in clip.visual.modules() if isinstance(m, torch.nn.Conv2d)]
    matrices = kernels + [p for p in clip.transformer.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in clip.parameters() if id(p) not in ids]
    optimisers = [Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.0)]
    generator = torch.Generator().manual_seed(seed)
    training = Training({"clip": clip}, optimisers, budget, folder, generator)
    while not training.done:
        image, sprites = frames(batch, generator)
        partial, fits = partial_captions(56, generator)
        ids = tokenise(tokenizer, all_captions(generator) + partial).to(device)
        fits = torch.cat([torch.eye(len(LOOKS), dtype=torch.bool), fits]).T[look_index(sprites)].to(device)
        with low_precision(device):
            embeds = clip.encode_image(image.to(device), normalize=True), clip.encode_text(ids, normalize=True)
        loss = contrastive_loss(clip.logit_scale.clamp(max=4.6), *(e.float() for e in embeds), fits)
        training.update(loss)
        if training.step % 50 == 0 or training.done:
            print(f"clip {training.step} {training.elapsed:.0f}s loss {loss:.4f}", flush=True)
        training.save_if_due()
    return clip.eval()


def save(folder: Path, clip: open_clip.CLIP, dtype: torch.dtype = torch.float16) -> None:
    """Write a folder that open_clip loads as 'local-dir:<folder>'."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.to(dtype).contiguous() for k, v in clip.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    models.save_tokenizer(folder)


@torch.no_grad()
def accuracy(clip: open_clip.CLIP, tokenizer, num: int = 512, seed: int = 1234) -> dict[str, float]:
    """Top-1 of the 72 looks on fresh frames, and of each attribute within that choice."""
    generator = torch.Generator().manual_seed(seed)
    image, sprites = frames(num, generator)
    text = clip.encode_text(tokenizer(all_captions(generator)), normalize=True)
    best = (clip.encode_image(image, normalize=True) @ text.T).argmax(-1)
    shape, rest = best % len(SHAPES), best // len(SHAPES)
    right = {
        "colour": rest % len(COLOURS) == sprites.colour,
        "background": rest // len(COLOURS) == sprites.background,
        "shape": shape == sprites.shape,
        "all": best == look_index(sprites),
    }
    return {name: hit.float().mean().item() for name, hit in right.items()}
