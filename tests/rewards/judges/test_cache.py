"""The cache of replies: what is one question, what is kept, and several processes in one folder."""

import json
import multiprocessing

import pytest
import torch

from rewards import Clip, RewardError, load
from rewards.judges.cache import ReplyCache
from rewards.judges.chat import Frame, Message, digest
from tests.rewards.judges.judge_servers import ScriptedServer, in_turn, says, sends

CLIP = Clip(torch.full((2, 3, 8, 8), 0.5), "a red circle")
REPLY = {"text": "t", "finished": True, "tokens": [["a", [["b", -1.0]]]]}


def judge(server, cache, use="vlm_score", **options):
    options = {"style": "final", **options} if use == "vlm_score" else options
    return load(use, **{"url": server.url, "model": "m", "retries": 0, "cache": str(cache), **options})


def test_a_question_is_asked_once(tmp_path):
    with ScriptedServer(in_turn(says("Final Score: 4"), says("Final Score: 1"))) as server:
        first = judge(server, tmp_path / "new" / "cache")([CLIP])
        again = judge(server, tmp_path / "new" / "cache")([CLIP, CLIP])
        assert len(server.requests) == 1
    assert first.total.tolist() == [0.75]
    assert again.total.tolist() == [0.75] * 2
    assert judge(server, tmp_path / "new" / "cache")([CLIP]).total.tolist() == [0.75]  # the server is gone


def test_log_probabilities_are_kept_too(tmp_path):
    answer = says("Yes", [("Yes", {"Yes": -0.25, "No": -2.0})])
    with ScriptedServer(in_turn(answer)) as server:
        found = [judge(server, tmp_path, "vlm_yes")([CLIP]).total.item() for _ in range(2)]
        assert len(server.requests) == 1
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("clip", "options"),
    [
        (Clip(CLIP.video + 2 / 255, CLIP.prompt), {}),
        (Clip(CLIP.video, "a red square"), {}),
        (CLIP, {"model": "other"}),
        (CLIP, {"temperature": 0.7}),
        (CLIP, {"seed": 1}),
        (CLIP, {"max_tokens": 7}),
        (CLIP, {"frames": 1}),
        (CLIP, {"image_format": "jpeg"}),
        (CLIP, {"extra": {"top_p": 0.5}}),
        (CLIP, {"style": "unified"}),
        (CLIP, {"system": __file__}),
    ],
)
def test_another_question_is_asked_anew(tmp_path, clip, options):
    text = "Final Score: 4\nAlignment Score (1-5): 4\nPhysics Score (1-5): 4\nStyle Score (1-5): 4"
    with ScriptedServer(in_turn(says(text))) as server:
        judge(server, tmp_path)([CLIP])
        judge(server, tmp_path, **options)([clip])
        assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [sends(500, b"oops"), says("no idea"), says("Final Score: 4", finish="length")])
def test_a_failed_call_is_not_kept(tmp_path, fault):
    with ScriptedServer(in_turn(fault, says("Final Score: 4"))) as server:
        reward = judge(server, tmp_path)
        assert reward([CLIP]).valid.tolist() == [False]
        assert list(tmp_path.rglob("*.json")) == []
        assert reward([CLIP]).total.tolist() == [0.75]


def test_what_another_format_kept_is_asked_again(tmp_path):
    template = tmp_path / "mine.txt"
    template.write_text("{prompt}")
    options = {"template": str(template), "dims": {"a": "A"}}
    with ScriptedServer(in_turn(says("A=1"), says("A=1 A:1"))) as server:
        one = judge(server, tmp_path / "c", pattern="{dim}={number}", **options)
        other = judge(server, tmp_path / "c", pattern="{dim}:{number}", **options)
        assert one([CLIP]).total.tolist() == other([CLIP]).total.tolist() == [0]
        assert len(server.requests) == 2


@pytest.mark.parametrize("content", [b"", b'{"text": "Final', b"[]", b'{"text": "x"}', b"\xff\xff"])
def test_a_damaged_file_is_a_miss_and_is_replaced(tmp_path, content):
    with ScriptedServer(in_turn(says("Final Score: 4"))) as server:
        judge(server, tmp_path)([CLIP])
        (file,) = tmp_path.rglob("*.json")
        good = file.read_bytes()
        file.write_bytes(content)
        assert judge(server, tmp_path)([CLIP]).total.tolist() == [0.75]
        assert file.read_bytes() == good
        assert len(server.requests) == 2


def test_the_name_of_a_question_depends_on_its_order():
    first, second = (Frame(torch.full((3, 2, 2), value, dtype=torch.uint8)) for value in (1, 2))
    flat, word = Frame(first.pixels.view(3, 1, 4)), first.digest
    questions = [(first, second), (second, first), (first,), (flat,), ("a", "b"), ("ab",), ("a", first), (word,)]
    assert len({digest({}, [Message("user", parts)], 1, 0) for parts in questions}) == len(questions)


def test_a_full_disk_is_said_and_does_not_stop_the_judge(tmp_path, caplog):
    with ScriptedServer(in_turn(says("Final Score: 4"))) as server:
        reward = judge(server, tmp_path / "cache")
        (tmp_path / "cache").rmdir()  # stands for a disk that takes no more
        assert reward([CLIP, CLIP]).total.tolist() == [0.75] * 2
        assert reward([CLIP]).total.tolist() == [0.75]
    assert caplog.text.count("replies are no longer kept") == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match="cache .*cannot be made"):
        ReplyCache(tmp_path / "file" / "cache")


def write_and_read(folder, letter):
    cache, mine = ReplyCache(folder), {"text": letter * 200_000, "finished": True, "tokens": []}
    for _ in range(60):
        cache.put("ab12", mine)
        found = cache.get("ab12")
        assert found is not None
        assert len(found["text"]) == 200_000
        assert len(set(found["text"])) == 1


def test_processes_that_write_at_once_never_read_half_a_file(tmp_path):
    fork = multiprocessing.get_context("fork")  # importing torch anew would take most of the test's time
    writers = [fork.Process(target=write_and_read, args=(tmp_path, letter)) for letter in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["ab12.json"]  # no temporary file is left


def test_a_failed_write_leaves_nothing(tmp_path):
    cache = ReplyCache(tmp_path)
    with pytest.raises(TypeError):
        cache.put("ab12", {"text": object()})
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    cache.put("ab12", REPLY)
    assert cache.get("ab12") == json.loads(json.dumps(REPLY))
