"""What judges write, and what is read from it: worked by hand."""

import math

import pytest

from rewards.judges.answers import (
    SCALES,
    Scale,
    read_categories,
    read_scores,
    read_selection,
    read_soft_scores,
    read_winner,
    read_yes,
)
from rewards.judges.chat import CallFailed, Reply, Token


def reply(text, finished=True, tokens=()):
    return Reply(text, finished, list(tokens))


def scores(text, style="unified"):
    return read_scores(reply(text), SCALES[style])


@pytest.mark.parametrize(
    ("text", "style", "expected"),
    [
        (
            "Alignment Score (1-5): 4\nPhysics Score (1-5): 3.5\nStyle Score (1-5): 1",
            "unified",
            {"alignment": 4, "physics": 3.5, "style": 1},
        ),
        (
            "**Alignment Score (1-5):** 4.\n- physics score (1-5): **2**\nStyle Score (1-5): 5/5.",
            "unified",
            {"alignment": 4, "physics": 2, "style": 5},
        ),
        ("Final Score: 3\nIn short: Final Score: 3.0", "final", {"final": 3}),
        ("Final Score:\n4 out of 5", "final", {"final": 4}),
        ("Final Score: 4 / 5", "final", {"final": 4}),
        ("<think>Final Score: 2? No.</think>Final Score: 4", "final", {"final": 4}),
        (
            "<think>blur, so visual quality: 2</think>\nvisual quality: 3\ntext-to-video alignment: 4\n"
            "physical/common-sense consistency: 5",
            "videoscore2",
            {"visual": 3, "t2v": 4, "physical": 5},
        ),
        (
            "visual quality: 1, text-to-video alignment: 2, physical/common-sense consistency: 3",
            "videoscore2",
            {"visual": 1, "t2v": 2, "physical": 3},
        ),
    ],
)
def test_scores_are_read_as_published_judges_write_them(text, style, expected):
    assert scores(text, style) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The video is good, I give it a 4.",
        "Score: 4",
        "Final Score: four",
        "Final Score: 4\nFinal Score: 5",
        "Final Score: 6",
        "Final Score: 0",
        "Final Score: -3",
        "Final Score: 45",
        "Final Score: 4-5",
        "Final Score: 4 to 5",
        "Final Score: 4 or 5",
        "Final Score: 4/10",
        "Final Score: 4 out of 10",
        "Final Score: 4/50",
        "Final Score: 80%",
        "Final Score: .5",
        "Final Score: 1.2.3",
        "Final Score: 3,5",
        "Final Score: <number>",
        "Final Score" + ":" * 1000 + " 4",  # far away: patterns that look on would need the square of the time
        "<think>Final Score: 4</think> Good.",
    ],
)
def test_a_score_that_is_not_clear_fails(text):
    with pytest.raises(CallFailed):
        scores(text, "final")


def test_one_missing_dimension_fails_all():
    with pytest.raises(CallFailed, match="no score for Style"):
        scores("Alignment Score (1-5): 4\nPhysics Score (1-5): 3")


def test_an_answer_that_is_cut_off_fails():
    with pytest.raises(CallFailed, match="cut off"):
        read_scores(reply("Final Score: 1", finished=False), SCALES["final"])


def test_a_scale_of_ones_own():
    own = Scale(r"<{dim}>{number}</{dim}>", {"motion": "m", "look": "l"}, 0, 100)
    assert read_scores(reply("<m>70</m><l>100</l>"), own) == {"motion": 70, "look": 100}


def digits(**probabilities):
    return [(name.lstrip("_"), math.log(value)) for name, value in probabilities.items()]


def test_soft_score_is_the_best_digit_times_its_share():
    tokens = [
        Token("<think>visual quality: 5</think>", [("x", -1.0)]),
        Token("visual quality:", [("x", -1.0)]),
        Token(" ", [(" ", 0.0)]),
        Token("4", digits(_4=0.3, _5=0.2, _3=0.1, _9=0.4)),
        Token("; text-to-video alignment: ", [("x", -1.0)]),
        Token("2", digits(_2=0.9)),
        Token("; physical/common-sense consistency:", [("x", -1.0)]),
        Token(" 1", [(" 1", math.log(0.25)), ("1", math.log(0.25)), (" 5", math.log(0.25))]),
    ]
    found = read_soft_scores(reply("the text does not matter", tokens=tokens), SCALES["videoscore2"])
    assert found == pytest.approx({"visual": 4 * 0.3 / 0.6, "t2v": 2.0, "physical": 1 * 0.5 / 0.75})


def test_soft_score_of_a_fraction_fails():
    tokens = [Token("Final Score: ", []), Token("4", digits(_4=0.9)), Token(".5", [])]
    with pytest.raises(CallFailed, match="one digit"):
        read_soft_scores(reply("", tokens=tokens), SCALES["final"])


def first(*top):
    return reply("", tokens=[Token("", [(text, math.log(p)) for text, p in top])])


def test_yes_sums_all_spellings():
    found = read_yes(first(("Yes", 0.3), (" yes", 0.1), ("YES", 0.05), ("The", 0.2), ("No", 0.1), ("no", 0.05)))
    assert found == pytest.approx(0.45 / 0.6)


def test_yes_without_the_other_word():
    assert read_yes(first(("Yes", 0.9), ("I", 0.1))) == 1
    assert read_yes(first(("no", 0.9), ("yesterday", 0.1))) == 0


@pytest.mark.parametrize("answer", [first(("The", 0.9), ("yesterday", 0.1)), reply("yes")])
def test_neither_yes_nor_no_fails(answer):
    with pytest.raises(CallFailed, match="neither yes nor no"):
        read_yes(answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>Video 2 (7/10)</think>\n<answer>Video 1 is better</answer>", 1),
        ("<answer> video 2 is better. </answer>", 0),
        ("<answer>Tie</answer>", 0.5),
        ("<think><answer>Video 1 is better</answer></think><answer>Video 2 is better</answer>", 0),
        ("<answer>Video 1 is better</answer> so <answer>Video 1 is better</answer>", 1),
    ],
)
def test_winner(text, expected):
    assert read_winner(reply(text)) == {"overall": expected}


@pytest.mark.parametrize(
    "text",
    [
        "Video 1 is better",
        "<answer>Video 1 is better",
        "<answer>Video 1 is not better</answer>",
        "<answer>Video 1 is better than Video 2</answer>",
        "<answer>Video 3 is better</answer>",
        "<answer>Video 1 is better</answer><answer>Video 2 is better</answer>",
        "<answer></answer>",
        "<answer>Video 1</answer> or <answer>",
        "<answer><answer>Video 1</answer>",
        "<think><answer>Video 1 is better</answer></think>",
    ],
)
def test_no_clear_winner_fails(text):
    with pytest.raises(CallFailed):
        read_winner(reply(text))


FLEX = """<think>{"winner": "Video 2"}</think>```json
{"categories": [{"name": "a", "dims": {"x": 6}, "cat_winner": "Video 1"}, {"name": "b", "cat_winner": "Video 2"},
 {"name": "c", "cat_winner": "tie"}, {"name": "d", "cat_winner": "who knows"}], "winner": "Video 1"}
```"""


def test_categories_are_the_leading_ones_in_order():
    assert read_categories(reply(FLEX), ["p", "q", "r"]) == {"overall": 1, "p": 1, "q": 0, "r": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "{",
        '{"winner": "Video 1"}',
        '{"winner": "Video 1", "categories": [{"cat_winner": "Video 1"}]}',
        '{"winner": "Video 1", "categories": [{"cat_winner": 3}, {"cat_winner": "tie"}]}',
        '{"winner": null, "categories": [{"cat_winner": "tie"}, {"cat_winner": "tie"}]}',
        '{"winner": "Video 1", "categories": {"a": "tie", "b": "tie"}}',
        "[" * 100_000 + "{}",
        '{"a": ' * 100_000 + "}",
    ],
)
def test_another_json_fails(text):
    with pytest.raises(CallFailed):
        read_categories(reply(text), ["p", "q"])


def test_selection_asks_for_frames_or_decides():
    asked = (
        "<Snapshot>s</Snapshot><think>look</think><recommend answer>TA = 1, MQ = 0, VQ = 0, OA = 1, CF = 2"
        "</recommend answer>\n<tool_call>\n"
        '{"name": "select_frames", "arguments": {"target_frames": [12, 96]}}\n</tool_call>'
    )
    assert read_selection(reply(asked), 96, 8) == [12, 96]
    verdict = {"overall": 1, "TA": 1, "VQ": 0, "MQ": 0.5}
    assert read_selection(reply("<Answer>TA=1, VQ=2, MQ=0, OA=1</Answer>"), 96, 8) == verdict
    assert read_selection(reply("<final answer>\nTA = 1, MQ = 0, VQ = 2, OA = 1\n</final answer>"), 96, 8) == verdict


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<recommend answer>TA=1, VQ=1, MQ=1, OA=1, CF=1</recommend answer>",
        "<answer>TA=1, VQ=1, MQ=1</answer>",
        "<answer>TA=1, VQ=1, MQ=1, OA=3</answer>",
        "<answer>TA=1, VQ=1, MQ=1, MQ=1</answer>",
        "<answer>TA=1, TA=2, VQ=1, MQ=1, OA=1</answer>",
        "<answer>TA=1, VQ=1, MQ=1, OA=1</answer><answer>TA=2, VQ=1, MQ=1, OA=1</answer>",
        "<tool_call>{}</tool_call>",
        "<tool_call>nonsense</tool_call>",
        '<tool_call>{"name": "delete", "arguments": {"target_frames": [1]}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": []}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [0]}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [9]}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [1, 2, 3, 4]}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": ["1"]}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [true]}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": 1}}</tool_call>',
        '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [1]}}</tool_call>' * 2,
    ],
)
def test_another_selection_fails(text):
    with pytest.raises(CallFailed):
        read_selection(reply(text), 8, 3)
