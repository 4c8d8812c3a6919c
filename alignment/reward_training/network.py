"""Qwen2-VL and its successors with trained parts: adapters, the vision tower, rows of the embedding, a head.

K special tokens, D hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from rewards import RewardError
from rewards.checkpoints import LOAD_ERRORS
from rewards.qwen2_vl import base_weights, fill

from ..config import LoRAConfig
from ..errors import UserError, one_line
from ..lora import check_targets


class TokenEmbedding(nn.Module):
    """A frozen embedding with trained rows for some tokens, which may lie beyond its end."""

    def __init__(self, frozen: nn.Embedding, token_ids: Sequence[int], rows: Tensor):
        super().__init__()
        self.frozen, self.token_ids = frozen, list(token_ids)
        self.rows = nn.Parameter(rows)  # (K, D) float32

    def forward(self, ids: Tensor) -> Tensor:
        embeds = self.frozen(ids.clamp(max=self.frozen.num_embeddings - 1))
        for token, row in zip(self.token_ids, self.rows, strict=True):
            embeds = torch.where((ids == token)[..., None], row.to(embeds.dtype), embeds)
        return embeds

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The matrix up to the last of the tokens, as VideoAlign saves it."""
        weight = self.frozen.weight
        size = max(self.token_ids) + 1
        rows = torch.cat([weight[:size], weight.new_zeros(max(0, size - len(weight)), weight.shape[1])])
        rows[self.token_ids] = self.rows.to(rows.dtype)
        return rows


def load_core(path: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """Qwen2-VL or a successor without its language head, from a folder or hub id. Raises: UserError, one line."""
    from accelerate import init_empty_weights
    from transformers import AutoModel

    with init_empty_weights():
        core = AutoModel.from_config(config)
    try:
        state = base_weights("reward_model", path)
        fill("reward_model", core, {name: t for name, t in state.items() if not name.startswith("lm_head.")})
    except RewardError as error:
        raise UserError(f"model.path: {error}") from error
    return core.to(dtype)


def load_network(path: str, dtype: torch.dtype, auto: Any) -> nn.Module:
    """The weights of a folder or hub id. Args: auto: class of transformers. Raises: UserError, one line."""
    try:
        network, info = auto.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except LOAD_ERRORS as error:
        raise UserError(f"model.path: cannot load {path}: {one_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"model.path: {path} lacks {len(missing)} weights, such as {missing[0]}; copy it again")
    return network


def fresh_network(config: Any, num_tokens: int, seed: int, auto: Any) -> nn.Module:
    """Random weights for an architecture: every matrix keeps the size of what goes through it (1 / sqrt(fan-in)).

    What transformers draws, deviation 0.02, is made for widths of a thousand and more.
    """
    config.text_config.vocab_size = num_tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = auto.from_config(config)
        for name, p in network.named_parameters():
            if p.ndim > 1 and "embed_tokens" not in name:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
        nn.init.normal_(network.get_input_embeddings().weight, std=0.3)
    return network


def new_rows(embedding: nn.Embedding, count: int, seed: int) -> Tensor:
    """(count, D) float32 drawn with the mean and the deviation of the others."""
    weight = embedding.weight.detach().float()
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, weight.shape[1], generator=draw).to(weight.device)
    return weight.mean(0) + weight.std() * noise


def add_lora(network: nn.Module, config: LoRAConfig, dropout: float, within: str = "language_model.") -> None:
    """Adapters on the linear layers of the language model that the targets name. Raises: UserError for an idle one."""
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and within in f"{n}."]
    check_targets("the language model", layers, config.targets)
    chosen = [n for n in layers if any(f".{n}".endswith(f".{target}") for target in config.targets)]
    options = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=dropout, target_modules=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same in every process
        inject_adapter_in_model(options, network)


def set_trained(network: nn.Module, vision: bool, whole: bool) -> None:
    """Freeze all but adapters, trained rows, the vision tower if wanted, and the language model where all of it is."""
    for name, p in network.named_parameters():
        in_vision = "visual." in name
        trained = vision if in_vision else whole or "lora_" in name or name.endswith("embed_tokens.rows")
        p.requires_grad_(trained)
        if trained:
            p.data = p.data.float()
