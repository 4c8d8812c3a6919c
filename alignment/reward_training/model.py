"""A reward model in training: VideoReward's architecture on Qwen2-VL and its successors.

B clips, T frames, K dimensions
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewards import RewardError
from rewards.qwen2_vl import token_scores
from rewards.qwen2_vl_reader import Reader
from rewards.video_reward import TOKEN, Look, looked_at

from ..config import Recipe
from ..errors import UserError
from ..optimization import other_weights
from .config import RewardModelConfig
from .frames import FrameCache, Frames
from .network import TokenEmbedding, add_lora, fresh_network, load_core, new_rows, set_trained
from .templates import read_template


class Description(NamedTuple):
    """What a saved folder says of its weights."""

    step: int
    norm: dict[str, tuple[float, float]]  # dimension -> mean and deviation of its raw scores


class Trainee:
    """A network with trained weights.

    Attributes:
        parameters: name -> trained parameter (float32), the same order in every process.
        evaluations: clips that were looked at so far.
        videos: their frames.
        describe: says what is saved with the weights in use.
    """

    core: nn.Module
    parameters: dict[str, nn.Parameter]
    videos: FrameCache
    evaluations, decode_seconds = 0, 0.0
    describe: Callable[[], Description] | None = None

    def learning(self, on: bool) -> None:
        """Dropout and gradient checkpointing are for updates."""
        self.core.train(on)

    def using(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Run with other values of the trained weights (an average, the best)."""
        return other_weights(self.parameters, weights)


class RewardModel(Trainee):
    """Scores clips at a special token for each dimension, and learns to."""

    def __init__(self, recipe: Recipe, device: torch.device):
        from transformers import AutoModel

        self.recipe, self.device = recipe, torch.device(device)
        self.config: RewardModelConfig = recipe.algorithm
        self.dtype = getattr(torch, recipe.model.dtype)
        self.reader = open_reader(recipe)
        try:
            self.template = read_template(self.config.template, self.config.dimensions)
        except RewardError as error:
            raise UserError(f"algorithm.template: {error}") from error
        if self.config.from_scratch:
            core = fresh_network(self.reader.config, len(self.reader.tokenizer), recipe.seed, AutoModel)
        else:
            core = load_core(recipe.model.path, self.reader.config, self.dtype)
        self.core = self._make_trainable(core.to(self.device))
        self.head = self._make_head()
        found = {name: p for name, p in self.core.named_parameters() if p.requires_grad}
        self.parameters = {**found, "rm_head.weight": self.head.weight}
        if recipe.model.gradient_checkpointing:
            self.core.gradient_checkpointing_enable({"use_reentrant": False})
        self.videos = open_videos(recipe, self.reader)

    def check_prompt(self, prompt: str) -> None:
        """Raises: RewardError for a prompt that holds a special token."""
        self.reader.check_prompt(prompt)

    def _make_trainable(self, core: nn.Module) -> nn.Module:
        model, text = self.recipe.model, core.language_model
        count = len(self.reader.token_ids)
        if model.trained == "lora":
            add_lora(core, model.lora, self.config.lora_dropout)
            rows = new_rows(text.embed_tokens, count, self.recipe.seed)
            text.embed_tokens = TokenEmbedding(text.embed_tokens, self.reader.token_ids, rows)
        elif not self.config.from_scratch:
            core.resize_token_embeddings(len(self.reader.tokenizer), mean_resizing=False)
            rows = new_rows(text.embed_tokens, count, self.recipe.seed)
            text.embed_tokens.weight.data[self.reader.token_ids] = rows.to(self.dtype)
        set_trained(core, self.config.vision, whole=model.trained == "full")
        return core

    def _make_head(self) -> nn.Linear:
        """Without a bias, as published, and in float32."""
        width = self.reader.config.text_config.hidden_size
        head = nn.Linear(width, 1, bias=False)
        draw = torch.Generator().manual_seed(self.recipe.seed)
        nn.init.normal_(head.weight, std=1 / math.sqrt(width), generator=draw)
        return head.to(self.device)

    def scores(self, frames: Sequence[Frames], prompts: Sequence[str]) -> Tensor:
        """(B, K) raw scores of clips."""
        self.evaluations += len(frames)
        patches = [self.reader.patches(f.pixels.to(self.device).float(), f.seconds) for f in frames]
        chats = [self.reader.chat("video", self.template.replace("{text_prompt}", prompt)) for prompt in prompts]
        dtype = next(self.core.visual.parameters()).dtype
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            batch = self.reader.batch("video", chats, patches, self.device, dtype)
            return token_scores(self.core, self.head, self.reader.token_ids, batch).squeeze(-1)

    def save(self, folder: Path) -> Path:
        """Write `reward/`, which rewards.load("video_reward", path=...) reads."""
        from .saving import save_reward

        return save_reward(self, self.describe(), folder / "reward")


def open_reader(recipe: Recipe) -> Reader:
    """Tokenizer, processor and configuration of the recipe's model. Raises: UserError, one line."""
    config: RewardModelConfig = recipe.algorithm
    tokens = [TOKEN.format(name) for name in config.dimensions]
    try:
        reader = Reader("reward_model", recipe.model.path, tokens)
    except RewardError as error:
        raise UserError(f"model.path: {error}") from error
    reader.positions = config.positions or ("row" if reader.config.model_type == "qwen2_vl" else "native")
    return reader


def open_videos(recipe: Recipe, reader: Reader) -> FrameCache:
    """The frames of the recipe's videos, as its model looks at them."""
    config: RewardModelConfig = recipe.algorithm
    look, factor = look_of(config), reader.factor
    folder = Path(config.frames or recipe.folder / "frames")

    def prepare(video: Tensor, fps: float) -> tuple[Tensor, float]:
        return looked_at(video, fps, look, factor)

    return FrameCache(folder, prepare, repr((look, factor)), config.frames_gb * 1e9, config.workers)


def look_of(config: RewardModelConfig) -> Look:
    """What of a clip is looked at."""
    return Look(config.fps, config.num_frames, config.min_pixels, config.max_pixels)
