"""Every statistic against images whose value is known without computing it."""

import math

import pytest
import torch

from rewards import image_statistics

SIZE = 16


def still(image, frames=3):
    """(1, F, 3, H, W) of one image (3, H, W) or a colour (3,)."""
    image = torch.as_tensor(image, dtype=torch.float32)
    image = image if image.ndim == 3 else image.view(3, 1, 1).expand(3, SIZE, SIZE)
    return image.expand(1, frames, 3, SIZE, SIZE)


def measured(video, name):
    return image_statistics(video)[name].item()


def halves(left, right):
    image = torch.zeros(3, SIZE, SIZE)
    image[:, :, : SIZE // 2] = torch.tensor(left).view(3, 1, 1)
    image[:, :, SIZE // 2 :] = torch.tensor(right).view(3, 1, 1)
    return still(image)


def checkerboard():
    return still((torch.arange(SIZE)[:, None] + torch.arange(SIZE)).remainder(2).float().expand(3, -1, -1))


def moving_bar(frames=4):
    """A white column, one pixel to the right each frame."""
    video = torch.zeros(1, frames, 3, SIZE, SIZE)
    for frame in range(frames):
        video[0, frame, :, :, 3 + frame] = 1
    return video


def test_a_flat_image():
    found = {name: values.item() for name, values in image_statistics(still([0.5, 0.5, 0.5])).items()}
    assert found == pytest.approx(
        {"edge_density": 0, "colour_entropy": 0, "brightness": 0.5, "saturation": 0, "motion": 0}
    )


def test_every_pixel_of_a_checkerboard_is_an_edge():
    assert measured(checkerboard(), "edge_density") == 1


def test_a_border_is_one_column_of_edges():
    assert measured(halves([0.0] * 3, [1.0] * 3), "edge_density") == pytest.approx(1 / (SIZE - 1))


@pytest.mark.parametrize(("step", "edge"), [(0.09, False), (0.11, True)])
def test_a_faint_border_is_no_edge(step, edge):
    assert (measured(halves([0.5] * 3, [0.5 + step] * 3), "edge_density") > 0) == edge


def test_steps_to_both_sides_count_together():
    # A ramp of 0.08 a pixel in both directions: neither step alone exceeds 0.1, sqrt(2) x 0.08 = 0.113 does.
    small = torch.arange(6) * 0.08
    assert measured((small[:, None] + small).expand(1, 1, 3, 6, 6), "edge_density") == 1


def test_two_colours_are_one_bit():
    assert measured(halves([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]), "colour_entropy") == pytest.approx(1)
    assert measured(checkerboard(), "colour_entropy") == pytest.approx(1)


def test_unequal_shares_of_colours():
    image = torch.zeros(3, SIZE, SIZE)
    image[1, :, : SIZE // 4] = 1
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert measured(still(image), "colour_entropy") == pytest.approx(expected)


def test_all_colours_equally_often_are_nine_bits():
    level = (torch.arange(8) + 0.5) / 8
    colours = torch.cartesian_prod(level, level, level).T.reshape(1, 1, 3, 16, 32)
    assert measured(colours, "colour_entropy") == pytest.approx(9)


def test_entropy_is_of_a_frame_not_of_the_clip():
    video = torch.cat([still([1.0, 0.0, 0.0], 1), still([0.0, 0.0, 1.0], 1)], 1)  # each frame has one colour
    assert measured(video, "colour_entropy") == 0


@pytest.mark.parametrize(
    ("colour", "brightness", "saturation"),
    [
        ([1.0, 0.0, 0.0], 0.299, 1),
        ([0.0, 1.0, 0.0], 0.587, 1),
        ([0.0, 0.0, 1.0], 0.114, 1),
        ([1.0, 1.0, 1.0], 1, 0),
        ([0.0, 0.0, 0.0], 0, 0),
        ([0.8, 0.4, 0.4], 0.299 * 0.8 + 0.701 * 0.4, 0.5),
    ],
)
def test_brightness_and_saturation_of_a_colour(colour, brightness, saturation):
    assert measured(still(colour), "brightness") == pytest.approx(brightness)
    assert measured(still(colour), "saturation") == pytest.approx(saturation)


def test_motion_of_a_bar():
    # One column goes out and one comes up in every step: two of SIZE columns change by 1.
    assert measured(moving_bar(), "motion") == pytest.approx(2 / SIZE)


def test_a_single_frame_does_not_move():
    assert measured(moving_bar(1), "motion") == 0


def test_a_batch_equals_its_clips_and_stays_in_range():
    video = torch.rand(4, 3, 3, 20, 12, generator=torch.Generator().manual_seed(0))
    video[1] = video[1].round()  # 0 and 1 are in the histogram's last and first cells
    together = image_statistics(video)
    for name, values in together.items():
        assert values.shape == (4,)
        assert values.dtype == torch.float32
        assert torch.equal(values, torch.cat([image_statistics(clip[None])[name] for clip in video]))
        assert values.min() >= 0
        assert values.max() <= (9 if name == "colour_entropy" else 1)


def test_takes_half_precision_and_gives_no_gradient():
    found = image_statistics(checkerboard().bfloat16().requires_grad_())
    assert found["edge_density"].item() == 1
    assert not any(values.requires_grad for values in found.values())


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (1, 2, 4, 8, 8), (1, 2, 3, 8, 1)])
def test_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"expected float \(N, F, 3, H, W\)"):
        image_statistics(torch.rand(shape))
