"""Mixtures of criteria, against arithmetic by hand: gates are logarithms of shares, which softmax gives back."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rewards import Clip, RewardError, Scores, aspects, weighted
from rewards.mixture import mixture
from rewards.mj_video import ASPECTS, MJVideoHead, load_head


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_a_mixture_by_hand():
    criteria = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -3.0]], dtype=torch.float64)
    criterion_gates = logs([3, 1, 7], [1, 1, 5])  # an only criterion has all of its aspect, whatever its gate
    aspect_gates = logs([1, 4], [3, 1])
    found = mixture(criteria, criterion_gates, aspect_gates, [[0, 1], [2]])
    # 3/4 1 - 1/4 1 = 0.5; 0.5 | 1/2 0 + 1/2 2 = 1; -3
    assert found.aspects.flatten().tolist() == pytest.approx([0.5, 0.5, 1.0, -3.0])
    # 1/5 0.5 + 4/5 0.5 = 0.5 | 3/4 1 - 1/4 3 = 0
    assert found.total.tolist() == pytest.approx([0.5, 0.0])


def test_temperature_takes_the_root_of_the_shares():
    criteria = torch.tensor([[1.0, 0.0, 6.0]], dtype=torch.float64)
    found = mixture(criteria, logs([9, 1, 1]), logs([16, 1]), [[0, 1], [2]], temperature=2.0)
    assert found.aspects[0].tolist() == pytest.approx([3 / 4, 6.0])  # 9 : 1 becomes 3 : 1
    assert found.total.item() == pytest.approx(4 / 5 * 3 / 4 + 1 / 5 * 6)


def test_groups_may_be_in_any_order_and_gates_the_same_for_all_clips():
    criteria = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]], dtype=torch.float64)
    found = mixture(criteria, logs([1, 1, 3]), logs([1, 1]), [[1], [2, 0]])
    assert found.aspects.tolist() == [pytest.approx([10, 75.25]), pytest.approx([20, 150.5])]
    assert found.total.tolist() == pytest.approx([42.625, 85.25])


class Judged:
    """Answers with given dims and the mean pixel as a further one."""

    name, scope, differentiable = "judged", "clip", True

    def __init__(self, **dims):
        self.dims = {name: torch.tensor(values) for name, values in dims.items()}

    def __call__(self, clips):
        pixel = torch.stack([clip.video.mean() for clip in clips])
        return Scores(pixel, {**self.dims, "pixel": pixel}, dense=torch.stack([pixel, pixel], 1))


def clips(video=None):
    video = torch.full((2, 1, 3, 4, 4), 0.5) if video is None else video
    return [Clip(one, "a") for one in video]


def test_aspects_of_a_reward_by_hand():
    judged = Judged(sharp=[1.0, 0.0], light=[0.0, 1.0], text=[0.25, 0.75])
    reward = aspects(judged, {"picture": {"sharp": 3, "light": 1}, "meaning": ["text"]}, {"picture": 1, "meaning": 4})
    found = reward(clips())
    assert reward.name == "judged"
    assert found.dims["picture"].tolist() == pytest.approx([0.75, 0.25])
    assert found.dims["meaning"].tolist() == [0.25, 0.75]
    assert found.total.tolist() == pytest.approx([(0.75 + 4 * 0.25) / 5, (0.25 + 4 * 0.75) / 5])
    assert list(found.dims) == ["picture", "meaning", "sharp", "light", "text", "pixel"]
    assert found.dense.shape == (2, 2)


def test_without_weights_all_count_alike_and_gradients_pass():
    video = torch.full((2, 1, 3, 4, 4), 0.5, requires_grad=True)
    reward = aspects(Judged(text=[0.0, 1.0], sharp=[1.0, 1.0]), {"a": ["pixel", "sharp"], "b": ["text"]}, name="mean")
    found = reward(clips(video))
    assert reward.name == "mean"
    assert found.total.tolist() == pytest.approx([0.375, 0.875])
    found.total.sum().backward()
    assert video.grad.unique().tolist() == pytest.approx([1 / 4 / 48])


def test_a_clip_without_a_criterion_is_invalid():
    reward = aspects(Judged(text=[float("nan"), 1.0], sharp=[1.0, 1.0]), {"a": ["sharp"], "b": ["text"]})
    found = reward(clips())
    assert found.valid.tolist() == [False, True]
    assert found.dims["a"].tolist() == [1, 1]


def test_aspects_of_several_rewards_and_of_one_that_is_awaited():
    class Waits(Judged):
        async def __call__(self, clips):
            return super().__call__(clips)

    parts = weighted({"x": Waits(text=[0.0, 1.0]), "y": Waits(text=[1.0, 1.0])}, {"x": 1, "y": 1})
    assert aspects(parts, {"text": ["x/text", "y/text"]})(clips()).total.tolist() == [0.5, 1]
    awaited = aspects(Waits(text=[0.0, 1.0]), {"meaning": ["text"]})
    assert awaited.is_async
    assert awaited(clips()).total.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("groups", "weights", "message"),
    [
        ({"a": ["text"]}, {"b": 1}, r"aspects \['a'\] and weights \['b'\] must name the same"),
        ({}, None, "weights is {}, expected one number above 0"),
        ({"a": []}, None, "a is {}, expected one number above 0"),
        ({"a": {"text": 0}}, None, "a is {'text': 0}, expected one number above 0"),
        ({"a": ["text"]}, {"a": math.nan}, "weights is {'a': nan}"),
        ({"a": ["text"]}, {"a": "much"}, "weights is {'a': 'much'}"),
        ({"a": ["text"], "b": ["text"]}, None, "text in more than one aspect"),
        ({"a": ["motion"]}, None, "no dims motion in judged; it has text, pixel"),
        ({"pixel": ["text"]}, None, "pixel is a dim already"),
    ],
)
def test_groups_that_do_not_fit_are_named(groups, weights, message):
    with pytest.raises(RewardError, match=f"reward judged: {message}"):
        aspects(Judged(text=[0.0, 1.0]), groups, weights)(clips())


def checkpoint(folder, hidden=12, width=7, seed=0, dtype=torch.float32):
    """A head in the released format, beside a weight of the backbone."""
    draw = np.random.default_rng(seed)

    def values(*shape):
        return torch.tensor(draw.standard_normal(shape), dtype=dtype)

    state = {"regression_layer.weight": values(28, hidden), "reward_transform_matrix": values(28, 28)}
    for gate, num in (("aspect_gating", 5), ("criteria_gating", 28)):
        widths = [hidden, width, width, width, num]
        for layer in range(4):
            state[f"{gate}.layers.{layer}.weight"] = values(widths[layer + 1], widths[layer]) / 2
            state[f"{gate}.layers.{layer}.bias"] = values(widths[layer + 1])
        state[f"{gate}.logit_scale"] = values(1).abs() + 0.5
    save_file(state | {"model.mlp1.0.weight": values(4)}, folder / "model.safetensors")
    return {name: value.double().numpy() for name, value in state.items()}


def gate(state, name, x):
    for layer in range(4):
        x = x @ state[f"{name}.layers.{layer}.weight"].T + state[f"{name}.layers.{layer}.bias"]
        x = np.maximum(x, 0) if layer < 3 else x
    return x


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_head_of_mj_video_against_numpy(tmp_path, temperature):
    state = checkpoint(tmp_path)
    draw = np.random.default_rng(1)
    last, closing = draw.standard_normal((2, 3, 12))
    criteria = last @ state["regression_layer.weight"].T @ state["reward_transform_matrix"]
    inner, outer = (np.exp(gate(state, f"{name}_gating", closing) / temperature) for name in ("criteria", "aspect"))
    borders = [0, 5, 11, 16, 23, 28]  # of the authors' evaluation script
    scores = np.zeros((3, 5))
    for aspect in range(5):
        part = slice(borders[aspect], borders[aspect + 1])
        scores[:, aspect] = (inner[:, part] * criteria[:, part]).sum(1) / inner[:, part].sum(1)
    scores *= state["criteria_gating.logit_scale"]
    total = (outer * scores).sum(1) / outer.sum(1) * state["aspect_gating.logit_scale"]
    head = load_head(tmp_path / "model.safetensors", temperature)
    found = head(torch.tensor(last).float(), torch.tensor(closing).float())
    np.testing.assert_allclose(found.criteria.detach(), criteria, atol=1e-4)
    np.testing.assert_allclose(found.aspects.detach(), scores, atol=1e-4)
    np.testing.assert_allclose(found.total.detach(), total, atol=1e-4)


def test_the_criteria_are_28_in_5_aspects():
    assert [len(criteria) for criteria in ASPECTS.values()] == [5, 6, 5, 7, 5]
    assert MJVideoHead(8, [4]).groups[2] == [11, 12, 13, 14, 15]


def test_a_head_is_read_from_a_folder_in_float32(tmp_path):
    state = checkpoint(tmp_path, dtype=torch.bfloat16)
    head = load_head(tmp_path)
    assert not head.training
    assert {value.dtype for value in head.state_dict().values()} == {torch.float32}
    np.testing.assert_array_equal(head.regression_layer.weight.detach(), state["regression_layer.weight"])


def test_a_file_that_is_no_head_is_named_in_one_line(tmp_path):
    checkpoint(tmp_path)
    whole = {f"aspect_gating.layers.{layer}.bias": torch.zeros(5) for layer in range(2)}
    files = {
        "other": {"lm_head.weight": torch.zeros(2, 2)},
        "five": {"regression_layer.weight": torch.zeros(5, 4)},
        "cut": {"regression_layer.weight": torch.zeros(28, 4), **whole},
    }
    for name, state in files.items():
        save_file(state, tmp_path / f"{name}.bin")
    (tmp_path / "broken.bin").write_bytes(b"\x00" * 100)
    (tmp_path / "empty").mkdir()
    messages = {
        "other.bin": "no regression_layer.weight in .*other.bin",
        "five.bin": "has 5 criteria, expected 28",
        "cut.bin": "holds another head: .*criteria_gating",
        "broken.bin": "broken.bin cannot be read; copy it again",
        "missing.bin": "no weights file .*missing.bin",
        "empty": "no regression_layer.weight in .*empty",
    }
    for name, message in messages.items():
        with pytest.raises(RewardError, match=message) as error:
            load_head(tmp_path / name)
        assert "\n" not in str(error.value)
