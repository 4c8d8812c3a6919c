"""A judge behind an OpenAI-compatible /chat/completions: vLLM, SGLang, `transformers serve`."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from rewards.contract import RewardError
from rewards.judges.chat import CallFailed, Frame, Message, Reply, Token

MAX_BYTES = 8 * 2**20  # of one answer; a long chain of thought with log-probabilities takes about one
CONFIGURATION = {
    401: "the server wants a key: name the environment variable that holds it with api_key_env",
    403: "the key may not use this model",
    404: "no such path or model: url ends with /v1 as a rule, and GET {url}/models lists the models",
    405: "not the path of a chat API: url ends with /v1 as a rule",
}


class Endpoint:
    """Asks a server. Time-outs, connection errors, 408, 429 and 5xx are tried again, after a growing pause.

    Args:
        model: as the server calls it.
        url: up to and including /v1.
        api_key_env: environment variable that holds the key.
        temperature, seed: 0 takes the most probable token; else the sampling is seeded, as far as the server does it.
        concurrency: requests at once.
        timeout: seconds for one request, from connecting to its last byte.
        retries: further attempts of a request.
        backoff: seconds before the first of them, doubled before each next one.
        image_format: "png" (lossless) or "jpeg" (quality 95: a fraction of the bytes and of the time).
        extra: further fields of the request, e.g. {"chat_template_kwargs": {"enable_thinking": False}}.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        api_key_env: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 0.5,
        image_format: str = "png",
        extra: Mapping[str, Any] | None = None,
        name: str = "endpoint",
    ):
        options = {"temperature": temperature, "concurrency": concurrency, "timeout": timeout, "retries": retries}
        options |= {"backoff": backoff, "image_format": image_format, "extra": extra}
        self.check(url=url, api_key_env=api_key_env, **options, name=name)
        self.name, self.url = name, url.rstrip("/")
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        self.image_format = image_format
        self.key = os.environ[api_key_env].strip() if api_key_env else ""
        self.fixed = {**dict(extra or {}), "model": model, "temperature": temperature, "seed": seed}
        self.settings = {"backend": "endpoint", "image_format": image_format, **self.fixed}
        self.tls = httpx.create_ssl_context() if url.startswith("https") else False
        self.limits: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    @staticmethod
    def check(
        *,
        url: str,
        api_key_env: str | None = None,
        temperature: float = 0.0,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 0.5,
        image_format: str = "png",
        extra: Mapping[str, Any] | None = None,
        name: str = "endpoint",
        **_: Any,
    ) -> None:
        """Validate the options; asks no server. Raises: RewardError, one line."""
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except (ValueError, TypeError, AttributeError):
            valid = False
        if not valid or parts.query or parts.fragment:
            raise RewardError(f"reward {name}: url {url!r} is not of the form http://host:port/v1")
        if parts.username or parts.password:
            raise RewardError(f"reward {name}: url holds a password; name an environment variable with api_key_env")
        if api_key_env is not None and not os.environ.get(api_key_env, "").strip():
            raise RewardError(f"reward {name}: api_key_env names {api_key_env}, which is not set; export it")
        for option, value, kind, least in (
            ("temperature", temperature, (int, float), 0),
            ("concurrency", concurrency, int, 1),
            ("timeout", timeout, (int, float), 0.001),
            ("retries", retries, int, 0),
            ("backoff", backoff, (int, float), 0),
        ):
            if not isinstance(value, kind) or not least <= value < math.inf:
                what = "a whole number" if kind is int else "a number"
                raise RewardError(f"reward {name}: {option} is {value!r}, expected {what}, {least} or more")
        if image_format not in ("png", "jpeg"):
            raise RewardError(f"reward {name}: image_format is {image_format!r}, expected png or jpeg")
        try:
            json.dumps(dict(extra or {}))
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {name}: extra is not fields of a JSON request: {error}") from error

    async def ask(self, messages: Sequence[Message], max_tokens: int, top_logprobs: int) -> Reply:
        async with self._limit():
            body = await asyncio.to_thread(self._body, messages, max_tokens, top_logprobs)
            for attempt in range(self.retries + 1):
                if attempt:
                    await asyncio.sleep(self.backoff * 2 ** (attempt - 1))
                try:
                    status, content = await asyncio.wait_for(self._post(body), self.timeout)
                except (asyncio.TimeoutError, httpx.TimeoutException):
                    failure = CallFailed("timed out", f"{self.url} gave no answer within {self.timeout:g} s")
                except httpx.TransportError as error:
                    failure = CallFailed(type(error).__name__, f"{self.url}: {error}")
                else:
                    if status == 200:
                        return self._reply(content, top_logprobs)
                    failure = self._failure(status, content)
                    if status not in (408, 429) and status < 500:
                        raise failure
            raise failure

    def _limit(self) -> asyncio.Semaphore:
        # A semaphore belongs to one event loop (and holds it), and every call of a reward runs in a loop of its own.
        for loop in list(self.limits):
            if loop.is_closed():
                self.limits.pop(loop, None)
        return self.limits.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.concurrency))

    def _body(self, messages: Sequence[Message], max_tokens: int, top_logprobs: int) -> bytes:
        turns = [{"role": m.role, "content": [self._part(part) for part in m.parts]} for m in messages]
        for turn, message in zip(turns, messages, strict=True):
            if message.role != "user":  # some servers take a list for users only
                turn["content"] = "".join(part for part in message.parts if isinstance(part, str))
        asked = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        return json.dumps({**self.fixed, "messages": turns, "max_tokens": max_tokens, **asked}).encode()

    def _part(self, part: str | Frame) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        return {"type": "image_url", "image_url": {"url": part.data_url(self.image_format)}}

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        async with (
            httpx.AsyncClient(timeout=self.timeout, verify=self.tls) as client,
            client.stream("POST", f"{self.url}/chat/completions", content=body, headers=headers) as response,
        ):
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise CallFailed("answer too large", f"{self.url} sent more than {MAX_BYTES} bytes")
            return response.status_code, bytes(content)

    def _failure(self, status: int, content: bytes) -> CallFailed:
        """The failure that a status means. Raises: RewardError where no call would fare better."""
        said = " ".join(content[:300].decode("utf-8", "replace").split())
        if self.key:
            said = said.replace(self.key, "***")  # some servers quote it
        if status in CONFIGURATION or 300 <= status < 400:
            hint = CONFIGURATION.get(status, "url is the address of something else").format(url=self.url)
            raise RewardError(f"reward {self.name}: {self.url} answers {status} ({hint}): {said[:200]}")
        return CallFailed(f"HTTP {status}", f"{self.url}: {said}")

    def _reply(self, content: bytes, top_logprobs: int) -> Reply:
        try:
            choice = json.loads(content)["choices"][0]
            text, logprobs = choice["message"]["content"], choice.get("logprobs")
            finished = choice.get("finish_reason") != "length"
            tokens = [_token(entry) for entry in logprobs["content"]] if top_logprobs and logprobs else []
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CallFailed("unreadable answer", f"{type(error).__name__}: {content[:150]!r}") from error
        if not isinstance(text, str):
            raise CallFailed("unreadable answer", f"no text in {content[:150]!r}")
        if top_logprobs and not logprobs:
            raise RewardError(
                f"reward {self.name}: {self.url} gives no log-probabilities (vLLM and SGLang do, `transformers serve` "
                "does not); use another server, or leave url out to run the model in this process"
            )
        return Reply(text, finished, tokens)


def _token(entry: Mapping[str, Any]) -> Token:
    top = [(str(other["token"]), float(other["logprob"])) for other in entry["top_logprobs"]]
    if not all(logp < 1 for _, logp in top):  # above 0 by rounding at most; NaN is not below either
        raise ValueError("a log-probability above 0")
    return Token(str(entry["token"]), top)
