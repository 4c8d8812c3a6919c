"""Given videos as latents: fitted to the pipeline's clips by hand arithmetic, encoded once, every problem named."""

from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import save_file

from alignment.data.latents import LatentCache, fit_video, load_latent, save_latent
from alignment.errors import Problems, UserError
from rewards.video_files import read_video
from tests.alignment.tiny import make_policy
from tests.pipelines import PROMPTS

FPS = 8


def noise_clip(frames=5, height=16, width=16, seed=0):
    """(F, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def write(path, frames, fps=FPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = frames.permute(0, 2, 3, 1).numpy()
    iio.imwrite(path, pixels, fps=fps, codec="libx264", macro_block_size=2, output_params=["-crf", "10"])
    return path


class FakeEncoder:
    """The mean colour of every frame; counts the videos that it sees."""

    video_shape, state_shape = (5, 3, 16, 16), (5, 3)

    def __init__(self):
        self.seen = 0
        weights = torch.nn.Linear(2, 2)
        weights.config = {"latent_channels": 3}
        self.pipe = SimpleNamespace(vae=weights)

    def __call__(self, videos):
        self.seen += len(videos)
        return videos.mean((3, 4))


def test_a_clip_that_fits_stays_bit_for_bit():
    frames = noise_clip()
    fitted = fit_video(frames, FPS, 5, FPS, 16, 16)
    assert (fitted.shape, fitted.dtype) == ((5, 3, 16, 16), torch.float32)
    assert torch.equal((fitted * 255).round().byte(), frames)
    assert torch.equal(fitted, frames.float() / 255)


@pytest.mark.parametrize(
    ("fps", "target", "expected"),
    [
        (8, 8, [0, 1, 2, 3]),
        (16, 8, [0, 2, 4, 6]),
        (24, 16, [0, 2, 3, 5]),  # at 1.5 and 4.5 the later of two that are as near
        (8, 16, [0, 1, 1, 2]),
        (30, 16, [0, 2, 4, 6]),  # 1.875, 3.75, 5.625
        (24000 / 1001, 24, [0, 1, 2, 3]),
    ],
)
def test_nearest_frames_in_time(fps, target, expected):
    frames = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(10, 3, 4, 4)
    fitted = fit_video(frames, fps, 4, target, 4, 4)
    assert (fitted[:, 0, 0, 0] * 255).round().tolist() == expected
    enough = frames[: expected[-1] + 1]
    assert torch.equal(fit_video(enough, fps, 4, target, 4, 4), fitted)
    with pytest.raises(ValueError, match=rf"is too short: {expected[-1]} frames at .* where 4 at {target} are needed"):
        fit_video(enough[:-1], fps, 4, target, 4, 4)


def test_the_middle_is_cut_out_and_resized():
    """Columns 0 to 11 of a 6 x 12 clip: a square is columns 3 to 8; at half the size without stripes of its own."""
    columns = torch.arange(12, dtype=torch.uint8).expand(1, 3, 6, 12) * 10
    assert (fit_video(columns, 1, 1, 1, 6, 6)[0, 0, 0] * 255).round().tolist() == [30, 40, 50, 60, 70, 80]
    upright = columns.transpose(2, 3)
    assert (fit_video(upright, 1, 1, 1, 6, 6)[0, 0, :, 0] * 255).round().tolist() == [30, 40, 50, 60, 70, 80]
    halved = fit_video(columns, 1, 1, 1, 3, 3)[0, 0, 0] * 255
    assert halved[1].item() == pytest.approx(55, abs=0.01)
    assert halved[0].item() == pytest.approx(35, abs=2)
    stripes = (255 * (torch.arange(64) % 8 == 0)).byte().expand(1, 3, 64, 64)  # no pixel of 8 lies on one
    assert (fit_video(stripes, 1, 1, 1, 8, 8)[..., 1:-1] - 1 / 8).abs().max() < 0.05
    assert fit_video(noise_clip(1, 9, 16), 1, 1, 1, 48, 83).shape == (1, 3, 48, 83)


def test_videos_are_encoded_once(tmp_path):
    encoder = FakeEncoder()
    cache = LatentCache(tmp_path / "cache", encoder, FPS)
    videos = [write(tmp_path / f"{seed}.mp4", noise_clip(seed=seed)) for seed in range(5)]
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(videos[0].read_bytes())
    done = []
    cache.encode_all(dict.fromkeys([*videos, copy], "line 1"), 2, lambda *counts: done.append(counts))
    assert (encoder.seen, done) == (5, [(2, 5), (4, 5), (5, 5)])
    assert len(list((tmp_path / "cache").iterdir())) == 5
    for video in [*videos, copy]:
        frames, fps = read_video(video)
        expected = encoder(fit_video(frames, fps, 5, FPS, 16, 16)[None])[0]
        assert torch.equal(cache.load(video), expected)
    encoder.seen = 0
    moved = videos[1].rename(tmp_path / "moved.mp4")
    again = LatentCache(tmp_path / "cache", encoder, FPS)
    again.encode_all(dict.fromkeys([videos[0], moved, *videos[2:]], "line 1"))
    assert encoder.seen == 0
    write(videos[0], noise_clip(seed=9))
    LatentCache(tmp_path / "cache", encoder, FPS).encode_all({videos[0]: "line 1"})
    assert encoder.seen == 1


def test_another_encoder_has_states_of_its_own(tmp_path):
    video = write(tmp_path / "a.mp4", noise_clip())
    first, other, sized, configured = (FakeEncoder() for _ in range(4))
    for encoder in (sized, configured):
        encoder.pipe.vae.load_state_dict(first.pipe.vae.state_dict())
    sized.video_shape = (5, 3, 16, 8)
    configured.pipe.vae.config = {"latent_channels": 4}
    caches = [(first, FPS), (other, FPS), (sized, FPS), (configured, FPS), (first, FPS + 1)]
    paths = {LatentCache(tmp_path, encoder, fps).path(video) for encoder, fps in caches}
    assert len(paths) == 5
    assert LatentCache(tmp_path, first, FPS).path(video) in paths


def test_every_problem_is_named_and_all_else_encoded(tmp_path):
    good = write(tmp_path / "good.mp4", noise_clip())
    short = write(tmp_path / "short.mp4", noise_clip(4))
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(good.read_bytes()[:200])
    missing = tmp_path / "missing.mp4"
    cache = LatentCache(tmp_path / "cache", FakeEncoder(), FPS)
    with pytest.raises(Problems) as error:
        cache.encode_all({torn: "line 1", short: "line 2", missing: "line 3", good: "line 4"}, 4)
    lines = sorted(error.value.lines)
    assert [line.split(": ")[:2] for line in lines] == [
        ["line 1", str(torn)],
        ["line 2", f"{short} is too short"],
        ["line 3", str(missing)],
    ]
    assert "No such file" in lines[2]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]
    assert cache.load(good).shape == (5, 3)


def test_damaged_states_are_encoded_again(tmp_path):
    video, encoder = write(tmp_path / "a.mp4", noise_clip()), FakeEncoder()
    cache = LatentCache(tmp_path / "cache", encoder, FPS)
    cache.encode_all({video: "line 1"})
    path = cache.path(video)
    path.write_bytes(path.read_bytes()[:-4])
    cache.encode_all({video: "line 1"})
    assert encoder.seen == 2
    assert cache.load(video).shape == (5, 3)


def test_latent_files(tmp_path):
    state, noise = torch.randn(4, 2), torch.randn(4, 2)
    save_latent(tmp_path / "a.safetensors", state.T.contiguous().T, noise.bfloat16())
    loaded = load_latent(tmp_path / "a.safetensors", (4, 2))
    assert torch.equal(loaded[0], state)
    assert torch.equal(loaded[1], noise.bfloat16())
    save_latent(tmp_path / "b.safetensors", state)
    assert load_latent(tmp_path / "b.safetensors", [4, 2])[1] is None
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"latents": torch.zeros(4, 2)}, 'has no tensor "state"'),
        ({"state": torch.zeros(2, 4)}, r'"state" is \(2, 4\), the states of this .* are \(4, 2\); encode'),
        ({"state": torch.zeros(4, 2), "noise": torch.zeros(4)}, r'"noise" is \(4,\)'),
        ({"state": torch.full((4, 2), torch.nan)}, "no finite floats"),
        ({"state": torch.zeros(4, 2, dtype=torch.int32)}, "no finite floats"),
        (None, "not a latent file, or damaged"),
    ],
)
def test_latent_files_that_do_not_fit(tmp_path, tensors, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing") if tensors is None else save_file(tensors, path)
    with pytest.raises(UserError, match=message) as error:
        load_latent(path, (4, 2))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["wan", "wan_image_to_video", "ltx_image_to_video", "stable_diffusion_3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_encodes_and_decodes(tmp_path, family, dtype):
    """Under the recipe's autocast, and with the image that a prompt brings."""
    policy = make_policy(family, model={"dtype": dtype})
    image = {"image": policy.call.pop("image")[:1]} if "image" in policy.call else {}
    policy.image_each = False
    encoder = policy.encoder(PROMPTS[0], **image)
    frames, _, height, width = encoder.video_shape
    cache = LatentCache(tmp_path / "cache", encoder, FPS)
    video = write(tmp_path / "a.mp4", noise_clip(frames, height, width))
    cache.encode_all({video: "line 1"})
    state = cache.load(video)
    assert (state.dtype, tuple(state.shape)) == (torch.float32, encoder.state_shape)
    policy.evaluations = 0
    made = policy.decode(state[None], PROMPTS[:1], **image)
    assert made.shape == (1, *encoder.video_shape)
    assert 0 <= made.min() < made.max() <= 1
    assert policy.evaluations in (1, 2)  # two with guidance
    assert policy.pipe.scheduler is policy.stock


def test_a_policy_without_text_encoders_encodes(tmp_path):
    policy = make_policy()
    policy.cache_embeddings(tmp_path)
    policy.encoder(PROMPTS[0])
    policy.release_encoders(PROMPTS)
    expected = policy.encoder(PROMPTS[1])(torch.ones(1, 5, 3, 16, 16))
    assert policy.pipe.text_encoder is None
    assert torch.isfinite(expected).all()
