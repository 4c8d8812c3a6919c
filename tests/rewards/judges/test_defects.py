"""Defects: areas and times by hand and on a grid, answers read or refused, and the reward over real servers."""

import json

import numpy as np
import pytest
import torch

from rewards import Clip, RewardError, aspects, check, load
from rewards.judges.chat import CallFailed, Reply
from rewards.judges.defects import Defect, Layout, clean_shares, defective, read_defects, union_area
from tests.rewards.judges.judge_servers import ScriptedServer, content_of, in_turn, says

FRAMES = Layout("frames", 4, 1000, 1000)


def defect(start, end, *box):
    return Defect("hand", "", start, end, box)


@pytest.mark.parametrize(
    ("boxes", "area"),
    [
        ([], 0),
        ([(0, 0, 1, 1)], 1),
        ([(0.25, 0.5, 0.75, 1)], 0.25),
        ([(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], 0.5),  # touch in a corner
        ([(0, 0, 0.5, 1), (0.25, 0, 0.75, 1)], 0.75),  # overlap
        ([(0, 0, 1, 0.5), (0.25, 0.125, 0.5, 0.25)], 0.5),  # one in the other
        ([(0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)], 0.25),  # twice the same
        ([(0, 0.25, 1, 0.5), (0.25, 0, 0.5, 1)], 0.25 + 0.25 - 0.0625),  # a cross
    ],
)
def test_area_of_boxes_by_hand(boxes, area):
    assert union_area(boxes) == pytest.approx(area)


def test_area_and_time_on_a_grid():
    """Boxes with whole corners, painted cell by cell."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        painted, defects = np.zeros((12, 10, 10), bool), []
        for _ in range(draw.integers(1, 7)):
            (a, b), (x, u), (y, v) = (sorted(draw.choice(n + 1, 2, replace=False).tolist()) for n in (12, 10, 10))
            painted[a:b, y:v, x:u] = True
            defects.append(defect(a / 12, b / 12, x / 10, y / 10, u / 10, v / 10))
        assert defective(defects, 0.0, 1.0) == pytest.approx(painted.mean())
        np.testing.assert_allclose(clean_shares(defects, 4), 1 - painted.reshape(4, -1).mean(1), atol=1e-9)
        np.testing.assert_allclose(clean_shares(defects, 5), 1 - painted.repeat(5, 0).reshape(5, -1).mean(1), atol=1e-9)


def test_segments_by_hand():
    half = defect(0.25, 0.75, 0, 0, 0.5, 1)
    assert clean_shares([half], 4) == [1, 0.5, 0.5, 1]
    assert clean_shares([half], 1) == [0.75]
    assert clean_shares([half, half], 2) == [0.75, 0.75]
    assert clean_shares([defect(0.25, 0.5, 0, 0, 1, 1), half], 4) == [1, 0, 0.5, 1]
    assert clean_shares([], 3) == [1, 1, 1]


def given(**changed):
    one = {"kind": "hand", "description": "six fingers", "frames": [2, 3], "box": [0, 250, 500, 1000], **changed}
    return {key: value for key, value in one.items() if value is not None}


def read(defects, layout=FRAMES, form="%s", finished=True):
    text = json.dumps({"defects": defects}) if not isinstance(defects, str) else defects
    return read_defects(Reply(form % text, finished, []), layout)


@pytest.mark.parametrize("form", ["%s", "```json\n%s\n```", '<think>a {"defects": 1} or so</think>\nHere: %s'])
def test_answers_are_read(form):
    assert read([], form=form) == []
    found = read([given(), given(kind=" face ", frames=[4, 4], box=[0, 0, 1000, 12.5])], form=form)
    assert found == [
        Defect("hand", "six fingers", 0.25, 0.75, (0, 0.25, 0.5, 1)),
        Defect("face", "six fingers", 0.75, 1.0, (0, 0, 1, 0.0125)),
    ]


def test_seconds_and_pixels():
    layout = Layout("seconds", 2.56, 64, 32)
    (found,) = read([given(frames=None, seconds=[0.64, 1.28], box=[16, 8, 64, 32])], layout)
    assert (found.start, found.end, found.box) == (0.25, 0.5, (0.25, 0.25, 1, 1))
    (rounded,) = read([given(frames=None, seconds=[0, 2.6], box=[0, 0, 1, 1])], layout)
    assert (rounded.start, rounded.end) == (0, 1)  # 2.56 said in one decimal
    with pytest.raises(CallFailed, match="seconds"):
        read([given(frames=None, seconds=[0, 2.7], box=[0, 0, 1, 1])], layout)


@pytest.mark.parametrize(
    "wrong",
    [
        *("no defects", "{}", "[]", '{"defects": null}', '{"defects": {}}', '{"defects": ""}', '{"defects": 0}'),
        *('{"defects": [], "score": 5}', '{"defects": []} {"defects": []}', '{"defects": [', '{"defects": [[1]]}'),
        *([given(kind=None)], [given(description=None)], [given(box=None)], [given(frames=None)], [given(severity=3)]),
        *([given(kind=" ")], [given(kind=1)], [given(description=[])], ["hand"], [None], [given()] * 65),
        *([given(frames=f)] for f in ([0, 1], [3, 2], [1, 5], [1], [1, 2, 3], [1.0, 2], ["1", "2"], [True, 2], 1, {})),
        *(
            [given(box=b)]
            for b in ([0, 0, 0, 9], [9, 0, 3, 9], [0, 9, 9, 9], [-1, 0, 9, 9], [0, 0, 1001, 9], [0, 0, 9])
        ),
        *([given(box=[0, 0, 9, edge])] for edge in ("9", None, True, float("nan"), float("inf"), 10**400)),
    ],
)
def test_an_answer_of_another_form_is_a_failed_call(wrong):
    with pytest.raises(CallFailed, match="not the JSON expected"):
        read(wrong)


def test_a_cut_answer_is_a_failed_call():
    with pytest.raises(CallFailed, match="cut off"):
        read([], finished=False)


def grey(level=0.5, frames=8, **options):
    return Clip(torch.full((frames, 3, 8, 16), level), "a lamp", **options)


def judge(server, **options):
    return load("vlm_defects", url=server.url, model="m", **{"backoff": 0.01, "retries": 0, "frames": 4, **options})


def answers(*defects):
    return says(json.dumps({"defects": list(defects)}))


def test_the_reward_by_hand():
    script = in_turn(answers(), answers(given()), answers(given(), given(frames=[3, 4], box=[0, 0, 1000, 1000])))
    with ScriptedServer(script) as server:
        found = judge(server, concurrency=1)([grey(), grey(), grey()])
    assert found.dense.tolist() == [[1, 1, 1, 1], [1, 0.625, 0.625, 1], [1, 0.625, 0, 0]]
    assert found.total.tolist() == [1, 0.8125, 0.40625]
    assert {name: values.tolist() for name, values in found.dims.items()} == {
        "time": [1, 0.5, 0.25],
        "defects": [0, 1, 2],
    }


def test_a_failed_call_is_masked_and_its_neighbours_stay(caplog):
    with ScriptedServer(in_turn(says("I see no defects."), answers(given()))) as server:
        found = judge(server, concurrency=1)([grey(), grey()])
    assert found.valid.tolist() == [False, True]
    assert found.dense[0].isnan().all()
    assert found.dims["time"][0].isnan()
    assert found.total[1] == 0.8125
    assert "answer is not the JSON expected" in caplog.text


def test_the_judge_is_told_how_many_frames_it_sees():
    video = (torch.arange(8) / 8)[:, None, None, None].expand(8, 3, 4, 4)
    with ScriptedServer(in_turn(answers())) as server:
        judge(server)([Clip(video, "a {count} lamp")])
        parts = content_of(server.requests[0])
    assert parts[0].startswith("You are shown 4 frames of a generated video, in order, numbered from 1 to 4.")
    assert [round(part.mean() / 255 * 8) for part in parts[1:5]] == [0, 2, 5, 7]
    assert "caption: a {count} lamp\n" in parts[5]
    assert parts[5].endswith('{"defects": []}\n')


def test_seconds_and_pixels_with_a_template_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{video}{prompt}: {seconds} s of {width} x {height}")
    said = given(frames=None, seconds=[0.25, 0.375], box=[4, 2, 16, 8])
    with ScriptedServer(in_turn(answers(said))) as server:
        found = judge(server, time="seconds", box="pixels", template=str(path), frames=2)([grey(fps=16.0)])
        assert content_of(server.requests[0])[-1] == "a lamp: 0.50 s of 16 x 8"
    # 0.25 to 0.375 s of 0.5 s is half of the second segment; the box is 3/4 by 3/4
    assert found.dense.tolist() == [[1, 1 - 9 / 32]]
    assert found.dims["time"].tolist() == [0.75]


def test_clips_of_unlike_lengths_have_no_dense():
    with ScriptedServer(in_turn(answers(given(frames=[1, 1], box=[0, 0, 1000, 1000])))) as server:
        found = judge(server)([grey(), grey(frames=2)])
    assert found.dense is None
    assert found.total.tolist() == [0.75, 0.5]


def test_time_alone_counts_as_an_aspect():
    with ScriptedServer(in_turn(answers(given()))) as server:
        assert aspects(judge(server), {"clean": ["time"]})([grey()]).total.tolist() == [0.5]


def test_what_was_found_can_be_read(tmp_path):
    import asyncio

    with ScriptedServer(in_turn(answers(given()), says("?"))) as server:
        reward = judge(server, concurrency=1, cache=str(tmp_path))
        first, second = asyncio.run(reward.find([grey(0.2), grey(0.4)]))
        assert (first[0].kind, first[0].description, second) == ("hand", "six fingers", None)
        assert reward([grey(0.2)]).total.tolist() == [0.8125]
        assert len(server.requests) == 2  # the answer that could be read was kept


def test_nonsense_of_a_real_model_is_masked(judge_folder):
    found = load("vlm_defects", model=str(judge_folder), frames=2, max_tokens=4, device="cpu")([grey(), grey(0.1)])
    assert not found.valid.any()
    assert found.total.isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "minutes"}, "time is 'minutes', expected frames or seconds"),
        ({"box": 0}, "box is 0, expected a number above 0"),
        ({"box": "percent"}, "box is 'percent'"),
        ({"time": "seconds"}, "time and box need a template of yours"),
        ({"box": "pixels"}, "time and box need a template of yours"),
        ({"template": "missing.txt"}, "template missing.txt cannot be read"),
        ({"frames": 0}, "frames is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"model": None}, "no model named"),
        ({"boxes": 1}, "no option 'boxes'"),
    ],
)
def test_options_are_checked_without_a_server(options, message):
    for refuses in (check, load):
        with pytest.raises(RewardError, match=f"reward vlm_defects: {message}") as error:
            refuses("vlm_defects", **{"url": "http://127.0.0.1:9/v1", "model": "m", **options})
        assert "\n" not in str(error.value)
