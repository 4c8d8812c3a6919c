"""The sprite rewards against videos drawn here, independently of the oracle's own geometry."""

import itertools
import math

import pytest
import torch

from rewards import sprite
from rewards.contract import Clip

FRAMES = 9
FINE = 4  # subpixels a side


def draw(shape, colour="red", background="black", velocity=(1.0, 0.0), area=110.0, size=32, middle=None, frames=FRAMES):
    """A clip (F, 3, size, size) by counting subpixels. velocity and area in px of a 32 px frame."""
    unit = size / 32
    middle = torch.tensor(middle or (16.0, 16.0))
    time = torch.arange(frames) - (frames - 1) / 2
    path = (middle + time[:, None] * torch.tensor(velocity)) * unit
    return paint(shape, path, colour, background, area * unit**2, size)


def paint(shape, path, colour="red", background="black", area=110.0, size=32):
    grid = (torch.arange(size * FINE) + 0.5) / FINE
    dx = grid[None, None, :] - path[:, 0, None, None]
    dy = grid[None, :, None] - path[:, 1, None, None]
    if shape == "circle":
        inside = dx**2 + dy**2 < area / math.pi
    elif shape == "square":
        inside = (dx.abs() < area**0.5 / 2) & (dy.abs() < area**0.5 / 2)
    else:  # an equilateral triangle on its base, its centroid a third of the height above it
        side = (4 * area / math.sqrt(3)) ** 0.5
        height = side * math.sqrt(3) / 2
        depth = (dy + 2 * height / 3) / height  # 0 at the tip, 1 at the base
        inside = (depth > 0) & (depth < 1) & (dx.abs() < depth * side / 2)
    share = inside.float().unflatten(1, (size, FINE)).unflatten(3, (size, FINE)).mean((2, 4))[:, None]
    ground = torch.tensor(sprite.BACKGROUNDS[background]).view(1, 3, 1, 1)
    return ground + share * (torch.tensor(sprite.COLOURS[colour]).view(1, 3, 1, 1) - ground)


def test_clips_of_several_sizes_and_a_single_pixel_are_scored_as_alone():
    clips = [
        Clip(draw("circle", size=32), "red"),
        Clip(draw("square", size=64, frames=5), "red"),
        Clip(draw("circle"), ""),
    ]
    for reward in (sprite.sprite_motion(), sprite.sprite_match()):
        together = reward([*clips, Clip(torch.zeros(2, 3, 1, 1), "red")])
        alone = [reward([clip]) for clip in clips]
        assert together.total.tolist() == pytest.approx([*(score.total.item() for score in alone), 0])
        for name, values in together.dims.items():
            assert values[:3].tolist() == pytest.approx([score.dims[name].item() for score in alone])


DIRECTIONS = {
    " ".join(words): torch.nn.functional.normalize(torch.tensor([sprite.STEPS[w] for w in words]).sum(0), dim=0)
    for words in [("up",), ("down",), ("left",), ("right",), *itertools.product(("up", "down"), ("left", "right"))]
}


@pytest.fixture(scope="module")
def everything():
    """One clip of each of the 6 x 4 x 3 x 8 combinations, speeds in turn."""
    videos, prompts = [], []
    speeds = itertools.cycle(sprite.SPEEDS)
    combinations = itertools.product(sprite.COLOURS, sprite.BACKGROUNDS, sprite.SHAPES, DIRECTIONS)
    for colour, background, shape, direction in combinations:
        speed = next(speeds)
        velocity = (DIRECTIONS[direction] * sprite.SPEEDS[speed]).tolist()
        videos.append(draw(shape, colour, background, velocity))
        prompts.append(f"a {colour} {shape} moving {direction} {speed} on a {background} background")
    return torch.stack(videos), prompts


def clips(videos, prompts):
    return [Clip(v, p) for v, p in zip(videos, prompts, strict=True)]


def one(reward, video, prompt):
    answer = reward([Clip(video, prompt)])
    return answer.total.item(), {name: values.item() for name, values in answer.dims.items()}


def test_every_attribute_of_a_clean_clip_is_read(everything):
    videos, prompts = everything
    seen = sprite.measure(videos)
    assert seen.valid.all()
    for name, right in sprite.match_readings(seen, sprite.read_words(prompts)).items():
        assert (right == 1).all(), name
    torch.testing.assert_close(
        seen.area, torch.full_like(seen.area, 110.0), atol=6.0, rtol=0
    )  # the oracle rounds corners off


def test_noise_is_tolerated(everything):
    videos, prompts = everything
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    seen = sprite.measure((videos + 0.15 * noise).clamp(0, 1))
    assert seen.valid.float().mean() > 0.99
    for name, right in sprite.match_readings(seen, sprite.read_words(prompts)).items():
        assert right.mean() > 0.97, name


def test_centroid_and_velocity_are_exact():
    seen = sprite.measure(draw("square", velocity=(0.75, -0.5))[None])
    torch.testing.assert_close(seen.velocity[0], torch.tensor([0.75, -0.5]), atol=0.01, rtol=0)
    torch.testing.assert_close(seen.centroid[0, 4], torch.tensor([16.0, 16.0]), atol=0.05, rtol=0)


@pytest.mark.parametrize(("size", "frames"), [(32, 5), (64, 9), (48, 13), (128, 3)])
def test_lengths_are_in_px_of_a_32_px_frame(size, frames):
    seen = sprite.measure(draw("triangle", "cyan", "brown", (0.6, 0.0), area=90.0, size=size, frames=frames)[None])
    assert seen.valid.all()
    assert seen.shape_index.item() == sprite.SHAPES.index("triangle")
    assert seen.area.mean().item() == pytest.approx(90, abs=5)
    assert seen.speed.item() == pytest.approx(0.6, abs=0.02)


def test_a_clip_without_a_sprite_scores_zero_and_says_so():
    empty = torch.full((FRAMES, 3, 32, 32), 0.5)
    gone = draw("circle", velocity=(0.5, 0.0))
    gone[4:6] = gone[0, :, :1, :1]  # the sprite is missing in two frames
    speck = draw("circle", area=20.0)
    flood = draw("circle", area=400.0)
    torch.manual_seed(0)
    static = torch.rand(FRAMES, 3, 32, 32)
    rewards = [
        sprite.sprite_colour(),
        sprite.sprite_shape(),
        sprite.sprite_background(),
        sprite.sprite_motion(),
        sprite.sprite_smoothness(),
        sprite.sprite_match(),
    ]
    for reward in rewards:
        answer = reward(clips([empty, gone, speck, flood, static], ["a red circle moving right"] * 5))
        assert answer.total.tolist() == [0.0] * 5
        assert answer.dims["valid"].tolist() == [0.0] * 5
        assert answer.valid.all()  # the call itself did not fail


def test_two_sprites_are_not_one():
    both = torch.maximum(draw("circle", middle=(7.0, 7.0), area=80.0), draw("circle", middle=(25.0, 25.0), area=80.0))
    assert not sprite.measure(both[None]).valid.item()


def test_motion_reward_by_hand():
    reward = sprite.sprite_motion(speed=1.35, area=110.0)
    cases = [  # velocity, prompt, (1 - |v - 1.35| / .9)+ x cosine
        ((1.35, 0.0), "a red circle moving right", 1.0),
        ((0.9, 0.0), "a red circle moving right", 0.5),
        ((0.9, 0.0), "a red circle moving left", -0.5),
        ((0.9, 0.0), "a red circle moving up right", 0.5 * math.sqrt(0.5)),
        ((0.9, 0.0), "a red circle", 0.5),  # no direction is named, so none is judged
        ((0.3, 0.0), "a red circle moving right", 0.0),
    ]
    for velocity, prompt, expected in cases:
        total, dims = one(reward, draw("circle", velocity=velocity), prompt)
        assert total == pytest.approx(expected, abs=0.02), (velocity, prompt)
        assert dims["speed"] == pytest.approx(velocity[0], abs=0.02)
        assert dims["valid"] == 1


def test_motion_guard_charges_a_doubled_sprite():
    video, prompt = draw("circle", velocity=(1.35, 0.0), area=220.0), "a red circle moving right"
    free, _ = one(sprite.sprite_motion(area=None), video, prompt)
    charged, dims = one(sprite.sprite_motion(area=110.0), video, prompt)
    assert free == pytest.approx(1.0, abs=0.02)
    assert dims["area_excess"] == pytest.approx(0.85, abs=0.05)  # |220 / 110 - 1| - 0.15
    assert charged == pytest.approx(free - dims["area_excess"], abs=1e-5)


def test_an_even_path_is_smoother_than_a_jittered_one_and_than_standing_still():
    time = torch.arange(FRAMES) - 4.0
    even = torch.stack([16 + time, torch.full_like(time, 16.0)], -1)
    jitter = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 1.0, 0.0])
    jittered = even + torch.stack([torch.zeros(FRAMES), jitter], -1)
    still = torch.full_like(even, 16.0) + 0.02 * torch.stack([jitter, -jitter], -1)
    videos = [paint("circle", path) for path in (even, jittered, still)]
    total = sprite.sprite_smoothness()(clips(videos, ["a red circle"] * 3)).total
    assert total[0] > 0.95
    assert total[1] < 0.5  # steps of 1 with a spread of 1.4: 1 / (1 + 1.4)
    assert total[2] < 0.3


def test_rewards_judge_only_the_words_of_the_prompt():
    video = draw("square", "blue", "white", (0.95, 0.0))
    match = sprite.sprite_match()
    assert one(match, video, "")[0] == 1.0
    assert one(match, video, "a blue sprite")[0] == 1.0
    assert one(match, video, "a red sprite")[0] == 0.0
    assert one(match, video, "a blue circle")[0] == 0.5
    assert one(match, video, "A BLUE square, moving right; steadily on a white background.")[0] == 1.0
    assert one(match, video, "a red circle moving left slowly on a black background")[0] == 0.0
    total, dims = one(match, video, "a blue square moving up right quickly on a white background")
    assert total == pytest.approx(3 / 5)
    assert [dims[name] for name in ("colour", "shape", "background", "motion")] == [1, 1, 1, 0]
    for reward in (sprite.sprite_colour(), sprite.sprite_shape(), sprite.sprite_background()):
        assert one(reward, video, "something else")[0] == 1.0


def test_colour_background_and_shape_rewards_order_right_before_wrong():
    video = draw("triangle", "yellow", "gray")
    for reward, right, wrong in [
        (sprite.sprite_colour(), "a yellow triangle", "a purple triangle"),
        (sprite.sprite_background(), "on a grey background", "on a white background"),
        (sprite.sprite_shape(), "a yellow triangle", "a yellow circle"),
    ]:
        good, bad = one(reward, video, right)[0], one(reward, video, wrong)[0]
        assert good > 0.9 > 0.5 > bad, reward.name


def test_rewards_are_called_without_a_graph_and_take_a_batch():
    video = draw("circle").requires_grad_()
    answer = sprite.sprite_colour()(clips([video, video], ["a red circle", "a blue circle"]))
    assert not answer.total.requires_grad
    assert answer.total[0] > answer.total[1]


def test_read_words_leaves_out_what_is_not_said():
    said = sprite.read_words(["", "a green triangle moving down left slowly on a brown background"])
    assert said.colour.tolist() == [-1, list(sprite.COLOURS).index("green")]
    assert said.shape.tolist() == [-1, 2]
    assert said.background.tolist() == [-1, 3]
    assert said.speed.isnan().tolist() == [True, False]
    torch.testing.assert_close(said.direction, torch.tensor([[0.0, 0.0], [-(0.5**0.5), 0.5**0.5]]))
