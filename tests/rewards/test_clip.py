"""CLIPReward against open_clip's own path: PIL images, its transform, its model."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from rewards import Clip
from rewards.clip import CLIPReward
from rewards.encoders.encoder import MAX_CACHED_PROMPTS
from rewards.encoders.images import prepare

PROMPTS = ["a red circle moving left", "a blue square", "a green triangle moving up quickly"]


@pytest.fixture
def reward(clip_folder):
    return CLIPReward(path=str(clip_folder), frames=None, device="cpu")


def clips_of(videos, prompts=PROMPTS):
    return [Clip(video, prompt) for video, prompt in zip(videos, prompts, strict=False)]


def to_pil(frame):
    return Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy())


def by_open_clip(folder, videos, prompts):
    """(N, F) cosines by open_clip alone."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(prompts), normalize=True)
        rows = []
        for video, embedding in zip(videos, text, strict=True):
            images = torch.stack([transform(to_pil(frame)) for frame in video])
            rows.append(model.encode_image(images, normalize=True) @ embedding)
    return torch.stack(rows)


def test_equals_open_clip_on_prepared_images(reward, clip_folder):
    # Frames of the model's own size need no resizing, so nothing but float rounding may differ.
    videos = (torch.rand(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 255).round() / 255
    expected = by_open_clip(clip_folder, videos, PROMPTS)
    scores = reward(clips_of(videos))
    assert expected.std() > 0.02  # the reference tells these clips apart
    torch.testing.assert_close(scores.dense, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.total, expected.mean(1), atol=1e-5, rtol=0)


def test_close_to_open_clip_through_pil(reward, clip_folder, videos):
    expected = by_open_clip(clip_folder, videos, PROMPTS)
    # Measured: 1.1e-3 where cosines spread by 0.07; the frames differ by one level of 255 at most.
    torch.testing.assert_close(reward(clips_of(videos)).dense, expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (20, 31), (16, 64), (32, 32), (120, 208)])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_prepares_as_the_pil_transform(mode, interpolation, shape, size):
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(size, "RGB", (0.0,) * 3, (1.0,) * 3, interpolation, mode, fill_color=100)
    coarse = torch.rand(1, 3, shape[0] // 4, shape[1] // 4, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(coarse, shape, mode="bilinear")[0].mul(255).round() / 255
    expected = image_transform_v2(config, is_train=False)(to_pil(image))
    found = prepare(image[None], asdict(config))[0]
    torch.testing.assert_close(found, expected, atol=1.2 / 255, rtol=0)  # PIL rounds twice


def test_saturated_noise_is_clipped_between_the_passes_as_pil_does():
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(32, "RGB", (0.0,) * 3, (1.0,) * 3)
    image = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0)).round()
    expected = image_transform_v2(config, is_train=False)(to_pil(image))
    torch.testing.assert_close(prepare(image[None], asdict(config))[0], expected, atol=1.2 / 255, rtol=0)


def test_gradient_of_the_total_matches_finite_differences(reward):
    # Away from 0 and 1, where clipping would bend the function.
    video = 0.3 + 0.4 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    video.requires_grad_()
    (gradient,) = torch.autograd.grad(reward([Clip(video, PROMPTS[0])]).total.sum(), video)
    direction = gradient / gradient.norm()
    step = 0.02
    up, down = (reward([Clip(video.detach() + sign * step * direction, PROMPTS[0])]).total.item() for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.02)


def test_every_clip_gets_its_own_gradient(reward, videos):
    videos.requires_grad_()
    reward(clips_of(videos)).total[1].backward()
    assert videos.grad[1].abs().max() > 0
    assert videos.grad[[0, 2]].abs().max() == 0


def test_lengths_and_sizes_may_differ_in_one_call(reward, videos):
    mixed = [videos[0], videos[1, :1], torch.rand(5, 3, 70, 33)]
    together = reward(clips_of(mixed))
    alone = torch.cat([reward([clip]).total for clip in clips_of(mixed)])
    torch.testing.assert_close(together.total, alone, atol=1e-6, rtol=0)
    assert together.dense is None


def test_scores_only_the_frames_asked_for(clip_folder, videos):
    two = CLIPReward(path=str(clip_folder), frames=2, device="cpu")
    everything = CLIPReward(path=str(clip_folder), frames=None, device="cpu", batch_size=3)
    dense = everything(clips_of(videos)).dense
    torch.testing.assert_close(two(clips_of(videos)).dense, dense[:, [0, 3]])
    assert dense.shape == (3, 4)


def test_frames_of_all_clips_are_encoded_together(clip_folder, videos):
    reward = CLIPReward(path=str(clip_folder), frames=None, device="cpu", batch_size=8)
    sizes = []
    encoder, encode = reward.encoder, reward.encoder.towers.encode_image
    encoder.towers = encoder.towers._replace(encode_image=lambda images: sizes.append(len(images)) or encode(images))
    mixed = reward(clips_of([*videos[:2], videos[2][..., :33]]))
    assert sizes == [8, 4]  # 12 frames of three clips and of two sizes
    assert torch.equal(mixed.total[:2], reward(clips_of(videos)).total[:2])


def test_a_prompt_is_encoded_once(reward, videos):
    seen = []
    encoder, encode = reward.encoder, reward.encoder.towers.encode_text
    encoder.towers = encoder.towers._replace(encode_text=lambda texts: seen.extend(texts) or encode(texts))
    first = reward(clips_of(videos, ["a", "b", "a"]))
    second = reward(clips_of(videos, ["a", "b", "a"]))
    assert seen == ["a", "b"]
    assert torch.equal(first.total, second.total)


def test_the_prompt_cache_is_bounded(reward, videos):
    reward.encoder.text_cache = {str(number): torch.zeros(16) for number in range(MAX_CACHED_PROMPTS)}
    reward(clips_of(videos))
    assert len(reward.encoder.text_cache) == MAX_CACHED_PROMPTS
    assert set(PROMPTS) < set(reward.encoder.text_cache)


def test_a_cache_filled_in_inference_mode_serves_gradients(reward, videos):
    with torch.inference_mode():
        reward(clips_of(videos))
    videos.requires_grad_()
    reward(clips_of(videos)).total.sum().backward()
    assert videos.grad.abs().max() > 0


def test_the_callers_autocast_changes_nothing(reward, videos):
    plain = reward(clips_of(videos)).total
    reward.encoder.text_cache.clear()
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward(clips_of(videos)).total
    assert torch.equal(plain, inside)


def test_loading_leaves_the_random_state_and_freezes_the_weights(clip_folder):
    state = torch.get_rng_state()
    reward = CLIPReward(path=str(clip_folder), device="cpu")
    assert torch.equal(state, torch.get_rng_state())
    assert not reward.encoder.towers.model.training
    assert not any(parameter.requires_grad for parameter in reward.encoder.towers.model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_low_precision_stays_close(clip_folder, videos, reward, precision):
    low = CLIPReward(path=str(clip_folder), frames=None, device="cpu", precision=precision)
    found, exact = low(clips_of(videos)), reward(clips_of(videos))
    assert found.total.dtype == torch.float32
    assert not torch.equal(found.total, exact.total)
    torch.testing.assert_close(found.total, exact.total, atol=0.02, rtol=0)


def test_importing_rewards_does_not_import_a_reward_model():
    code = "import rewards, sys; print([m for m in ('open_clip', 'transformers', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
