"""HPSv2Reward against the authors' steps, redone: letterbox by hand, model by open_clip, cosine."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards import RewardError, check, load
from rewards.hpsv2 import HPSv2Reward

PROMPTS = ["a red circle moving left", "a blue square " * 40]  # the second is longer than 77 tokens
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SIZE = 32


def bicubic(length, target):
    """(target, length) matrix of a cubic filter (a = -1/2) that widens where it shrinks, as PIL and torch have it."""
    scale = length / target
    width = max(scale, 1.0)
    centre = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    x = np.abs(np.arange(length)[None, :] - centre) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weight = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weight / weight.sum(1, keepdims=True)


def letterboxed(frame):
    """(3, H, W) in [0, 1] -> (3, 32, 32) as HPSv2 prepares it, in float64."""
    frame = frame.numpy().astype(np.float64)
    scale = SIZE / max(frame.shape[1:])
    height, width = (round(side * scale) for side in frame.shape[1:])  # halves go to the even number
    if scale != 1:
        frame = bicubic(frame.shape[1], height) @ frame @ bicubic(frame.shape[2], width).T
    square = np.zeros((3, SIZE, SIZE))
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    square[:, top : top + height, left : left + width] = frame
    return (square - MEAN) / STD


def by_the_authors(files, videos, prompts, prepared=letterboxed):
    """(N, F) scores of videos, by open_clip alone."""
    import open_clip

    weights, config = files
    model = open_clip.CLIP(**json.loads(config.read_text())).eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    tokens = open_clip.SimpleTokenizer(context_length=77)(prompts)
    rows = []
    with torch.no_grad():
        for video, text in zip(videos, model.encode_text(tokens, normalize=True), strict=True):
            images = torch.from_numpy(np.stack([prepared(frame) for frame in video])).float()
            rows.append(model.encode_image(images, normalize=True) @ text)
    return torch.stack(rows)


def bytes_video(*shape, seed=0):
    """Saturated noise in steps of 1 / 255, of which a bicubic filter overshoots far."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return ((1.5 * noise - 0.25).clamp(0, 1) * 255).round() / 255


@pytest.fixture(scope="module")
def reward(hpsv2_files):
    weights, config = hpsv2_files
    return load("hpsv2", path=str(weights), model=str(config))


SHAPES = [
    (40, 48),
    (48, 40),
    (41, 64),
    (43, 64),
    (42, 64),
    (7, 64),
    (20, 31),
    (32, 20),
    (20, 32),
    (32, 32),
    (50, 50),
    (90, 160),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_authors_steps(reward, hpsv2_files, shape):
    videos = bytes_video(2, 3, 3, *shape)
    expected = by_the_authors(hpsv2_files, videos, PROMPTS)
    found = reward(videos, PROMPTS, fps=8)
    torch.testing.assert_close(found.dense, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.total, expected.mean(1), atol=1e-6, rtol=0)


def test_the_reference_tells_wrong_preparations_apart(hpsv2_files):
    # What peers do instead would not pass: to squash, to clip what the filter overshoots, to crop.
    videos = bytes_video(2, 1, 3, 20, 31)
    right = by_the_authors(hpsv2_files, videos, PROMPTS)

    def squashed(frame):
        return (bicubic(20, SIZE) @ frame.double().numpy() @ bicubic(31, SIZE).T - MEAN) / STD

    def clipped(frame):
        return (np.clip(letterboxed(frame) * STD + MEAN, 0, 1) - MEAN) / STD

    def cropped(frame):
        return (bicubic(20, SIZE) @ frame[:, :, 5:25].double().numpy() @ bicubic(20, SIZE).T - MEAN) / STD

    for wrong in (squashed, clipped, cropped):
        assert (by_the_authors(hpsv2_files, videos, PROMPTS, wrong) - right).abs().max() > 3e-4


def test_without_antialias_is_what_older_torchvision_does(reward, hpsv2_files):
    videos = bytes_video(2, 2, 3, 90, 160)
    weights, config = hpsv2_files

    def prepared(frame):
        inner = torch.nn.functional.interpolate(frame[None], (18, 32), mode="bicubic", align_corners=False)[0]
        return (np.pad(inner.numpy(), ((0, 0), (7, 7), (0, 0))) - MEAN) / STD

    found = HPSv2Reward(weights, config, antialias=False)(videos, PROMPTS)
    torch.testing.assert_close(found.dense, by_the_authors(hpsv2_files, videos, PROMPTS, prepared), atol=1e-6, rtol=0)
    assert (found.total - reward(videos, PROMPTS).total).abs().min() > 1e-3


def test_an_image_thinner_than_a_pixel_of_the_model_is_scored(reward):
    assert reward(bytes_video(1, 1, 3, 1, 200), ["a line"]).valid.all()


def test_every_form_of_file_gives_the_same_scores(reward, hpsv2_files, tmp_path):
    from safetensors.torch import save_file

    weights, config = hpsv2_files
    state = torch.load(weights, weights_only=True)["state_dict"]
    architecture = json.loads(config.read_text())
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "distributed.pt")
    save_file(state, tmp_path / "bare.safetensors")
    preprocess = {"mean": [0.1] * 3, "std": [0.9] * 3, "resize_mode": "squash"}  # not HPSv2's, and so not used
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": architecture, "preprocess_cfg": preprocess})
    )
    videos = bytes_video(2, 2, 3, 40, 48)
    expected = reward(videos, PROMPTS).total
    for file in ("bare.pt", "distributed.pt", "bare.safetensors"):
        found = load("hpsv2", path=str(tmp_path / file), model=str(tmp_path / "open_clip_config.json"))
        assert torch.equal(found(videos, PROMPTS).total, expected)


def test_a_built_in_architecture_is_named(hpsv2_files, tmp_path):
    # The published weights are of ViT-H-14; the same path with a smaller one, drawn here in the released form.
    import open_clip

    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    videos = bytes_video(1, 1, 3, 112, 224)
    found = HPSv2Reward(str(tmp_path / "weights.pt"), "ViT-S-32-alt", device="cpu")(videos, ["a cat"])
    image = torch.zeros(1, 3, 224, 224)
    image[:, :, 56:168] = videos[0]
    image = (image - torch.tensor(MEAN).float()) / torch.tensor(STD).float()
    with torch.no_grad():
        cosine = (
            model.eval().encode_image(image, normalize=True)
            @ model.encode_text(open_clip.tokenize(["a cat"]), normalize=True).T
        )
    torch.testing.assert_close(found.total, cosine[0], atol=1e-6, rtol=0)


def test_loading_warns_of_nothing(hpsv2_files, caplog):
    HPSv2Reward(*hpsv2_files)
    assert caplog.text == ""


def test_gradient_matches_finite_differences(reward):
    video = bytes_video(1, 2, 3, 40, 48).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(video, PROMPTS[:1]).total.sum(), video)
    direction = gradient / gradient.norm()
    up, down = (
        reward((video + sign * 0.02 * direction).clamp(-0.1, 1.1), PROMPTS[:1]).total.item() for sign in (1, -1)
    )
    assert (up - down) / 0.04 == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere/HPS.pt"}, r"no weights file /nowhere/HPS\.pt"),
        ({"path": "WEIGHTS", "model": "/nowhere/tiny.json"}, r"no /nowhere/tiny\.json"),
        ({"path": "WEIGHTS", "model": "ViT-H-15"}, "near: .*ViT-H-14"),
        ({"path": "WEIGHTS", "model": "CONFIG", "frames": 0}, "frames is 0"),
        ({"model": "CONFIG"}, "the published weights are of ViT-H-14"),
        ({"version": "2.2"}, "version is '2.2', expected one of 2.0, 2.1"),
        ({"version": 2.1, "precision": "int4"}, "precision 'int4'"),  # 2.1 from a YAML file is fine
    ],
)
def test_options_are_checked_in_one_line(hpsv2_files, options, message):
    names = {"WEIGHTS": str(hpsv2_files[0]), "CONFIG": str(hpsv2_files[1])}
    with pytest.raises(RewardError, match=message) as caught:
        check("hpsv2", **{key: names.get(value, value) for key, value in options.items()})
    assert str(caught.value).startswith("reward hpsv2: ")
    assert "\n" not in str(caught.value)


def test_checking_reads_no_weights(hpsv2_files, tmp_path):
    (tmp_path / "empty.pt").touch()
    check("hpsv2", path=str(tmp_path / "empty.pt"), model=str(hpsv2_files[1]))
    check("hpsv2")  # to be downloaded when it is loaded
    with pytest.raises(RewardError, match=r"empty\.pt cannot be read"):
        load("hpsv2", path=str(tmp_path / "empty.pt"), model=str(hpsv2_files[1]))


def drop(state):
    del state["visual.proj"]


def add(state):
    state["visual.more"] = torch.zeros(1)


def widen(state):
    state["visual.proj"] = torch.zeros(32, 17)


def enlarge(state):  # open_clip would interpolate these positions without a word
    state["visual.positional_embedding"] = torch.zeros(26, 32)


@pytest.mark.parametrize("spoil", [drop, add, widen, enlarge])
def test_weights_must_be_exactly_those_of_the_architecture(hpsv2_files, tmp_path, spoil):
    state = torch.load(hpsv2_files[0], weights_only=True)["state_dict"]
    spoil(state)
    torch.save({"state_dict": state}, tmp_path / "spoilt.pt")
    with pytest.raises(RewardError, match=r"reward hpsv2: cannot load .*spoilt\.pt") as caught:
        load("hpsv2", path=str(tmp_path / "spoilt.pt"), model=str(hpsv2_files[1]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"embed_dim": 4}', "lacks text_cfg, vision_cfg")],
)
def test_a_spoilt_architecture_is_named(hpsv2_files, tmp_path, content, message):
    (tmp_path / "spoilt.json").write_text(content)
    with pytest.raises(RewardError, match=rf"spoilt\.json.*{message}"):
        check("hpsv2", path=str(hpsv2_files[0]), model=str(tmp_path / "spoilt.json"))


def test_a_half_copied_file_is_named(hpsv2_files, tmp_path):
    half = shutil.copy(hpsv2_files[0], tmp_path / "half.pt")
    half.write_bytes(half.read_bytes()[:5000])
    with pytest.raises(RewardError, match=r"half\.pt cannot be read"):
        load("hpsv2", path=str(half), model=str(hpsv2_files[1]))


def test_a_tokenizer_of_hugging_face_lies_beside_the_architecture():
    """The tiny world's CLIP has one: its words, not bytes. 32 x 32 frames need no letterbox."""
    import open_clip

    folder = Path(__file__).parents[2] / "examples" / "tiny_world" / "clip"
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    videos, prompts = bytes_video(2, 2, 3, SIZE, SIZE), ["a red circle", "a blue square moving left"]
    found = load("hpsv2", path=str(weights), model=str(config))(videos, prompts)
    model, tokenizer = (
        open_clip.create_model(f"local-dir:{folder}").eval(),
        open_clip.get_tokenizer(f"local-dir:{folder}"),
    )
    with torch.no_grad():
        text = model.encode_text(tokenizer(prompts), normalize=True)
        images = (videos - torch.tensor(MEAN).float()) / torch.tensor(STD).float()
        expected = torch.stack([model.encode_image(i, normalize=True) @ t for i, t in zip(images, text, strict=True)])
    assert expected.std() > 0.02
    torch.testing.assert_close(found.dense, expected, atol=1e-5, rtol=0)
