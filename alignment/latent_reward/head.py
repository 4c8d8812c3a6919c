"""From the hidden states of a transformer to rewards.

B batch, N tokens, W width, D dimensions of the reward
"""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """Learned queries, one a dimension, look up what they need among the tokens; an MLP makes numbers of it.

    The hidden states know the noise level already; the MLP is told it again, since what a token says of the clean video
    depends on it. Differences of scores are all that it is trained by, so there is no bias that these do not show.
    """

    def __init__(self, width: int, num_dimensions: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)  # some channels of a trained transformer are a hundred times larger than others
        self.queries = nn.Parameter(torch.randn(num_dimensions, width))
        self.attention = nn.MultiheadAttention(width, math.gcd(width, 8), bias=False, batch_first=True)
        self.level = nn.Linear(width, width)
        self.hidden = nn.Linear(num_dimensions * width, width)
        self.out = nn.Linear(width, num_dimensions, bias=False)

    def forward(self, hidden: Tensor, level: Tensor) -> Tensor:
        """(B, D) float32 rewards of hidden states (B, N, W) at noise levels (B,) in [0, 1]."""
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = self.norm(hidden.float())
            queries = self.queries.expand(len(tokens), -1, -1)
            pooled, _ = self.attention(queries, tokens, tokens, need_weights=False)  # (B, D, W)
            time = get_timestep_embedding(1000 * level.float(), tokens.shape[-1], True, 0)
            return self.out(F.silu(self.hidden(pooled.flatten(1)) + self.level(time)))
