"""A judge in training: a vision-language model that answers a question about a clip with Yes or No.

It is shown evenly spaced frames in the very words of `rewards.judges.pointwise.VLMYes`, which reads what is saved here.

    B clips
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards import RewardError
from rewards.checkpoints import LOAD_ERRORS
from rewards.frames import frame_indices
from rewards.judges.chat import Frame, Message
from rewards.judges.in_process import chat_inputs
from rewards.judges.templates import load_template, render

from ..config import Recipe
from ..errors import UserError, one_line
from ..files import replacing_folder
from .config import RewardModelConfig
from .frames import FrameCache, Frames
from .model import Trainee
from .network import add_lora, fresh_network, load_network, set_trained

ANSWERS = ("Yes", "No")
FRAMES = 8  # that are shown, where the recipe does not say
QUESTION_FILE = "question.txt"


def check_yes_no(recipe: Recipe) -> list[str]:
    """What else a judge needs, one line each."""
    config: RewardModelConfig = recipe.algorithm
    wrong = []
    if len(config.dimensions) != 1:
        wrong.append(f"algorithm.dimensions: yes_no answers one question, not {len(config.dimensions)}; name one")
    try:
        question_of(config)
    except RewardError as error:
        wrong.append(f"algorithm.template: {error}")
    return wrong


def question_of(config: RewardModelConfig) -> str:
    """The question's template. Raises: RewardError, one line."""
    return load_template("yes_no", config.template, "yes.txt", ("video",))


class YesNoModel(Trainee):
    """log P(Yes) - log P(No) of clips; it learns by the cross-entropy of these words over the whole vocabulary."""

    def __init__(self, recipe: Recipe, device: torch.device):
        from transformers import AutoModelForImageTextToText

        self.recipe, self.device = recipe, torch.device(device)
        self.config: RewardModelConfig = recipe.algorithm
        self.dtype = getattr(torch, recipe.model.dtype)
        self.processor = open_processor(recipe.model.path)
        self.question = question_of(self.config)
        self.answer_ids = answer_ids(self.processor.tokenizer)
        if self.config.from_scratch:
            configuration, size = _configuration(recipe.model.path), len(self.processor.tokenizer)
            core = fresh_network(configuration, size, recipe.seed, AutoModelForImageTextToText)
        else:
            core = load_network(recipe.model.path, self.dtype, AutoModelForImageTextToText)
        self.core = core.to(self.device)
        whole = recipe.model.trained == "full"
        if not whole:
            add_lora(self.core, recipe.model.lora, self.config.lora_dropout)
        set_trained(self.core, self.config.vision, whole)
        self.parameters = {name: p for name, p in self.core.named_parameters() if p.requires_grad}
        if recipe.model.gradient_checkpointing:
            self.core.gradient_checkpointing_enable({"use_reentrant": False})
        folder = Path(self.config.frames or recipe.folder / "frames")
        limit, shown = self.config.frames_gb * 1e9, self.config.num_frames or FRAMES
        prepare, workers = partial(evenly, count=shown), self.config.workers
        self.videos = FrameCache(folder, prepare, f"{shown} even", limit, workers)

    def check_prompt(self, prompt: str) -> None:
        """Raises: RewardError for a prompt that holds a special token."""
        check_prompt(self.processor, prompt)

    def answers(self, frames: Sequence[Frames], prompts: Sequence[str]) -> Tensor:
        """(B, 2) log-probabilities of Yes and of No as the first word."""
        self.evaluations += len(frames)
        words = [self.first_word(*clip) for clip in zip(frames, prompts, strict=True)]
        return torch.stack(words)[:, self.answer_ids]

    def scores(self, frames: Sequence[Frames], prompts: Sequence[str]) -> Tensor:
        """(B, 1) log-odds of Yes against No."""
        found = self.answers(frames, prompts)
        return found[:, :1] - found[:, 1:]

    def first_word(self, frames: Frames, prompt: str) -> Tensor:
        """(vocabulary,) log-probabilities of the answer's first token."""
        parts = render(self.question, {"prompt": prompt}, {"video": [Frame(pixels) for pixels in frames.pixels]})
        inputs = chat_inputs(self.processor, [Message("user", parts)]).to(self.device, dtype=self.dtype)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.core(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits.float().log_softmax(-1)

    def save(self, folder: Path) -> Path:
        """Write `judge/`, a whole model for rewards.load("vlm_yes", model=..., template=.../question.txt)."""
        with replacing_folder(folder / "judge") as new:
            merged = merged_network(self.core, self.recipe.model.lora.alpha / self.recipe.model.lora.rank)
            merged.to(self.dtype).save_pretrained(new)
            self.processor.save_pretrained(new)
            (new / QUESTION_FILE).write_text(self.question, "utf-8")
        return folder / "judge"


def check_prompt(processor: Any, prompt: str) -> None:
    """Raises: RewardError for a prompt that holds a special token."""
    for token in processor.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in prompt:
            raise RewardError(f"a prompt holds the special token {token.content}: {prompt[:80]!r}")


def evenly(video: Tensor, fps: float, count: int) -> tuple[Tensor, float]:
    """The frames that a judge is shown, as bytes in their own size."""
    chosen = frame_indices(len(video), count)
    return video[chosen], (len(video) - 1) / max(1, len(chosen) - 1) / fps


def open_processor(path: str) -> Any:
    """Raises: UserError, one line."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise UserError(f"model.path: cannot load a processor from {path}: {one_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"model.path: the processor of {path} takes no text")
    return processor


def answer_ids(tokenizer: Any) -> list[int]:
    """The tokens of Yes and No. Raises: UserError where one is not a token of its own."""
    found = [tokenizer.encode(word, add_special_tokens=False) for word in ANSWERS]
    if any(len(ids) != 1 for ids in found):
        raise UserError(f"model.path: {' and '.join(ANSWERS)} are not one token each in its vocabulary; use another")
    return [ids[0] for ids in found]


@torch.no_grad()
def merged_network(network: nn.Module, scale: float) -> nn.Module:
    """A copy on the CPU whose adapters, W + scale B A, are part of its weights."""
    state = network.state_dict()
    plain = {n.replace(".base_layer.", "."): t.cpu() for n, t in state.items() if "lora_" not in n}
    for name in [n for n in state if ".lora_A." in n]:
        layer = name.partition(".lora_A.")[0]
        product = state[name.replace(".lora_A.", ".lora_B.")].float() @ state[name].float()
        weight = plain[f"{layer}.weight"]
        plain[f"{layer}.weight"] = (weight.float() + scale * product.cpu()).to(weight.dtype)
    merged = type(network)(network.config)
    merged.load_state_dict(plain)
    return merged


def _configuration(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise UserError(f"model.path: cannot load a configuration from {path}: {one_line(error)}") from error
