"""PickScoreReward, and `clip` on a checkpoint of transformers, against CLIPModel and its processor with PIL."""

import json
import shutil

import pytest
import torch
from PIL import Image

from rewards import RewardError, check, load
from rewards.encoders.transformers_clip import prepare

PROMPTS = ["A red circle, moving left!", "a blue square " * 20]  # the second is longer than 24 tokens


def noise(*shape, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


def smooth(*shape, seed=0):
    """Neighbouring pixels are alike, as in a video; in steps of 1 / 255."""
    coarse = noise(shape[0] * shape[1], 3, shape[-2] // 4, shape[-1] // 4, seed=seed)
    fine = torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear")
    return (fine * 255).round().view(shape) / 255


def to_pil(frame):
    return Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy())


def by_transformers(folder, videos, prompts):
    """(N, F) of exp(logit_scale) cos, as PickScore's README computes it."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokens = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    rows = []
    with torch.no_grad():
        text = model.get_text_features(**tokens).pooler_output
        text = text / text.norm(dim=-1, keepdim=True)
        for video, embedding in zip(videos, text, strict=True):
            pixels = processor([to_pil(frame) for frame in video], return_tensors="pt")
            image = model.get_image_features(**pixels).pooler_output
            rows.append(model.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ embedding)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def reward(clip_hf_folder):
    return load("pickscore", path=str(clip_hf_folder), frames=None)


def test_equals_transformers_on_images_of_the_models_size(reward, clip_hf_folder):
    videos = noise(2, 3, 3, 32, 32)
    expected = by_transformers(clip_hf_folder, videos, PROMPTS)
    found = reward(videos, PROMPTS, fps=8)
    assert expected.std() > 1  # the reference tells these clips apart
    torch.testing.assert_close(found.dense, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.total, expected.mean(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (44, 96), (120, 208)])
def test_close_to_transformers_where_images_are_resized(reward, clip_hf_folder, shape):
    videos = smooth(2, 3, 3, *shape)
    expected = by_transformers(clip_hf_folder, videos, PROMPTS)
    # PIL rounds to bytes twice, we do not. Measured: at most 0.08, mean 0.02, where the frames of a clip spread by 1.2.
    torch.testing.assert_close(reward(videos, PROMPTS).dense, expected, atol=0.12, rtol=0)


@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (20, 31), (33, 64), (32, 35), (120, 208)])
@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [{"shortest_edge": 32}, {"shortest_edge": 40}, {"height": 32, "width": 32}])
def test_prepares_as_the_processor_with_pil(shape, resample, size):
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil

    options = {
        "size": size,
        "crop_size": {"height": 32, "width": 32},
        "resample": resample,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    }
    image = noise(3, *shape)
    expected = CLIPImageProcessorPil(**options)([to_pil(image)], return_tensors="pt")["pixel_values"]
    found = prepare(image[None], CLIPImageProcessor(**options))
    torch.testing.assert_close(found, expected, atol=1.2 / 255 / 0.5, rtol=0)  # one level; PIL rounds twice


@pytest.mark.parametrize("shape", [(40, 48), (44, 96), (120, 208)])
def test_the_rounding_of_pil_is_all_that_is_missing(shape, monkeypatch):
    from torchvision.transforms.functional import resize
    from transformers import CLIPImageProcessor, CLIPImageProcessorPil

    def with_rounding(images, target, interpolation):
        for part in ((images.shape[-2], target[1]), target):
            images = (resize(images, part, interpolation, antialias=True).clamp(0, 1) * 255).round() / 255
        return images

    monkeypatch.setattr("rewards.encoders.transformers_clip.resize_as_pil", with_rounding)
    plain = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": True}
    plain |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    frames = noise(4, 3, *shape)
    expected = CLIPImageProcessorPil(**plain)([to_pil(frame) for frame in frames], return_tensors="pt")["pixel_values"]
    different = (prepare(frames, CLIPImageProcessor(**plain)) - expected).abs() > 1e-6
    assert different.float().mean() < 2e-3  # halves of a level, which PIL's integers decide another way


@pytest.mark.parametrize("scale", ["cosine", "logit/26"])
def test_scales(reward, clip_hf_folder, scale):
    videos = noise(2, 2, 3, 32, 32)
    factor = {"cosine": 1 / reward.encoder.towers.model.logit_scale.exp().item(), "logit/26": 1 / 26}[scale]
    found = load("pickscore", path=str(clip_hf_folder), scale=scale)(videos, PROMPTS)
    torch.testing.assert_close(found.total, factor * reward(videos, PROMPTS).total, atol=1e-5, rtol=0)


def test_clip_takes_the_same_folder(reward, clip_hf_folder):
    videos = smooth(2, 3, 3, 40, 48)
    found = load("clip", path=str(clip_hf_folder))(videos, PROMPTS)
    cosine = load("pickscore", path=str(clip_hf_folder), scale="cosine")(videos, PROMPTS)
    assert torch.equal(found.total, cosine.total)


def test_its_tokens_are_open_clips(reward, clip_hf_folder):
    import open_clip
    from transformers import AutoTokenizer

    texts = [*PROMPTS, "Two  cats' toys, 3 o'clock; caf\u00e9"]
    found = AutoTokenizer.from_pretrained(clip_hf_folder)(texts, truncation=True, max_length=24)["input_ids"]
    expected = open_clip.SimpleTokenizer(context_length=24)(texts)
    assert found == [[token for token in row if token] for row in expected.tolist()]


def test_tokenizer_and_preparation_may_be_elsewhere(reward, clip_hf_folder, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(clip_hf_folder / file, tmp_path)
    videos = smooth(2, 2, 3, 40, 48)
    found = load("pickscore", path=str(tmp_path), processor=str(clip_hf_folder))(videos, PROMPTS)
    assert torch.equal(found.total, reward(videos, PROMPTS).total)


def test_gradient_matches_finite_differences(reward):
    video = (0.3 + 0.4 * noise(1, 2, 3, 36, 44)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(video, PROMPTS[:1]).total.sum(), video)
    step = 0.02 * gradient / gradient.norm()
    up, down = (reward((video + sign * step).detach(), PROMPTS[:1]).total.item() for sign in (1, -1))
    assert (up - down) / 0.04 == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "pure_fp16"])
def test_low_precision_stays_close(reward, clip_hf_folder, precision):
    videos = smooth(2, 2, 3, 40, 48)
    low = load("pickscore", path=str(clip_hf_folder), precision=precision)(videos, PROMPTS)
    assert low.total.dtype == torch.float32
    torch.testing.assert_close(low.total, reward(videos, PROMPTS).total, atol=0.4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere/pickscore"}, "no folder /nowhere/pickscore"),
        ({"processor": "/nowhere/clip"}, "no folder /nowhere/clip"),
        ({"scale": "26"}, "scale is '26', expected one of logit, cosine, logit/26"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"weights": "median"}, "weights is 'median'"),
    ],
)
def test_options_are_checked_in_one_line(options, message):
    with pytest.raises(RewardError, match=message) as caught:
        check("pickscore", **options)
    assert str(caught.value).startswith("reward pickscore: ")
    assert "\n" not in str(caught.value)


def test_the_published_names_need_no_network_to_be_checked():
    check("pickscore")
    check("clip", path="openai/clip-vit-large-patch14")


def remove(*files):
    def spoil(folder):
        for file in files:
            (folder / file).unlink()

    return spoil


def edit(file, **changes):
    def spoil(folder):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return spoil


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def change_weights(change):
    def spoil(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def with_more_words(folder):
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 49408}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("model.safetensors"), "none of model.safetensors"),
        (remove("preprocessor_config.json"), "none of preprocessor_config.json"),
        (remove("vocab.json"), "none of tokenizer.json, vocab.json"),
        (edit("config.json", model_type="siglip"), "model_type 'siglip', expected 'clip'"),
        (cut_weights, "cannot load"),
        (change_weights(lambda state: state.pop("visual_projection.weight")), "missing_keys visual_projection.weight"),
        (change_weights(lambda state: state.update(more=torch.zeros(1))), "unexpected_keys more"),
        (
            change_weights(lambda state: state.update({"visual_projection.weight": torch.zeros(8, 32)})),
            "visual_projection",
        ),
        (with_more_words, "knows more words"),
        (edit("preprocessor_config.json", do_rescale=False), "another preparation"),
        (edit("preprocessor_config.json", crop_size={"height": 24, "width": 24}), "another preparation"),
        (edit("preprocessor_config.json", resample=0), "another preparation"),
    ],
)
def test_a_spoilt_folder_is_one_line_that_names_it(clip_hf_folder, tmp_path, spoil, message):
    folder = shutil.copytree(clip_hf_folder, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(RewardError, match=message) as caught:
        load("clip", path=str(folder))
    assert str(caught.value).startswith("reward clip: ")
    assert "\n" not in str(caught.value)
