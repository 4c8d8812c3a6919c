"""Transformer and text encoder of the tiny world, trained together on cached latents by flow matching.

B batch, N clips, K text tokens, L video tokens, C channels
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import models, world
from .optim import Budget, Muon, Training, low_precision, track

KEYS = 13  # the longest caption, 12 words and the end token
LENGTHS = (14, 512)  # padded lengths seen in training
SHIFT = 4.0  # of the noise levels
EMA = 0.998
POSITION_WEIGHT = 0.05


class PlainAttention:
    """Wan's attention with an explicit softmax: on a CPU its backward is twice as fast as the fused one's.

    `bias` (B, 1, 1, K+1) is added to the scores of cross-attention. It hides unused text keys and makes the last one,
    a pad, count as many times as there are pads, so that long prompts cost nothing to train on.
    """

    def __init__(self):
        self.bias: Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, C)
        if rotary_emb is not None:
            q, k = (_rotate(x, *rotary_emb) for x in (q, k))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        if encoder_hidden_states is not None:
            scores = scores + self.bias
        out = scores.softmax(-1).to(v.dtype) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. x: (B, heads, L, C); cos, sin: (1, L, 1, C), each angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.transpose(1, 2)[..., ::2].to(x.dtype), sin.transpose(1, 2)[..., ::2].to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Text(NamedTuple):
    ids: Tensor  # (B, K)
    mask: Tensor  # (B, K) 1 for a token, 0 for a pad


def tokenise(tokenizer, texts: list[str], device: str = "cpu") -> Text:
    tokens = tokenizer(texts, padding="max_length", max_length=KEYS, truncation=True, return_tensors="pt")
    return Text(tokens.input_ids.to(device), tokens.attention_mask.to(device))


def condition(text_encoder: nn.Module, text: Text, length: Tensor) -> tuple[Tensor, Tensor]:
    """Text keys as the pipeline builds them when it pads to `length` (B,), with all pads in one key.

    Returns: embeddings (B, K+1, C), the last of them a pad, and the bias (B, 1, 1, K+1) of their scores.
    """
    mask = text.mask.bool()
    embeds = text_encoder(text.ids, text.mask).last_hidden_state.float() * mask[..., None]
    embeds = F.pad(embeds, (0, 0, 0, 1))
    bias = torch.zeros_like(text.mask, dtype=torch.float32).masked_fill(~mask, -math.inf)
    pads = (length - mask.sum(-1)).float().log()[:, None]
    return embeds, torch.cat([bias, pads], -1)[:, None, None]


def random_lengths(num: int, generator: torch.Generator) -> Tensor:
    """Padded lengths (N,): log-uniform, a quarter of them the longest, which is the pipeline's default."""
    low, high = (math.log(length) for length in LENGTHS)
    lengths = (low + (high - low) * torch.rand(num, generator=generator)).exp().round()
    longest = torch.rand(num, generator=generator) < 0.25
    return torch.where(longest, torch.tensor(float(LENGTHS[1])), lengths)


class PositionHead(nn.Module):
    """Reads (t, y, x) of each token off an early block; thrown away after training.

    Wan has relative positions only, and a transformer this small does not discover absolute ones by itself, without
    which directions are not learnt.
    """

    def __init__(self, width: int, sizes: tuple[int, int, int]):
        super().__init__()
        self.sizes, self.head = sizes, nn.Linear(width, sum(sizes))

    def loss(self, hidden: Tensor) -> Tensor:
        """Cross-entropy, summed over the three axes. hidden: (B, L, C)."""
        logits = self.head(F.layer_norm(hidden.float(), hidden.shape[-1:]))
        grid = torch.cartesian_prod(*(torch.arange(size, device=hidden.device) for size in self.sizes))  # (L, 3)
        parts = logits.split(self.sizes, -1)
        return sum(
            F.cross_entropy(part.flatten(0, 1).float(), grid[:, axis].repeat(len(hidden)))
            for axis, part in enumerate(parts)
        )


def velocity_loss(transformer, clean: Tensor, noise: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
    """Flow matching, plain MSE. clean, noise: (B, z, f, h, w); sigma: (B,) in (0, 1); embeds: (B, K+1, C)."""
    level = sigma.view(-1, 1, 1, 1, 1)
    made = transformer((1 - level) * clean + level * noise, 1000 * sigma, embeds, return_dict=False)[0]
    return (made.float() - (noise - clean)).square().mean()


def noise_levels(num: int, generator: torch.Generator) -> Tensor:
    """Stratified uniform levels (N,), shifted towards noise."""
    u = (torch.randperm(num, generator=generator) + torch.rand(num, generator=generator)) / num
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def train(
    folder: Path,
    latents: Tensor,
    sprites: world.Sprites,
    budget: Budget,
    snapshots: Iterable[int] = (),
    seed: int = 0,
    batch: int = 64,
    device: str = "cpu",
) -> int:
    """Train on normalised latents (N, z, f, h, w) and what they show.

    Writes `<folder>/step_<n>.safetensors`, the averaged weights, after the steps in `snapshots` and at the end, and
    continues a `state.pt` in `folder`. Returns: the number of the last step.
    """
    torch.manual_seed(seed)
    transformer, text_encoder = models.transformer().to(device), models.text_encoder().to(device)
    averages = {"transformer": copy.deepcopy(transformer), "text_encoder": copy.deepcopy(text_encoder)}
    head = PositionHead(128, (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)).to(device)
    attention = PlainAttention()
    transformer.set_attn_processor(attention)
    hidden: list[Tensor] = []
    transformer.blocks[1].register_forward_hook(lambda module, args, output: hidden.append(output))

    matrices = [m.weight for m in transformer.modules() if isinstance(m, nn.Linear)]
    ids = {id(p) for p in matrices}
    rest = [p for m in (transformer, text_encoder, head) for p in m.parameters() if id(p) not in ids]
    optimisers = [Muon(matrices, lr=0.015), torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.0)]
    generator = torch.Generator().manual_seed(seed)
    live = {"live_transformer": transformer, "live_text_encoder": text_encoder, "head": head}
    training = Training({**averages, **live}, optimisers, budget, folder, generator)
    tokenizer = models.tokenizer()
    snapshots = set(snapshots)
    while not training.done:
        pick = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[pick].to(device, torch.float32)
        texts = world.captions(world.Sprites(*(values[pick] for values in sprites)), generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = noise_levels(batch, generator).to(device)
        length = random_lengths(batch, generator).to(device)
        hidden.clear()
        with low_precision(device):
            embeds, attention.bias = condition(text_encoder, tokenise(tokenizer, texts, device), length)
            fit = velocity_loss(transformer, clean, noise, sigma, embeds)
        position = head.loss(hidden[0])
        training.update(fit + POSITION_WEIGHT * position)
        for name, module in (("transformer", transformer), ("text_encoder", text_encoder)):
            track(averages[name], module, EMA, training.step)
        if training.step % 25 == 0 or training.done:
            print(
                f"transformer {training.step} {training.elapsed:.0f}s fit {fit:.4f} position {position:.3f}", flush=True
            )
        if training.step in snapshots or training.done:
            write_snapshot(folder / f"step_{training.step}.safetensors", averages)
        training.save_if_due()
    return training.step


def write_snapshot(path: Path, averages: dict[str, nn.Module]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{k}": v.contiguous().clone() for name, m in averages.items() for k, v in m.state_dict().items()}
    save_file(tensors, path)


def read_snapshot(path: Path) -> tuple[nn.Module, nn.Module]:
    """Transformer and text encoder of a snapshot."""
    tensors = load_file(path)
    loaded = []
    for name, module in (("transformer", models.transformer()), ("text_encoder", models.text_encoder())):
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        loaded.append(module.eval())
    return tuple(loaded)
