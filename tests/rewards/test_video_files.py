"""Reading videos: what comes out is what was written, and what is broken is said in one line with the file's name."""

import subprocess

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from rewards import RewardError
from rewards.video_files import clip_from_file, read_video

CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx-vp9"}


def ramp(frames=12, height=48, width=64):
    """(F, H, W, 3): every frame of one gray, brighter each time, with a red left half."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for index in range(frames):
        video[index] = 40 + 12 * index
        video[index, :, : width // 2] = (200, 10, 10)
    return video


def write(path, frames=None, fps=8, codec=None, **options):
    frames = ramp() if frames is None else frames
    codec = codec or CODECS[path.suffix[1:]]
    quality = {"output_params": ["-crf", "10"]} if codec.startswith("lib") else {}
    settings = {"plugin": "FFMPEG", "fps": fps, "codec": codec, "macro_block_size": 1, "ffmpeg_log_level": "error"}
    iio.imwrite(path, frames, **{**settings, **quality, **options})
    return path


def ffmpeg(*arguments):
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


def refused(path, message, **options):
    with pytest.raises(RewardError) as caught:
        read_video(path, **options)
    text = str(caught.value)
    assert str(path) in text
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("suffix", ["m4v", *CODECS])
def test_reads_every_container(tmp_path, suffix):
    write(tmp_path / "a.mp4" if suffix == "m4v" else tmp_path / f"a.{suffix}").rename(tmp_path / f"b.{suffix}")
    frames, fps = read_video(tmp_path / f"b.{suffix}")
    assert (frames.dtype, tuple(frames.shape), fps) == (torch.uint8, (12, 3, 48, 64), 8.0)
    written = torch.from_numpy(ramp()).permute(0, 3, 1, 2)
    inside = (slice(None), slice(None), slice(8, -8))  # colour bleeds where red and gray meet
    for columns in (slice(0, 24), slice(40, 64)):
        error = (frames[inside][..., columns].float() - written[inside][..., columns].float()).abs()
        assert error.mean() < 4


def test_reads_a_gif_exactly(tmp_path):
    written = ramp()
    iio.imwrite(tmp_path / "a.gif", written, duration=100, loop=0)  # 13 colours, so nothing is quantised
    frames, fps = read_video(tmp_path / "a.gif")
    assert torch.equal(frames, torch.from_numpy(written).permute(0, 3, 1, 2))
    assert fps == 10


def test_odd_sizes_and_lengths(tmp_path):
    path = write(tmp_path / "odd.mkv", ramp(1, 35, 51), pixelformat="yuv444p")
    assert tuple(read_video(path)[0].shape) == (1, 3, 35, 51)


def test_a_phone_held_sideways_is_upright(tmp_path):
    write(tmp_path / "flat.mp4")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert tuple(read_video(tmp_path / "turned.mp4")[0].shape) == (12, 3, 64, 48)


@pytest.mark.parametrize(("printed", "exact"), [("24000/1001", 24 / 1.001), ("30000/1001", 30 / 1.001), ("12.5", 12.5)])
def test_rates_are_exact(tmp_path, printed, exact):
    write(tmp_path / "a.mp4", output_params=["-r", printed])
    assert read_video(tmp_path / "a.mp4")[1] == pytest.approx(exact, rel=1e-9)


def test_a_varying_rate_keeps_the_frames_as_they_are(tmp_path):
    write(tmp_path / "even.mp4")
    slower = "setpts='if(lt(N,6),N,6+(N-6)*3)/8/TB'"  # the second half at a third of the rate
    ffmpeg("-i", tmp_path / "even.mp4", "-vf", slower, "-fps_mode", "vfr", tmp_path / "varying.mp4")
    frames, fps = read_video(tmp_path / "varying.mp4")
    assert len(frames) == 12
    assert 3 < fps < 8


def test_the_callers_rate_wins(tmp_path):
    assert read_video(write(tmp_path / "a.mp4"), fps=5.5)[1] == 5.5


def test_clip_from_file(tmp_path):
    clip = clip_from_file(write(tmp_path / "a.mp4"), "a red half")
    assert (clip.prompt, clip.fps, tuple(clip.video.shape)) == ("a red half", 8.0, (12, 3, 48, 64))
    assert clip.video.dtype == torch.float32
    torch.testing.assert_close(clip.video * 255, read_video(tmp_path / "a.mp4")[0].float())


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "jpg", "jpeg"])
def test_an_image_is_one_frame(tmp_path, suffix):
    pixels = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    frames, fps = read_video(tmp_path / f"a.{suffix}")
    assert (tuple(frames.shape), fps) == ((1, 3, 20, 30), 1.0)
    tolerance = 2 if suffix.startswith("j") else 0
    assert (frames[0, :, 5, 5].int() - torch.tensor([200, 100, 50])).abs().max() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_lies_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    frames = read_video(tmp_path / "a.png")[0]
    assert frames[0, :, 4, 1].tolist() == [0, 0, 0]
    assert frames[0, :, 4, 6].tolist() == [255, 255, 255]


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    assert tuple(read_video(tmp_path / "a.jpg")[0].shape) == (1, 3, 20, 10)


def test_images_that_would_be_read_wrong_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    refused(tmp_path / "deep.png", "more than 8 bits")
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[second], duration=100)
    refused(tmp_path / "moving.webp", "an animation of 2 frames")


@pytest.mark.parametrize("name", ["gone.mp4", "gone.png", "."])
def test_missing(tmp_path, name):
    refused(tmp_path / name, "no such file")


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_empty_and_not_a_video(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.touch()
    refused(path, "empty")
    path.write_text("this is a letter\n" * 50)
    refused(path, "damaged")


def test_unknown_kinds_are_named(tmp_path):
    for name in ("notes.pdf", "README"):
        (tmp_path / name).write_text("text")
        refused(tmp_path / name, "no known kind of video (.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "mov", "gif", "png", "jpg"])
def test_a_file_cut_short_is_damaged_even_where_half_of_it_can_be_read(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    if suffix == "gif":
        iio.imwrite(path, noise, duration=100, loop=0)
    elif suffix in ("png", "jpg"):
        Image.fromarray(noise[0]).save(path)
    else:  # an index in front, as for streaming, lets a player begin
        write(path, noise, **({"output_params": ["-movflags", "+faststart"]} if suffix in ("mp4", "mov") else {}))
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "damaged")


def test_a_hole_is_damage(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), np.uint8)
    path = write(tmp_path / "a.mp4", noise)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 9000] = bytes(9000)  # a sector or two; the lengths of some packets are among them
    path.write_bytes(data)
    refused(path, "damaged")


def test_sound_without_pictures(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "a.mp4")
    refused(tmp_path / "a.mp4", "damaged")


def test_a_video_without_frames(tmp_path):
    write(tmp_path / "a.mp4")
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-frames:v", "0", tmp_path / "none.mkv")
    refused(tmp_path / "none.mkv", "")


@pytest.mark.parametrize("rate", ["1000", "1/20"])
def test_a_rate_that_cannot_be_right(tmp_path, rate):
    path = write(tmp_path / "a.mp4", ramp(4), output_params=["-filter:v", f"setpts=N/({rate})/TB", "-r", rate])
    refused(path, "frames a second")
    assert read_video(path, fps=8)[1] == 8


def test_more_pixels_than_allowed(tmp_path):
    path = write(tmp_path / "a.mp4")
    pixels = 12 * 48 * 64
    assert len(read_video(path, max_pixels=pixels)[0]) == 12
    refused(path, f"more than {pixels - 1} pixels", max_pixels=pixels - 1)
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "more than 9999 pixels", max_pixels=9999)


def test_a_playlist_in_the_guise_of_a_video_reads_nothing(tmp_path):
    write(tmp_path / "secret.mp4")
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'secret.mp4'}'\n")
    refused(playlist, "damaged")
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:secret.mp4\n#EXT-X-ENDLIST\n")
    refused(playlist, "damaged")


def test_names_that_look_like_something_else(tmp_path):
    for name in ("-i.mp4", "http:a.mp4", "a b%d.mp4"):
        write(tmp_path / "plain.mp4").rename(tmp_path / name)
        assert len(read_video(tmp_path / name)[0]) == 12
