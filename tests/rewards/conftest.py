"""A tiny open_clip checkpoint, made here in open_clip's own format: no published weights are needed."""

import json

import pytest
import torch

from tests.rewards.servers import serving

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# Unlike CLIP's own numbers, so that a test sees whether the checkpoint's are used.
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Folder with open_clip_config.json and open_clip_model.safetensors, random weights of seed 0."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**MODEL)
        torch.nn.init.normal_(model.token_embedding.weight, std=1.0)  # so that prompts differ clearly
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def videos():
    """Smooth random clips, 3 of (4, 3, 40, 48): neighbouring pixels are alike, as in a video."""
    noise = torch.rand(3, 12, 10, 12, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (40, 48), mode="bilinear").view(3, 4, 3, 40, 48)


@pytest.fixture(scope="session")
def reward_server():
    """URL of a server of sprite_colour."""
    with serving("--reward", "sprite_colour") as server:
        yield server.url
