"""HPSv3 against transformers, on a tiny model in the released format."""

import pytest
import torch
import torchvision.transforms.functional as TF

from rewards import Clip, RewardError, check, load

from .qwen2_vl_twin import HPSV3_TEMPLATE as TEMPLATE
from .qwen2_vl_twin import smart_size

PIXELS = 24 * 24


def build(folder, **options):
    options = {"base": str(folder / "base"), "pixels": PIXELS, "frames": None, "device": "cpu"} | options
    return load("hpsv3", path=str(folder / "HPSv3.safetensors"), **options)


def test_the_mean_of_each_frame_is_that_of_the_authors_forward_pass(hpsv3):
    videos = torch.rand(2, 3, 3, 20, 36, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "two dogs on a lawn"]
    found = build(hpsv3.folder)(videos, prompts)
    size = list(smart_size(20, 36, PIXELS, PIXELS))
    expected = []
    for video, prompt in zip(videos, prompts, strict=True):
        images = TF.resize((video * 255).round().byte(), size, TF.InterpolationMode.BICUBIC, antialias=True).float()
        texts = [TEMPLATE.replace("{text_prompt}", prompt)] * 3
        expected.append(hpsv3.twin.logits("image", [image[None] for image in images], texts)[:, 0])
    expected = torch.stack(expected)  # (2, 3 frames, 2 outputs)
    assert expected[..., 0].std() > 1e-3
    torch.testing.assert_close(found.dense, expected[..., 0], atol=5e-5, rtol=0)
    torch.testing.assert_close(found.total, expected[..., 0].mean(1), atol=5e-5, rtol=0)
    torch.testing.assert_close(found.dims["sigma"], expected[..., 1].exp().mean(1), atol=5e-5, rtol=0)


def test_frames_in_small_batches_score_the_same(hpsv3):
    clips = [Clip(torch.rand(n, 3, 20, 36, generator=torch.Generator().manual_seed(n)), "a", 8.0) for n in (1, 4)]
    torch.testing.assert_close(
        build(hpsv3.folder, batch_size=2)(clips).total, build(hpsv3.folder)(clips).total, atol=1e-4, rtol=0
    )


def test_a_prompt_with_its_token_is_refused(hpsv3):
    with pytest.raises(RewardError, match="special token"):
        build(hpsv3.folder)(torch.rand(1, 1, 3, 32, 32), ["a <|Reward|>"])


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "extract_template"), ("no token {text_prompt}", "must hold"), ("<|Reward|> no prompt", "must hold")],
)
def test_the_template_is_checked_before_weights_are_read(tmp_path, text, message):
    (tmp_path / "HPSv3.safetensors").write_bytes(b"not looked at")
    if text:
        (tmp_path / "prompt_template.txt").write_text(text)
    with pytest.raises(RewardError, match=message):
        check("hpsv3", path=str(tmp_path))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(RewardError, match="holds 0 .safetensors"):
        check("hpsv3", path=str(tmp_path))
