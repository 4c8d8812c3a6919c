"""A tiny open_clip checkpoint, made here in open_clip's own format: no published weights are needed."""

import json
from pathlib import Path

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


@pytest.fixture(scope="session")
def hpsv2_files(tmp_path_factory):
    """A checkpoint in the form of HPS_v2.1_compressed.pt, and its architecture as open_clip writes one. Of seed 1."""
    import open_clip

    folder = tmp_path_factory.mktemp("tiny_hpsv2")
    model_cfg = MODEL | {"text_cfg": MODEL["text_cfg"] | {"context_length": 77}}
    (folder / "tiny.json").write_text(json.dumps(model_cfg))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.CLIP(**model_cfg)
        torch.nn.init.normal_(model.token_embedding.weight, std=1.0)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_tiny.pt")
    return folder / "HPS_tiny.pt", folder / "tiny.json"


@pytest.fixture(scope="session")
def clip_hf_folder(tmp_path_factory):
    """A CLIPModel of transformers with CLIP's real vocabulary and a preprocessor, random weights of seed 2."""
    import gzip

    from open_clip.tokenizer import SimpleTokenizer, default_bpe
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("tiny_clip_hf")
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), "utf-8")
    # As OpenAI's vocab.json names them.
    released = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {released.get(token, token): index for token, index in SimpleTokenizer().encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=16,
        text_config=shared | {"num_hidden_layers": 1, "max_position_embeddings": 24, "eos_token_id": 2},
        vision_config=shared | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = CLIPModel(config)
        for parameter in model.parameters():  # of transformers' own draws, all prompts would be alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    preparation = {"image_mean": PREPROCESS["mean"], "image_std": PREPROCESS["std"]}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**preparation, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def aesthetic_files(clip_folder, tmp_path_factory):
    """A head in the form of sac+logos+ava1-l14-linearMSE.pth, of seed 3, and the CLIP that it belongs to."""
    draw = torch.Generator().manual_seed(3)
    widths = {0: (32, 16), 2: (24, 32), 4: (12, 24), 6: (8, 12), 7: (1, 8)}
    state = {}
    for layer, (rows, columns) in widths.items():
        state[f"layers.{layer}.weight"] = torch.randn(rows, columns, generator=draw) / columns**0.5
        state[f"layers.{layer}.bias"] = torch.randn(rows, generator=draw)
    path = tmp_path_factory.mktemp("tiny_aesthetic") / "linearMSE.pth"
    torch.save(state, path)
    return path, clip_folder


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """A tiny vision-language model that writes nonsense, as a folder that transformers loads."""
    from tests.rewards.judges import tiny_vlm

    return tiny_vlm.save(tmp_path_factory.mktemp("tiny_vlm"))


@pytest.fixture(scope="session")
def judge_url():
    """URL of a scripted judge that likes bright videos."""
    from tests.rewards.judges.judge_servers import ScriptedServer, brightness

    with ScriptedServer(brightness) as server:
        yield server.url


@pytest.fixture(scope="session")
def defects_url():
    """URL of a scripted judge that finds defects where frames are dark."""
    from tests.rewards.judges.judge_servers import ScriptedServer, dark_halves

    with ScriptedServer(dark_halves) as server:
        yield server.url


@pytest.fixture(scope="session")
def video_reward(tmp_path_factory):
    """A tiny VideoReward in the released layout, of seed 0."""
    from .qwen2_vl_twin import REWARD_TOKENS, Saved, Twin, linear, save_video_reward

    twin = Twin(REWARD_TOKENS, linear(1))
    return Saved(twin, save_video_reward(tmp_path_factory.mktemp("video_reward") / "whole", twin))


@pytest.fixture(scope="session")
def hpsv3(tmp_path_factory):
    """A tiny HPSv3 in the released format, of seed 0."""
    from .qwen2_vl_twin import Saved, Twin, ranknet, save_hpsv3

    twin = Twin(["<|Reward|>"], ranknet, lora=False, tied=False)
    return Saved(twin, save_hpsv3(tmp_path_factory.mktemp("hpsv3"), twin))
