"""The shipped twins of VideoReward and HPSv2 judge the tiny world, and the programs that made them run."""

import json
from pathlib import Path

import pytest
import torch

from examples.tiny_world import flaws, hpsv2, optim, video_reward, video_reward_model, world
from rewards import load

FOLDER = Path(world.__file__).parent


@pytest.fixture(scope="module")
def reward():
    return load("video_reward", path=str(FOLDER / "video_reward"), use_norm=False, device="cpu")


def worlds(num=48, seed=7):
    sprites = world.sample(num, torch.Generator().manual_seed(seed))
    return sprites, world.render(sprites), world.captions(sprites)


def won(first, second):
    return (first > second).float().mean().item()


def test_video_reward_sees_each_kind_of_flaw(reward):
    generator = torch.Generator().manual_seed(8)
    sprites, clean, prompts = worlds()
    level = torch.full((len(clean),), 2)
    best = reward(clean, prompts, fps=8).dims
    noisy = reward(flaws.visual_flaw(clean, level, generator), prompts, fps=8).dims
    jumpy = world.render(sprites, flaws.motion_flaw(sprites, level, generator))
    wrong, _ = flaws.wrong_words(sprites, level, generator)
    assert won(best["VQ"], noisy["VQ"]) > 0.95
    assert won(best["MQ"], reward(jumpy, prompts, fps=8).dims["MQ"]) > 0.7  # it is weak at motion: README.md
    assert won(best["TA"], reward(clean, wrong, fps=8).dims["TA"]) > 0.9


def test_video_reward_is_in_the_released_layout():
    config = json.loads((FOLDER / "video_reward" / "model_config.json").read_text())
    assert {"data_config", "model_config", "peft_lora_config", "inference_config"} <= config.keys()
    (weights,) = (FOLDER / "video_reward").glob("checkpoint-*/model.pth")
    names = set(torch.load(weights, weights_only=True))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{layer}.base_layer.weight", f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"} <= names
    assert {"base_model.model.visual.patch_embed.proj.weight", "base_model.model.rm_head.weight"} <= names


def test_hpsv2_prefers_clean_frames_that_show_what_the_prompt_says():
    files = {"path": str(FOLDER / "hpsv2" / hpsv2.WEIGHTS), "model": str(FOLDER / "hpsv2" / hpsv2.ARCHITECTURE)}
    tiny = load("hpsv2", **files, device="cpu")
    choices = hpsv2.draw(64, torch.Generator().manual_seed(9))
    better, worse = (tiny(frames[:, None], choices.prompts).total for frames in choices[:2])
    assert won(better, worse) > 0.9


def test_video_reward_trains_goes_on_and_scores_as_it_trained(tmp_path, monkeypatch):
    """Killed behind the first of two steps and run again, it ends where it would have; what is saved scores alike."""
    budget = optim.Budget(2, save_every=0.0)
    whole, ids = video_reward.train(tmp_path / "whole", budget, batch=4)
    save = optim.Training.save

    def save_then_die(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(optim.Training, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        video_reward.train(tmp_path / "killed", budget, batch=4)
    monkeypatch.setattr(optim.Training, "save", save)
    killed, _ = video_reward.train(tmp_path / "killed", budget, batch=4)
    other = killed.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.state_dict().items())
    video_reward_model.save(tmp_path / "saved", whole, ids, step=2, num=16)
    batch = flaws.draw(6, torch.Generator().manual_seed(1))
    found = load("video_reward", path=str(tmp_path / "saved"), use_norm=False, device="cpu")(
        batch.video, batch.prompts, fps=8
    )
    expected = video_reward_model.raw_scores(whole, ids, batch)
    torch.testing.assert_close(torch.stack(list(found.dims.values()), 1), expected, atol=0.02, rtol=0.01)


def test_hpsv2_trains_and_saves_what_loads(tmp_path):
    clip = hpsv2.train(tmp_path / "work", optim.Budget(2), batch=8)
    hpsv2.save(tmp_path / "hpsv2", clip)
    files = {"path": str(tmp_path / "hpsv2" / hpsv2.WEIGHTS), "model": str(tmp_path / "hpsv2" / hpsv2.ARCHITECTURE)}
    choices = hpsv2.draw(8, torch.Generator().manual_seed(9))
    found = load("hpsv2", **files, device="cpu")(choices.better[:, None], choices.prompts).total
    with torch.no_grad():
        expected = hpsv2.cosines(clip, hpsv2.models.tokenizer(), choices.better, choices.prompts)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
