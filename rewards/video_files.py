"""Videos from files: frames and rate, or one line that says what is wrong with the file.

F frames, H W pixels
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from rewards.contract import Clip, RewardError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PIXELS = 2**29  # of all frames together: 1.6 GB of bytes, 84 s of 480x832 at 16 frames a second
FPS_RANGE = (0.1, 240.0)  # a container that counts milliseconds claims 1000 where it knows nothing
STILL_FPS = 1.0  # a single image lasts a second
# A playlist in the guise of a video could have ffmpeg read other files and addresses.
SAFE_INPUT = ("-protocol_whitelist", "file", "-format_whitelist", "mov,matroska,webm,avi,gif")


def read_video(
    path: str | Path, fps: float | None = None, max_pixels: int = MAX_PIXELS, max_frames: int | None = None
) -> tuple[Tensor, float]:
    """Read a video through ffmpeg, or an image as a video of one frame.

    Frames come as they are stored: none is doubled or dropped to even out a varying rate, whose mean is the rate then.
    Transparent pixels of an image lie on white.

    Args:
        path: mp4, m4v, mov, webm, mkv, avi, gif; png, jpg, jpeg, webp, bmp.
        fps: the rate to believe instead of the file's.
        max_pixels: the most that all frames may have together.
        max_frames: read no more than the first ones, which says little of what is behind them; None: all.
    Returns: frames (F, 3, H, W) uint8, and frames a second.
    Raises: RewardError, one line with the file's name: missing, empty, damaged (also where a part could be read), not a
        video, larger than max_pixels, or without a plausible rate.
    """
    path = Path(path)
    if not path.is_file():
        raise RewardError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise RewardError(f"{path}: the file is empty (0 bytes)")
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return _read_image(path, max_pixels), fps or STILL_FPS
    if suffix not in VIDEO_SUFFIXES:
        known = ", ".join((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
        raise RewardError(f"{path}: {suffix or 'a name without suffix'} is no known kind of video ({known})")
    if suffix == ".gif" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
        raise RewardError(f"{path}: damaged: a GIF without its end (make or copy it again)")  # ffmpeg does not mind
    frames, log = _decode(path, max_pixels, max_frames)
    return frames, _plausible_rate(path, log) if fps is None else fps


def clip_from_file(path: str | Path, prompt: str, fps: float | None = None, max_pixels: int = MAX_PIXELS) -> Clip:
    """Read a clip to be scored, with all frames as float. Raises: RewardError as `read_video` does."""
    frames, rate = read_video(path, fps, max_pixels)
    return Clip(frames.contiguous().float().div_(255), prompt, rate)


def _decode(path: Path, max_pixels: int, max_frames: int | None) -> tuple[Tensor, str]:
    """Frames (F, 3, H, W), and what ffmpeg says of the file."""
    from imageio_ffmpeg import get_ffmpeg_exe

    output = ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24"]
    output += [] if max_frames is None else ["-frames:v", str(max_frames)]
    command = [get_ffmpeg_exe(), "-nostdin", "-nostats", "-v", "level+info", *SAFE_INPUT, "-i", f"file:{path}"]
    with tempfile.TemporaryFile() as messages:
        with subprocess.Popen([*command, *output, "-"], stdout=subprocess.PIPE, stderr=messages) as process:
            try:
                data, shape = _read_images(path, process.stdout, max_pixels)
            except BaseException:
                process.kill()
                raise
        messages.seek(0)
        log = messages.read().decode("utf-8", "replace")
    # ffmpeg ends well after half of a file, too, so every complaint counts.
    if process.returncode != 0 or _complaints(log):
        reason = (_complaints(log) or [f"ffmpeg ended with {process.returncode}"])[0]
        raise RewardError(f"{path}: not a video, or damaged: {reason} (make or copy it again)")
    if not data:
        raise RewardError(f"{path}: a video without frames")
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, *shape, 3).permute(0, 3, 1, 2), log


def _read_images(path: Path, stream: BinaryIO, max_pixels: int) -> tuple[bytearray, tuple[int, int]]:
    """Read a stream of binary PPM images of one size: all their bytes, and height and width."""
    data, shape, seen = bytearray(), (0, 0), 0
    while stream.readline() == b"P6\n":
        width, height = (int(number) for number in stream.readline().split())
        stream.readline()  # the largest value, 255
        seen, shape = seen + width * height, (height, width)
        if seen > max_pixels:
            raise RewardError(_too_large(path, max_pixels))
        data += stream.read(width * height * 3)
    return data, shape


def _too_large(path: Path, max_pixels: int) -> str:
    return f"{path}: more than {max_pixels} pixels in all frames; shorten it, shrink it, or raise max_pixels"


def _complaints(log: str) -> list[str]:
    found = re.findall(r"^(?:\[[^\]]*\] )?\[(?:error|fatal|panic)\] (.+)$", log, re.MULTILINE)
    return [" ".join(line.split())[:200] for line in found]


def _plausible_rate(path: Path, log: str) -> float:
    line = next((line for line in log.splitlines() if "Stream #0:" in line and " Video: " in line), "")
    match = re.search(r", ([\d.]+)(k?) fps", line)
    if not match:
        raise RewardError(f"{path}: does not say how many frames a second it has; give fps")
    fps = float(match[1]) * (1000 if match[2] else 1)
    if not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
        raise RewardError(f"{path}: claims {fps:g} frames a second, which cannot be right; give fps")
    # ffmpeg prints 23.976... as 23.98; the rates of television are whole numbers / 1.001.
    television = round(fps * 1.001) / 1.001
    return television if f"{television:.2f}" == f"{fps:.2f}" and fps % 1 else fps


def _read_image(path: Path, max_pixels: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise RewardError(f"{path}: an animation of {image.n_frames} frames; convert it to mp4 or gif")
            if image.mode.startswith(("I", "F")):
                raise RewardError(f"{path}: more than 8 bits a channel ({image.mode}); convert it to 8")
            if image.width * image.height > max_pixels:
                raise RewardError(_too_large(path, max_pixels))
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.array(image.convert("RGB"))
    except RewardError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's for damaged files
        raise RewardError(f"{path}: not an image, or damaged: {' '.join(str(error).split())[:200]}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
