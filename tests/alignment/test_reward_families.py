"""Reward models on every family: the forward pass of transformers, a step of training, and what is saved of it."""

import pytest
import torch

import rewards
from alignment.algorithms import reward_model
from alignment.reward_training.learning import ranked
from rewards.qwen2_vl import run
from rewards.qwen2_vl_reader import Reader
from rewards.video_files import clip_from_file
from tests.rewards.judges import tiny_vlm

from . import reward_recipe as tiny
from .test_reward_model import in_memory, opened, stepped

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
PROMPTS = ["a red circle", "b", "cc", "dd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    tiny.write_clips(folder)
    tiny.write_rows(folder / "pairs.jsonl", tiny.rows())
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def successor(request, folder):
    """The family's name, its model, and the folder that it is saved in."""
    return request.param, tiny.save_successor(folder / request.param, request.param), folder / request.param


def test_native_positions_are_those_of_transformers(successor):
    """Of its own forward pass, given the seconds between steps; clips differ in size, length and prompt."""
    family, model, base = successor
    reader = Reader("test", str(base), ["<|VQ_reward|>"], "native")
    draw = torch.Generator().manual_seed(0)
    frames = [torch.rand(shape, generator=draw) * 255 for shape in ((4, 3, 16, 24), (6, 3, 16, 16))]
    chats = [reader.chat("video", text) for text in ("hi", "hello there")]
    patches = [reader.patches(film, seconds) for film, seconds in zip(frames, (0.5, 1.0), strict=True)]
    batch = reader.batch("video", chats, patches, "cpu", torch.float32)
    text = reader.tokenizer.decode(batch.ids[1])
    assert (" seconds>" in text) == (family == "qwen3_vl")
    if family == "qwen3_vl":  # frames at 0, 1, 2, ... seconds, two of them a step
        assert all(f"<{time} seconds><|vision_start|>" in text for time in (0.5, 2.5, 4.5))
    seconds = {"second_per_grid_ts": batch.seconds} if family == "qwen2_5_vl" else {}
    kinds = 2 * (batch.ids == batch.pad_id).int()
    with torch.no_grad():
        found = run(model.model, *batch)[0].last_hidden_state
        expected = model.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            pixel_values_videos=batch.rows,
            video_grid_thw=batch.grid,
            mm_token_type_ids=kinds,
            **seconds,
        ).last_hidden_state
    known = batch.mask.bool()
    torch.testing.assert_close(found[known], expected[known], atol=1e-5, rtol=1e-4)


def test_a_successor_learns_and_is_read_again(successor, folder, tmp_path):
    family, _, base = successor
    path = tiny.write_recipe(tmp_path, base, folder / "pairs.jsonl")
    session = opened(path)
    before = {name: p.detach().clone() for name, p in session.policy.parameters.items()}
    stepped(session, 2)
    still = {name for name, p in session.policy.parameters.items() if torch.equal(p, before[name])}
    assert not still
    files = [folder / f"{i}.mp4" for i in range(4)]
    raw = in_memory(session, files, PROMPTS)
    saved = session.policy.save(session.folder)
    reward = rewards.load("video_reward", path=str(saved), device="cpu", use_norm=False)
    assert reward.settings.positions == "native"
    found = reward([clip_from_file(file, prompt) for file, prompt in zip(files, PROMPTS, strict=True)])
    torch.testing.assert_close(torch.stack([*found.dims.values()], 1), raw, atol=1e-5, rtol=1e-5)


def test_a_judge_learns_to_say_yes_and_is_read_again(folder, tmp_path):
    """Its probabilities through vlm_yes are those of the model in memory; the brighter clip is the better one."""
    tiny_vlm.save(tmp_path / "vlm")
    algorithm = {"loss": "yes_no", "dimensions": ["VQ"], "num_frames": 2, "batch_size": 4, "lora_dropout": 0.0}
    session = opened(tiny.write_recipe(tmp_path, tmp_path / "vlm", folder / "pairs.jsonl", **algorithm))
    first, *_, last = stepped(session, 8, rate=1e-2)
    assert last < 0.5 * first
    assert ranked(session, session.given.chosen("held_out", reward_model.chosen))[0] == {"VQ": 1, "mean": 1}
    files = [folder / f"{i}.mp4" for i in range(4)]
    saved = session.policy.save(session.folder)
    judge = rewards.load(
        "vlm_yes", model=str(saved), template=str(saved / "question.txt"), frames=2, top_logprobs=300, device="cpu"
    )
    clips = [clip_from_file(file, prompt) for file, prompt in zip(files, PROMPTS, strict=True)]
    with torch.no_grad():
        frames = session.policy.videos.load((file, None) for file in files)
        spelled = torch.stack([spellings(session.policy, *clip) for clip in zip(frames, PROMPTS, strict=True)])
    torch.testing.assert_close(judge(clips).total.double(), spelled.double(), atol=1e-5, rtol=1e-4)


def spellings(model, frames, prompt):
    """P(yes) / (P(yes) + P(no)) over all spellings, which is what vlm_yes reads."""
    tokens = model.processor.tokenizer
    logp = model.first_word(frames, prompt)
    words = [tokens.decode([i]).strip().lower() for i in range(len(logp))]
    yes, no = (logp[[i for i, w in enumerate(words) if w == word]].exp().sum() for word in ("yes", "no"))
    return yes / (yes + no)
