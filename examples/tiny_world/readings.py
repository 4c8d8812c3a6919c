"""Linear readings that make the tiny Qwen2-VL look: what is shown, where it is, how evenly it moves, what words fit.

Captions alone leave a small model blind for long; these are read where they can be known first, and thrown away.

B batch, F frames, L tokens, D hidden size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rewards.sprite import BACKGROUNDS, COLOURS, SHAPES, SPEEDS, STEPS

from . import world
from .flaws import LEVELS, Batch
from .qwen2_vl import FRAMES, TEMPORAL, Seen

STEPS_OF_TIME = len(FRAMES) // TEMPORAL
NEAR = 0.2  # px: smaller errors count by their square, larger ones by their size


class Readings(nn.Module):
    """Each is a linear layer on normalised states: of the tower, or of the language model behind a layer."""

    looks = (len(BACKGROUNDS), len(COLOURS), len(SHAPES), LEVELS)
    motions = (len(world.DIRECTIONS), len(SPEEDS))

    def __init__(self, width: int, ids: PreTrainedTokenizerFast):
        super().__init__()
        self.ids = ids
        self.frame = nn.Linear(width, sum(self.looks) + 2 * TEMPORAL)
        self.place = nn.Linear(width, STEPS_OF_TIME)
        self.step, self.change = nn.Linear(width, 2 * TEMPORAL), nn.Linear(width, 2 * TEMPORAL)
        self.whole = nn.Linear(width, sum(self.looks + self.motions))
        self.even, self.visual = nn.Linear(width, LEVELS + 1), nn.Linear(width, LEVELS)
        self.word, self.match = nn.Linear(width, 1), nn.Linear(width, LEVELS)

    def of_frames(self, seen: Seen, batch: Batch) -> dict[str, Tensor]:
        """What each of the tower's tokens tells: attributes and visual flaw, and where the sprite is in its frames."""
        s = batch.sprites
        classes, places = self.frame(normalised(seen.features)).split([sum(self.looks), 2 * TEMPORAL], -1)
        true = [x[:, None].expand(-1, STEPS_OF_TIME) for x in (s.background, s.colour, s.shape, batch.flaws[:, 0])]
        return {
            "look": entropies(classes, self.looks, true),
            "centre": distance(world.SIZE / 2 * (1 + places.flatten(1)), centres(batch).flatten(1)),
        }

    def of_clips(self, model: nn.Module, seen: Seen, batch: Batch) -> dict[str, Tensor]:
        """What the language model's tokens tell.

        Behind the first layer when it is, and how far the sprite is from where it was in the frame before; behind the
        second how much that changed, a frame, and at the end of the video what it shows; behind the third how even the
        motion is and how clear the frames are, and which words are wrong; at the very end how many are.
        """
        first, second, third = (normalised(h) for h in seen.hidden[1:4])
        video = self.at(seen, "<|video_pad|>")
        num = len(seen.tokens)
        step = centres(batch).diff(dim=1)  # (B, F - 1, 2) px
        change = (step / torch.tensor(FRAMES).diff()[:, None]).diff(dim=1)  # (B, F - 2, 2) px a frame
        steps, changes = self.step(first[video]).view(num, -1, 2), self.change(second[video]).view(num, -1, 2)
        times = torch.arange(STEPS_OF_TIME).repeat(num)
        s = batch.sprites
        shown = s.background, s.colour, s.shape, batch.flaws[:, 0], s.direction, s.speed
        even = self.even(third[self.at(seen, "motion")])
        wrong, named = self.words(seen.tokens, s)
        end = self.at(seen, "<|im_end|>")
        return {
            "place": F.cross_entropy(self.place(first[video]), times),
            "step": distance(steps[:, 1:], step),
            "change": distance(changes[:, 2:], change),
            "whole": entropies(self.whole(second[self.at(seen, "<|vision_end|>")]), self.looks + self.motions, shown),
            "even": distance(even[:, -1], change.norm(dim=-1).mean(1)),
            "jump": F.cross_entropy(even[:, :-1], batch.flaws[:, 1]),
            "visual": F.cross_entropy(self.visual(third[self.at(seen, "look")]), batch.flaws[:, 0]),
            "word": 3 * F.binary_cross_entropy_with_logits(self.word(third[named]).squeeze(-1), wrong[named].float()),
            "match": F.cross_entropy(self.match(normalised(seen.hidden[-1][end])), batch.flaws[:, 2]),
            "caption": self.caption(model, seen, batch.flaws[:, 2] == 0),
        }

    def at(self, seen: Seen, token: str) -> Tensor:
        """(B, L) bool: where a token stands."""
        return seen.tokens == self.ids.convert_tokens_to_ids(token)

    def caption(self, model: nn.Module, seen: Seen, right: Tensor) -> Tensor:
        """Cross-entropy of the prompt's words given the video, over the clips whose prompt is right."""
        end = self.at(seen, "<|im_end|>")
        spoken = (self.at(seen, "prompt").cumsum(1) > 0) & (end.cumsum(1) == 0) & right[:, None]  # (B, L) says the next
        logits = seen.hidden[-1][spoken] @ model.get_input_embeddings().weight.T
        return F.cross_entropy(logits, seen.tokens[spoken.roll(1, dims=1)])

    def words(self, tokens: Tensor, sprites: world.Sprites) -> tuple[Tensor, Tensor]:
        """(B, L) bool twice: words that do not fit what a clip shows, and words that could."""
        attribute = self.ids.convert_tokens_to_ids([*COLOURS, *SHAPES, *BACKGROUNDS, *STEPS, *SPEEDS])
        said = [self.ids.convert_tokens_to_ids(caption.split()) for caption in world.captions(sprites)]
        fits = torch.stack([torch.isin(row, torch.tensor(right)) for row, right in zip(tokens, said, strict=True)])
        named = torch.isin(tokens, torch.tensor(attribute))
        return named & ~fits, named


def centres(batch: Batch) -> Tensor:
    """(B, F, 2) px: where the sprites are, in the frames that are looked at."""
    return (world.centres(batch.sprites) + batch.offset)[:, FRAMES]


def normalised(states: Tensor) -> Tensor:
    return F.layer_norm(states, states.shape[-1:])


def distance(found: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(found, target, beta=NEAR)


def entropies(logits: Tensor, classes: tuple[int, ...], targets: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    parts = zip(logits.split(classes, -1), targets, strict=True)
    return sum(F.cross_entropy(part.flatten(0, -2), target.flatten()) for part, target in parts)
