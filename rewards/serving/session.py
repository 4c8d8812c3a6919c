"""Requests to a reward server, repeated while it is busy or away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rewards.contract import RewardError, one_line
from rewards.serving.wire import WireError, parse_json, read_error

if TYPE_CHECKING:
    import ssl

    import httpx

FAILED = 500  # the reward raised on these clips, and would again
RETRIED = (408, 502, 503, 504)  # the server, or a proxy before it, is busy or starts again
CONNECT_SECONDS = 10.0
PAUSE, LONGEST_PAUSE = 0.25, 10.0  # seconds between attempts: the first, doubled up to the last
LONGEST_RETRY_AFTER = 60.0  # seconds that a server may ask for
LARGEST_ANSWER = 64 * 2**20  # bytes
_chance = random.Random()  # not the global generator, whose draws a run may depend on


class Unanswered(Exception):
    """Why a request has no answer, in a line."""


class Session:
    """The connections of one call, and since when nothing has been answered.

    Args:
        url, headers, tls: the server, what every request says, and httpx's TLS context.
        who: begins the messages of errors.
        timeout: seconds for one answer.
        patience: seconds after a request's first failure, or while the server answers nothing at all, in which it is
            repeated.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], tls: ssl.SSLContext, who: str, timeout: float, patience: float
    ):
        import httpx

        self.url, self.who, self.timeout, self.patience = url, who, timeout, patience
        self.client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **headers},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            verify=tls,
            trust_env=False,
        )
        self.network_error = httpx.TransportError
        self._silent_since: float | None = None

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def ask_json(self, path: str) -> Mapping[str, Any]:
        """GET an object. Raises: as `ask`."""
        try:
            said = parse_json(await self.ask("GET", path), "answer")
        except WireError as error:
            raise RewardError(f"{self.who}: {self.url} is not a reward server: {error}") from error
        if not isinstance(said, Mapping):
            raise RewardError(f"{self.who}: {self.url} is not a reward server: it answers with {type(said).__name__}")
        return said

    async def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of the answer. Raises: Unanswered once patience is spent; RewardError where the server refuses."""
        failed_since, pause = None, PAUSE
        while True:
            content, cause, asked = await self._attempt(method, path, body)
            now = time.monotonic()
            if content is not None:
                self._silent_since = None
                return content
            failed_since = now if failed_since is None else failed_since
            self._silent_since = failed_since if self._silent_since is None else self._silent_since
            wait = max(asked, pause * _chance.uniform(0.5, 1.0))  # many clients do not come back at the same moment
            if now + wait > min(failed_since, self._silent_since) + self.patience:
                raise Unanswered(f"{self.url} does not answer: {cause}")
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _attempt(self, method: str, path: str, body: bytes | None) -> tuple[bytes | None, str, float]:
        """The content; or None, why there is none, and the seconds that the server asks to wait."""
        try:
            response, content = await asyncio.wait_for(self._send(method, path, body), self.timeout)
        except asyncio.TimeoutError:
            return None, f"nothing in {self.timeout:g} seconds", 0.0
        except self.network_error as error:
            return None, f"{type(error).__name__} {one_line(error)}".rstrip(), 0.0
        status = response.status_code
        if status == 200:
            return content, "", 0.0
        cause = f"{status} {read_error(content)}"
        if status in RETRIED:
            return None, cause, _retry_after(response.headers.get("retry-after", ""))
        if status == FAILED:
            raise Unanswered(f"{self.url} fails: {cause}")
        raise RewardError(f"{self.who}: {self.url} refuses: {cause}")

    async def _send(self, method: str, path: str, body: bytes | None) -> tuple[httpx.Response, bytes]:
        async with self.client.stream(method, self.url + path, content=body) as response:
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > LARGEST_ANSWER:
                    raise RewardError(f"{self.who}: {self.url} answers with more than {LARGEST_ANSWER} bytes")
        return response, bytes(content)


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After header, within bounds; one that gives a date counts as none."""
    return min(float(text), LONGEST_RETRY_AFTER) if text.isascii() and text.isdigit() else 0.0
