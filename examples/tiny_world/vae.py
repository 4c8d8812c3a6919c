"""The video autoencoder of the tiny world: a small AutoencoderKLWan, trained on whole clips.

B batch, F frames, H W pixels, C channels
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, patchify, unpatchify
from torch import Tensor, nn

from rewards.sprite import BACKGROUNDS

from . import world
from .optim import Budget, Muon, Training, low_precision

CONFIG = {
    "base_dim": 24,
    "z_dim": 8,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 4,
    "latents_mean": [0.0] * 8,
    "latents_std": [1.0] * 8,
}


def _conv(module: WanCausalConv3d, x: Tensor) -> Tensor:
    """A causal 3-D convolution over a whole clip as a 2-D one over stacked frames, which is faster on a CPU."""
    depth = module.kernel_size[0]
    stride = module.stride[0]
    x = F.pad(x, (0, 0, 0, 0, module._padding[4], 0)).transpose(1, 2)  # (B, F', C, H, W)
    count = (x.shape[1] - depth) // stride + 1
    stacked = torch.cat([x[:, i : i + stride * (count - 1) + 1 : stride] for i in range(depth)], 2)
    weight = module.weight.transpose(1, 2).flatten(1, 2)  # (O, depth C, k, k)
    y = F.conv2d(stacked.flatten(0, 1), weight, module.bias, padding=module._padding[0])
    return y.unflatten(0, (len(x), count)).transpose(1, 2)


def _resample(module: WanResample, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    """Wan's resampling over a whole clip: the first frame stays single, the others go in pairs."""
    if module.mode == "upsample3d" and x.shape[2] > 1:
        pairs = module.time_conv(x[:, :, 1:])  # (B, 2 C, F-1, H, W)
        pairs = pairs.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # (B, C, 2 (F-1), H, W)
        x = torch.cat([x[:, :, :1], pairs], 2)
    frames = x.shape[2]
    x = module.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if module.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], module.time_conv(x)], 2)
    return x


@contextmanager
def whole_clips(vae: AutoencoderKLWan) -> Iterator[None]:
    """Inside, the encoder and decoder run over a whole clip at once instead of by cached chunks, with equal results."""
    changed = []
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = partial(_conv, module)
            changed.append(module)
        elif isinstance(module, WanResample):
            module.forward = partial(_resample, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def encode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of clips (B, F, 3, H, W) in [0, 1], inside `whole_clips`: mean and log variance (B, z, f, h, w)."""
    x = patchify(2 * video.transpose(1, 2) - 1, vae.config.patch_size)
    mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips (B, F, 3, H, W), not clamped, of latents (B, z, f, h, w), inside `whole_clips`."""
    x = vae.decoder(vae.post_quant_conv(latents), first_chunk=True).float()
    return (unpatchify(x, vae.config.patch_size).transpose(1, 2) + 1) / 2


def reconstruction_loss(made: Tensor, video: Tensor, background: Tensor) -> Tensor:
    """L1 + MSE, five-fold around the sprite, plus L1 of the image gradients.

    Args:
        made, video: (B, F, 3, H, W) in [0, 1].
        background: (B, 3) RGB.
    """
    error = 2 * (made - video)  # in the scale of the VAE's pixels, [-1, 1]
    sprite = ((video - background[:, None, :, None, None]).abs().amax(2) > 0.01).float()  # (B, F, H, W)
    weight = 1 + 4 * F.max_pool2d(sprite, 5, 1, 2)[:, :, None]
    pixels = ((error.abs() + error.square()) * weight).mean()
    return pixels + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def train(folder: Path, budget: Budget, seed: int = 0, batch: int = 8, device: str = "cpu") -> AutoencoderKLWan:
    """Train the autoencoder; a `state.pt` in `folder` is continued."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG).to(device)
    kernels = [m.weight for m in vae.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    ids = {id(p) for p in kernels}
    rest = [p for p in vae.parameters() if id(p) not in ids]
    optimisers = [Muon(kernels, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]
    generator = torch.Generator().manual_seed(seed)
    training = Training({"vae": vae}, optimisers, budget, folder, generator)
    colours = torch.tensor(list(BACKGROUNDS.values()))
    with whole_clips(vae):
        while not training.done:
            frames = 5 if training.progress < 0.5 else world.FRAMES  # shorter clips first: twice the steps
            sprites = world.sample(batch, generator)
            video = world.render(sprites)
            start = int(torch.randint(world.FRAMES - frames + 1, (), generator=generator))
            video = video[:, start : start + frames].to(device)
            noise = torch.randn(batch, vae.config.z_dim, frames // 2 + 1, 8, 8, generator=generator).to(device)
            with low_precision(device):
                mean, logvar = encode(vae, video)
                made = decode(vae, mean + (logvar / 2).exp() * noise)
            fit = reconstruction_loss(made, video, colours[sprites.background].to(device))
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            training.update(fit + 2e-4 * kl)
            if training.step % 50 == 0 or training.done:
                print(f"vae {training.step} {training.elapsed:.0f}s fit {fit:.4f} kl {kl:.2f}", flush=True)
            training.save_if_due()
    return vae.eval()


@torch.no_grad()
def latents_of(vae: AutoencoderKLWan, num: int, seed: int, batch: int = 64) -> tuple[Tensor, world.Sprites]:
    """Posterior means of N fresh clips (N, z, f, h, w), and what they show."""
    sprites = world.sample(num, torch.Generator().manual_seed(seed))
    device = vae.device
    means = []
    with whole_clips(vae), low_precision(device):
        for start in range(0, num, batch):
            part = world.Sprites(*(values[start : start + batch] for values in sprites))
            means.append(encode(vae, world.render(part).to(device))[0].cpu())
    return torch.cat(means), sprites


def set_latent_scale(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Write the latents' (N, z, f, h, w) mean and std into the config, where Wan's pipelines read them."""
    std = latents.std((0, 2, 3, 4))
    std = std.clamp_min(float(std.median()) / 2)  # a dead channel would become loud noise
    vae.register_to_config(latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=std.tolist())


def normalised(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents as the transformer sees them."""
    mean, std = (latents.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std
