"""How much moves: optical flow between frames, and VBench's dynamic degree.

The rule is that of github.com/Vchitect/VBench, vbench/dynamic_degree.py at 11abda9: about 8 frames a second, the mean
of the longest 5 % of the flow vectors of each pair of frames, a pair moves above 6 pixels for a frame of 256, and a
video is dynamic where a quarter as many pairs move as there are frames. Only with "raft" are the vectors VBench's, too
(arXiv 2003.12039; the authors' weights for FlyingChairs and FlyingThings3D, as torchvision has them; 20 updates); "dis"
is OpenCV's dense inverse search (arXiv 1603.03590). Numbers of the two are not comparable, so name the flow with them.

F frames, P = F' - 1 pairs of neighbours among the F' frames looked at, H W pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.errors import UserError, one_line

from ..pictures import INSTALL

FLOWS = ("auto", "raft", "dis")
FPS = 8.0  # at which videos are looked at
LONGEST = 0.05  # share of the flow vectors
PIXELS, SIZE = 6.0, 256.0  # a pair moves above so many pixels for frames whose shorter side is SIZE
RAFT_UPDATES = 20
RAFT_SIDE = 128  # pixels; its correlation pyramid needs them
DIS_SIDE = 32  # pixels; below, its coarsest scale holds no whole patch


class Flow(NamedTuple):
    name: str  # "raft" or "dis"
    between: Callable[[Tensor, Tensor], Tensor]  # two frames (3, H, W) in [0, 1] -> (2, H, W) pixels right and down


def load_flow(name: str = "auto", device: str | torch.device = "cpu") -> Flow:
    """Optical flow by its name.

    Args:
        name: "raft" (torchvision, which fetches 20 MB of weights the first time), "dis" (OpenCV, no weights), or
            "auto": "raft" where its weights are already there, otherwise "dis".
        device: for "raft".
    Raises: UserError, one line: unknown, weights that cannot be had, OpenCV missing.
    """
    if name not in FLOWS:
        raise UserError(f"flow: {name!r} is none of {', '.join(FLOWS)}")
    if name == "auto":
        name = "raft" if raft_weights().is_file() else "dis"
    return Flow(name, _raft(torch.device(device)) if name == "raft" else _dis())


def raft_weights() -> Path:
    """Where torchvision keeps RAFT's weights once they are fetched."""
    from torchvision.models.optical_flow import Raft_Large_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(Raft_Large_Weights.C_T_V1.url).name


def flow_magnitude(video: Tensor, fps: float, flow: Flow | None = None) -> Tensor:
    """Mean length of the longest 5 % of the flow vectors, for each pair of neighbours about 1/8 second apart.

    Args:
        video: (F, 3, H, W) in [0, 1].
        fps: its frames a second; every round(fps / 8)-th frame is looked at.
        flow: default: `load_flow()`.
    Returns: (P,) pixels of the video, P = 0 for a single frame.
    """
    flow = flow or load_flow()
    frames = video[:: max(1, round(fps / FPS))].float()
    longest = []
    for first, second in zip(frames[:-1], frames[1:], strict=True):
        lengths = flow.between(first, second).square().sum(0).sqrt().flatten()
        longest.append(lengths.topk(max(1, int(LONGEST * len(lengths)))).values.mean().cpu())
    return torch.stack(longest) if longest else torch.zeros(0)


def is_dynamic(magnitude: Tensor, fps: float, side: int) -> bool:
    """VBench's rule on the (P,) values of `flow_magnitude`.

    A pair moves above 6 * side / 256 pixels, and as many times more as its frames lie further apart than 1/8 second in
    a slow video. The video is dynamic where at least round(4 * (P + 1) / 16) pairs move; one at least, where VBench
    takes a still video of two frames for a dynamic one.

    Args:
        fps: of the video, before frames were left out.
        side: pixels of the shorter side.
    """
    threshold = max(1.0, FPS / fps) * PIXELS * side / SIZE
    enough = max(1, round(4 * (len(magnitude) + 1) / 16))
    return int((magnitude > threshold).sum()) >= enough


def dynamic_degree(videos: Sequence[Tensor], fps: float, flow: Flow | None = None) -> list[bool]:
    """Whether each video (F, 3, H, W) in [0, 1] is dynamic; VBench's dynamic degree of a model is the mean."""
    flow = flow or load_flow()
    return [is_dynamic(flow_magnitude(video, fps, flow), fps, min(video.shape[-2:])) for video in videos]


def _raft(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    url = Raft_Large_Weights.C_T_V1.url
    try:
        weights = torch.hub.load_state_dict_from_url(url, check_hash=True, progress=False, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:  # no network; a file that was cut short
        path = raft_weights()
        raise UserError(f'flow "raft": no weights ({one_line(error)}); put {url} at {path}, or use "dis"') from error
    model = raft_large(weights=None)
    model.load_state_dict(weights)
    return raft_flow(model.eval().to(device), device)


def raft_flow(model: torch.nn.Module, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A RAFT network for frames of any size: enlarged where they are too small, padded to multiples of 8."""

    @torch.no_grad()
    def between(first: Tensor, second: Tensor) -> Tensor:
        pair = torch.stack([first, second]).to(device)
        times = _enlargement(pair, RAFT_SIDE)
        pair = F.interpolate(pair, scale_factor=times, mode="bilinear") if times > 1 else pair
        height, width = pair.shape[-2:]
        right, below = -width % 8, -height % 8
        pair = F.pad(pair, (right // 2, right - right // 2, below // 2, below - below // 2), mode="replicate")
        flow = model(*(2 * pair - 1).split(1), num_flow_updates=RAFT_UPDATES)[-1]
        return _reduce(flow[..., below // 2 :, right // 2 :][..., :height, :width], times)

    return between


def _dis() -> Callable[[Tensor, Tensor], Tensor]:
    try:
        import cv2
    except ImportError as error:
        raise UserError(f'flow "dis" needs OpenCV: {INSTALL}') from error
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def between(first: Tensor, second: Tensor) -> Tensor:
        pair = torch.stack([first, second])
        times = _enlargement(pair, DIS_SIDE)
        pair = F.interpolate(pair, scale_factor=times, mode="bilinear") if times > 1 else pair
        pixels = pair.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        grey = [cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY) for image in pixels]
        return _reduce(torch.from_numpy(search.calc(*grey, None)).permute(2, 0, 1)[None], times)

    return between


def _enlargement(frames: Tensor, side: int) -> int:
    return max(1, math.ceil(side / min(frames.shape[-2:])))


def _reduce(flow: Tensor, times: int) -> Tensor:
    """(1, 2, times H, times W) in enlarged pixels -> (2, H, W) in the video's."""
    return F.avg_pool2d(flow, times)[0] / times if times > 1 else flow[0]
