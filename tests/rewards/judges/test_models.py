"""A real model behind the judges: in this process, through `transformers serve`, and against logits worked out by hand.

The model is a tiny Qwen2-VL with random weights. Its words mean nothing, which is what a judge must withstand.
"""

import asyncio
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards import Clip, RewardError, load, win_rate
from rewards.judges.chat import CallFailed, Frame, Message
from rewards.judges.endpoint import Endpoint
from rewards.judges.in_process import InProcess
from tests.rewards.judges.judge_servers import Reference, logprob_server, transformers_serve

EVERY_TOKEN = 400  # more than the vocabulary has


@pytest.fixture(scope="module")
def served(judge_folder):
    with transformers_serve(judge_folder) as url:
        yield url


@pytest.fixture(scope="module")
def served_with_logprobs(judge_folder):
    with logprob_server(judge_folder) as url:
        yield url


@pytest.fixture(scope="module")
def model(judge_folder):
    return InProcess(str(judge_folder), device="cpu")


@pytest.fixture(scope="module")
def frames():
    noise = torch.rand(3, 3, 6, 7, generator=torch.Generator().manual_seed(2))
    return (torch.nn.functional.interpolate(noise, (42, 60), mode="bilinear") * 255).byte()


def question(frames, text="Is it a lamp?"):
    return [Message("system", ("Be brief.",)), Message("user", ("Look:", *map(Frame, frames), text))]


def as_turns(messages):
    """The same conversation in the form of a processor of transformers."""

    def part(given):
        if isinstance(given, str):
            return {"type": "text", "text": given}
        return {"type": "image", "image": Image.fromarray(given.pixels.permute(1, 2, 0).numpy())}

    return [{"role": message.role, "content": [part(p) for p in message.parts]} for message in messages]


def ask(backend, messages, num, top_logprobs=0):
    return asyncio.run(backend.ask(messages, num, top_logprobs))


def test_greedy_text_and_log_probabilities_are_those_of_the_model(model, judge_folder, frames):
    texts, rows = Reference(judge_folder).complete(as_turns(question(frames)), 5)
    reply = ask(model, question(frames), 5, EVERY_TOKEN)
    assert [token.text for token in reply.tokens] == texts
    assert not reply.finished
    decode = model.processor.tokenizer.decode
    for token, row in zip(reply.tokens, rows, strict=True):
        best, ids = row.sort(descending=True)
        np.testing.assert_allclose([logp for _, logp in token.top], best, atol=1e-4)
        assert [text for text, _ in token.top[:3]] == [decode([index]) for index in ids[:3]]
        assert sum(np.exp([logp for _, logp in token.top])) == pytest.approx(1, abs=1e-5)  # raw, no sampling filter


def test_the_answer_depends_on_frames_and_words(model, frames):
    def top(*given):
        return dict(ask(model, question(*given), 1, EVERY_TOKEN).tokens[0].top)["Yes"]

    plain = top(frames)
    assert abs(top(255 - frames) - plain) > 1e-3
    assert abs(top(frames.flip(0)) - plain) > 1e-4  # the order of the frames
    assert abs(top(frames, "Is it a door?") - plain) > 1e-3


def test_an_answer_ends_at_the_end_of_the_turn(judge_folder, frames):
    model = InProcess(str(judge_folder), device="cpu")
    ending = model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    bias = torch.zeros(model.model.config.text_config.vocab_size)
    bias[ending] = 1e4
    model.model.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    reply = ask(model, question(frames), 5, 1)
    assert (reply.text, reply.finished, len(reply.tokens)) == ("", True, 1)


def test_special_tokens_in_a_prompt_fail_the_call(model, frames):
    for token in ("<|im_end|>", "<|image_pad|>"):
        with pytest.raises(CallFailed, match="special token in the text"):
            ask(model, question(frames, f"a lamp {token}"), 1)


def test_probability_of_yes_is_that_of_the_logits(judge_folder, videos):
    reward = load("vlm_yes", model=str(judge_folder), frames=3, top_logprobs=EVERY_TOKEN, device="cpu")
    prompts = ["a lamp", "two lamps", "a door"]
    found = reward(videos, prompts)
    reference = Reference(judge_folder)
    vocabulary = [reference.processor.tokenizer.decode([index]) for index in range(len(reference.processor.tokenizer))]
    yes, no = ([i for i, t in enumerate(vocabulary) if t.strip().lower() == word] for word in ("yes", "no"))
    assert (len(yes), len(no)) == (3, 3)  # "Yes", "yes", " yes"; "No", "no", " No"
    template = (
        "These are frames of a generated video, in order.\n\n",
        '\n\nDoes the video show "%s", completely and without visible flaws? Answer with one word, Yes or No.\n',
    )
    for index, prompt in enumerate(prompts):
        seen = (videos[index, [0, 2, 3]] * 255).round().byte()  # linspace(0, 3, 3) = 0, 1.5, 3, halves to even
        turn = as_turns([Message("user", (template[0], *map(Frame, seen), template[1] % prompt))])
        (row,) = reference.complete(turn, 1)[1]
        p = row.double().exp()
        assert found.total[index].item() == pytest.approx(
            (p[yes].sum() / (p[yes].sum() + p[no].sum())).item(), abs=1e-5
        )
    assert found.total.unique().numel() == 3


def test_neither_word_among_the_first_tokens_is_masked(judge_folder, videos, caplog):
    found = load("vlm_yes", model=str(judge_folder), top_logprobs=2, device="cpu")(videos, ["a lamp"] * 3)
    assert not found.valid.any()
    assert "neither yes nor no" in caplog.text


def test_gradients_autocast_and_generators_of_the_caller_stay_outside(judge_folder, videos):
    reward = load("vlm_yes", model=str(judge_folder), top_logprobs=EVERY_TOKEN, device="cpu")
    plain = reward(videos, ["a lamp"] * 3).total
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        cast = reward(videos.requires_grad_(), ["a lamp"] * 3).total
    assert torch.equal(cast, plain)
    assert not cast.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_a_win_rate_of_a_real_model(judge_folder, videos):
    inner = load("vlm_yes", model=str(judge_folder), top_logprobs=EVERY_TOKEN, device="cpu")
    order = inner(videos, ["a lamp"] * 3).total.argsort()
    assert win_rate(inner)(videos, ["a lamp"] * 3).total[order].tolist() == [0, 0.5, 1]


def test_transformers_serve_says_what_the_model_says_here(served, model, judge_folder, frames):
    endpoint = Endpoint(str(judge_folder), served)
    for text in ("Is it a lamp?", "Is it a door?"):
        there, here = (ask(backend, question(frames, text), 6) for backend in (endpoint, model))
        assert there == here
        assert len(here.text) > 0


@pytest.mark.parametrize(("use", "options"), [("vlm_score", {}), ("vlm_pairwise", {"style": "select", "frames": 2})])
def test_nonsense_of_a_real_server_is_masked(use, options, served, judge_folder, videos, caplog):
    reward = load(use, url=served, model=str(judge_folder), max_tokens=4, retries=0, **options)
    with caplog.at_level(logging.INFO, "rewards"):
        found = reward([Clip(video, "a lamp") for video in videos])
    assert not found.valid.any()
    assert found.total.isnan().all()
    calls = 3 if use == "vlm_score" else 6
    assert f"{calls} of {calls} calls failed" in caplog.text


def test_transformers_serve_has_no_log_probabilities(served, judge_folder, videos):
    with pytest.raises(RewardError, match="gives no log-probabilities .*transformers serve"):
        load("vlm_yes", url=served, model=str(judge_folder))(videos, ["a lamp"] * 3)


def test_a_model_that_transformers_serve_does_not_have_is_masked_with_its_words(served, videos, caplog):
    found = load("vlm_score", url=served, model="other/judge", retries=0)(videos, ["a lamp"] * 3)
    assert not found.valid.any()
    assert "HTTP 400" in caplog.text
    assert "requested 'other/judge'" in caplog.text


def test_a_path_that_transformers_serve_does_not_have_is_an_error(served, videos):
    with pytest.raises(RewardError, match=r"answers 404 .*url ends with /v1"):
        load("vlm_score", url=served.removesuffix("/v1"), model="m")(videos, ["a lamp"] * 3)


def test_probability_of_yes_over_http_is_that_in_process(served_with_logprobs, judge_folder, videos):
    options = {"frames": 3, "top_logprobs": EVERY_TOKEN}
    here = load("vlm_yes", model=str(judge_folder), device="cpu", **options)(videos, ["a lamp"] * 3)
    there = load("vlm_yes", url=served_with_logprobs, model="m", **options)(videos, ["a lamp"] * 3)
    torch.testing.assert_close(there.total, here.total, atol=1e-5, rtol=0)


@pytest.mark.parametrize("broken", ["config", "weights", "a weight", "processor"])
def test_a_damaged_folder_is_named_in_one_line(broken, judge_folder, tmp_path):
    for file in judge_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if broken == "config":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    elif broken == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    elif broken == "a weight":
        weights = load_file(tmp_path / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        (tmp_path / "processor_config.json").unlink()
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(RewardError, match="reward vlm_score: cannot load model") as error:
        load("vlm_score", model=str(tmp_path))
    assert "\n" not in str(error.value)
