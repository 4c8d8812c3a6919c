"""The shipped twins of VideoReward and HPSv2 judge the tiny world, and the programs that made them run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.data import read_preferences
from examples.tiny_world import flawed_videos, flaws, hpsv2, optim, qwen2_vl, readings, video_reward, world
from rewards import load

FOLDER = Path(world.__file__).parent
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def reward():
    return load("video_reward", path=str(FOLDER / "video_reward"), use_norm=False, device="cpu", batch_size=64)


def won(first, second):
    return (first > second).float().mean().item()


def test_video_reward_sees_each_kind_of_small_flaw(reward):
    found = video_reward.accuracy(reward, num=64)
    assert found["VQ"] > 0.95
    assert found["MQ"] > 0.9
    assert found["TA"] > 0.9


def test_video_reward_is_in_the_released_layout():
    config = json.loads((FOLDER / "video_reward" / "model_config.json").read_text())
    assert {"data_config", "model_config", "peft_lora_config", "inference_config"} <= config.keys()
    (weights,) = (FOLDER / "video_reward").glob("checkpoint-*/model.pth")
    names = set(torch.load(weights, weights_only=True))
    assert {f"{LAYER}.weight", f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"} <= names
    assert {"base_model.model.visual.patch_embed.proj.weight", "base_model.model.rm_head.weight"} <= names


def test_a_trained_video_reward_is_saved_as_one_that_stands_alone(tmp_path):
    """LoRA on one layer, and all that a training keeps beside it; what is saved scores alike, without its base."""
    trained, base = tmp_path / "reward", FOLDER / "qwen2_vl"
    (trained / "checkpoint-3").mkdir(parents=True)
    config = json.loads((FOLDER / "video_reward" / "model_config.json").read_text())
    config["model_config"] |= {"model_name_or_path": str(base), "frozen_weights": str(base)}
    config["peft_lora_config"] |= {"lora_r": 2, "lora_alpha": 3}
    (trained / "model_config.json").write_text(json.dumps(config))
    (trained / "prompt_template.txt").write_bytes((FOLDER / "reward_template.txt").read_bytes())
    processor = qwen2_vl.processor()
    processor.save_pretrained(trained / "base")
    qwen2_vl.configuration().save_pretrained(trained / "base")
    draw = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 96), "B": (96, 2)}
    factors = {f"{LAYER}.lora_{n}.weight": 0.1 * torch.randn(s, generator=draw).half() for n, s in shapes.items()}
    save_file(factors, trained / "checkpoint-3" / "adapter_model.safetensors")
    words = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    rest = {"base_model.model.model.embed_tokens.weight": torch.cat([words, torch.randn(3, 96, generator=draw).half()])}
    rest["base_model.model.rm_head.weight"] = torch.randn(1, 96, generator=draw).half()
    torch.save(rest, trained / "checkpoint-3" / "non_lora_state_dict.pth")
    video_reward.save(trained, tmp_path / "saved")
    drawn = flaws.draw(4, torch.Generator().manual_seed(1))
    found, expected = (
        load("video_reward", path=str(tmp_path / name), use_norm=False, device="cpu")(drawn.video, drawn.prompts, fps=8)
        for name in ("saved", "reward")
    )
    for name in ("VQ", "MQ", "TA"):
        torch.testing.assert_close(found.dims[name], expected.dims[name], atol=1e-3, rtol=1e-3)
    assert json.loads((tmp_path / "saved" / "model_config.json").read_text())["model_config"]["frozen_weights"] is None


@pytest.mark.parametrize(("level", "noise"), [(1, 0.06), (2, 0.15)])
def test_visual_flaws_fade_blur_or_add_noise(level, noise):
    """Of upright bars: a third of the clips each, by hand."""
    bars = 0.5 + 0.1 * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8)
    near = [(torch.arange(32) + shift).clamp(0, 31) for shift in range(-level, level + 1)]
    expected = [0.5 + (1 - level / 3) * (bars - 0.5), sum(bars[place] for place in near) / len(near)]
    clean = bars.expand(60, 2, 3, 32, 32)
    found = flaws.visual_flaw(clean, torch.full((60,), level), torch.Generator().manual_seed(0))
    faded, blurred = ((found - rows).abs().flatten(1).amax(1) < 1e-5 for rows in expected)
    noisy = ((found - clean).flatten(1).std(1) - noise).abs() < 0.05 * noise
    assert (faded ^ blurred ^ noisy).all()
    assert min(faded.sum(), blurred.sum(), noisy.sum()) > 12
    assert torch.equal(flaws.visual_flaw(clean, torch.zeros(60), torch.Generator().manual_seed(0)), clean)


def test_pairs_of_videos_are_labelled_by_what_was_planted():
    generator = torch.Generator().manual_seed(3)
    pool = world.sample(2048, generator)
    rows = world.attributes(world.sample(50, generator))
    for count in (0, 1, 2):
        misled = flawed_videos.misled(rows, torch.full((50,), count), generator)
        assert ((misled != rows).sum(1) == count).all()
        assert torch.equal(world.attributes(flawed_videos.showing(misled, pool, generator)), misled)
    close = flawed_videos.draw_close(12, pool, generator)
    assert torch.equal(close.flaws.sum(1), torch.eye(3).repeat(4, 1))
    perfect = close.flaws.sum(-1) == 0  # (12, 2)
    better, worse = close.videos[perfect], close.videos[~perfect]
    assert (better - worse).abs().flatten(1).amax(1).min() > 0.02
    smooth, match = load("sprite_smoothness"), load("sprite_match")
    assert (match(better, close.prompts, fps=8).total == 1).all()
    assert (smooth(better, close.prompts, fps=8).total > smooth(worse, close.prompts, fps=8).total)[1::3].all()
    assert (match(worse, close.prompts, fps=8).total < 1)[2::3].all()


def test_pairs_of_videos_are_written_as_preferences(tmp_path):
    flawed_videos.make(["--out", str(tmp_path / "close.jsonl"), "--num", "3", "--close"])
    pairs = read_preferences(tmp_path / "close.jsonl")
    assert [next(name for name, label in pair.labels.items() if label) for pair in pairs] == ["VQ", "MQ", "TA"]
    for pair in pairs:
        assert all(label == pair.scores[name][0] - pair.scores[name][1] for name, label in pair.labels.items())


def test_the_tower_sees_what_transformers_own_sees():
    """All frames at once, as training does, and frame by frame; and the chat is what the processor makes of it."""
    model, ids = qwen2_vl.build().eval(), qwen2_vl.tokenizer()
    batch = flaws.draw(2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = qwen2_vl.see(model, ids, batch)
        for block in model.model.visual.blocks:
            block.attn.forward = qwen2_vl.attend.__get__(block.attn)
        found = qwen2_vl.see(model, ids, batch)
    torch.testing.assert_close(found.features, expected.features)
    content = [{"type": "video"}, {"type": "text", "text": qwen2_vl.TEXT.format(prompt=batch.prompts[0])}]
    chat = qwen2_vl.processor().apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    pads = "<|video_pad|>" * (len(qwen2_vl.FRAMES) // qwen2_vl.TEMPORAL)
    tokens = ids(chat.replace("<|video_pad|>", pads)).input_ids
    assert found.tokens[0, : len(tokens)].tolist() == tokens


def test_readings_know_the_words_and_how_even_a_path_is():
    ids = qwen2_vl.tokenizer()
    sprites = world.sample(1, torch.Generator().manual_seed(0))
    caption = world.captions(sprites)[0].split()  # a COLOUR SHAPE moving ...
    other = ["a", "blue" if "red" in caption else "red", *caption[2:]]
    tokens = torch.tensor([ids.convert_tokens_to_ids(other)])
    wrong, named = readings.Readings(96, ids).words(tokens, sprites)
    assert [other[i] for i in wrong[0].nonzero().flatten()] == [other[1]]
    rest = [other[i] for i in (~named[0]).nonzero().flatten()]
    assert rest == ["a", "moving", "on", "a", "background"]
    batch = flaws.Batch(world.render(sprites), [""], torch.zeros(1, 3), sprites, torch.zeros(1, world.FRAMES, 2))
    gaps = torch.tensor(qwen2_vl.FRAMES).diff()[:, None]
    velocity = readings.centres(batch).diff(dim=1) / gaps
    torch.testing.assert_close(velocity, velocity[:, :1].expand_as(velocity), atol=1e-4, rtol=0)


def test_qwen2_vl_trains_and_goes_on(tmp_path, monkeypatch):
    """Killed behind the second of three steps and run again, it ends where it would have."""
    budget = optim.Budget(3, save_every=0.0)
    whole = qwen2_vl.pretrain(tmp_path / "whole", budget, batch=4)
    save = optim.Training.save

    def save_then_die(self):
        save(self)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(optim.Training, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        qwen2_vl.pretrain(tmp_path / "killed", budget, batch=4)
    monkeypatch.setattr(optim.Training, "save", save)
    killed = qwen2_vl.pretrain(tmp_path / "killed", budget, batch=4).state_dict()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.state_dict().items())


def test_muon_orthogonalises_wide_matrices_in_groups_of_columns():
    weight = torch.nn.Parameter(torch.zeros(10, 6, 5))
    weight.grad = torch.randn(10, 6, 5, generator=torch.Generator().manual_seed(0))
    optim.Muon([weight], lr=1.0, block=8).step()
    for part in weight.detach().flatten(1).split(8, 1):
        size = torch.linalg.svdvals(part) / max(1.0, len(part) / part.shape[1]) ** 0.5
        assert (size > 0.6).all()
        assert (size < 1.3).all()


def test_hpsv2_prefers_clean_frames_that_show_what_the_prompt_says():
    files = {"path": str(FOLDER / "hpsv2" / hpsv2.WEIGHTS), "model": str(FOLDER / "hpsv2" / hpsv2.ARCHITECTURE)}
    tiny = load("hpsv2", **files, device="cpu")
    choices = hpsv2.draw(64, torch.Generator().manual_seed(9))
    better, worse = (tiny(frames[:, None], choices.prompts).total for frames in choices[:2])
    assert won(better, worse) > 0.9


def test_hpsv2_trains_and_saves_what_loads(tmp_path):
    clip = hpsv2.train(tmp_path / "work", optim.Budget(2), batch=8)
    hpsv2.save(tmp_path / "hpsv2", clip)
    files = {"path": str(tmp_path / "hpsv2" / hpsv2.WEIGHTS), "model": str(tmp_path / "hpsv2" / hpsv2.ARCHITECTURE)}
    choices = hpsv2.draw(8, torch.Generator().manual_seed(9))
    found = load("hpsv2", **files, device="cpu")(choices.better[:, None], choices.prompts).total
    with torch.no_grad():
        expected = hpsv2.cosines(clip, hpsv2.models.tokenizer(), choices.better, choices.prompts)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
