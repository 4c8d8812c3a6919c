"""The command on sprite videos: rewards are ranked, scores are kept, failures are counted, pages are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from alignment.generation import write_video
from benchmarks.accuracy.data import Benchmark, Item, Pair
from benchmarks.accuracy.fingerprints import describe, fingerprint
from benchmarks.accuracy.protocols import behind, evaluate, headline, note_on, source_of
from benchmarks.accuracy.readers import read_benchmark
from benchmarks.reward_accuracy import main
from examples.tiny_world import flawed_videos, world
from rewards.arguments import RewardArgument

NUM = 4
REWARDS = """
from pathlib import Path
import torch
from rewards import Clip
from rewards.sprite import sprite_motion


def right(videos, prompts):
    return sprite_motion()([Clip(video, prompt) for video, prompt in zip(videos, prompts)]).total


def against(videos, prompts):
    return -right(videos, prompts)


def moody(videos, prompts):
    with Path(__file__).with_name("calls.txt").open("a") as calls:
        calls.write("x" * len(videos))
    return right(videos, prompts) * torch.tensor([1 if len(prompt) % 2 else -1 for prompt in prompts])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a sprite that moves as its prompt says and the same one the other way; every second pair is swapped."""
    folder = tmp_path_factory.mktemp("pairs")
    sprites = world.sample(NUM, torch.Generator().manual_seed(4))
    opposite = torch.where(sprites.direction < 4, sprites.direction ^ 1, 11 - sprites.direction)
    videos = [world.render(sprites), world.render(sprites._replace(direction=opposite))]
    lines = ["path_A,path_B,prompt,MQ,Overall"]
    for i, attributes in enumerate(world.attributes(sprites).tolist()):
        swapped = i % 2
        for side in (0, 1):
            write_video(folder / f"{i}{'AB'[side]}.mp4", videos[side ^ swapped][i], 8)
        label = "AB"[swapped]
        prompt = world.describe(attributes)
        lines.append(f"{i}A.mp4,{i}B.mp4,{prompt},{label},{label if i else 'same'}")
    (folder / "pairs.csv").write_text("\n".join(lines), "utf-8")
    (folder / "mine.py").write_text(REWARDS, "utf-8")
    return folder


def calls(data: Path) -> int:
    return len((data / "calls.txt").read_text())


def test_rewards_are_ranked_and_everything_is_written(data, tmp_path):
    mine = data / "mine.py"
    arguments = ["--data", str(data / "pairs.csv"), "--reward", f"{mine}:against", "--reward", f"{mine}:moody"]
    arguments += ["--reward", "sprite_motion", "--reward", "judge=win_rate:judge=sprite_motion"]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--cache", str(data / "cache"), "--batch", "4"]) == 0
    result = json.loads((out / "accuracy.json").read_text("utf-8"))
    assert result["command"].startswith("python -m benchmarks.reward_accuracy --data ")
    assert {"versions", "date", "protocol"} <= result.keys()
    assert result["data"]["labels"]["Overall"] == {"first": 1, "second": 2, "tie": 1, "invalid": 0}
    rewards = {reward["name"]: reward for reward in result["rewards"]}
    assert [reward["name"] for reward in result["rewards"]] == ["sprite_motion", "judge", "moody", "against"]
    overall = {name: reward["dimensions"]["Overall"] for name, reward in rewards.items()}
    assert overall["sprite_motion"]["without_ties"]["accuracy"] == 1
    assert overall["against"]["without_ties"]["accuracy"] == 0
    assert rewards["against"]["behind_first"][0] == -1
    # A win or a loss says less than a number: the tie cannot be told from the others, so that 3 of 4 are right.
    assert overall["judge"]["with_ties"]["accuracy"] == 3 / 4
    rows = [json.loads(line) for line in (out / "margins.jsonl").read_text("utf-8").splitlines()]
    assert {row["margins"]["judge"]["Overall"] for row in rows} == {1, -1}
    right = sum(len(row["prompt"]) % 2 for row in rows)
    assert 0 < right < NUM
    assert rewards["moody"]["dimensions"]["MQ"]["without_ties"]["accuracy"] == right / NUM
    page = (out / "accuracy.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") > 2
    assert "<script" not in page
    assert ' src="http' not in page
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_scored_is_not_scored_again(data, tmp_path):
    """Also for another table of the same media; a line that a crash has torn is scored again, and nothing else."""
    arguments = ["--reward", f"{data / 'mine.py'}:moody", "--cache", str(tmp_path / "cache")]
    before = calls(data) if (data / "calls.txt").exists() else 0
    assert main(["--data", str(data / "pairs.csv"), *arguments]) == 0
    assert calls(data) - before == 2 * NUM
    row = (data / "pairs.csv").read_text("utf-8").splitlines()[1].split(",")
    pair = {"id": "1", "prompt": row[2], "a": {"video": row[1]}, "b": {"video": row[0]}, "label": 1}
    (data / "pairs.jsonl").write_text(json.dumps(pair), "utf-8")
    assert main(["--data", str(data / "pairs.jsonl"), *arguments]) == 0
    assert calls(data) - before == 2 * NUM
    (scores,) = (tmp_path / "cache").glob("moody-*/scores-*.jsonl")
    scores.write_bytes(scores.read_bytes()[:-9])
    assert main(["--data", str(data / "pairs.csv"), *arguments]) == 0
    assert calls(data) - before == 2 * NUM + 1


def test_media_that_cannot_be_read(data, tmp_path, capsys):
    """One of 8 may fail where --max-failed allows it; its pair counts as wrong. Mended, it is scored."""
    for file in data.glob("*.mp4"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "1A.mp4").read_bytes()
    (tmp_path / "1A.mp4").write_bytes(whole[: len(whole) // 2])
    arguments = ["--data", str(data / "pairs.csv"), "--media", str(tmp_path), "--reward", "sprite_motion"]
    arguments += ["--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--max-failed", "0"]) == 1
    assert "1A.mp4: not a video, or damaged" in capsys.readouterr().err
    assert main([*arguments, "--max-failed", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert "1 without a score (1A.mp4" in shown
    assert "1 pairs count as wrong" in shown
    assert "75.0 (" in shown  # 3 of 4
    (tmp_path / "1A.mp4").write_bytes(whole)
    assert main([*arguments, "--max-failed", "0"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward", "sprite_motoin"], "unknown name (did you mean 'sprite_motion'?)"),
        (["--reward", "sprite_motion", "--reward", "sprite_motion"], "the name sprite_motion is taken"),
        (["--reward", "sprite_motion", "--media", "nowhere"], "--media: no such folder: nowhere"),
        (["--reward", "sprite_motion", "--media", "EMPTY"], "8 of 8 media files are missing"),
        (["--reward", "sprite_motion", "--format", "hpdv2"], 'line 2: "image_path" should be a list of text'),
    ],
)
def test_bad_input(data, tmp_path, capsys, arguments, words):
    arguments = [str(tmp_path) if word == "EMPTY" else word for word in arguments]
    assert main(["--data", str(data / "pairs.csv"), *arguments, "--cache", str(tmp_path / "cache")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(words in line for line in lines)
    assert all(line.startswith("error: ") for line in lines)


def test_fingerprint_follows_the_contents(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.bin").write_bytes(b"1")
    argument = RewardArgument("clip", "clip", {"path": str(tmp_path / "weights"), "frames": 4})
    first = fingerprint(describe(argument))
    assert fingerprint(describe(argument)) == first
    assert fingerprint(describe(argument._replace(options=argument.options | {"frames": 5}))) != first
    (tmp_path / "weights" / "model.bin").write_bytes(b"2")
    assert fingerprint(describe(argument)) != first
    parts = {"rewards": {"a": {"use": "clip", "options": {"path": str(tmp_path / "weights")}}}}
    assert str(tmp_path / "weights") in describe(RewardArgument("w", "weighted", parts))["files"]


def bench(format: str, labels: list[dict], records: list[str]) -> Benchmark:
    items = [Item(f"{i}", Path(f"{i}"), f"prompt {r}", None, None, {}) for i, r in enumerate(records)]
    pairs = [Pair(record, i, i, label) for i, (record, label) in enumerate(zip(records, labels, strict=True))]
    return Benchmark(format, Path("x"), items, pairs, list(labels[0]))


def readings(margins: list[float | None]) -> list:
    return [None if m is None else ({"total": m}, {"total": 0.0}) for m in margins]


def overall(*labels: int | None) -> list[dict]:
    return [{"Overall": label} for label in labels]


def test_each_benchmark_has_its_own_count():
    """MJ-Bench-Video: of 4 decided one is right, one wrong, one equal, one not scored. HPDv2: records of 1 (wrong) and
    2 pairs (right, a tie). ImageReward: the same without the tie, by pair 1 of 2, by record (0 + 1) / 2."""
    found = bench("mj_bench_video", overall(1, 1, -1, -1, 0, None), list("abcdef"))
    measures = evaluate(found, readings([2, -1, 0, None, 1, 1]), "realisable")["Overall"].measures
    assert [(m.value, m.pairs, m.unscored) for m in measures.values()] == [(1 / 4, 4, 1), (1.5 / 4, 4, 1)]
    assert list(measures) == ["strict", "tie_aware"]
    found = bench("hpdv2", overall(1, 1, 0), ["a", "b", "b"])
    measures = evaluate(found, readings([-1, 1, 5]), "realisable")["Overall"].measures
    assert (measures["ranking"].value, measures["ranking"].chance) == (1 / 2, (0.5 + 0.75) / 2)
    found = bench("image_reward", overall(1, 1, -1, 0), ["a", "b", "b", "b"])
    measures = evaluate(found, readings([-1, 1, -1, 5]), "realisable")["Overall"].measures
    assert (measures["by_pair"].value, measures["by_prompt"].value) == (pytest.approx(2 / 3), 1 / 2)


def test_genai_bench_by_three_rules():
    """Decided 1 of 2; with ties at the threshold 0.4 the two ties and one more: 3 of 4; VideoScore's the same."""
    found = bench("genai_bench", overall(1, -1, 0, 0), list("abcd"))
    said = readings([1.0, 0.5, 0.4, -0.4])
    measures = evaluate(found, said, "realisable")["Overall"].measures
    assert {name: m.value for name, m in measures.items()} == {
        "without_ties": 1 / 2,
        "with_ties": 3 / 4,
        "video_score_rule": 3 / 4,
    }
    assert measures["with_ties"].threshold == [0.4]
    assert math.isnan(measures["video_score_rule"].chance)
    assert evaluate(found, said, "official")["Overall"].measures["with_ties"].value == 3 / 4
    assert len(evaluate(found, said, "held-out")["Overall"].measures["with_ties"].threshold) == 2


def test_which_number_answers_which_question():
    dims = ["total", "VQ", "MQ", "TA"]
    assert [source_of(dim, dims) for dim in ("Overall", "VQ", "ta", "Alignment", "Safety")] == [
        *("total", "VQ", "TA", "TA", "total")
    ]
    assert source_of("MQ", ["total", "alignment", "motion"]) == "motion"
    found = bench("video_align", [{"VQ": 1, "TA": 1}] * 2, ["a", "b"])
    said = [({"total": 0.0, "quality": 1.0}, {"total": 1.0, "quality": 0.0})] * 2
    answers = evaluate(found, said, "realisable")
    assert {dim: answer.measures["without_ties"].value for dim, answer in answers.items()} == {"VQ": 1, "TA": 0}
    assert note_on(answers) == "VQ by quality; TA by its total, since it has no such number"
    assert headline(answers) == 1 / 2
    other = evaluate(found, readings([1, 1]), "realisable")
    assert behind(other, answers, found.prompts)[0] == -1 / 2


def test_pairs_with_planted_flaws(tmp_path):
    """The video with fewer flaws of a kind is better in it, the one with fewer in all is better overall."""
    flawed_videos.make(["--out", str(tmp_path / "pairs.jsonl"), "--num", "3", "--seed", "1"])
    found = read_benchmark(tmp_path / "pairs.jsonl")
    assert (found.format, len(found.items)) == ("preferences", 6)
    rows = [json.loads(line)["scores"] for line in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    for pair, scores in zip(found.pairs, rows, strict=True):
        gaps = {dim: first - second for dim, (first, second) in scores.items()}
        signs = {dim: (gap > 0) - (gap < 0) for dim, gap in (gaps | {"Overall": sum(gaps.values())}).items()}
        assert pair.labels == signs
