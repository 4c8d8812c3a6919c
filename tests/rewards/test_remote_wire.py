"""What a server reads from strangers: every form but the right one is a WireError, and nothing is executed."""

import json
import math
import pickle
import random

import pytest
import safetensors.torch
import torch

from rewards import Clip, Scores
from rewards.serving.wire import (
    Limits,
    WireError,
    decode_clips,
    decode_scores,
    encode_clips,
    encode_scores,
    one_line,
    quantised,
    read_error,
    restored,
)

GOOD = {"prompts": ["a", "b"], "fps": [16.0, 8], "groups": [0, 1], "meta": [{}, {"path": "x"}]}


def frames(*shapes, dtype=torch.uint8):
    shapes = shapes or ((2, 3, 4, 5), (1, 3, 6, 6))
    return {str(index): torch.zeros(shape, dtype=dtype) for index, shape in enumerate(shapes)}


def question(tensors=None, **said):
    """A body with the right tensors and metadata but for what is given."""
    metadata = {"clips": json.dumps({**GOOD, **said})}
    return safetensors.torch.save(frames() if tensors is None else tensors, metadata)


def raw(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def with_text(text):
    return safetensors.torch.save(frames(), {"clips": text})


class Opens:
    """Its pickle opens a file for writing where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


ENTRY = {"dtype": "U8", "shape": [1, 3, 2, 2], "data_offsets": [0, 12]}
META = {"clips": json.dumps({"prompts": [""], "fps": [1], "groups": [0], "meta": [{}]})}
HOSTILE = {
    "nothing": b"",
    "a few bytes": b"abc",
    "zeros": bytes(1000),
    "garbage": random.Random(0).randbytes(5000),
    "JSON": json.dumps(GOOD).encode(),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a length beyond the end": (2**40).to_bytes(8, "little") + b"{}",
    "the largest length": b"\xff" * 8 + b"{}",
    "a header of 9 MB": raw(b'{"a":"' + b" " * (9 * 2**20) + b'"}'),
    "a deep header": raw(b"[" * 100_000),
    "a deep object": raw(b'{"a":' * 100_000),
    "a header that is a list": raw([]),
    "no metadata": safetensors.torch.save(frames()),
    "other metadata": safetensors.torch.save(frames(), {"format": "pt"}),
    "metadata of no text": raw({"__metadata__": {"clips": {}}, "0": ENTRY}, bytes(12)),
    "truncated": question()[:-1],
    "half": question()[: len(question()) // 2],
    "a byte more": question() + b"x",
    "offsets out of range": raw({"__metadata__": META, "0": {**ENTRY, "data_offsets": [0, 2**40]}}, bytes(12)),
    "offsets backwards": raw({"__metadata__": META, "0": {**ENTRY, "data_offsets": [12, 0]}}, bytes(12)),
    "negative offsets": raw({"__metadata__": META, "0": {**ENTRY, "data_offsets": [-12, 0]}}, bytes(12)),
    "a shape beyond its bytes": raw({"__metadata__": META, "0": {**ENTRY, "shape": [9, 3, 99, 99]}}, bytes(12)),
    "an overflowing shape": raw({"__metadata__": META, "0": {**ENTRY, "shape": [2**62, 3, 2**62, 4]}}, bytes(12)),
    "a negative shape": raw({"__metadata__": META, "0": {**ENTRY, "shape": [-1, 3, -2, 2]}}, bytes(12)),
    "an unknown type": raw({"__metadata__": META, "0": {**ENTRY, "dtype": "OBJECT"}}, bytes(12)),
    "no clips": question({}, prompts=[], fps=[], groups=[], meta=[]),
    "float frames": question(frames((2, 3, 4, 5), (1, 3, 6, 6), dtype=torch.float32)),
    "signed frames": question(frames((2, 3, 4, 5), (1, 3, 6, 6), dtype=torch.int8)),
    "channels last": question(frames((2, 4, 5, 3), (1, 6, 6, 3))),
    "an image": question(frames((3, 4, 5), (3, 6, 6))),
    "no frames": question(frames((0, 3, 4, 5), (1, 3, 6, 6))),
    "no pixels": question(frames((2, 3, 0, 5), (1, 3, 6, 6))),
    "a tensor too few": question(frames((1, 3, 2, 2))),
    "a tensor too many": question({**frames(), "2": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)}),
    "a tensor of another name": question({"0": frames()["0"], "one": frames()["1"]}),
    "metadata that is no JSON": with_text("prompts"),
    "metadata with NaN": with_text(json.dumps({**GOOD, "fps": [math.nan, 1.0]})),
    "metadata with infinity": with_text(json.dumps({**GOOD, "meta": [{"a": math.inf}, {}]})),
    "metadata beyond a float": with_text(json.dumps(GOOD).replace("16.0", "1e999")),
    "metadata with a long integer": with_text(json.dumps(GOOD).replace("16.0", "9" * 100_000)),
    "metadata that names a file": with_text(json.dumps({**GOOD, "meta": [{"reference": "/etc/hostname"}, {}]})),
    "deep metadata": with_text("[" * 100_000),
    "deep meta": with_text(json.dumps(GOOD).replace('"x"', "[" * 100_000 + "]" * 100_000)),
    "metadata that is a list": with_text("[]"),
    "a key too many": question(reward="x"),
    "a key too few": with_text(json.dumps({key: GOOD[key] for key in ("prompts", "fps")})),
    "lists of other lengths": question(prompts=["a"]),
    "no list": question(prompts="ab"),
    "a prompt that is none": question(prompts=["a", None]),
    "a prompt of bytes": question(prompts=["a", [98]]),
    "a long prompt": question(prompts=["a", "b" * 20_000]),
    "fps of text": question(fps=["16", 8]),
    "fps of a truth": question(fps=[True, 8]),
    "no fps": question(fps=[0, 8]),
    "negative fps": question(fps=[-1.0, 8]),
    "huge fps": question(fps=[1e6, 8]),
    "a group between": question(groups=[0.5, 1]),
    "a group of truth": question(groups=[True, 1]),
    "a huge group": question(groups=[2**60, 1]),
    "meta of text": question(meta=["x", {}]),
    "meta of lists": question(meta=[[], []]),
}


def test_the_right_form_is_read():
    clips = decode_clips(question())
    assert [(clip.prompt, clip.fps, clip.group, clip.meta) for clip in clips] == [
        ("a", 16.0, 0, {}),
        ("b", 8.0, 1, {"path": "x"}),
    ]
    assert [tuple(clip.video.shape) for clip in clips] == [(2, 3, 4, 5), (1, 3, 6, 6)]


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_any_other_form_is_refused_in_one_line(body):
    with pytest.raises(WireError) as error:
        decode_clips(body)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_pickle_is_not_loaded(tmp_path):
    target = tmp_path / "opened"
    payload = pickle.dumps(Opens(target))
    bodies = [payload, raw(payload), question(meta=[{"x": payload.decode("latin1")}, {}]), question() + payload]
    for body in bodies:
        try:
            decode_clips(body)
        except WireError:
            continue
    assert not target.exists()
    pickle.loads(payload).close()  # it would have been
    assert target.exists()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"clips": 1}, "four lists of one length, 1 to 1"),
        ({"frames": 1}, r"tensor 0: \(2, 3, 4, 5\), at most 1 frames"),
        ({"pixels": 35}, r"tensor 1: \(1, 3, 6, 6\), at most 2048 frames of 35 pixels"),
        ({"prompt": 0}, "texts of at most 0 characters"),
        ({"header": 20}, "a header of at most 20 bytes"),
    ],
)
def test_limits_are_held(limits, message):
    with pytest.raises(WireError, match=message):
        decode_clips(question(), Limits(**limits))
    decode_clips(question(), Limits(clips=2, frames=2, pixels=36, prompt=1))


def test_damaged_bodies_are_read_or_refused():
    """3000 bodies with a few bytes changed, cut out or doubled: nothing but WireError is ever raised."""
    chance, good = random.Random(0), question()
    read = 0
    for _ in range(3000):
        body = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(body))
            change = chance.choice("abcd")
            if change == "a":
                body[start] = chance.randrange(256)
            elif change == "b":
                del body[start : start + chance.randint(1, 20)]
            elif change == "c":
                body[start:start] = body[start : start + chance.randint(1, 20)]
            else:
                body[start] = ord(chance.choice('0129-"{}[],:'))
        try:
            decode_clips(bytes(body))
            read += 1
        except WireError:
            continue
    assert 0 < read < 3000  # pixels may change, and digits


def test_clips_arrive_as_they_were_sent():
    video = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sent = [Clip(video, "a \u00e9 \U0001f600 \"'\n\\", 23.976, -3, {"a": [1, None, {"b": "c"}]})]
    sent.append(Clip(video[1:3, :, :5].double(), "", 1, 2))
    found = decode_clips(encode_clips(sent))
    for one, other in zip(found, sent, strict=True):
        assert (one.prompt, one.fps, one.group, one.meta) == (other.prompt, other.fps, other.group, dict(other.meta))
        assert (restored(one).video - other.video).abs().max() <= 0.5 / 255 + 1e-6
        assert torch.equal(quantised(restored(one).video), one.video)  # a second time changes nothing


def test_all_levels_survive():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(quantised(restored(Clip(levels, "")).video), levels)


def test_scores_arrive_as_they_were_sent():
    total = torch.tensor([0.1, math.nan, 1 / 3])
    sent = Scores(
        total, {"a": torch.tensor([1e-30, math.inf, 3e38])}, torch.rand(3, 2), torch.tensor([True, False, True])
    )
    body = json.dumps(encode_scores(sent), allow_nan=False).encode()
    found = decode_scores(body, 3)
    torch.testing.assert_close(found.total, total, atol=0, rtol=0, equal_nan=True)
    assert found.dims["a"].tolist()[::2] == sent.dims["a"].tolist()[::2]
    assert found.dims["a"][1].isnan()  # a number that is none
    assert torch.equal(found.dense, sent.dense)
    assert torch.equal(found.valid, sent.valid)


def test_a_strangers_words_are_one_printable_line():
    assert one_line("a\nb\t\x1b[31mc \ud800") == "a b ?[31mc ?"
    assert read_error(b'{"error": "a\\nb"}') == "a b"
    assert read_error(b"<html>\n") == "<html>"
    assert read_error(b"") == "no reason given"
    assert len(read_error(b"x" * 10_000)) <= 300
