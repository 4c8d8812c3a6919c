"""VideoReward against transformers and peft, on a tiny model in the released layouts."""

import json
import shutil

import pytest
import torch
import torchvision.transforms.functional as TF
from torch import nn

from rewards import Clip, RewardError, check, load
from rewards.video_reward import rate_indices

from .qwen2_vl_twin import NORM, REWARD_TOKENS, TEMPLATE, Twin, linear, save_video_reward, smart_size

PROMPTS = ["a red circle", "b", "a blue square that moves to the left {slowly}"]
FPS = 4.0
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def twin(video_reward):
    return video_reward.twin


@pytest.fixture(scope="module")
def folder(video_reward):
    return video_reward.folder


@pytest.fixture(scope="module")
def reward(folder):
    return load("video_reward", path=str(folder), device="cpu")


@pytest.fixture
def videos():
    noise = torch.rand(3, 27, 6, 10, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, (24, 40), mode="bilinear").view(3, 9, 3, 24, 40)


def expected_raw(twin, videos, prompts, indices, positions="row", template=TEMPLATE):
    """(B, 3) by transformers, its processor and unmerged LoRA."""
    size = list(smart_size(*videos[0].shape[-2:], 16 * 16, 32 * 40))
    bytes_ = [(video[indices] * 255).round().byte() for video in videos]
    frames = [TF.resize(b, size, TF.InterpolationMode.BICUBIC, antialias=True).float() for b in bytes_]
    texts = [template.replace("{text_prompt}", prompt) for prompt in prompts]
    logits = twin.logits("video", frames, texts, positions)
    return logits.squeeze(-1) if logits.shape[-1] == 1 else logits.diagonal(dim1=1, dim2=2)


def raw_of(scores):
    return torch.stack([scores.dims[name] for name in ("VQ", "MQ", "TA")], 1)


@pytest.mark.parametrize("layout", ["model.pth", "adapter"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_raw_scores_are_those_of_the_authors_forward_pass(layout, outputs, videos, tmp_path):
    twin = Twin(REWARD_TOKENS, linear(outputs), seed=outputs)
    path = save_video_reward(tmp_path / "checkpoint", twin, layout, outputs)
    found = load("video_reward", path=str(path), use_norm=False, device="cpu")(videos, PROMPTS, fps=FPS)
    expected = expected_raw(twin, videos, PROMPTS, [0, 3, 5, 8])
    assert expected.std(0).min() > 0.02  # the reference tells these clips apart
    torch.testing.assert_close(raw_of(found), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.total, expected.sum(1), atol=3 * TOLERANCE, rtol=0)


def test_normalised_scores_and_their_sum(reward, twin, videos):
    found = reward(videos, PROMPTS, fps=FPS)
    raw = expected_raw(twin, videos, PROMPTS, [0, 3, 5, 8])
    for column, name in enumerate(("VQ", "MQ", "TA")):
        expected = (raw[:, column] - NORM[f"{name}_mean"]) / NORM[f"{name}_std"]
        torch.testing.assert_close(found.dims[name], expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(found.total, sum(found.dims.values()))


def test_weights_choose_the_dimensions(folder, reward, videos):
    dims = reward(videos, PROMPTS, fps=FPS).dims
    found = load("video_reward", path=str(folder), weights=[1, 0.5, 0], device="cpu")(videos, PROMPTS, fps=FPS)
    torch.testing.assert_close(found.total, dims["VQ"] + 0.5 * dims["MQ"])


def test_positions_in_three_dimensions_would_give_other_scores(twin, videos):
    row, natural = (expected_raw(twin, videos, PROMPTS, [0, 3, 5, 8], kind) for kind in ("row", "natural"))
    assert (row - natural).abs().max() > 100 * TOLERANCE


def test_only_text_alignment_sees_the_prompt(reward, videos):
    first, second = reward(videos, PROMPTS, fps=FPS), reward(videos, ["another"] * 3, fps=FPS)
    torch.testing.assert_close(first.dims["VQ"], second.dims["VQ"], atol=1e-5, rtol=0)
    torch.testing.assert_close(first.dims["MQ"], second.dims["MQ"], atol=1e-5, rtol=0)
    assert (first.dims["TA"] - second.dims["TA"]).abs().min() > 1e-3


def test_sizes_and_lengths_may_differ_in_one_call(reward):
    shapes = [(9, 24, 40), (4, 60, 20), (2, 16, 16), (30, 40, 41)]
    videos = [torch.rand(f, 3, h, w, generator=torch.Generator().manual_seed(f)) for f, h, w in shapes]
    clips = [Clip(video, prompt, FPS) for video, prompt in zip(videos, "abcd", strict=True)]
    together = raw_of(reward(clips))
    alone = torch.cat([raw_of(reward([clip])) for clip in clips])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_the_gradient_behind_the_resizing_matches_finite_differences(reward):
    """The rounding of the resizing has no slope; test_qwen2_vl.py has its gradient."""
    model, chat = reward.model, reward.chat("a")
    frames = (80 + 100 * torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(3))).requires_grad_()
    (gradient,) = torch.autograd.grad(model.scores("video", [chat], [model.patches(frames)]).sum(), frames)
    direction, step = gradient / gradient.norm(), 0.2
    with torch.no_grad():
        up, down = (
            model.scores("video", [chat], [model.patches(frames + sign * step * direction)]).sum() for sign in (1, -1)
        )
    assert ((up - down) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize(
    ("length", "fps", "expected"),
    [  # n = length / fps * 2, at least 4, an even number, no more than there are; Python rounds 2.5 down, 3.5 up
        (81, 16.0, 10),
        (40, 16.0, 4),  # 5 / 2 = 2.5
        (56, 16.0, 8),  # 7 / 2 = 3.5
        (9, 16.0, 4),
        (3, 16.0, 2),
        (2, 24.0, 2),
        (126, 24.0, 10),
        (152, 30.0, 10),
        (3000, 2.0, 768),
    ],
)
def test_how_many_frames_are_looked_at(length, fps, expected):
    found = rate_indices(length, fps, 2.0)
    assert len(found) == expected
    assert (found[0], found[-1]) == (0, length - 1)
    assert found == torch.linspace(0, length - 1, expected).round().long().tolist()


@pytest.mark.parametrize("fps", [5.0, 7.3, 16.0, 23.976, 29.97])
@pytest.mark.parametrize("length", range(2, 90, 3))
def test_frames_that_were_picked_are_picked_again(length, fps):
    found = rate_indices(length, fps, 2.0)
    assert rate_indices(len(found), fps * len(found) / length, 2.0) == list(range(len(found)))


def test_a_clip_of_fewer_frames_than_asked_for_is_looked_at_whole():
    assert rate_indices(7, 16.0, 2.0, num_frames=10) == list(range(7))


def test_a_fixed_number_of_frames_or_another_rate(folder):
    assert len(load("video_reward", path=str(folder), num_frames=7, device="cpu").indices(81, 16.0)) == 8
    assert len(load("video_reward", path=str(folder), fps=4.0, device="cpu").indices(81, 16.0)) == 20


@pytest.mark.parametrize("token", ["<|VQ_reward|>", "<|video_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_a_prompt_with_a_special_token_is_refused(reward, videos, token):
    with pytest.raises(RewardError, match=r"a prompt holds the special token <\|"):
        reward(videos[:1], [f"a cat {token} and a dog"])


def test_one_frame_and_a_ribbon_are_refused(reward):
    with pytest.raises(RewardError, match="has 1 frame, expected 2 or more"):
        reward(torch.rand(1, 1, 3, 32, 32), ["a"])
    with pytest.raises(RewardError, match="longer than 200 times"):
        reward(torch.rand(1, 2, 3, 2, 402), ["a"])


def as_saved_in_2024(base):
    """Rewrite a base folder as transformers 4.45 saved it and the hub holds it, without weights."""
    config = json.loads((base / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key not in ("model_type", "layer_types")}
    rope = text.pop("rope_parameters")
    vision = config["vision_config"]
    kept = ("depth", "embed_dim", "hidden_size", "num_heads", "mlp_ratio", "patch_size", "temporal_patch_size")
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    flat = {
        **text,
        **{key: config[key] for key in (*special, "model_type", "tie_word_embeddings")},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": {"in_chans": 3, "spatial_merge_size": 2, **{key: vision[key] for key in kept}},
        "transformers_version": "4.45.2",
    }
    (base / "config.json").write_text(json.dumps(flat))
    image = json.loads((base / "processor_config.json").read_text())["image_processor"]
    image |= {"min_pixels": 3136, "max_pixels": 12845056, "processor_class": "Qwen2VLProcessor"}
    (base / "preprocessor_config.json").write_text(json.dumps(image))
    template = (base / "chat_template.jinja").read_text()
    for name in ("processor_config.json", "chat_template.jinja", "model.safetensors"):
        (base / name).unlink()
    return template


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_a_base_of_transformers_4_is_read_as_well(folder, reward, videos, tmp_path, place):
    copy = shutil.copytree(folder, tmp_path / "copy")
    template = as_saved_in_2024(copy / "base")
    file = copy / "base" / place
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | {"chat_template": template}))
    found = load("video_reward", path=str(copy), device="cpu")(videos, PROMPTS, fps=FPS)
    assert torch.equal(found.total, reward(videos, PROMPTS, fps=FPS).total)


def spoil_config(folder):
    config = folder / "model_config.json"
    config.write_text(config.read_text()[:50])


def change_config(part, **values):
    def spoil(folder):
        config = json.loads((folder / "model_config.json").read_text())
        config[part] |= values
        (folder / "model_config.json").write_text(json.dumps(config))

    return spoil


def change_template(old, new):
    def spoil(folder):
        file = folder / "prompt_template.txt"
        file.write_text(file.read_text().replace(old, new))

    return spoil


def drop(name):
    return lambda folder: (folder / name).unlink()


SMALL = [
    (spoil_config, "not valid JSON"),
    (drop("model_config.json"), "model_config.json"),
    (change_config("model_config", use_special_tokens=False), "only models with a special token for each"),
    (change_config("data_config", eval_dim=["VQ", "VQ"]), "only models with a special token for each"),
    (change_config("data_config", eval_dim=["VQ", "MQ", "TA", "X"]), "<|X_reward|> once each"),
    (change_config("model_config", positions="round"), "positions 'round' is none of row, native"),
    (change_config("data_config", prompt_template_type="detailed_special"), "its sha256 differs"),
    (drop("prompt_template.txt"), "python -m rewards.extract_template"),
    (change_template("{text_prompt}", ""), "must hold {text_prompt} once"),
    (change_template("<|MQ_reward|>", ""), "once each, in this order"),
    (change_template("<|VQ_reward|>", "<|TA_reward|>"), "once each, in this order"),
    (drop("checkpoint-12/model.pth"), "holds neither model.pth nor adapter_model"),
    (lambda folder: shutil.rmtree(folder / "checkpoint-12"), "no checkpoint-*"),
]


def rewrite(change):
    def spoil(folder):
        file = folder / "checkpoint-12" / "model.pth"
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return spoil


def cut_file(folder):
    file = folder / "checkpoint-12" / "model.pth"
    file.write_bytes(file.read_bytes()[:5000])


class Touch:
    """Pickles as a call of open(path, "w"): a checkpoint that would run code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def run_code(folder):
    torch.save({"weights": Touch(folder / "ran")}, folder / "checkpoint-12" / "model.pth")


def without(name):
    return rewrite(lambda state: state.pop(f"base_model.model.{name}"))


def with_weight(name, tensor):
    return rewrite(lambda state: state.update({f"base_model.model.{name}": tensor}))


def untie(folder):
    rewrite(lambda state: state["base_model.model.lm_head.weight"].add_(1))(folder)


def without_base_weights(spoil):
    def both(folder):
        spoil(folder)
        (folder / "base" / "model.safetensors").unlink()  # or the base's own would fill the gap

    return both


LARGE = [
    (cut_file, "cannot be read as plain tensors"),
    (run_code, "cannot be read as plain tensors"),
    (without_base_weights(without("model.layers.1.input_layernorm.weight")), "lacks language_model.layers.1"),
    (with_weight("model.extra.weight", torch.zeros(1)), "holds the unknown language_model.extra.weight"),
    (with_weight("rm_head.weight", torch.zeros(1, 9)), "has another size of weight"),
    (without("model.layers.0.self_attn.q_proj.lora_B.default.weight"), "the checkpoint is cut"),
    (without("model.embed_tokens.weight"), "no token embeddings"),
    (untie, "embed_tokens and lm_head differ"),
    (lambda folder: shutil.rmtree(folder / "base"), "cannot be fetched from the hub"),
    (drop("base/tokenizer.json"), "not a whole Qwen2-VL folder"),
]


@pytest.mark.parametrize("function", [check, load])
@pytest.mark.parametrize(("spoil", "message"), SMALL)
def test_a_spoilt_folder_is_found_before_weights_are_read(folder, tmp_path, function, spoil, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(RewardError) as caught:
        function("video_reward", path=str(copy))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spoil", "message"), LARGE)
def test_spoilt_weights_are_one_line(folder, tmp_path, spoil, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(RewardError) as caught:
        load("video_reward", path=str(copy), device="cpu")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (copy / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 1]}, "expected a number for each of VQ, MQ, TA"),
        ({"weights": [1, 1, "x"]}, "expected a number for each of VQ, MQ, TA"),
        ({"weights": [1, 1, float("nan")]}, "expected a number for each of VQ, MQ, TA"),
        ({"fps": 0}, "fps 0"),
        ({"num_frames": 1}, "num_frames 1"),
        ({"fps": 2.0, "num_frames": 8}, "exclude each other"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"step": 99}, "no checkpoint-99"),
        ({"path": "/nowhere/video_reward"}, "/nowhere/video_reward"),
    ],
)
def test_options_are_checked_in_one_line(folder, options, message):
    with pytest.raises(RewardError) as caught:
        check("video_reward", **{"path": str(folder), **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_precision_stays_close_and_the_head_is_float32(folder, reward, videos):
    low = load("video_reward", path=str(folder), dtype="bfloat16", device="cpu")
    found, exact = low(videos, PROMPTS, fps=FPS), reward(videos, PROMPTS, fps=FPS)
    assert low.model.head.weight.dtype == torch.float32
    assert not torch.equal(found.total, exact.total)
    torch.testing.assert_close(found.total, exact.total, atol=0.3, rtol=0)


def test_the_newest_checkpoint_counts(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(copy / "checkpoint-12", copy / "checkpoint-7")
    (copy / "checkpoint-7" / "model.pth").write_bytes(b"")
    assert load("video_reward", path=str(copy), device="cpu").settings.weights.name == "checkpoint-12"
    with pytest.raises(RewardError, match="checkpoint-7"):
        load("video_reward", path=str(copy), step=7)
