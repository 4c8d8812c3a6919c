"""The judges as rewards: what they ask, and what their answers become. Servers are real, their words are scripted."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import Clip, RewardError, check, load
from rewards.judges.chat import Frame
from rewards.judges.templates import render
from tests.rewards.judges.judge_servers import ScriptedServer, content_of, in_turn, says


def grey(level, frames=4, prompt="a lamp", **options):
    return Clip(torch.full((frames, 3, 8, 8), level), prompt, **options)


def judge(use, server, **options):
    return load(use, url=server.url, model="m", **{"backoff": 0.01, "retries": 0, **options})


def test_scores_are_normalised_and_averaged(bright_server):
    clips = [grey(0.0), grey(0.5), grey(1.0)]
    found = judge("vlm_score", bright_server)(clips)
    bright = torch.tensor([0.0, 128 / 255, 1.0])
    torch.testing.assert_close(found.dims["alignment"], bright, atol=2e-4, rtol=0)
    torch.testing.assert_close(found.dims["physics"], torch.full((3,), 0.5))
    torch.testing.assert_close(found.total, torch.full((3,), 0.5), atol=2e-4, rtol=0)  # alignment and style add up to 1
    raw = judge("vlm_score", bright_server, normalise=False)(clips)
    torch.testing.assert_close(raw.dims["alignment"], 1 + 4 * bright, atol=1e-3, rtol=0)
    torch.testing.assert_close(raw.total, torch.full((3,), 3.0), atol=1e-3, rtol=0)


def test_a_judge_sees_evenly_spaced_frames_in_order():
    video = (torch.arange(9) / 10)[:, None, None, None].expand(9, 3, 4, 4)
    with ScriptedServer(in_turn(says("Final Score: 1"))) as server:
        reward = judge("vlm_score", server, style="final", frames=3)
        reward([Clip(video, "a lamp")])
        parts = content_of(server.requests[0])
    assert reward.indices(9, 16.0) == [0, 4, 8]
    assert [isinstance(part, str) for part in parts] == [True, False, False, False, True]
    assert [round(part.mean() / 25.5) for part in parts[1:4]] == [0, 4, 8]


def test_a_template_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text('Rate {prompt}! Answer {"look": <number>}')
    with ScriptedServer(in_turn(says('{"look": 30, "sound": 90}'))) as server:
        options = {"dims": ["look", "sound"], "pattern": '"{dim}": {number}', "scale": [0, 100], "system": str(path)}
        found = judge("vlm_score", server, template=str(path), frames=1, **options)([grey(0.2)])
        picture, text = content_of(server.requests[0])  # no place for the frames: they come first
        assert server.requests[0]["messages"][0] == {"role": "system", "content": path.read_text()}
    assert text == 'Rate a lamp! Answer {"look": <number>}'
    assert picture.shape == (8, 8, 3)
    assert {name: round(value.item(), 4) for name, value in found.dims.items()} == {"look": 0.3, "sound": 0.9}


def test_only_what_stands_in_braces_is_a_place():
    assert render('"prompt"{prompt}{none} {{prompt}}', {"prompt": "{video}"}, {"video": []}) == (
        '"prompt"{video}{none} {{video}}',
    )


def test_soft_scores_over_an_endpoint():
    sure, unsure = {"5": math.log(0.9)}, {"4": math.log(0.4), "5": math.log(0.4 - 1e-9)}
    lines = [("visual quality: ", {}), ("5", sure), ("\ntext-to-video alignment: ", {}), ("4", unsure)]
    lines += [("\nphysical/common-sense consistency: ", {}), ("5", sure)]
    with ScriptedServer(in_turn(says("".join(text for text, _ in lines), lines))) as server:
        found = judge("vlm_score", server, style="videoscore2", soft=True)([grey(0.5)])
        raw = judge("vlm_score", server, style="videoscore2", soft=True, normalise=False)([grey(0.5)])
        assert server.requests[0]["top_logprobs"] == 20
    assert [round(raw.dims[name].item(), 4) for name in ("visual", "t2v", "physical")] == [5, 2, 5]
    assert found.total.item() == pytest.approx((1 + 0.4 + 1) / 3)  # 0 to the best number is 0 to 1


def likes_brighter(request):
    """P(yes) = 0.8 where the last image is brighter than the first, else 0.2."""
    images = [part for part in content_of(request) if not isinstance(part, str)]
    yes = 0.8 if images[-1].mean() > images[0].mean() else 0.2
    return says("Yes", [("Yes", {"Yes": math.log(yes), "No": math.log(1 - yes)})])


def test_a_reference_is_seen_first(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(tmp_path / "reference.png")
    with ScriptedServer(likes_brighter) as server:
        from_file = judge("vlm_yes", server, reference=str(tmp_path / "reference.png"), concurrency=1)
        own = [grey(0.2), grey(0.9), grey(0.9, meta={"reference": torch.full((5, 3, 8, 8), 1.0)})]
        assert from_file(own).total.tolist() == pytest.approx([0.2, 0.8, 0.2])
        assert len(content_of(server.requests[0])) == 3 + 1 + 4  # texts, reference, clip
        by_name = grey(0.4, meta={"reference": str(tmp_path / "reference.png")})
        assert judge("vlm_yes", server, reference=True)([by_name]).total.tolist() == pytest.approx([0.2])
        from_clips = judge("vlm_yes", server, reference=True)(own)
    assert from_clips.valid.tolist() == [False, False, True]  # a clip without one is not guessed


def test_a_template_without_places_gets_the_reference_before_the_clip(tmp_path):
    (tmp_path / "bare.txt").write_text("{prompt}?")
    with ScriptedServer(likes_brighter) as server:
        reward = judge("vlm_yes", server, reference=True, template=str(tmp_path / "bare.txt"))
        assert reward([grey(0.9, meta={"reference": torch.zeros(1, 3, 8, 8)})]).total.tolist() == pytest.approx([0.8])
        assert [isinstance(part, str) for part in content_of(server.requests[0])] == [False] * 5 + [True]


def test_a_reference_of_another_form_is_named(tmp_path):
    with ScriptedServer(likes_brighter) as server:
        reward = judge("vlm_yes", server, reference=True)
        with pytest.raises(RewardError, match=r"reward vlm_yes: .*expected \(F, 3, H, W\)"):
            reward([grey(0.2, meta={"reference": torch.zeros(3, 8, 8)})])
        with pytest.raises(RewardError, match="clip.meta\\['reference'\\] is a list, expected a file or a tensor"):
            reward([grey(0.2, meta={"reference": [0.5]})])
        with pytest.raises(RewardError, match=r"none.mp4: no such file"):
            reward([grey(0.2, meta={"reference": str(tmp_path / "none.mp4")})])
        with pytest.raises(RewardError, match=r"pixels from 0 to 255"):
            reward([grey(0.2, meta={"reference": torch.linspace(0, 255, 192).view(1, 3, 8, 8)})])
    with pytest.raises(RewardError, match="no reference file"):
        check("vlm_yes", url="http://127.0.0.1:1/v1", model="m", reference=str(tmp_path / "none.mp4"))


def test_pairwise_is_the_win_rate_of_the_group(bright_server):
    levels = [0.2, 0.9, 0.5, 0.5, 0.1, 0.3]
    clips = [grey(level) for level in levels[:4]] + [grey(level, prompt="b", group=1) for level in levels[4:]]
    found = judge("vlm_pairwise", bright_server)(clips)
    assert found.total.tolist() == [0, 1, 0.5, 0.5, 0, 1]
    assert len(bright_server.requests) == 2 * (6 + 1)  # both orders of all pairs of each group


def test_frames_are_encoded_once_for_all_comparisons(bright_server, monkeypatch):
    encoded = []
    image = Frame.image
    monkeypatch.setattr(Frame, "image", lambda frame: encoded.append(frame) or image(frame))
    judge("vlm_pairwise", bright_server, frames=2, concurrency=1)([grey(level) for level in (0.1, 0.5, 0.9)])
    assert len(bright_server.requests) == 6
    assert len(encoded) == 3 * 2


def test_a_judge_that_always_says_the_first_decides_nothing():
    with ScriptedServer(in_turn(says("<answer>Video 1 is better</answer>"))) as server:
        assert judge("vlm_pairwise", server)([grey(0.1), grey(0.5), grey(0.9)]).total.tolist() == [0.5] * 3
        once = judge("vlm_pairwise", server, swap=False)
        assert once([grey(0.1), grey(0.5), grey(0.9)]).total.tolist() == [1, 0.5, 0]
        assert len(server.requests) == 6 + 3


def test_one_failed_order_fails_the_comparison():
    def script(request):
        images = [part for part in content_of(request) if not isinstance(part, str)]
        if images[0].mean() > images[-1].mean():
            return says("<answer>hard to say</answer>")
        return says("<answer>Video 2 is better</answer>")

    with ScriptedServer(script) as server:
        assert judge("vlm_pairwise", server)([grey(0.1), grey(0.9)]).valid.tolist() == [False, False]
        assert judge("vlm_pairwise", server, swap=False)([grey(0.1), grey(0.9)]).total.tolist() == [0, 1]


FLEX = {  # (brightness of video 1, of video 2) -> winner, and of three categories
    (1, 2): ("2", "1", "2", "2"),
    (2, 1): ("1", "2", "1", "2"),
    (1, 3): ("2", "2", "1", "2"),
    (3, 1): ("1", "1", "2", "1"),
    (2, 3): ("1", "2", "1", "1"),
    (3, 2): ("1", "1", "2", "2"),
}


def flex(request):
    images = [part for part in content_of(request) if not isinstance(part, str)]
    winner, *categories = FLEX[round(images[0].mean() / 51), round(images[-1].mean() / 51)]
    listed = ", ".join(f'{{"name": "c", "cat_winner": "Video {number}"}}' for number in categories)
    return says(f'{{"categories": [{listed}], "winner": "Video {winner}"}}')


@pytest.mark.parametrize("weights", [None, {"overall": 3.0, "categories": 1.0}, {"overall": 0.0}])
def test_flex_weighs_the_overall_rate_and_the_mean_rate_of_the_categories(weights):
    """Rates by hand: a verdict counts where both orders agree, else it is a tie."""
    with ScriptedServer(flex) as server:
        found = judge("vlm_pairwise", server, style="flex", weights=weights)([grey(k / 5) for k in (1, 2, 3)])
    # Winner, and winners of the categories: 1 against 2: 2; 1 | 2 | tie, since both orders name their second video.
    # 1 against 3: 3; 3 | 1 | 3. 2 against 3: tie, since both orders name their first video; 3 | 2 | 2.
    overall = [0.0, 0.75, 0.75]
    dims = {"alignment": [0.5, 0.0, 1.0], "motion": [0.5, 1.0, 0.0], "quality": [0.25, 0.75, 0.5]}
    assert found.dims["overall"].tolist() == overall
    assert {name: found.dims[name].tolist() for name in dims} == dims
    w_o, w_d = (weights or {}).get("overall", 1.0), (weights or {}).get("categories", 1.0)
    mean = [sum(column) / 3 for column in zip(*dims.values(), strict=True)]
    expected = [(w_o * o + w_d * m) / (w_o + w_d) for o, m in zip(overall, mean, strict=True)]
    assert found.total.tolist() == pytest.approx(expected)


def levels_of(message):
    parts = [part for part in content_of({"messages": [message]}) if not isinstance(part, str)]
    return [round(part.mean() / 255 * 100) for part in parts]


def test_a_judge_may_ask_for_frames():
    """Twelve frames of each clip, numbered 1 to 24, whose brightness is their number (second clip: 12 more)."""
    first, second = (
        Clip((torch.arange(1, 13) + start)[:, None, None, None].expand(12, 3, 4, 4) / 100, "a lamp")
        for start in (0, 12)
    )
    tool = '<think>t</think><tool_call>{"name": "select_frames", "arguments": {"target_frames": %s}}</tool_call>'
    verdict = "<answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
    with ScriptedServer(in_turn(says(tool % "[12, 13]"), says(tool % "[24]"), says(verdict))) as server:
        reward = judge("vlm_pairwise", server, style="select", swap=False, frames=12, first_frames=4)
        found = reward([first, second])
        requests = server.requests
    assert found.total.tolist() == [1, 0]
    assert {name: values.tolist() for name, values in found.dims.items()} == {
        "overall": [1, 0],
        "TA": [1, 0],
        "VQ": [0.5, 0.5],
        "MQ": [0, 1],
    }
    assert levels_of(requests[0]["messages"][0]) == [3, 6, 9, 12, 15, 18, 21, 24]
    text = "".join(part for part in content_of(requests[0]) if isinstance(part, str))
    assert "24 frames" in text
    assert "Video 1, frames 3, 6, 9, 12:" in text
    assert "Video 2, frames 15, 18, 21, 24:" in text
    assert [message["role"] for message in requests[2]["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert levels_of(requests[1]["messages"][2]) == [12, 13]
    assert content_of(requests[1])[0::2] == ["Frame 12 (Video 1):", "Frame 13 (Video 2):"]
    assert requests[1]["messages"][1]["content"] == tool % "[12, 13]"


def test_a_judge_that_never_decides_is_stopped():
    tool = '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [1]}}</tool_call>'
    with ScriptedServer(in_turn(says(tool))) as server:
        reward = judge("vlm_pairwise", server, style="select", swap=False, turns=3)
        assert reward([grey(0.1), grey(0.9)]).valid.tolist() == [False, False]
        assert len(server.requests) == 3


def test_too_many_frames_at_once_fail():
    tool = '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [1, 2, 3]}}</tool_call>'
    with ScriptedServer(in_turn(says(tool), says("<answer>TA=1, VQ=1, MQ=1, OA=1</answer>"))) as server:
        reward = judge("vlm_pairwise", server, style="select", swap=False, most=2)
        assert reward([grey(0.1), grey(0.9)]).valid.tolist() == [False, False]


@pytest.fixture
def files(tmp_path):
    for name, text in {
        "no_prompt.txt": "Is it good?",
        "one_video.txt": "{prompt} {video_1}",
        "fine.txt": "{prompt}",
        "long.txt": "{prompt}" + "x" * 300_000,
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe{prompt}")
    (tmp_path / "model").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("vlm_score", {"style": "best"}, "style 'best' is not one of unified, final, videoscore2"),
        ("vlm_score", {"template": "{d}/none.txt"}, "template .*none.txt cannot be read"),
        ("vlm_score", {"template": "{d}/bytes.txt"}, "template .*bytes.txt cannot be read"),
        ("vlm_score", {"template": "{d}/long.txt"}, "long.txt has 300008 characters"),
        ("vlm_score", {"template": "{d}/no_prompt.txt"}, "no_prompt.txt lacks {prompt}"),
        ("vlm_score", {"system": "{d}/none.txt"}, "system .*none.txt cannot be read"),
        ("vlm_score", {"dims": ["a"]}, "dims need a template of yours"),
        ("vlm_score", {"pattern": "{dim}", "template": "{d}/fine.txt"}, "lacks {number}"),
        ("vlm_score", {"pattern": "{number}", "template": "{d}/fine.txt"}, "lacks {dim}"),
        ("vlm_score", {"pattern": "({dim}{number}", "template": "{d}/fine.txt"}, "no regular expression"),
        ("vlm_score", {"scale": [5, 1], "template": "{d}/fine.txt"}, "nothing to score"),
        ("vlm_score", {"scale": 5, "template": "{d}/fine.txt"}, r"expected \[lowest, highest\]"),
        ("vlm_score", {"frames": 0}, "frames is 0"),
        ("vlm_score", {"max_tokens": 0}, "max_tokens is 0"),
        ("vlm_score", {"cache": "{d}/fine.txt"}, "is a file, expected a folder"),
        ("vlm_score", {"url": "127.0.0.1:8000"}, "is not of the form http://host:port/v1"),
        ("vlm_score", {"url": "http://:8000/v1"}, "is not of the form"),
        ("vlm_score", {"url": "http://host:port/v1"}, "is not of the form"),
        ("vlm_score", {"url": "http://me:secret@host/v1"}, "url holds a password"),
        ("vlm_score", {"url": 8000}, "is not of the form"),
        ("vlm_score", {"api_key": "sk-1"}, "no option 'api_key' .*did you mean 'api_key_env'"),
        ("vlm_score", {"api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE, which is not set"),
        ("vlm_score", {"retries": -1}, "retries is -1"),
        ("vlm_score", {"concurrency": 1.5}, "concurrency is 1.5, expected a whole number"),
        ("vlm_score", {"timeout": float("nan")}, "timeout is nan"),
        ("vlm_score", {"image_format": "gif"}, "expected png or jpeg"),
        ("vlm_score", {"extra": {"a": {1, 2}}}, "extra is not fields of a JSON request"),
        ("vlm_score", {"device": "cpu"}, "no option 'device' with url"),
        ("vlm_score", {"model": None}, "no model named"),
        ("vlm_score", {"url": None}, "model 'm' is no folder, and no owner/name"),
        ("vlm_score", {"url": None, "model": "{d}/model"}, "no config.json and no .*safetensors"),
        ("vlm_score", {"url": None, "model": "a/b", "timeout": 3.0}, "no option 'timeout' without url"),
        ("vlm_score", {"url": None, "model": "a/b", "dtype": "int8"}, "dtype is 'int8'"),
        ("vlm_yes", {"top_logprobs": 1}, "top_logprobs is 1"),
        ("vlm_yes", {"template": "{d}/no_prompt.txt"}, "lacks {prompt}"),
        ("vlm_pairwise", {"style": "best"}, "style 'best' is not one of think, flex, select"),
        ("vlm_pairwise", {"template": "{d}/one_video.txt"}, "lacks {video_2}"),
        ("vlm_pairwise", {"weights": {"overall": 1}}, "weights are for style flex"),
        ("vlm_pairwise", {"style": "flex", "weights": {"motion": 1}}, "expected overall and categories"),
        ("vlm_pairwise", {"style": "flex", "weights": {"overall": 0, "categories": 0}}, "not both 0"),
        ("vlm_pairwise", {"style": "flex", "categories": ["a", "a"]}, "expected different names"),
        ("vlm_pairwise", {"style": "select", "turns": 0}, "turns is 0"),
    ],
)
def test_check_refuses_in_one_line_and_asks_no_server(files, use, options, message):
    given = {"url": "http://127.0.0.1:9/v1", "model": "m"} | options
    given = {key: value.replace("{d}", str(files)) if isinstance(value, str) else value for key, value in given.items()}
    given = {key: value for key, value in given.items() if value is not None}
    for refuses in (check, load):
        with pytest.raises(RewardError, match=message) as error:
            refuses(use, **given)
        assert str(error.value).startswith(f"reward {use}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("use", ["vlm_score", "vlm_yes", "vlm_pairwise"])
def test_check_accepts_without_network_and_weights(use, files):
    check(use, url="http://127.0.0.1:9/v1", model="m", template=str(files / "fine.txt"), cache=str(files / "cache"))
    check(use, url="https://judge.example.org/v1/", model="m", concurrency=2, extra={"top_k": 1})
    check(use, model="owner/judge-7b")
    assert not (files / "cache").exists()
