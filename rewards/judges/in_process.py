"""A judge in this process: any model of transformers that reads images and writes text."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rewards.checkpoints import LOAD_ERRORS, is_hub_id
from rewards.contract import RewardError, one_line
from rewards.judges.chat import CallFailed, Message, Reply, Token

DTYPES = ("auto", "float32", "bfloat16", "float16")


class InProcess:
    """Runs a model here, one question at a time, taking the most probable token each time.

    Args:
        model: a folder, or owner/name on the Hugging Face hub; weights in safetensors, code from transformers only.
        device: "cuda" where there is one, else "cpu".
        dtype: of the weights; "auto" is what they are stored in.
    """

    def __init__(self, model: str, *, device: str | None = None, dtype: str = "auto", name: str = "in_process"):
        self.check(model=model, dtype=dtype, name=name)
        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.settings = {"backend": "in_process", "model": model, "dtype": dtype}
        self.lock = threading.Lock()
        self.model, self.processor = load(model, dtype, name)
        self.model.to(self.device)

    @staticmethod
    def check(*, model: str, dtype: str = "auto", name: str = "in_process", **_: Any) -> None:
        """Validate the options and find the folder without reading weights. Raises: RewardError, one line."""
        if dtype not in DTYPES:
            raise RewardError(f"reward {name}: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        folder = Path(model)
        if not folder.is_dir():
            if is_hub_id(model):
                return  # a name on the hub; whether it exists is known when it is loaded
            raise RewardError(f"reward {name}: model {model!r} is no folder, and no owner/name of the hub")
        missing = [part for part in ("config.json", "*.safetensors") if not any(folder.glob(part))]
        if missing:
            raise RewardError(f"reward {name}: no {' and no '.join(missing)} in {model}; save the whole model there")

    async def ask(self, messages: Sequence[Message], max_tokens: int, top_logprobs: int) -> Reply:
        return await asyncio.to_thread(self._generate, messages, max_tokens, top_logprobs)

    def _generate(self, messages: Sequence[Message], max_tokens: int, top_logprobs: int) -> Reply:
        inputs = chat_inputs(self.processor, messages)
        # Autocast is per thread, and this is a thread of its own: a caller's does not reach here.
        with self.lock:
            inputs = inputs.to(self.device, dtype=self.model.dtype)  # only what is floating takes the dtype
            drawn = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                return_dict_in_generate=True,
                output_logits=top_logprobs > 0,
            )
        ids = drawn.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        decode = self.processor.tokenizer.decode
        tokens = []
        for index, logits in zip(ids, drawn.logits or (), strict=False):
            logp, best = logits[0].float().log_softmax(-1).topk(min(top_logprobs, logits.shape[-1]))
            top = [(decode([other]), value) for other, value in zip(best.tolist(), logp.tolist(), strict=True)]
            tokens.append(Token(decode([index]), top))
        ends = self.model.generation_config.eos_token_id
        finished = ids[-1] in (ends if isinstance(ends, list) else [ends])
        return Reply(decode(ids, skip_special_tokens=True), finished, tokens)


def chat_inputs(processor: Any, messages: Sequence[Message]) -> Any:
    """What a model of transformers is given to answer messages. Raises: CallFailed for a special token in a text."""
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    turns = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, str):
                found = [token for token in special if token in part]
                if found:  # the tokenizer would take it for the end of a turn, or for an image
                    raise CallFailed("special token in the text", f"{found[0]} in a prompt")
                content.append({"type": "text", "text": part})
            else:
                content.append({"type": "image", "image": part.image()})
        turns.append({"role": message.role, "content": content})
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def load(model: str, dtype: str, name: str) -> tuple[torch.nn.Module, Any]:
    """A frozen model in evaluation mode, and its processor. Raises: RewardError, one line."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model)
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        reason = one_line(error)
        raise RewardError(f"reward {name}: cannot load model {model}: {reason}") from error
    if info["missing_keys"]:  # transformers would draw them at random
        missing = sorted(info["missing_keys"])
        raise RewardError(
            f"reward {name}: cannot load model {model}: {len(missing)} weights are not there, such as {missing[0]}"
        )
    if not hasattr(processor, "tokenizer"):
        raise RewardError(f"reward {name}: cannot load model {model}: its processor takes no text")
    return loaded.eval().requires_grad_(False), processor
