"""Segments of a clip against hand arithmetic, and against times that are looked up frame by frame."""

from fractions import Fraction

import pytest

from alignment.data.segments import frame_labels, num_segments, segment_bounds, segment_of_latent_frames


@pytest.mark.parametrize(
    ("frames", "fps", "seconds", "factor", "sizes"),
    [
        (81, 16, 1.0, 4, [5, 4, 4, 4, 4]),  # Wan: 80 / 16 is 5 seconds, not 81 / 16
        (121, 24, 1.0, 4, [7, 6, 6, 6, 6]),
        (33, 16, 1.0, 4, [5, 4]),
        (9, 8, 0.5, 2, [3, 2]),  # tiny
        (97, 24, 1.0, 8, [4, 3, 3, 3]),  # LTX
        (29, 100, 0.14, 4, [4, 4]),  # centres 0, 2.5, 6.5, 10.5, 14.5 .. 26.5; segments of 14 frames
        (97, 24, 1 / 3, 8, [2] + [1] * 11),  # segments of a latent frame, with the first one's besides
        (5, 4, 1.0, 1, [5]),  # frames 0..4, no compression
        (6, 4, 1.0, 1, [4, 2]),
        (1, 16, 1.0, 4, [1]),  # an image
    ],
)
def test_latent_frames_of_each_segment(frames, fps, seconds, factor, sizes):
    latent_frames = (frames - 1) // factor + 1
    segments = segment_of_latent_frames(frames, latent_frames, fps, seconds)
    assert segments == sorted(segments)
    assert [segments.count(i) for i in range(num_segments(frames, fps, seconds))] == sizes
    labels = [(1, -1, 0)[i % 3] for i in range(len(sizes))]
    expected = [label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]
    assert frame_labels(labels, frames, latent_frames, fps, seconds) == expected


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize(("fps", "seconds"), [(16, "1"), (24, "0.5"), (8, "1.3"), (30, "0.7"), (100, "0.29")])
def test_a_latent_frame_lies_where_its_centre_does(factor, fps, seconds):
    """In exact fractions: the frames of latent j are r (j - 1) + 1 .. r j; the clip ends with its last frame."""
    for latent_frames in (2, 5, 13, 21):
        frames, length = factor * (latent_frames - 1) + 1, fps * Fraction(seconds)
        count = next(n for n in range(1, 1000) if n * length >= frames - 1)
        assert num_segments(frames, fps, float(seconds)) == count
        covered = [[0], *(range(factor * (j - 1) + 1, factor * j + 1) for j in range(1, latent_frames))]
        centres = [Fraction(sum(part), len(part)) for part in covered]
        expected = [next(i for i in range(count) if c < (i + 1) * length or i == count - 1) for c in centres]
        assert segment_of_latent_frames(frames, latent_frames, fps, float(seconds)) == expected
        bounds = segment_bounds(frames, fps, float(seconds))
        at = [next(i for i in range(count) if f < (i + 1) * length or i == count - 1) for f in range(frames)]
        assert [i for i, (start, stop) in enumerate(bounds) for _ in range(start, stop)] == at
        assert all(start < stop for start, stop in bounds)


def test_segment_bounds_by_hand():
    assert segment_bounds(81, 16, 1.0) == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 81)]
    assert segment_bounds(82, 16, 1.0) == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 80), (80, 82)]
    assert segment_bounds(33, 16, 1.0) == [(0, 16), (16, 33)]
    assert segment_bounds(9, 8, 0.5) == [(0, 4), (4, 9)]
    assert segment_bounds(8, 5, 0.5) == [(0, 3), (3, 5), (5, 8)]  # segments of 2.5 frames: 0-2, 3-4, 5-7
    assert segment_bounds(1, 16, 1.0) == [(0, 1)]


def test_rounding_opens_no_segment():
    assert 0.29 * 100 < 29
    assert num_segments(30, 100, 0.29) == 1
    assert segment_bounds(59, 100, 0.29) == [(0, 29), (29, 59)]
    assert 0.14 * 100 > 14
    assert segment_bounds(29, 100, 0.14) == [(0, 14), (14, 29)]
    assert segment_of_latent_frames(29, 29, 100, 0.14) == [0] * 14 + [1] * 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segment_of_latent_frames(80, 21, 16, 1.0), "80 frames do not make 21 latent frames"),
        (lambda: segment_of_latent_frames(9, 1, 8, 1.0), "9 frames do not make 1 latent frames"),
        (lambda: segment_of_latent_frames(1, 3, 8, 1.0), "1 frames do not make 3 latent frames"),
        (lambda: segment_of_latent_frames(9, 17, 8, 1.0), "9 frames do not make 17 latent frames"),
        (lambda: segment_of_latent_frames(97, 13, 24, 0.25), "shorter than a latent frame, 8 frames"),
        (lambda: frame_labels([1, 0, 1], 9, 5, 8, 0.5), "3 labels for the 2 segments of 0.5 s in 9 frames at 8 fps"),
        (lambda: num_segments(9, 8, 0.1), "segments of 0.1 s at 8 fps are shorter than a frame"),
        (lambda: segment_bounds(9, 0, 1.0), "segments of 1.0 s at 0 fps"),
        (lambda: segment_bounds(9, 8, -1.0), "segments of -1.0 s"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
