"""Where CLIPReward's weights come from, and what it says about a checkpoint that it cannot use."""

import json
import shutil

import pytest
import torch

from rewards import Clip, RewardError, load
from rewards.clip import CLIPReward
from rewards.encoders.clip_checkpoints import OpenClipSource, find_built_in

from .conftest import PREPROCESS


def totals(reward, videos):
    return reward([Clip(video, prompt) for video, prompt in zip(videos, "abc", strict=True)]).total


@pytest.fixture
def built_in(clip_folder, tmp_path):
    """The tiny architecture as a named one of open_clip, its weights as a file. Its own preparation is CLIP's."""
    import open_clip
    from open_clip import factory

    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    yield "tiny-clip", clip_folder / "open_clip_model.safetensors"
    factory._MODEL_CONFIG_PATHS.pop()
    del factory._MODEL_CONFIGS["tiny-clip"]


def test_weights_files_of_both_kinds_load(built_in, videos, tmp_path):
    from safetensors.torch import load_file

    model, weights = built_in
    torch.save({"state_dict": load_file(weights)}, tmp_path / "weights.pt")
    from_pt = CLIPReward(model, path=str(tmp_path / "weights.pt"), device="cpu")
    from_safetensors = CLIPReward(model, path=str(weights), device="cpu")
    assert torch.equal(totals(from_pt, videos), totals(from_safetensors, videos))
    assert from_pt.encoder.towers.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_an_architecture_may_be_a_file(clip_folder, videos, tmp_path):
    weights, config = clip_folder / "open_clip_model.safetensors", clip_folder / "open_clip_config.json"
    whole = CLIPReward(config, path=weights, device="cpu")
    assert torch.equal(totals(whole, videos), totals(CLIPReward(path=str(clip_folder), device="cpu"), videos))
    (tmp_path / "bare.json").write_text(json.dumps(json.loads(config.read_text())["model_cfg"]))
    bare = CLIPReward(str(tmp_path / "bare.json"), path=str(weights), device="cpu")
    assert bare.encoder.towers.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_a_file_is_prepared_for_as_its_tag_says(built_in, clip_folder, videos, monkeypatch):
    from open_clip import pretrained

    model, weights = built_in
    monkeypatch.setitem(pretrained._PRETRAINED, model, {"first": dict(PREPROCESS, url="")})
    by_tag = CLIPReward(model, "first", str(weights), device="cpu")
    by_folder = CLIPReward(path=str(clip_folder), device="cpu")
    assert torch.equal(totals(by_tag, videos), totals(by_folder, videos))


class Touch:
    """Pickles as a call of open(path, "w"): a checkpoint that would run code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_runs_code_is_refused(built_in, tmp_path):
    torch.save({"state_dict": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(RewardError, match=r"evil\.pt"):
        CLIPReward(built_in[0], path=str(tmp_path / "evil.pt"), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_file_takes_its_image_preparation_from_the_published_tags(tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    siglip = find_built_in("clip", "ViT-B-16-SigLIP", None, str(weights))
    assert siglip.preprocess["mean"] == (0.5, 0.5, 0.5)
    assert siglip.preprocess["resize_mode"] == "squash"
    with pytest.raises(RewardError, match="pretrained="):  # laion2b_s32b_b82k differs from the other ten
        find_built_in("clip", "ViT-L-14", None, str(weights))
    assert find_built_in("clip", "ViT-L-14", "laion2b_s32b_b82k", str(weights)).preprocess["mean"] == (0.5, 0.5, 0.5)
    assert find_built_in("clip", "ViT-B-32", "openai", str(weights)).quick_gelu


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no checkpoint named"),
        ({"model": "ViT-B-32"}, "no checkpoint named"),
        ({"path": "/nowhere/clip"}, "open_clip_config.json"),
        ({"path": "x", "pretrained": "openai"}, "without model"),
        ({"model": "ViT-B-33", "pretrained": "openai"}, "near: ViT-B-32"),
        ({"model": "ViT-B-32", "pretrained": "laion3b"}, "known: "),
        ({"model": "ViT-B-32", "path": "/nowhere/w.pt"}, r"no weights file /nowhere/w\.pt"),
        ({"path": "x", "frames": 0}, "frames is 0"),
        ({"path": "x", "precision": "int4"}, "precision 'int4'"),
        ({"path": "x", "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_are_checked_in_one_line(options, message):
    with pytest.raises(RewardError, match=message) as caught:
        CLIPReward.check(**options)
    assert "\n" not in str(caught.value)


def spoil_weights(folder):
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def spoil_architecture(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 48
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def drop_weights(folder):
    (folder / "open_clip_model.safetensors").unlink()


def spoil_config(folder):
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text()[:40])


def drop_preparation(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config["model_cfg"]}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "cannot load"),
        (spoil_architecture, "cannot load"),
        (drop_weights, "no weights"),
        (spoil_config, "not valid JSON"),
        (drop_preparation, "lacks model_cfg or preprocess_cfg"),
    ],
)
def test_a_spoilt_folder_is_one_line_that_names_it(clip_folder, tmp_path, spoil, message):
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(RewardError, match=message) as caught:
        load("clip", path=str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_weights_is_never_drawn_at_random(clip_folder, tmp_path):
    # What a hub repository without a readable weights file comes down to: open_clip itself only warns.
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    with pytest.raises(RewardError, match="cannot load"):
        OpenClipSource(f"local-dir:{tmp_path}", "hub").load("clip", "fp32", torch.device("cpu"))
