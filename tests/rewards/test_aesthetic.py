"""AestheticReward: its head against the layers that it is made of, its embedding against open_clip."""

import pytest
import torch
from torch import nn

from rewards import RewardError, check, load
from rewards.aesthetic import affine

from .test_hpsv2 import bytes_video


def layered(state):
    """The published head as its authors run it: dropout that is switched off between linear layers."""
    widths = [state[f"layers.{layer}.weight"].shape for layer in (0, 2, 4, 6, 7)]
    linear = [nn.Linear(columns, rows) for rows, columns in widths]
    first, second, third, fourth, fifth = linear
    layers = nn.Sequential(first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), fourth, fifth)
    layers.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    return layers.eval()


def published_widths(seed=0):
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (rows, columns) in {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        state[f"layers.{layer}.weight"] = torch.randn(rows, columns, generator=draw) / columns**0.5
        state[f"layers.{layer}.bias"] = torch.randn(rows, generator=draw)
    return state


def test_the_layers_multiply_out(tmp_path):
    state = published_widths()
    torch.save(state, tmp_path / "head.pth")
    weight, bias = affine("aesthetic", tmp_path / "head.pth")
    embedding = nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(1)), dim=-1)
    with torch.no_grad():
        expected = layered(state)(embedding)[:, 0]
    assert expected.std() > 0.02
    torch.testing.assert_close(embedding @ weight + bias, expected, atol=2e-6, rtol=0)


def test_equals_open_clip_and_the_layers(aesthetic_files):
    import open_clip

    head, folder = aesthetic_files
    videos = bytes_video(2, 3, 3, 32, 32)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    layers = layered(torch.load(head, weights_only=True))
    normalise = transform.transforms[-1]
    with torch.no_grad():
        embeddings = model.eval().encode_image(normalise(videos.flatten(0, 1)))
        expected = layers(embeddings / embeddings.norm(dim=-1, keepdim=True)).view(2, 3)
    found = load("aesthetic", head=str(head), path=str(folder))(videos, ["a", "b"], fps=8)
    torch.testing.assert_close(found.dense, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.total, expected.mean(1), atol=1e-5, rtol=0)


def test_prompts_do_not_count(aesthetic_files):
    head, folder = aesthetic_files
    reward = load("aesthetic", head=str(head), path=str(folder))
    videos = bytes_video(2, 2, 3, 40, 48)
    assert torch.equal(reward(videos, ["a", "b"]).total, reward(videos, ["c", ""]).total)


def test_openais_model_is_the_default(aesthetic_files):
    check("aesthetic", head=str(aesthetic_files[0]))  # which is downloaded, and not read, when it is loaded
    with pytest.raises(RewardError, match="near: "):
        check("aesthetic", head=str(aesthetic_files[0]), model="ViT-L-15", pretrained="openai")


@pytest.mark.parametrize("head", [None, "/nowhere/head.pth"])
def test_a_missing_head_says_where_it_is_published(head):
    with pytest.raises(RewardError, match=r"^reward aesthetic: no file .*improved-aesthetic-predictor$"):
        check("aesthetic", head=head)


def relu_layout(state):  # layers 0, 3, 6, 9 and 11 where activations stand between them
    numbers = {"0": "0", "2": "3", "4": "6", "6": "9", "7": "11"}
    moved = {f"layers.{numbers[key.split('.')[1]]}.{key.split('.')[2]}": value for key, value in state.items()}
    state.clear()
    state.update(moved)


def misfit(state):
    state["layers.4.weight"] = torch.zeros(12, 23)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (relu_layout, "not a head without activations"),
        (lambda state: state.pop("layers.7.bias"), r"not in both: layers\.7\.bias"),
        (misfit, "do not fit together"),
        (
            lambda state: state.update({"layers.0.weight": torch.zeros(32, 15)}),
            "embeddings of 15 numbers, the model gives 16",
        ),
    ],
)
def test_a_head_of_another_form_is_named(aesthetic_files, tmp_path, spoil, message):
    state = torch.load(aesthetic_files[0], weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(RewardError, match=message) as caught:
        load("aesthetic", head=str(tmp_path / "head.pth"), path=str(aesthetic_files[1]))
    assert str(tmp_path / "head.pth") in str(caught.value)
    assert "\n" not in str(caught.value)
