"""A tiny VideoReward that knows the tiny world, in the released layout of VideoAlign's.

A small Qwen2-VL, trained from nothing with the Bradley-Terry loss with ties on planted flaws: noise, blur and faded
colours for visual quality, jitter and stutter for motion quality, wrong words for text alignment. All clips of a batch
are compared with one another.

    python -m examples.tiny_world.video_reward --out runs/tiny_world/video_reward     # 35 minutes on one CPU core

    B batch, F frames, L tokens, D hidden size
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from alignment.objectives import bradley_terry_with_ties
from rewards.sprite import BACKGROUNDS, COLOURS, SHAPES, SPEEDS, STEPS
from rewards.video_reward import TOKENS

from . import world
from .flaws import LEVELS, Batch, draw, motion_flaw, visual_flaw
from .optim import Budget, Muon, Training
from .video_reward_model import FRAMES, LORA, MERGE, PATCH, TEMPORAL, Seen, build, raw_scores, save, scores, see


def preference_loss(raw: Tensor, flaws: Tensor) -> Tensor:
    """Bradley-Terry with ties over all pairs of a batch, for each dimension. raw, flaws: (B, 3)."""
    i, j = torch.triu_indices(len(raw), len(raw), offset=1)
    return bradley_terry_with_ties(raw[i] - raw[j], (flaws[j] - flaws[i]).sign()).mean(0).sum()


def caption_loss(model: nn.Module, ids: PreTrainedTokenizerFast, seen: Seen, right: Tensor) -> Tensor:
    """Cross-entropy of the prompt's words given the video, over the clips whose prompt is right."""
    start = (seen.tokens == ids.convert_tokens_to_ids("prompt")).long().argmax(1, keepdim=True)
    end = (seen.tokens == ids.convert_tokens_to_ids(TOKENS[2])).long().argmax(1, keepdim=True)
    place = torch.arange(seen.tokens.shape[1])
    spoken = (place > start) & (place < end) & right[:, None]  # (B, L) words of the prompt
    logits = seen.hidden[spoken.roll(-1, dims=1)] @ model.get_base_model().get_input_embeddings().weight.T
    return F.cross_entropy(logits, seen.tokens[spoken])


class Probes(nn.Module):
    """Linear readings that make the model look, thrown away afterwards. Comparisons alone leave it blind for long.

    Looks from the mean vision feature; each video token's own place, since the model knows relative positions only;
    where the sprite is, from the last token of each step in time; everything else from the token that ends the video;
    one layer later, where it can be looked up, the whole path from the token that scores motion, and whether a word is
    wrong from the word; and how uneven the motion is, from the last state of the former.
    """

    looks = (len(BACKGROUNDS), len(COLOURS), len(SHAPES))
    places = (len(FRAMES) // TEMPORAL, *[world.SIZE // PATCH // MERGE] * 2)
    motions = (len(world.DIRECTIONS), len(SPEEDS), LEVELS)

    def __init__(self, width: int):
        super().__init__()
        self.look, self.place, self.all = (
            nn.Linear(width, sum(classes)) for classes in (self.looks, self.places, self.looks + self.motions)
        )
        self.centre, self.path = nn.Linear(width, 2 * TEMPORAL), nn.Linear(width, 2 * len(FRAMES))
        self.jump, self.word = nn.Linear(width, LEVELS), nn.Linear(width, 1)

    def loss(self, ids: PreTrainedTokenizerFast, seen: Seen, batch: Batch) -> dict[str, Tensor]:
        s = batch.sprites
        video, words, summary = (F.layer_norm(h, h.shape[-1:]) for h in (seen.video, seen.words, seen.summary))
        grid = torch.cartesian_prod(*(torch.arange(n) for n in self.places)).repeat(len(batch.prompts), 1)
        steps = video.view(len(video), self.places[0], -1, video.shape[-1])[:, :, -1]
        path = 2 * (world.centres(s) + batch.offset)[:, FRAMES].flatten(1) / world.SIZE - 1
        wrong, named = self.word_labels(ids, seen.tokens, s)
        looks = (s.background, s.colour, s.shape)
        motions = (s.direction, s.speed, batch.flaws[:, 0])
        scoring = seen.tokens == ids.convert_tokens_to_ids(TOKENS[1])
        return {
            "look": _entropies(self.look(seen.features.mean(1)), self.looks, looks),
            "place": _entropies(self.place(video).flatten(0, 1), self.places, grid.unbind(1)) / 3,
            "centre": 10 * F.mse_loss(self.centre(steps).flatten(1), path),
            "path": 10 * F.mse_loss(self.path(words[scoring]), path),
            "all": _entropies(self.all(summary), self.looks + self.motions, looks + motions),
            "jump": F.cross_entropy(self.jump(seen.hidden[scoring]), batch.flaws[:, 1]),
            "word": 3 * F.binary_cross_entropy_with_logits(self.word(words)[named].squeeze(-1), wrong[named].float()),
        }

    @staticmethod
    def word_labels(ids: PreTrainedTokenizerFast, tokens: Tensor, sprites: world.Sprites) -> tuple[Tensor, Tensor]:
        """(B, L) bool twice: words that do not fit what a clip shows, and words that could."""
        said = [set(ids.convert_tokens_to_ids(caption.split())) for caption in world.captions(sprites)]
        attribute = set(ids.convert_tokens_to_ids([*COLOURS, *SHAPES, *BACKGROUNDS, *STEPS, *SPEEDS]))
        rows = list(zip(tokens.tolist(), said, strict=True))
        wrong = torch.tensor([[token in attribute and token not in right for token in row] for row, right in rows])
        return wrong, torch.tensor([[token in attribute for token in row] for row, _ in rows])


def _entropies(logits: Tensor, classes: tuple[int, ...], targets: tuple[Tensor, ...]) -> Tensor:
    parts = zip(logits.split(classes, -1), targets, strict=True)
    return sum(F.cross_entropy(part, target) for part, target in parts)


def train(folder: Path, budget: Budget, seed: int = 0, batch: int = 32) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Train on fresh clips; a `state.pt` in `folder` is continued."""
    torch.manual_seed(seed)
    model, ids = build()
    probes = Probes(model.config.text_config.hidden_size)
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and not any(w in n for w in ("embed", "_head"))]
    matrices = [p for p in matrices if min(len(p), p[0].numel()) > LORA["r"]]  # LoRA factors are too narrow for Muon
    known = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *probes.parameters()) if id(p) not in known]
    optimisers = [Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]
    generator = torch.Generator().manual_seed(seed)
    training = Training({"model": model, "probes": probes}, optimisers, budget, folder, generator)
    while not training.done:
        part = draw(batch, generator)
        seen = see(model, ids, part)
        preference = preference_loss(scores(model, ids, seen), part.flaws)
        captions = caption_loss(model, ids, seen, part.flaws[:, 2] == 0)
        readings = probes.loss(ids, seen, part)
        training.update(preference + captions + 0.3 * sum(readings.values()))
        if training.step % 50 == 0 or training.done:
            parts = {"preference": preference, "captions": captions, **readings}
            row = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"video_reward {training.step} {training.elapsed:.0f}s {row}", flush=True)
        training.save_if_due()
    return model.eval(), ids


@torch.no_grad()
def accuracy(model: nn.Module, ids: PreTrainedTokenizerFast, num: int = 384, seed: int = 1234) -> dict[str, float]:
    """Share of fresh pairs in which the better one scores higher: one small flaw apart, everything else the same."""
    generator = torch.Generator().manual_seed(seed)
    sprites = world.sample(num, generator)
    clean, right, one = world.render(sprites), world.captions(sprites), torch.ones(num, dtype=torch.long)

    def raw(video: Tensor, prompts: list[str]) -> Tensor:
        return raw_scores(model, ids, Batch(video, prompts, torch.zeros(num, 3), sprites, torch.zeros(())))

    def won(worse: Tensor, dimension: int) -> float:
        return (best[:, dimension] > worse[:, dimension]).float().mean().item()

    best = raw(clean, right)
    found = {"VQ": won(raw(visual_flaw(clean, one, generator), right), 0)}
    found["MQ"] = won(raw(world.render(sprites, motion_flaw(sprites, one, generator)), right), 1)
    for place, (name, table) in enumerate(zip(world.Sprites._fields[:5], world.TABLES, strict=True)):
        rows = world.attributes(sprites)
        rows[:, place] = (rows[:, place] + torch.randint(1, len(table), (num,), generator=generator)) % len(table)
        found[f"TA {name}"] = won(raw(clean, [world.describe(row) for row in rows.tolist()]), 2)
    of_words = [share for name, share in found.items() if name.startswith("TA ")]
    return found | {"TA": sum(of_words) / len(of_words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="bound on the training time (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, ids = train(args.out / "work", Budget(args.steps, 60 * args.minutes), args.seed)
    print("accuracy:", {name: round(value, 3) for name, value in accuracy(model, ids).items()}, flush=True)
    save(args.out / "video_reward", model, ids, args.steps)


if __name__ == "__main__":
    main()
