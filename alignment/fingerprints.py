"""What tells one network's weights from another's, without reading all of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def sampled_weights(network: nn.Module) -> Iterator[bytes]:
    """Of every tensor its name, shape and type, and about a thousand of its values: to be hashed."""
    for key, tensor in network.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        yield f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode() + sample.tobytes()
