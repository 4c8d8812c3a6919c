"""A tiny VideoReward that knows the tiny world, in the released layout of VideoAlign's.

A small Qwen2-VL, trained from nothing with the Bradley-Terry loss with ties on planted flaws: noise, blur and faded
colours for visual quality, jitter and stutter for motion quality, wrong words for text alignment. All clips of a batch
are compared with one another.

    python -m examples.tiny_world.video_reward --out runs/tiny_world/video_reward     # 35 minutes on one CPU core

    B batch, F frames, L tokens, D hidden size
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from alignment.objectives import bradley_terry_with_ties
from rewards.sprite import BACKGROUNDS, COLOURS, SHAPES, SPEEDS, STEPS
from rewards.video_reward import DIMENSIONS, TOKENS, rate_indices

from . import models, world
from .optim import Budget, Muon, Training

FPS = 8.0  # of the world's clips, and of what the model looks at: 8 of 9 frames
PATCH, TEMPORAL, MERGE = 4, 2, 2
FRAMES = rate_indices(world.FRAMES, FPS, FPS)
VIDEO_TOKENS = len(FRAMES) // TEMPORAL * (world.SIZE // PATCH // MERGE) ** 2
TEMPLATE = "look <|VQ_reward|> motion <|MQ_reward|> prompt {text_prompt} <|TA_reward|>"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type in ('image', 'video') %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LORA = {"r": 4, "lora_alpha": 8}
TABLES = (BACKGROUNDS, COLOURS, SHAPES, world.DIRECTIONS, SPEEDS)
ATTRIBUTES = ("background", "colour", "shape", "direction", "speed")
LEVELS = 3  # of flaws: none, some, many


class Batch(NamedTuple):
    """Clips with planted flaws."""

    video: Tensor  # (B, F, 3, H, W) in [0, 1], all frames
    prompts: list[str]
    flaws: Tensor  # (B, 3) of VQ, MQ and TA: 0 is perfect
    sprites: world.Sprites
    offset: Tensor  # (B, F, 2) px that the sprite is off its path


class Seen(NamedTuple):
    """What the model makes of a batch."""

    tokens: Tensor  # (B, L) ids
    hidden: Tensor  # (B, L, D) last hidden states
    video: Tensor  # (B, video tokens, D) hidden states behind the second layer
    summary: Tensor  # (B, D) the same of the token that ends the video
    words: Tensor  # (B, L, D) hidden states behind the third layer
    features: Tensor  # (B, video tokens, D) of the vision tower


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; Qwen2-VL's special tokens."""
    words = ["<unk>", "user", "assistant", "look", "motion", "prompt", *world.vocabulary()]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
        model_max_length=512,
    )


def processor() -> Qwen2VLProcessor:
    sizes = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE}
    image = Qwen2VLImageProcessor(**sizes, min_pixels=world.SIZE**2, max_pixels=64 * world.SIZE**2)
    video = Qwen2VLVideoProcessor(**sizes, size={"shortest_edge": world.SIZE**2, "longest_edge": 64 * world.SIZE**2})
    return Qwen2VLProcessor(image, tokenizer(), video, chat_template=CHAT_TEMPLATE)


def base_config() -> Qwen2VLConfig:
    ids = tokenizer()
    text = {
        "vocab_size": len(ids),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
        "bos_token_id": None,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
    }
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 96, "num_heads": 4, "mlp_ratio": 2}
    vision |= {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "spatial_merge_size": MERGE}
    special = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    special |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    special = {f"{name}_token_id": ids.convert_tokens_to_ids(token) for name, token in special.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def build() -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Qwen2-VL with a reward head, LoRA factors and the three reward tokens: 0.6M parameters."""
    model = Qwen2VLForConditionalGeneration(base_config())
    for weight in (p for p in model.parameters() if p.ndim > 1):
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)  # the default, 0.02, is for wider models
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    ids = tokenizer()
    ids.add_tokens(list(TOKENS), special_tokens=True)
    model.resize_token_embeddings(len(ids))
    model.rm_head = nn.Linear(model.config.text_config.hidden_size, 1, bias=False)
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    model = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    return model.requires_grad_(True), ids


def chats(prompts: list[str]) -> list[str]:
    """What the processor makes of a video and the template."""
    head = "<|im_start|>user\n<|vision_start|>" + "<|video_pad|>" * VIDEO_TOKENS + "<|vision_end|>"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    return [head + TEMPLATE.replace("{text_prompt}", prompt) + tail for prompt in prompts]


def see(model: nn.Module, ids: PreTrainedTokenizerFast, batch: Batch) -> Seen:
    """Run the model with positions in a row, as VideoReward has them."""
    core = model.get_base_model().model
    tokens = ids(chats(batch.prompts), padding=True, padding_side="right", return_tensors="pt")
    pixels = (batch.video[:, FRAMES].clamp(0, 1) - pixel_mean()) / pixel_std()
    rows = rearrange(
        pixels,
        "b (t p) c (h m y) (w n x) -> (b t h w m n) (c p y x)",
        p=TEMPORAL,
        m=MERGE,
        n=MERGE,
        y=PATCH,
        x=PATCH,
    )
    grid = torch.tensor([[len(FRAMES) // TEMPORAL, world.SIZE // PATCH, world.SIZE // PATCH]] * len(batch.video))
    features = core.visual(rows, grid_thw=grid).pooler_output
    embeds = core.language_model.embed_tokens(tokens.input_ids)
    is_video = tokens.input_ids == ids.convert_tokens_to_ids("<|video_pad|>")
    embeds = embeds.masked_scatter(is_video[..., None], features)
    out = core.language_model(
        inputs_embeds=embeds,
        attention_mask=tokens.attention_mask,
        position_ids=torch.arange(embeds.shape[1]).expand(len(embeds), -1),
        use_cache=False,
        output_hidden_states=True,
    )
    shape = (len(embeds), VIDEO_TOKENS, -1)
    second = out.hidden_states[2]
    summary = second[torch.arange(len(embeds)), is_video.long().cumsum(1).argmax(1) + 1]
    video = second[is_video].view(shape)
    return Seen(tokens.input_ids, out.last_hidden_state, video, summary, out.hidden_states[3], features.view(shape))


def pixel_mean() -> Tensor:
    return torch.tensor(Qwen2VLVideoProcessor.image_mean).view(3, 1, 1)


def pixel_std() -> Tensor:
    return torch.tensor(Qwen2VLVideoProcessor.image_std).view(3, 1, 1)


def scores(model: nn.Module, ids: PreTrainedTokenizerFast, seen: Seen) -> Tensor:
    """(B, 3) raw scores of VQ, MQ and TA."""
    at = torch.isin(seen.tokens, torch.tensor(ids.convert_tokens_to_ids(list(TOKENS))))
    return model.get_base_model().rm_head(seen.hidden[at]).view(len(seen.hidden), len(TOKENS))


def caption_loss(model: nn.Module, ids: PreTrainedTokenizerFast, seen: Seen, right: Tensor) -> Tensor:
    """Cross-entropy of the prompt's words given the video, over the clips whose prompt is right."""
    start = (seen.tokens == ids.convert_tokens_to_ids("prompt")).long().argmax(1, keepdim=True)
    end = (seen.tokens == ids.convert_tokens_to_ids(TOKENS[2])).long().argmax(1, keepdim=True)
    place = torch.arange(seen.tokens.shape[1])
    spoken = (place > start) & (place < end) & right[:, None]  # (B, L) words of the prompt
    logits = seen.hidden[spoken.roll(-1, dims=1)] @ model.get_base_model().get_input_embeddings().weight.T
    return F.cross_entropy(logits, seen.tokens[spoken])


class Probes(nn.Module):
    """Linear readings that make the model look, thrown away afterwards. Comparisons alone leave it blind for long.

    Looks from the mean vision feature; each video token's own place, since the model knows relative positions only;
    where the sprite is, from the last token of each step in time; everything else from the token that ends the video;
    one layer later, where it can be looked up, the whole path from the token that scores motion, and whether a word is
    wrong from the word; and how uneven the motion is, from the last state of the former.
    """

    looks = (len(BACKGROUNDS), len(COLOURS), len(SHAPES))
    places = (len(FRAMES) // TEMPORAL, *[world.SIZE // PATCH // MERGE] * 2)
    motions = (len(world.DIRECTIONS), len(SPEEDS), LEVELS)

    def __init__(self, width: int):
        super().__init__()
        self.look, self.place, self.all = (
            nn.Linear(width, sum(classes)) for classes in (self.looks, self.places, self.looks + self.motions)
        )
        self.centre, self.path = nn.Linear(width, 2 * TEMPORAL), nn.Linear(width, 2 * len(FRAMES))
        self.jump, self.word = nn.Linear(width, LEVELS), nn.Linear(width, 1)

    def loss(self, ids: PreTrainedTokenizerFast, seen: Seen, batch: Batch) -> dict[str, Tensor]:
        s = batch.sprites
        video, words, summary = (F.layer_norm(h, h.shape[-1:]) for h in (seen.video, seen.words, seen.summary))
        grid = torch.cartesian_prod(*(torch.arange(n) for n in self.places)).repeat(len(batch.prompts), 1)
        steps = video.view(len(video), self.places[0], -1, video.shape[-1])[:, :, -1]
        path = 2 * (world.centres(s) + batch.offset)[:, FRAMES].flatten(1) / world.SIZE - 1
        wrong, named = self.wrong_words(ids, seen.tokens, s)
        looks = (s.background, s.colour, s.shape)
        motions = (s.direction, s.speed, batch.flaws[:, 0])
        scoring = seen.tokens == ids.convert_tokens_to_ids(TOKENS[1])
        return {
            "look": _entropies(self.look(seen.features.mean(1)), self.looks, looks),
            "place": _entropies(self.place(video).flatten(0, 1), self.places, grid.unbind(1)) / 3,
            "centre": 10 * F.mse_loss(self.centre(steps).flatten(1), path),
            "path": 10 * F.mse_loss(self.path(words[scoring]), path),
            "all": _entropies(self.all(summary), self.looks + self.motions, looks + motions),
            "jump": F.cross_entropy(self.jump(seen.hidden[scoring]), batch.flaws[:, 1]),
            "word": 3 * F.binary_cross_entropy_with_logits(self.word(words)[named].squeeze(-1), wrong[named].float()),
        }

    @staticmethod
    def wrong_words(ids: PreTrainedTokenizerFast, tokens: Tensor, sprites: world.Sprites) -> tuple[Tensor, Tensor]:
        """(B, L) bool twice: words that do not fit what a clip shows, and words that could."""
        said = [set(ids.convert_tokens_to_ids(caption.split())) for caption in world.captions(sprites)]
        attribute = set(ids.convert_tokens_to_ids([*COLOURS, *SHAPES, *BACKGROUNDS, *STEPS, *SPEEDS]))
        rows = list(zip(tokens.tolist(), said, strict=True))
        wrong = torch.tensor([[token in attribute and token not in right for token in row] for row, right in rows])
        return wrong, torch.tensor([[token in attribute for token in row] for row, _ in rows])


def _entropies(logits: Tensor, classes: tuple[int, ...], targets: tuple[Tensor, ...]) -> Tensor:
    parts = zip(logits.split(classes, -1), targets, strict=True)
    return sum(F.cross_entropy(part, target) for part, target in parts)


def draw(num: int, generator: torch.Generator) -> Batch:
    """Clips with flaws of every kind and level, each drawn by itself."""
    sprites = world.sample(num, generator)
    flaws = torch.randint(LEVELS, (num, 3), generator=generator)
    offset = motion_flaw(sprites, flaws[:, 1], generator)
    prompts, flaws[:, 2] = wrong_words(sprites, flaws[:, 2], generator)
    return Batch(visual_flaw(world.render(sprites, offset), flaws[:, 0], generator), prompts, flaws, sprites, offset)


def motion_flaw(sprites: world.Sprites, level: Tensor, generator: torch.Generator) -> Tensor:
    """Offsets (B, F, 2) from an even path: jitter of .5 or 1.2 px, or one or two stops followed by a jump."""
    num = len(level)
    jitter = torch.tensor([0.0, 0.5, 1.2])[level][:, None, None] * torch.randn(
        num, world.FRAMES, 2, generator=generator
    )
    moment = torch.arange(world.FRAMES).expand(num, -1)
    late = torch.zeros(num, world.FRAMES, dtype=torch.long)
    for stop in range(1, LEVELS):
        first = torch.randint(1, world.FRAMES - 3, (num, 1), generator=generator)
        within = (moment > first) & (moment <= first + 2) & (level[:, None] >= stop)
        late = torch.where(within, (moment - first).maximum(late), late)
    velocity = world.direction_vectors()[sprites.direction] * sprites.pace[:, None]
    stutter = -late[..., None] * velocity[:, None]
    return torch.where((torch.rand(num, generator=generator) < 0.5)[:, None, None], jitter, stutter)


def visual_flaw(video: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of .06 or .15, a blur over 3 or 5 px, or colours that fade by a third or two thirds."""
    amount = level[:, None, None, None, None]
    noise = torch.tensor([0.0, 0.06, 0.15])[amount] * torch.randn(video.shape, generator=generator)
    flat = video.flatten(0, 1)
    blurs = [F.avg_pool2d(F.pad(flat, [k] * 4, mode="replicate"), 2 * k + 1, 1).view_as(video) for k in (0, 1, 2)]
    blurred = torch.where(amount == 0, blurs[0], torch.where(amount == 1, blurs[1], blurs[2]))
    faded = video.lerp(video.mean((1, 2, 3, 4), keepdim=True).expand_as(video), amount / 3)
    kind = torch.randint(3, (len(video), 1, 1, 1, 1), generator=generator)
    return torch.where(kind == 0, video + noise, torch.where(kind == 1, blurred, faded)).clamp(0, 1)


def wrong_words(sprites: world.Sprites, level: Tensor, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Captions with `level` wrong attributes, fewer where a caption names fewer; and how many are wrong: (B,)."""
    prompts, wrong = [], []
    for row, count in zip(torch.stack(sprites[:5], -1).tolist(), level.tolist(), strict=True):
        named = torch.rand(5, generator=generator) >= torch.tensor([0.2, 0.2, 0.2, 0.2, 0.4])
        places = [i for i in torch.randperm(5, generator=generator).tolist() if named[i]][:count]
        for place in places:
            step = int(torch.randint(1, len(TABLES[place]), (), generator=generator))
            row[place] = (row[place] + step) % len(TABLES[place])
        words = [list(table)[i] if keep else None for table, i, keep in zip(TABLES, row, named.tolist(), strict=True)]
        prompts.append(world.caption(*words))
        wrong.append(len(places))
    return prompts, torch.tensor(wrong)


def preference_loss(raw: Tensor, flaws: Tensor) -> Tensor:
    """Bradley-Terry with ties over all pairs of a batch, for each dimension. raw, flaws: (B, 3)."""
    i, j = torch.triu_indices(len(raw), len(raw), offset=1)
    return bradley_terry_with_ties(raw[i] - raw[j], (flaws[j] - flaws[i]).sign()).mean(0).sum()


def train(folder: Path, budget: Budget, seed: int = 0, batch: int = 32) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Train on fresh clips; a `state.pt` in `folder` is continued."""
    torch.manual_seed(seed)
    model, ids = build()
    probes = Probes(model.config.text_config.hidden_size)
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and not any(w in n for w in ("embed", "_head"))]
    matrices = [p for p in matrices if min(len(p), p[0].numel()) > LORA["r"]]  # LoRA factors are too narrow for Muon
    known = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *probes.parameters()) if id(p) not in known]
    optimisers = [Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]
    generator = torch.Generator().manual_seed(seed)
    training = Training({"model": model, "probes": probes}, optimisers, budget, folder, generator)
    while not training.done:
        part = draw(batch, generator)
        seen = see(model, ids, part)
        preference = preference_loss(scores(model, ids, seen), part.flaws)
        captions = caption_loss(model, ids, seen, part.flaws[:, 2] == 0)
        readings = probes.loss(ids, seen, part)
        training.update(preference + captions + 0.3 * sum(readings.values()))
        if training.step % 50 == 0 or training.done:
            parts = {"preference": preference, "captions": captions, **readings}
            row = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"video_reward {training.step} {training.elapsed:.0f}s {row}", flush=True)
        training.save_if_due()
    return model.eval(), ids


@torch.no_grad()
def raw_scores(model: nn.Module, ids: PreTrainedTokenizerFast, batch: Batch, size: int = 128) -> Tensor:
    """(B, 3)."""
    parts = []
    for start in range(0, len(batch.video), size):
        part = slice(start, start + size)
        piece = batch._replace(video=batch.video[part], prompts=batch.prompts[part])
        parts.append(scores(model, ids, see(model, ids, piece)))
    return torch.cat(parts)


@torch.no_grad()
def accuracy(model: nn.Module, ids: PreTrainedTokenizerFast, num: int = 384, seed: int = 1234) -> dict[str, float]:
    """Share of fresh pairs in which the better one scores higher: one small flaw apart, everything else the same."""
    generator = torch.Generator().manual_seed(seed)
    sprites = world.sample(num, generator)
    clean, right, one = world.render(sprites), world.captions(sprites), torch.ones(num, dtype=torch.long)

    def raw(video: Tensor, prompts: list[str]) -> Tensor:
        return raw_scores(model, ids, Batch(video, prompts, torch.zeros(num, 3), sprites, torch.zeros(())))

    def won(worse: Tensor, dimension: int) -> float:
        return (best[:, dimension] > worse[:, dimension]).float().mean().item()

    best = raw(clean, right)
    found = {"VQ": won(raw(visual_flaw(clean, one, generator), right), 0)}
    found["MQ"] = won(raw(world.render(sprites, motion_flaw(sprites, one, generator)), right), 1)
    for place, (name, table) in enumerate(zip(ATTRIBUTES, TABLES, strict=True)):
        rows = torch.stack(sprites[:5], -1)
        rows[:, place] = (rows[:, place] + torch.randint(1, len(table), (num,), generator=generator)) % len(table)
        wrong = [world.caption(*(list(t)[i] for t, i in zip(TABLES, row, strict=True))) for row in rows.tolist()]
        found[f"TA {name}"] = won(raw(clean, wrong), 2)
    return found | {"TA": sum(found[f"TA {name}"] for name in ATTRIBUTES) / len(ATTRIBUTES)}


def save(folder: Path, model: nn.Module, ids: PreTrainedTokenizerFast, step: int, num: int = 1024) -> None:
    """Write a folder in VideoReward's layout, in fp16, with the Qwen2-VL that it is made of in `base`."""
    folder = Path(folder)
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    processor().save_pretrained(folder / "base")
    for file in (folder / "base").glob("tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", models.TOKENIZER_CLASS))
    base_config().save_pretrained(folder / "base")
    (folder / "prompt_template.txt").write_text(TEMPLATE)
    state = {released_name(name): tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / f"checkpoint-{step}" / "model.pth")
    raw = raw_scores(model, ids, draw(num, torch.Generator().manual_seed(4321)))
    mean, std = raw.mean(0).tolist(), raw.std(0).tolist()
    norm = {f"{name}_mean": round(m, 4) for name, m in zip(DIMENSIONS, mean, strict=True)}
    norm |= {f"{name}_std": round(s, 4) for name, s in zip(DIMENSIONS, std, strict=True)}
    config = {
        "data_config": {
            "max_frame_pixels": world.SIZE**2,
            "min_frame_pixels": world.SIZE**2,
            "num_frames": None,
            "fps": FPS,
            "eval_dim": list(DIMENSIONS),
            "prompt_template_type": "tiny_world_special",
            "sample_type": "uniform",
        },
        "model_config": {
            "model_name_or_path": "base",
            "output_dim": 1,
            "use_special_tokens": True,
            "reward_token": "special",
            "loss_type": "btt",
            "torch_dtype": "float16",
        },
        "peft_lora_config": {
            "lora_enable": True,
            "lora_r": LORA["r"],
            "lora_alpha": LORA["lora_alpha"],
            "use_rslora": False,
        },
        "inference_config": norm,
    }
    (folder / "model_config.json").write_text(json.dumps(config, indent=2) + "\n")


def released_name(name: str) -> str:
    """The name of a weight under transformers 4.45, which VideoReward was trained with."""
    return name.replace("model.model.visual.", "model.visual.").replace("model.language_model.", "model.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="bound on the training time (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, ids = train(args.out / "work", Budget(args.steps, 60 * args.minutes), args.seed)
    print("accuracy:", {name: round(value, 3) for name, value in accuracy(model, ids).items()}, flush=True)
    save(args.out / "video_reward", model, ids, args.steps)


if __name__ == "__main__":
    main()
