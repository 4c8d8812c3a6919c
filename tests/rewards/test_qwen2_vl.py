"""The parts that VideoReward and HPSv3 share, against transformers' own."""

import pytest
import torch
from torch import nn

from rewards import RewardError
from rewards.checkpoints import merge_lora, plain_names, read_tensors
from rewards.qwen2_vl import Qwen2VLReward, find_base
from rewards.qwen2_vl_reader import resized, smart_resize

from .qwen2_vl_twin import REWARD_TOKENS, Twin, processor, save_base, smart_size


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    twin = Twin(REWARD_TOKENS, lambda hidden: nn.Linear(hidden, 1, bias=False))
    save_base(folder, twin)
    return Qwen2VLReward(
        "test",
        str(folder),
        twin.released_state(),
        lambda hidden: nn.Linear(hidden, 1, bias=False),
        REWARD_TOKENS,
        lora_scale=2.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("shape", [(4, 3, 16, 24), (5, 3, 8, 8), (1, 3, 24, 16)])
def test_patches_are_those_of_the_processor(model, shape):
    frames = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 255).round()
    expected = processor().video_processor(frames, do_resize=False, do_sample_frames=False, return_tensors="pt")
    found = model.patches(frames)
    torch.testing.assert_close(found.rows, expected.pixel_values_videos, atol=1e-5, rtol=0)
    assert list(found.grid) == expected.video_grid_thw[0].tolist()


def test_an_image_is_a_video_of_one_frame(model):
    image = (torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 255).round()
    expected = processor().image_processor(image.byte(), do_resize=False, return_tensors="pt")
    found = model.patches(image[None])
    torch.testing.assert_close(found.rows, expected.pixel_values, atol=1e-5, rtol=0)
    assert list(found.grid) == expected.image_grid_thw[0].tolist()


def test_the_chat_is_the_processors(model):
    content = [{"type": "video"}, {"type": "text", "text": "why?"}]
    expected = processor().apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert model.chat("video", "why?") == expected


@pytest.mark.parametrize("bounds", [(100352, 200704), (200704, 200704), (3136, 12845056)])
@pytest.mark.parametrize("shape", [(480, 832), (1080, 1920), (32, 32), (28, 280), (715, 700), (17, 900)])
def test_sides_follow_qwens_rule(shape, bounds):
    found = smart_resize(*shape, 28, *bounds)
    assert found == smart_size(*shape, *bounds, factor=28)
    assert all(side % 28 == 0 and side > 0 for side in found)


def test_resizing_rounds_as_bytes_do_and_keeps_a_gradient():
    video = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    plain = resized(video, 32, 48)
    assert torch.equal(plain, plain.round())
    assert torch.equal(resized(video.clone().requires_grad_(), 32, 48), plain)
    tracked = video.clone().requires_grad_()
    resized(tracked, 32, 48).sum().backward()
    # Resizing keeps a constant, so that the gradient of the sum adds up to the pixels that there are afterwards.
    assert tracked.grad.sum().item() == pytest.approx(255 * 2 * 3 * 32 * 48, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("base_model.model.model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("base_model.model.model.layers.3.mlp.up_proj.base_layer.weight", "language_model.layers.3.mlp.up_proj.weight"),
        (
            "base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight",
            "language_model.layers.3.mlp.up_proj.lora_A",
        ),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_B.weight", "language_model.layers.3.mlp.up_proj.lora_B"),
        ("base_model.model.model.language_model.norm.weight", "language_model.norm.weight"),
        ("base_model.model.model.visual.merger.ln_q.bias", "visual.merger.ln_q.bias"),
        ("model.language_model.norm.weight", "language_model.norm.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("visual.merger.ln_q.bias", "visual.merger.ln_q.bias"),
        ("base_model.model.rm_head.weight", "rm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("rm_head.0.bias", "rm_head.0.bias"),
    ],
)
def test_names_of_old_and_new_checkpoints(name, expected):
    assert list(plain_names({name: torch.zeros(1)})) == [expected]


def test_lora_is_merged_by_its_formula():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.5]])
    found = merge_lora("test", {"q.weight": weight, "q.lora_A": a, "q.lora_B": b, "k.bias": weight[0]}, 2.0)
    assert found.keys() == {"q.weight", "k.bias"}
    assert found["q.weight"].tolist() == [[1 + 4, 2 - 4], [3 + 1, 4 - 1]]


def test_the_base_is_the_folder_inside_or_the_one_named(tmp_path):
    assert find_base("test", tmp_path, "Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
    with pytest.raises(RewardError, match="give base="):
        find_base("test", tmp_path, None)
    (tmp_path / "qwen").mkdir()
    assert find_base("test", tmp_path, "qwen") == str(tmp_path / "qwen")
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    assert find_base("test", tmp_path, "Qwen/Qwen2-VL-2B-Instruct") == str(tmp_path / "qwen")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    assert find_base("test", tmp_path, "Qwen/Qwen2-VL-2B-Instruct") == str(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": "text"}}])
def test_only_a_mapping_of_tensors_is_a_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(RewardError, match="names to tensors"):
        read_tensors("test", tmp_path / "model.pth")
