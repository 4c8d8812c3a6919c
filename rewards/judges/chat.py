"""How a judge is asked: texts and frames in, a text out; and what becomes of a call that fails."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from rewards.judges.cache import ReplyCache

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("rewards")
Value = TypeVar("Value")


class Frame:
    """One picture. What is worked out of it is kept, since a frame is shown in many comparisons."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels  # (3, H, W) uint8, on the CPU
        self._urls: dict[str, str] = {}

    def image(self) -> Image:
        """As an image of PIL."""
        from PIL import Image

        return Image.fromarray(self.pixels.permute(1, 2, 0).numpy())

    @cached_property
    def digest(self) -> str:
        """Equal exactly where shape and pixels are."""
        return hashlib.sha256(f"{tuple(self.pixels.shape)} ".encode() + self.pixels.numpy().tobytes()).hexdigest()

    def data_url(self, image_format: str) -> str:
        """The picture within a URL: "png" is lossless, "jpeg" of quality 95."""
        if image_format not in self._urls:
            buffer = io.BytesIO()
            options = {"compress_level": 1} if image_format == "png" else {"quality": 95}
            self.image().save(buffer, image_format, **options)
            data = base64.b64encode(buffer.getvalue()).decode()
            self._urls[image_format] = f"data:image/{image_format};base64,{data}"
        return self._urls[image_format]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    parts: tuple[str | Frame, ...]  # in the order in which the model sees them


class Token(NamedTuple):
    """One generated token and what else it might have been."""

    text: str
    top: list[tuple[str, float]]  # the most probable tokens at this place: text, natural logarithm of the probability


class Reply(NamedTuple):
    """What the model said."""

    text: str
    finished: bool  # False: cut off at max_tokens
    tokens: list[Token]  # empty unless log-probabilities were asked for


class CallFailed(Exception):
    """A call that gave no usable answer. `cause` is short and the same for all calls that fail alike."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {' '.join(detail.split())[:200]}" if detail else cause)
        self.cause = cause


class Backend(Protocol):
    """Something that answers messages: `Endpoint` or `InProcess`."""

    settings: Mapping[str, Any]  # all that an answer depends on besides the question, for the cache

    async def ask(self, messages: Sequence[Message], max_tokens: int, top_logprobs: int) -> Reply:
        """Answer. Raises: CallFailed for this call, RewardError for what no call will survive."""


class Chat:
    """A backend with its cache, and the count of what failed.

    A failed call is logged as a warning once per cause, counted in `failures`, and summed up after each batch.
    """

    def __init__(self, backend: Backend, name: str, cache: str | None = None, system: str | None = None):
        self.backend, self.name = backend, name
        self.cache = ReplyCache(cache) if cache else None
        self.system = [Message("system", (system,))] if system else []
        self.failures: Counter[str] = Counter()
        self.asked = self.failed = 0

    async def ask(
        self, messages: Sequence[Message], read: Callable[[Reply], Value], max_tokens: int, top_logprobs: int = 0
    ) -> Value:
        """What `read` makes of the reply; only a reply that it can read is kept in the cache.

        Raises: CallFailed by the backend or by `read`.
        """
        messages = [*self.system, *messages]
        key = digest(self.backend.settings, messages, max_tokens, top_logprobs) if self.cache else None
        if key is not None and (kept := self.cache.get(key)):
            try:
                return read(Reply(kept["text"], kept["finished"], [Token(*token) for token in kept["tokens"]]))
            except CallFailed:
                pass  # kept by a judge that reads another format
        reply = await self.backend.ask(messages, max_tokens, top_logprobs)
        value = read(reply)
        if key is not None and self.cache:
            self._keep(key, reply)
        return value

    def _keep(self, key: str, reply: Reply) -> None:
        try:
            self.cache.put(key, reply._asdict())
        except OSError as error:  # a full disk is no reason to stop a training
            logger.warning("reward %s: replies are no longer kept: %s", self.name, error)
            self.cache = None

    async def attempt(self, call: Awaitable[Value]) -> Value | None:
        """The value of a call, or None where it failed."""
        self.asked += 1
        try:
            return await call
        except CallFailed as failure:
            if not self.failures[failure.cause]:
                logger.warning("reward %s: %s; such clips are masked (said once)", self.name, failure)
            self.failures[failure.cause] += 1
            self.failed += 1
            return None

    def report(self) -> None:
        """Log how many calls failed since the last report, if any."""
        if self.failed:
            causes = ", ".join(f"{cause} {count}" for cause, count in self.failures.most_common())
            logger.info("reward %s: %d of %d calls failed; in all: %s", self.name, self.failed, self.asked, causes)
        self.asked = self.failed = 0


def digest(settings: Mapping[str, Any], messages: Sequence[Message], max_tokens: int, top_logprobs: int) -> str:
    """A name for a question: equal exactly where settings, texts and frames are."""
    turns = [
        [message.role, [part if isinstance(part, str) else [part.digest] for part in message.parts]]
        for message in messages
    ]
    question = {"settings": settings, "turns": turns, "max_tokens": max_tokens, "top_logprobs": top_logprobs}
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
