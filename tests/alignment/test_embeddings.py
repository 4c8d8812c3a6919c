"""The embedding cache changes nothing but how often a prompt is encoded."""

import functools

import pytest
import torch
from safetensors.torch import save_file

from alignment import embeddings
from alignment.embeddings import EmbeddingCache
from alignment.errors import UserError
from tests.alignment.tiny import make_policy
from tests.pipelines import FAMILIES, PROMPTS

SEEDS = [5, 6]


def with_cache(family, folder):
    """A pipeline with a cache, its call, the cache, and the list of prompts that reached the encoders."""
    pipe, call = FAMILIES[family]()
    encode, reached = pipe.encode_prompt, []

    @functools.wraps(encode)
    def counted(*args, **kwargs):
        reached.append(kwargs["prompt"])
        return encode(*args, **kwargs)

    pipe.encode_prompt = counted
    return pipe, call, EmbeddingCache.install(pipe, folder), reached


@torch.no_grad()
def video(pipe, call, **more):
    return pipe(**{**call, **more}, generator=[torch.Generator().manual_seed(seed) for seed in SEEDS])[0]


def settings_of(cache):
    (settings,) = cache.settings.values()
    return settings


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_the_pipeline(family, tmp_path):
    """Bit for bit those of each prompt on its own; a batch in the encoder may round otherwise."""
    pipe, call, cache, reached = with_cache(family, tmp_path)
    plain, _ = FAMILIES[family]()
    torch.testing.assert_close(video(pipe, call), video(plain, call), atol=1e-5, rtol=0)
    assert cache.cacheable
    assert reached == [[PROMPTS[0]], [PROMPTS[0]] * 2, [PROMPTS[1]]]
    with torch.no_grad():
        cached = cache(**settings_of(cache), prompt=PROMPTS)
        alone = [plain.encode_prompt(**settings_of(cache), prompt=[prompt]) for prompt in PROMPTS]
        together = plain.encode_prompt(**settings_of(cache), prompt=PROMPTS)
    for found, first, second, both in zip(cached, *alone, together, strict=True):
        assert (found is None) == (both is None)
        if found is not None:
            assert found.shape == both.shape
            assert found.dtype == both.dtype
            joined = torch.cat([first, second]) if len(first) != len(both) else first
            assert torch.equal(found, joined)
    assert len(reached) == 3


@pytest.mark.parametrize("family", ["wan", "stable_diffusion"])
def test_without_guidance(family, tmp_path):
    """There the negative embedding is None. Both settings have entries of their own."""
    pipe, call, cache, reached = with_cache(family, tmp_path)
    plain, _ = FAMILIES[family]()
    for scale in (1.0, 3.0, 1.0):
        expected = video(plain, call, guidance_scale=scale)
        torch.testing.assert_close(video(pipe, call, guidance_scale=scale), expected, atol=1e-5, rtol=0)
    assert len(cache.settings) == 2
    assert len(reached) == 6


def test_one_encoder_call_a_prompt(tmp_path):
    """And one more a setting, which tells what has a row for each prompt."""
    pipe, call, cache, reached = with_cache("wan", tmp_path)
    for prompts in (["a", "b"], ["b", "c"], ["c", "a"], ["a", "a"]):
        video(pipe, call, prompt=prompts)
    assert reached == [["a"], ["a", "a"], ["b"], ["c"]]
    cache.hold(["a", "d"])
    assert reached[4:] == [["d"]]
    assert len(list(tmp_path.iterdir())) == 4


def test_rows_keep_their_order(tmp_path):
    pipe, call, cache, _ = with_cache("wan", tmp_path)
    video(pipe, call)
    forward = cache(prompt=["a", "b", "a"], **settings_of(cache))[0]
    backward = cache(prompt=["b", "a", "b"], **settings_of(cache))[0]
    assert torch.equal(forward[0], forward[2])
    assert torch.equal(forward[[0, 1]], backward[[1, 0]])
    assert not torch.equal(forward[0], forward[1])


def test_second_start_reads_from_disk(tmp_path):
    first = with_cache("wan", tmp_path)
    expected = video(*first[:2])
    pipe, call, _, reached = with_cache("wan", tmp_path)
    assert torch.equal(video(pipe, call, prompt=PROMPTS), expected)
    assert reached == []


def entries(folder, change=lambda pipe: None, **more):
    """Names of the entries that one run of the pipeline adds."""
    before = set(folder.iterdir()) if folder.exists() else set()
    pipe, call = FAMILIES["wan"]()
    change(pipe)
    EmbeddingCache.install(pipe, folder)
    video(pipe, call, **more)
    return {path.name for path in set(folder.iterdir()) - before}


def test_keyed_by_everything_that_decides_the_result(tmp_path):
    """Another prompt, negative prompt, length, encoder or tokenizer is another entry; a prompt never gets another's."""
    assert len(entries(tmp_path)) == 2
    assert entries(tmp_path) == set()
    assert len(entries(tmp_path, prompt=[PROMPTS[0], "something else"])) == 1
    assert len(entries(tmp_path, negative_prompt="blurry")) == 2
    assert len(entries(tmp_path, negative_prompt=["dark", "bright"])) == 2
    assert len(entries(tmp_path, max_sequence_length=16)) == 2

    def other_weights(pipe):
        pipe.text_encoder.shared.weight.data[5, 0] += 1

    def other_precision(pipe):
        pipe.text_encoder.to(torch.bfloat16)

    def other_tokens(pipe):
        pipe.tokenizer.add_tokens(["circle"])

    for change in (other_weights, other_precision, other_tokens):
        assert len(entries(tmp_path, change)) == 2
    assert entries(tmp_path) == set()


def test_negative_prompts_of_a_list_go_with_their_rows(tmp_path):
    pipe, call, _, _ = with_cache("wan", tmp_path)
    plain, _ = FAMILIES["wan"]()
    for negative in (["blurry", "dark"], ["dark", "blurry"], "dark"):
        expected = video(plain, call, negative_prompt=negative)
        torch.testing.assert_close(video(pipe, call, negative_prompt=negative), expected, atol=1e-6, rtol=0)


def test_lists_that_are_no_prompts_stay_whole(tmp_path):
    """Sana takes a list of instruction lines, here as many as there are prompts."""
    pipe, call, cache, _ = with_cache("sana_video", tmp_path)
    plain, _ = FAMILIES["sana_video"]()
    instruction = {"complex_human_instruction": ["Make it", "long: "], "max_sequence_length": 64}
    ours, theirs = video(pipe, call, **instruction), video(plain, call, **instruction)
    assert cache.cacheable
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_calls_that_a_key_cannot_describe_are_left_to_the_pipeline(tmp_path):
    class Picture:
        pass

    pipe, call, cache, reached = with_cache("wan", tmp_path)
    video(pipe, call)
    with pytest.raises(TypeError):  # the pipeline's own: it knows no such negative prompt
        cache(prompt=PROMPTS, negative_prompt=Picture())
    assert reached[3:] == [PROMPTS]
    assert not cache.cacheable


def test_prompts_of_unequal_length_are_encoded_together(tmp_path):
    """As QwenImage does, whose embeddings end with the longest prompt of the batch."""
    pipe, call = FAMILIES["wan"]()
    encode, reached = pipe.encode_prompt, []

    @functools.wraps(encode)
    def trimmed(*args, **kwargs):
        reached.append(kwargs["prompt"])
        longest = max(map(len, kwargs["prompt"]))
        return tuple(t[:, :longest] for t in encode(*args, **kwargs))

    pipe.encode_prompt = trimmed
    cache = EmbeddingCache.install(pipe, tmp_path)
    video(pipe, call, prompt=["ab", "abcd"])
    assert reached[-1] == ["ab", "abcd"]
    found = cache(prompt=["abcd", "ab"], **settings_of(cache))[0]
    assert found.shape[:2] == (2, 4)
    assert cache(prompt=["ab", "ab"], **settings_of(cache))[0].shape[:2] == (2, 2)
    assert cache.hold(["ab", "cd"])
    assert not cache.hold(["ab", "abcd"])


def test_interrupted_write_leaves_no_entry(tmp_path, monkeypatch):
    pipe, call, _, reached = with_cache("wan", tmp_path)

    def half(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        path.write_bytes(path.read_bytes()[:200])
        raise KeyboardInterrupt

    monkeypatch.setattr(embeddings, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        video(pipe, call)
    assert not list(tmp_path.glob("*.safetensors"))
    monkeypatch.undo()
    reached.clear()
    torch.testing.assert_close(video(pipe, call), video(*FAMILIES["wan"]()), atol=1e-6, rtol=0)
    assert [PROMPTS[0]] in reached


def test_damaged_entry_is_written_anew(tmp_path):
    first = with_cache("wan", tmp_path)
    expected = video(*first[:2])
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-40])
    pipe, call, _, reached = with_cache("wan", tmp_path)
    assert torch.equal(video(pipe, call), expected)
    assert len(reached) == 3


def test_entries_are_memory_mapped(tmp_path):
    """A write to the file shows in a tensor that was read before it."""
    tensor = torch.arange(5000.0)
    path = tmp_path / "entry.safetensors"
    embeddings._write(path, embeddings.Entry((tensor, None), (True, False), False))
    entry = embeddings._read(path)
    assert torch.equal(entry.tensors[0], tensor)
    assert entry.tensors[1] is None
    assert entry.rows == (True, False)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert entry.tensors[0][-1] == 0


def test_released_encoders_are_not_missed(tmp_path):
    policy = make_policy()
    policy.cache_embeddings(tmp_path)
    expected = policy.generate(PROMPTS, SEEDS)
    policy.release_encoders([*PROMPTS, "held out"])
    assert policy.pipe.text_encoder is None
    assert torch.equal(policy.generate(PROMPTS, SEEDS), expected)
    assert policy.generate(["held out"], [5]).shape == (1, 5, 3, 16, 16)
    assert policy.rollout(PROMPTS, SEEDS, SEEDS, [1]).trajectory.steps
    with pytest.raises(RuntimeError, match="dropped before this was embedded: .'never seen'"):
        policy.generate(["never seen"], [5])


def test_release_is_refused_where_encoders_stay_needed(tmp_path):
    """Before the first call nobody knows what the pipeline asks for."""
    policy = make_policy()
    policy.cache_embeddings(tmp_path)
    with pytest.raises(UserError, match="model.drop_encoders: WanPipeline needs its text encoders"):
        policy.release_encoders(PROMPTS)
    assert policy.pipe.text_encoder is not None
