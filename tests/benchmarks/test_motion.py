"""Flow of textures moved by a known number of pixels; VBench's rule by hand arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.errors import UserError
from benchmarks.winning.motion import (
    Flow,
    dynamic_degree,
    flow_magnitude,
    is_dynamic,
    load_flow,
    raft_flow,
    raft_weights,
)

pytest.importorskip("cv2")


def moving(step: tuple[int, int], frames: int = 4, grain: int = 4, size: int = 64) -> Tensor:
    """(frames, 3, size, size) of a texture that is smooth over grain pixels and moves by whole ones (right, down)."""
    noise = torch.rand(1, 3, 192 // grain, 192 // grain, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(noise, scale_factor=grain, mode="bicubic").clamp(0, 1)[0]
    right, down = step
    cuts = [(60 - down * i, 60 - right * i) for i in range(frames)]
    return torch.stack([large[:, y : y + size, x : x + size] for y, x in cuts])


@pytest.fixture(scope="module")
def dis() -> Flow:
    return load_flow("dis")


def lengths(*values: float) -> Flow:
    """A flow whose vectors have given lengths in the first row, 100 columns, and (3, 4) / 5 as direction."""
    field = torch.tensor(values)[None] * torch.tensor([0.6, 0.8])[:, None]
    return Flow("given", lambda first, second: field[:, None, :])


@pytest.mark.parametrize("step", [(1, 0), (2, 1), (-3, 2), (0, -4)])
def test_dis_finds_a_known_translation(dis: Flow, step: tuple[int, int]) -> None:
    video = moving(step)
    flow = dis.between(video[0], video[1])
    inside = flow[:, 8:-8, 8:-8].flatten(1).median(1).values
    assert inside.tolist() == pytest.approx(step, abs=0.1)
    magnitude = flow_magnitude(video, 8, dis)
    assert magnitude.shape == (3,)
    assert magnitude.tolist() == pytest.approx(
        [math.hypot(*step)] * 3, rel=0.15
    )  # borders that appear blur the top 5 %


def test_small_frames_are_measured_in_their_own_pixels(dis: Flow) -> None:
    video = F.avg_pool2d(moving((4, 8), grain=16), 4)  # 16 x 16, moving by 1 and 2
    flow = dis.between(video[0], video[1])
    assert flow.shape == (2, 16, 16)
    assert flow[:, 3:-3, 3:-3].flatten(1).median(1).values.tolist() == pytest.approx([1, 2], abs=0.1)


def test_still_videos_do_not_move(dis: Flow) -> None:
    still = moving((0, 0), frames=5)
    assert flow_magnitude(still, 8, dis).max() < 1e-3
    assert dynamic_degree([still, still[:2], still[:1], moving((3, 0), frames=5)], 8, dis) == [
        False,
        False,
        False,
        True,
    ]


def test_mean_of_the_longest_five_percent() -> None:
    values = [0.1] * 94 + [10.0, 2.0, 3.0, 4.0, 5.0, 1.5]  # the longest 5 of 100: 10 + 2 + 3 + 4 + 5
    assert flow_magnitude(torch.zeros(2, 3, 1, 100), 8, lengths(*values)).tolist() == pytest.approx([24 / 5])


@pytest.mark.parametrize(("fps", "pairs"), [(8, 15), (11, 15), (12, 7), (16, 7), (24, 5), (30, 3), (4, 15)])
def test_about_eight_frames_a_second_are_looked_at(fps: float, pairs: int) -> None:
    # every 1st, 1st, 2nd (1.5 rounds to 2), 2nd, 3rd, 4th (3.75), 1st of 16 frames
    assert len(flow_magnitude(torch.zeros(16, 3, 1, 2), fps, lengths(1, 1))) == pairs


def test_rule_by_hand() -> None:
    # 16 frames of 256 pixels at 8 a second: 4 of 15 pairs above 6.0 pixels.
    assert is_dynamic(torch.tensor([6.1] * 4 + [0.0] * 11), 8, 256)
    assert not is_dynamic(torch.tensor([6.1] * 3 + [6.0] * 12), 8, 256)
    # 480 pixels: 6 * 480 / 256 = 11.25. At 4 a second twice that; at 24 a second the same, as frames are left out.
    assert is_dynamic(torch.full((15,), 11.26), 8, 480)
    assert not is_dynamic(torch.full((15,), 11.24), 24, 480)
    assert not is_dynamic(torch.full((15,), 22.4), 4, 480)
    assert is_dynamic(torch.full((15,), 22.6), 4, 480)
    # 6 frames: round(1.5) = 2 of 5 pairs.
    assert not is_dynamic(torch.tensor([6.1] + [0.0] * 4), 8, 256)
    # 9 frames of 32 pixels: round(2.25) = 2 pairs above 0.75. 49 frames: round(12.25) = 12.
    assert is_dynamic(torch.tensor([0.76] * 2 + [0.0] * 6), 8, 32)
    assert not is_dynamic(torch.tensor([0.76] + [0.0] * 7), 8, 32)
    assert is_dynamic(torch.tensor([0.76] * 12 + [0.0] * 36), 8, 32)
    assert not is_dynamic(torch.tensor([0.76] * 11 + [0.0] * 37), 8, 32)


def test_raft_takes_any_size_and_answers_in_pixels_of_the_video() -> None:
    sizes = []

    class Shift(torch.nn.Module):  # answers as torchvision's RAFT does: one flow for each update
        def forward(self, first: Tensor, second: Tensor, num_flow_updates: int) -> list[Tensor]:
            assert num_flow_updates == 20
            assert (first.min(), second.max()) == (-1, 1)
            sizes.append(tuple(first.shape[-2:]))
            return [torch.zeros(1, 2, *sizes[-1]), torch.tensor([8.0, -4.0])[:, None, None].expand(1, 2, *sizes[-1])]

    between = raft_flow(Shift(), torch.device("cpu"))
    flow = between(torch.zeros(3, 33, 50), torch.ones(3, 33, 50))  # 4 times: 132 x 200, padded to 136 x 200
    assert flow.shape == (2, 33, 50)
    assert flow[:, 0, 0].tolist() == [2.0, -1.0]
    assert between(torch.zeros(3, 130, 256), torch.ones(3, 130, 256))[:, 5, 5].tolist() == [8.0, -4.0]
    assert sizes == [(136, 200), (136, 256)]


def test_flow_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert load_flow().name == "dis"
    with pytest.raises(UserError, match="flow: 'farneback' is none of auto, raft, dis"):
        load_flow("farneback")
    raft_weights().parent.mkdir()
    raft_weights().write_bytes(b"cut short")
    with pytest.raises(UserError, match=r'flow "raft": no weights .*raft_large_C_T_V1.*, or use "dis"'):
        load_flow()  # weights that are there but broken are no reason to measure something else
