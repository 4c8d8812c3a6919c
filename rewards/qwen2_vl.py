"""Reward models on Qwen2-VL, run as their authors trained them: what VideoReward and HPSv3 share.

Both read a chat of one video or image and a text, and put a small head on the last hidden states of some tokens. Two
things differ from Qwen2-VL as transformers runs it, and both would change scores silently:

- positions are one-dimensional, 0, 1, 2, ..., in all three sections of the rotary embedding: the authors' forward pass
  hands embeddings to the language model, which transformers 4.45, that they trained with, then numbers in a row;
- vision features are the merged ones (`pooler_output` in transformers 5), one a placeholder token.

Models trained here may be built on Qwen2.5-VL and Qwen3-VL as well, with these positions ("row") or those of
transformers ("native", by time, height and width; Qwen3-VL then also reads the time before each step).

    B clips, T frames, L tokens, P patches, D hidden size, K special tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.checkpoints import merge_lora, plain_names, read_json, read_tensors, snapshot
from rewards.contract import RewardError
from rewards.qwen2_vl_reader import PROCESSORS, TEXT_FILES, Batch, Patches, Reader

TEMPLATE_FILE = "prompt_template.txt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING = "language_model.embed_tokens.weight"


class Qwen2VLReward(Reader):
    """Qwen2-VL or a successor without its language head, with a head of one's own in float32.

    Args:
        where: name of the reward, for messages.
        base: folder or hub id of the Qwen2-VL that was tuned: configuration, tokenizer, chat template and image
            preparation are taken from it, and weights only where `state` lacks some.
        state: the tuned weights under the names of Qwen2-VL or those of peft; the head's are called rm_head.
        head: makes the head, given the hidden size.
        tokens: the special tokens that the authors added, in the order in which they added them.
        lora_scale: factor of LoRA products, which are merged.
        positions: of POSITIONS.
        frozen: folder or hub id of the weights that `state` lacks, where base has none; None: base.
    Raises: RewardError, one line, for parts that are missing or do not fit.
    """

    def __init__(
        self,
        where: str,
        base: str,
        state: dict[str, Tensor],
        head: Callable[[int], nn.Module],
        tokens: Sequence[str],
        *,
        lora_scale: float = 1.0,
        positions: str = "row",
        frozen: str | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        from accelerate import init_empty_weights
        from transformers import AutoModel

        super().__init__(where, base, tokens, positions)
        self.device, self.dtype, config = device, dtype, self.config
        state = plain_names(state)
        if EMBEDDING not in state:
            raise RewardError(f"reward {where}: the checkpoint holds no token embeddings; it is cut")
        config.text_config.vocab_size = len(state[EMBEDDING])
        self._check_vocabulary(state, config.tie_word_embeddings)
        with init_empty_weights():
            self.model = AutoModel.from_config(config)
        self.head = head(config.text_config.hidden_size)
        if missing := self.model.state_dict().keys() - state.keys():
            whole = base_weights(where, base) or (base_weights(where, frozen) if frozen else {})
            state |= {name: whole[name] for name in missing if name in whole}
        state = merge_lora(where, state, lora_scale)
        fill(where, self.model, {n: t for n, t in state.items() if not n.startswith(("rm_head.", "lm_head."))})
        fill(where, self.head, {n[len("rm_head.") :]: t for n, t in state.items() if n.startswith("rm_head.")})
        # Buffers too: the authors' call of model.to(bfloat16) rounds the frequencies of positions, in training as well.
        self.model.to(device, dtype).eval().requires_grad_(False)
        self.head.to(device, torch.float32).eval().requires_grad_(False)

    def _check_vocabulary(self, state: dict[str, Tensor], tied: bool) -> None:
        embedding, head = state[EMBEDDING], state.get("lm_head.weight")
        if tied and head is not None and not torch.equal(embedding, head):
            raise RewardError(
                f"reward {self.where}: embed_tokens and lm_head differ in the checkpoint though the base model ties "
                "them; it was put together wrongly"
            )
        if max(self.token_ids) >= len(embedding):
            raise RewardError(
                f"reward {self.where}: token {max(self.token_ids)} of the tokenizer is beyond the {len(embedding)} of "
                "the checkpoint; base is not the model that was tuned"
            )

    def scores(self, kind: str, chats: Sequence[str], patches: Sequence[Patches]) -> Tensor:
        """(B, K, head's outputs) at the special tokens of B chats, in the order in which they stand there."""
        return token_scores(
            self.model, self.head, self.token_ids, self.batch(kind, chats, patches, self.device, self.dtype)
        )


def fill(where: str, module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put weights into a module that may have none yet. Raises: RewardError where they are not just the right ones."""
    wanted = module.state_dict()
    missing, unknown = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    wrong = [name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape]
    for what, names in (("lacks", missing), ("holds the unknown", unknown), ("has another size of", wrong)):
        if names:
            example, more = sorted(names)[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RewardError(
                f"reward {where}: the checkpoint {what} {example}{more}; it is cut, or base is another model"
            )
    module.load_state_dict(state, assign=True)


def token_scores(model: nn.Module, head: nn.Module, token_ids: Sequence[int], batch: Batch) -> Tensor:
    """(B, K, head's outputs) at K special tokens, in the order in which they stand in a chat; the head is float32."""
    hidden = run(model, *batch)[0].last_hidden_state
    at = torch.isin(batch.ids, torch.tensor(token_ids, device=batch.ids.device))
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden[at].float()).view(len(batch.ids), len(token_ids), -1)


def run(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    rows: Tensor,
    grid: Tensor,
    pad_id: int,
    seconds: Tensor | None = None,
    **options: Any,
) -> tuple[Any, Tensor]:
    """Run a Qwen2VLModel, or a successor's, on B chats as its reward models are trained.

    Args:
        ids, mask, rows, grid, pad_id, seconds: see `Batch`; of rows also `cut`.
        options: of the language model, such as output_hidden_states.
    Returns: the language model's output, and the vision features (placeholders, D).
    """
    embeds, is_video = model.language_model.embed_tokens(ids), ids == pad_id
    seen = model.visual(rows, grid_thw=grid)
    features = seen.pooler_output
    embeds = embeds.masked_scatter(is_video[..., None], features.to(embeds.dtype))
    if seconds is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    else:
        kinds = (2 if pad_id == model.config.video_token_id else 1) * is_video.int()  # 0 is text, 1 image, 2 video
        grids = {"video_grid_thw" if pad_id == model.config.video_token_id else "image_grid_thw": grid}
        positions, _ = model.get_rope_index(
            ids, mm_token_type_ids=kinds, attention_mask=mask, second_per_grid_ts=seconds, **grids
        )
    if deep := getattr(seen, "deepstack_features", None):  # of Qwen3-VL, which adds them behind its first layers
        options |= {"visual_pos_masks": is_video, "deepstack_visual_embeds": deep}
    output = model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **options
    )
    return output, features


def find_base(where: str, folder: Path, named: str | None) -> str:
    """The base model of a checkpoint: its folder, one inside, or the folder or hub id that its configuration names."""
    inside = [path.parent for path in [*folder.glob("config.json"), *sorted(folder.glob("*/config.json"))]]
    candidates = [path for path in inside if read_json(where, path / "config.json").get("model_type") in PROCESSORS]
    if candidates:
        return str(candidates[0])
    if named and (folder / named).is_dir():
        return str(folder / named)
    if not named:
        raise RewardError(f"reward {where}: {folder} does not say which Qwen2-VL was tuned; give base=folder or hub id")
    return named


def base_weights(where: str, base: str) -> dict[str, Tensor]:
    """All weights of the base model, under the names of Qwen2VLModel."""
    folder = snapshot(where, base, [*TEXT_FILES, "*.safetensors"])
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= read_tensors(where, file)
    return plain_names(state)
