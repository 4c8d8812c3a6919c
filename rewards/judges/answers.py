r"""Reading what judges write. An answer that is not in its format is a failed call, never a guess.

The formats are those of published judges:
    scores    "Alignment Score (1-5): 4" lines (UnifiedReward), "Final Score: 4", VideoScore2's three lines
    winner    <answer>Video 1 is better</answer> (UnifiedReward-Think)
    JSON      {"categories": [{"cat_winner": "Video 1", ...}, ...], "winner": "Video 1"} (UnifiedReward-Flex)
    select    <tool_call>{"name": "select_frames", "arguments": {"target_frames": [12, 24]}}</tool_call> or
              <answer>TA=1, VQ=2, MQ=0, OA=1</answer>, where 0 is a tie (VR-Thinker, arXiv 2510.10518, appendix)
Everything up to a closing </think> is thought, not answer, except for frames asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rewards.judges.chat import CallFailed, Reply, Token

# A number that is not a part of another one, of a range ("4-5", "4 or 5") or of a fraction ("4/10" where 5 is best).
NUMBER = (
    r"(?<![\d.,])(?P<number>[-+]?\d+(?:\.\d+)?)(?![\d%]|[.,]\d|\s*(?:-|\u2013|to\b|or\b)\s*\d"
    r"|\s*(?:/|out of\b)(?!\s*{high}(?!\d|\.\d)))"
)
COLON = r"\W{0,20}?:\W{0,20}?"  # bounded: a judge that writes nothing but colons would be read for hours


class Scale(NamedTuple):
    """How scores are written."""

    pattern: str  # regular expression; {dim} stands for the label, {number} for the number
    labels: dict[str, str]  # name of a dimension -> how the answer calls it
    low: float
    high: float


SCALES = {
    "unified": Scale(
        r"\b{dim} Score \(1-5\)" + COLON + "{number}", {d.lower(): d for d in ("Alignment", "Physics", "Style")}, 1, 5
    ),
    "final": Scale(r"\b{dim}" + COLON + "{number}", {"final": "Final Score"}, 1, 5),
    "videoscore2": Scale(
        r"\b{dim}" + COLON + "{number}",
        {"visual": "visual quality", "t2v": "text-to-video alignment", "physical": "physical/common-sense consistency"},
        1,
        5,
    ),
}


def expression(scale: Scale, label: str) -> re.Pattern[str]:
    """The regular expression that finds one dimension's number. Raises: re.error."""
    number = NUMBER.replace("{high}", re.escape(f"{scale.high:g}"))
    return re.compile(scale.pattern.replace("{dim}", re.escape(label)).replace("{number}", number), re.IGNORECASE)


def answer_start(text: str) -> int:
    """Where the answer begins: after the last </think>, or at 0."""
    return max(0, text.lower().rfind("</think>"))


def read_scores(reply: Reply, scale: Scale) -> dict[str, float]:
    """Name of a dimension -> its number.

    Raises: CallFailed where one is missing, said twice with different values, or outside the scale.
    """
    _require_finished(reply)
    return {name: _number(reply.text, scale, label)[0] for name, label in scale.labels.items()}


def _number(text: str, scale: Scale, label: str) -> tuple[float, int]:
    """The number of a dimension, and the place of its last digit group."""
    found = list(expression(scale, label).finditer(text, answer_start(text)))
    values = {float(match["number"]) for match in found}
    if len(values) != 1:
        what = "no score" if not values else "two different scores"
        raise CallFailed("answer without a clear score", f"{what} for {label} in {text[-150:]!r}")
    value = values.pop()
    if not scale.low <= value <= scale.high:
        raise CallFailed("score outside the scale", f"{label}: {value:g}, expected {scale.low:g} to {scale.high:g}")
    return value, found[-1].start("number")


def read_soft_scores(reply: Reply, scale: Scale) -> dict[str, float]:
    """VideoScore2's soft score: the most probable digit times its share of the probability of all digits.

    Digits of the scale that are not among the returned log-probabilities count as impossible. For two equally probable
    digits a score is half of what a sure judge gives: it is not an expectation.
    Source: TIGER-AI-Lab/VideoScore2, eval/eval_methods/vs2_float.py (ll_based_soft_score_normed).
    Raises: CallFailed as `read_scores` does, and where the digit is not a token of its own.
    """
    _require_finished(reply)
    text = "".join(token.text for token in reply.tokens)
    scores = {}
    for name, label in scale.labels.items():
        value, place = _number(text, scale, label)
        digits = {str(digit): 0.0 for digit in range(math.ceil(scale.low), math.floor(scale.high) + 1)}
        for other, logp in _token_at(reply.tokens, place).top:
            if other.strip() in digits:
                digits[other.strip()] += math.exp(logp)
        total, best = sum(digits.values()), max(digits, key=digits.get)
        if not total > 0 or f"{value:g}" not in digits:
            raise CallFailed("score is not one digit", f"{label}: {value:g}")
        scores[name] = float(best) * digits[best] / total
    return scores


def _token_at(tokens: Sequence[Token], place: int) -> Token:
    for token in tokens:
        if place < len(token.text):
            return token
        place -= len(token.text)
    raise CallFailed("unreadable answer", "the tokens do not make up the text")


def read_yes(reply: Reply) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token, over all spellings of the two that differ in case and spaces.

    If only one of the two is among the returned log-probabilities, the other counts as impossible.
    Raises: CallFailed where neither is.
    """
    weight = {"yes": 0.0, "no": 0.0}
    for text, logp in reply.tokens[0].top if reply.tokens else ():
        if text.strip().lower() in weight:
            weight[text.strip().lower()] += math.exp(logp)
    if not sum(weight.values()) > 0:
        raise CallFailed("neither yes nor no", f"among the most probable first tokens; the answer is {reply.text!r}")
    return weight["yes"] / sum(weight.values())


def read_winner(reply: Reply) -> dict[str, float]:
    """{"overall": 1, 0.5 or 0}: whether the first video won, from one <answer> tag."""
    _require_finished(reply)
    winners = {_winner(tag) for tag in _tagged(reply.text[answer_start(reply.text) :], "answer")}
    if len(winners) != 1:
        raise CallFailed("answer without a clear winner", reply.text[-150:])
    return {"overall": winners.pop()}


def _tagged(text: str, tag: str) -> list[str]:
    """What stands in <tag>...</tag>, in linear time. Raises: CallFailed for one left open."""
    _, *pieces = re.split(rf"<(?:{tag})>", text, flags=re.IGNORECASE)
    found = [re.split(rf"</(?:{tag})>", piece, maxsplit=1, flags=re.IGNORECASE) for piece in pieces]
    if any(len(parts) == 1 for parts in found):
        raise CallFailed("tag that is not closed", text[-150:])
    return [inside for inside, _ in found]


def _winner(text: Any) -> float:
    said = re.sub(r"[\s*.\"']+", " ", str(text)).strip().lower()
    match = re.fullmatch(r"(?:video|image)? ?([12])(?: is better| wins)?|(tie|equal)", said)
    if not match:
        raise CallFailed("answer without a clear winner", str(text))
    return 0.5 if match[2] else float(match[1] == "1")


def read_categories(reply: Reply, names: Sequence[str]) -> dict[str, float]:
    """{"overall": ..., names...: ...}: whether the first video won, and won each of the leading categories in order."""
    _require_finished(reply)
    text = reply.text[answer_start(reply.text) :]
    try:
        verdict = json.loads(text[text.index("{") : text.rindex("}") + 1])
        categories = [category["cat_winner"] for category in verdict["categories"][: len(names)]]
        winner = verdict["winner"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CallFailed("answer is not the JSON expected", f"{error} in {text[-150:]!r}") from error
    if len(categories) < len(names):
        raise CallFailed("answer is not the JSON expected", f"{len(categories)} categories, expected {len(names)}")
    return {"overall": _winner(winner), **{n: _winner(c) for n, c in zip(names, categories, strict=True)}}


def read_selection(reply: Reply, last: int, most: int) -> list[int] | dict[str, float]:
    """Numbers of frames that the judge asks to see, or its final verdict: TA, VQ, MQ and overall, 1, 0.5 or 0 each.

    A recommendation ("recommend answer") is no verdict. Args: numbers go from 1 to `last`, at most `most` of them.
    """
    _require_finished(reply)
    text = reply.text[answer_start(reply.text) :]
    finals, calls = _tagged(text, "final answer|answer"), _tagged(text, "tool_call")
    if len(finals) == 1:
        return _verdict(finals[0])
    if finals or len(calls) != 1:
        raise CallFailed("neither one answer nor one request for frames", text[-150:])
    try:
        call = json.loads(calls[0])
        frames = call["arguments"]["target_frames"]
        good = call["name"] == "select_frames" and all(type(frame) is int and 1 <= frame <= last for frame in frames)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CallFailed("unreadable request for frames", f"{error} in {calls[0]}") from error
    if not good or not 1 <= len(frames) <= most:
        raise CallFailed("impossible request for frames", f"{calls[0]}; expected 1 to {most} numbers from 1 to {last}")
    return frames


def _verdict(text: str) -> dict[str, float]:
    said = re.fullmatch(r"\s*(?:(?:TA|VQ|MQ|OA)\s*=\s*[012][\s,;]*){4}", text)
    found: Mapping[str, str] = dict(re.findall(r"(TA|VQ|MQ|OA)\s*=\s*([012])", text))
    if not said or len(found) != 4:
        raise CallFailed("answer without a clear winner", text)
    value = {"1": 1.0, "2": 0.0, "0": 0.5}
    return {"overall": value[found["OA"]], **{name: value[found[name]] for name in ("TA", "VQ", "MQ")}}


def _require_finished(reply: Reply) -> None:
    if not reply.finished:
        raise CallFailed("answer cut off", "raise max_tokens")
