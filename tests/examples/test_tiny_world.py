"""The shipped models of the tiny world work, and the program that made them runs, stops and goes on."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from examples.tiny_world import clip as tiny_clip
from examples.tiny_world import evaluate, models, optim, pretrain, transformer, vae, world
from rewards.sprite import COLOURS, match_readings, measure, read_words

FOLDER = Path(world.__file__).parent


@pytest.fixture(scope="module")
def pipe():
    return evaluate.load(FOLDER / "base")


def test_world_is_deterministic_and_says_what_it_shows():
    first, again = (world.sample(64, torch.Generator().manual_seed(3)) for _ in range(2))
    videos = world.render(first)
    assert torch.equal(videos, world.render(again))
    assert videos.shape == (64, 9, 3, 32, 32)
    assert videos.amin() >= 0
    assert videos.amax() <= 1
    seen, said = measure(videos), read_words(world.captions(first))
    assert torch.equal(said.colour, first.colour)
    assert torch.equal(said.shape, first.shape)
    assert torch.equal(said.background, first.background)
    assert seen.valid.all()
    assert all((hit == 1).all() for hit in match_readings(seen, said).values())


def test_sprites_stay_inside_the_frame():
    sprites = world.sample(500, torch.Generator().manual_seed(0))
    videos = world.render(sprites)
    seen = (videos - videos[:, :1, :, :1, :1]).abs().amax(2) > 0.5 * 0.3  # against the top left corner's colour
    edge = torch.cat([seen[..., 0, :], seen[..., -1, :], seen[..., 0], seen[..., -1]], -1)
    assert edge.float().mean() < 0.01


def test_dropped_captions_are_true():
    generator = torch.Generator().manual_seed(0)
    sprites = world.sample(200, generator)
    texts = world.captions(sprites, generator)
    assert "" in texts
    said = read_words(texts)
    for words, truth in ((said.colour, sprites.colour), (said.shape, sprites.shape)):
        assert ((words == truth) | (words == -1)).all()
        assert (words == -1).any()
    unknown = models.tokenizer().unk_token_id
    assert all(unknown not in ids for ids in models.tokenizer()(texts).input_ids)


@pytest.mark.parametrize("suffix", ["", "_speed"])
def test_prompt_files_are_the_split_of_the_world(suffix):
    train, heldout = world.prompt_split(speeds=bool(suffix))
    assert (FOLDER / f"prompts/train{suffix}.txt").read_text().splitlines() == train
    assert (FOLDER / f"prompts/heldout{suffix}.txt").read_text().splitlines() == heldout
    assert (len(set(train)), len(set(heldout)), len(set(train) & set(heldout))) == (192, 256, 0)


def test_base_is_a_wan_pipeline_that_makes_valid_sprites(pipe):
    assert type(pipe).__name__ == "WanPipeline"
    assert pipe.scheduler.config.flow_shift == 3.0
    prompts = (FOLDER / "prompts/heldout.txt").read_text().splitlines()[:16]
    row = evaluate.judge(evaluate.generate(pipe, prompts, num_inference_steps=8, guidance_scale=1.0), prompts)
    assert row["valid"] >= 0.9
    assert row["colour"] >= 0.9
    assert row["background"] >= 0.9
    assert row["motion"] >= 0.7


def test_base_takes_prompts_of_any_padded_length(pipe):
    prompts = ["a red circle moving left on a black background", "a cyan square moving up on a white background"]
    videos = [
        evaluate.generate(pipe, prompts, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=length)
        for length in (16, 512)
    ]
    for video in videos:
        assert evaluate.judge(video, prompts)["colour"] == 1


def test_autoencoder_keeps_shapes_and_its_whole_clip_pass_is_wans(pipe):
    row = evaluate.judge_vae(pipe.vae, num=48)
    assert row["shape"] >= 0.95
    assert row["valid"] == 1
    assert row["psnr"] > 33
    videos = world.render(world.sample(2, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        chunked = pipe.vae.encode(2 * videos.transpose(1, 2) - 1).latent_dist.mean
        with vae.whole_clips(pipe.vae):
            whole, _ = vae.encode(pipe.vae, videos)
            decoded = vae.decode(pipe.vae, whole).clamp(0, 1)
        torch.testing.assert_close(whole, chunked, atol=1e-4, rtol=1e-4)
        stock = (pipe.vae.decode(whole).sample.transpose(1, 2) + 1) / 2
    torch.testing.assert_close(decoded, stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [16, 200])
def test_training_attention_equals_wans_on_a_padded_prompt(pipe, length):
    texts = ["a red circle moving up left quickly on a gray background", "a blue sprite", ""]
    x, t = torch.randn(3, 8, 5, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, 500.0, 900.0])
    padded, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
    stock = pipe.transformer.attn_processors
    attention = transformer.PlainAttention()
    with torch.no_grad():
        expected = pipe.transformer(x, t, padded, return_dict=False)[0]
        text = transformer.tokenise(pipe.tokenizer, texts)
        embeds, attention.bias = transformer.condition(pipe.text_encoder, text, torch.full((3,), length))
        pipe.transformer.set_attn_processor(attention)
        found = pipe.transformer(x, t, embeds, return_dict=False)[0]
        pipe.transformer.set_attn_processor(stock)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_muon_update_is_orthogonal():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optim.orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_clip_folder_loads_in_open_clip_and_ranks_colours():
    source = f"local-dir:{FOLDER / 'clip'}"
    model, _, _ = open_clip.create_model_and_transforms(source)
    tokenizer = open_clip.get_tokenizer(source)
    model.eval()
    right = tiny_clip.accuracy(model, tokenizer, num=128)
    assert right["colour"] > 0.95
    assert right["background"] > 0.95
    video = world.render(world.sample(1, torch.Generator().manual_seed(5)))[0]
    said = world.captions(world.sample(1, torch.Generator().manual_seed(5)))[0]
    colour = next(word for word in said.split() if word in COLOURS)
    texts = [said, *(said.replace(colour, other) for other in COLOURS if other != colour)]
    with torch.no_grad():
        image = model.encode_image((video[:1] - 0.5) / 0.5, normalize=True)
        scores = image @ model.encode_text(tokenizer(texts), normalize=True).T
    assert scores.argmax().item() == 0


class Killed(Exception):
    pass


def test_pretraining_runs_resumes_and_writes_loadable_folders(tmp_path, monkeypatch):
    plan = pretrain.Plan(vae_steps=3, clips=64, transformer_steps=3, base_step=2, clip_steps=2, save_every=0.0)
    pretrain.run(tmp_path / "whole", plan)

    save, counter = optim.Training.save, iter(range(100))

    def save_then_die(self):
        save(self)
        if next(counter) in (1, 4):  # inside the autoencoder's training, then inside the transformer's
            raise Killed

    monkeypatch.setattr(optim.Training, "save", save_then_die)
    for _ in range(2):
        with pytest.raises(Killed):
            pretrain.run(tmp_path / "killed", plan)
    pretrain.run(tmp_path / "killed", plan)

    for name in ("base/vae", "base/transformer", "final/transformer"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        whole, killed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
        assert all(torch.equal(whole[key], killed[key]) for key in whole), name
    first, last = (load_file(tmp_path / f"whole/{n}/text_encoder/model.safetensors") for n in ("base", "final"))
    assert not torch.equal(first["shared.weight"], last["shared.weight"])
    for folder in ("base", "final"):
        made = evaluate.generate(evaluate.load(tmp_path / "whole" / folder), ["a red circle"], num_inference_steps=2)
        assert made.shape == (1, 9, 3, 32, 32)
    open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'whole/clip'}")
