"""The queue and the calls of one served reward, step by step."""

import threading

import pytest
import torch

from rewards import Clip, Reward, Scores
from rewards.serving.worker import QueueFull, ScoringFailed, Worker


class Gated(Reward):
    """Keeps what it was called with, and answers once the gate is open."""

    name = "gated"

    def __init__(self, scope="clip"):
        self.scope, self.calls = scope, []
        self.gate, self.called = threading.Event(), threading.Event()

    def score(self, clips):
        self.calls.append([(clip.prompt, clip.group) for clip in clips])
        self.called.set()
        assert self.gate.wait(10)
        if any(clip.prompt == "bad" for clip in clips):
            raise ValueError("bad")
        return Scores(torch.tensor([float(clip.prompt) for clip in clips]))


@pytest.fixture
def gated():
    """Build a worker whose first call runs already, so that what follows waits."""
    workers = []

    def build(scope="clip", **options):
        worker = Worker("gated", Gated(scope), wait=0.0, **options)
        workers.append(worker)
        worker.first = worker.submit(question("0"))
        assert worker.reward.called.wait(10)
        return worker

    yield build
    for worker in workers:
        worker.reward.gate.set()
        assert worker.close(10)


def question(*prompts, size=8, groups=None):
    video = torch.zeros(2, 3, size, 8, dtype=torch.uint8)
    return [Clip(video, prompt, group=group) for prompt, group in zip(prompts, groups or [0] * 9, strict=False)]


def prompts_of(worker):
    return ["".join(prompt for prompt, _ in call) for call in worker.reward.calls]


def results(worker, answers):
    worker.reward.gate.set()
    return [answer.result(10).total.tolist() for answer in answers]


def test_what_waits_is_one_call_and_everyone_has_his_own_answer(gated):
    worker = gated()
    answers = [worker.submit(question(*prompts)) for prompts in ("1", "23", "4")]
    assert results(worker, answers) == [[1], [2, 3], [4]]
    assert prompts_of(worker) == ["0", "1234"]


def test_other_shapes_are_another_call_and_do_not_stand_in_the_way(gated):
    worker = gated()
    sizes = {"1": 8, "2": 16, "3": 8, "4": 16, "5": 8}
    answers = [worker.submit(question(prompt, size=size)) for prompt, size in sizes.items()]
    assert results(worker, answers) == [[1], [2], [3], [4], [5]]
    assert prompts_of(worker) == ["0", "135", "24"]


def test_a_call_is_not_larger_than_asked_for_unless_one_question_is(gated):
    worker = gated(batch=3)
    answers = [worker.submit(question(*prompts)) for prompts in ("12", "34", "5", "6789")]
    assert results(worker, answers) == [[1, 2], [3, 4], [5], [6, 7, 8, 9]]
    assert prompts_of(worker) == ["0", "125", "34", "6789"]


def test_groups_of_different_questions_have_different_numbers(gated):
    worker = gated("group")
    answers = [worker.submit(question("1", "2", "3", groups=[5, 6, 5])), worker.submit(question("4", groups=[5]))]
    results(worker, answers)
    groups = [group for _, group in worker.reward.calls[1]]
    assert groups[0] == groups[2]
    assert len({groups[0], groups[1], groups[3]}) == 3


def test_a_reward_of_scope_batch_has_one_question_a_call(gated):
    worker = gated("batch")
    results(worker, [worker.submit(question("1")), worker.submit(question("2"))])
    assert prompts_of(worker) == ["0", "1", "2"]


def test_a_question_that_fails_is_tried_alone_and_fails_alone(gated):
    worker = gated()
    good, bad, other = (worker.submit(question(prompt)) for prompt in ("1", "bad", "2"))
    assert results(worker, [good, other]) == [[1], [2]]
    with pytest.raises(ScoringFailed, match="^reward gated: ValueError: bad$"):
        bad.result(10)
    assert prompts_of(worker) == ["0", "1bad2", "1", "bad", "2"]
    assert worker.health() == {"waiting": 0, "busy_seconds": None, "questions": 3, "clips": 3, "calls": 5, "failed": 1}


def test_a_full_queue_refuses_and_has_room_again(gated):
    worker = gated(capacity=2)
    answers = [worker.submit(question("1")), worker.submit(question("2"))]
    assert worker.health()["waiting"] == 2
    assert worker.health()["busy_seconds"] >= 0
    with pytest.raises(QueueFull):
        worker.submit(question("3"))
    assert results(worker, answers) == [[1], [2]]
    assert results(worker, [worker.submit(question("3"))]) == [[3]]


def test_a_question_that_nobody_waits_for_is_not_scored(gated):
    worker = gated()
    lost, kept = worker.submit(question("1")), worker.submit(question("2"))
    assert lost.cancel()
    assert results(worker, [kept]) == [[2]]
    assert prompts_of(worker) == ["0", "2"]


def test_close_answers_what_waits(gated):
    worker = gated()
    waiting = worker.submit(question("1"))
    assert not worker.close(0.01)  # the first call is not over
    worker.reward.gate.set()
    assert worker.close(10)
    assert waiting.result(0).total.tolist() == [1]
