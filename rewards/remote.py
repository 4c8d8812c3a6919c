"""A reward that runs elsewhere: `remote(url, name)` asks a server of `python -m rewards.serve`.

    reward = remote("http://127.0.0.1:8000", "clip")
    scores = reward(videos, prompts, fps=16)

N clips, S segments
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import torch
from torch import Tensor

from rewards.contract import SCOPES, Clip, Reward, RewardError, Scores, settled
from rewards.serving.session import Session, Unanswered
from rewards.serving.wire import WireError, check_indices, decode_scores, encode_clips, read_token

log = logging.getLogger("rewards.remote")
REQUEST_CLIPS = 64


class RemoteReward(Reward):
    """A reward on a server; see `remote`. `failures` counts the requests that were given up, by cause."""

    def __init__(
        self,
        url: str,
        name: str,
        *,
        scope: str | None = None,
        token_env: str | None = None,
        timeout: float = 300.0,
        patience: float = 120.0,
        request_mb: float = 64.0,
        concurrency: int = 4,
    ):
        import httpx

        self.check(url, name, scope, token_env, timeout, patience, request_mb, concurrency)
        self.url, self.path, self.name = url.rstrip("/"), f"/rewards/{quote(name, safe='')}", name
        self.timeout, self.patience = timeout, patience
        self.request_bytes, self.concurrency = request_mb * 2**20, concurrency
        self.failures: Counter[str] = Counter()
        self._headers = {"Authorization": f"Bearer {read_token(token_env)}"} if token_env else {}
        self._tls = httpx.create_ssl_context()  # slow to make, and every call has a client of its own
        self._seen: dict[tuple[int, float], list[int]] = {}
        self.scope = scope or settled(self._fetch_scope())

    @staticmethod
    def check(
        url: str,
        name: str,
        scope: str | None = None,
        token_env: str | None = None,
        timeout: float = 300.0,
        patience: float = 120.0,
        request_mb: float = 64.0,
        concurrency: int = 4,
    ) -> None:
        """Validate the options without asking the server."""
        where = f"reward remote: {name!r} at {url!r}"
        if not isinstance(name, str) or not name:
            raise RewardError(f"{where}: name: expected the name of a reward on the server")
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except (ValueError, AttributeError, TypeError):  # a port out of range, or no text
            sound = False
        if not sound or parts.query or parts.fragment or parts.username is not None:
            raise RewardError(f"{where}: url: expected http://host:port, as {'http://127.0.0.1:8000'!r}")
        if scope is not None and scope not in SCOPES:
            raise RewardError(f"{where}: scope {scope!r} is not one of {', '.join(SCOPES)}; null asks the server")
        if token_env is not None:
            read_token(token_env)
        for option, value in (("timeout", timeout), ("request_mb", request_mb), ("concurrency", concurrency)):
            if not _is_number(value) or not value > 0:
                raise RewardError(f"{where}: {option} is {value!r}, expected a number above 0")
        if not _is_number(patience) or patience < 0:
            raise RewardError(f"{where}: patience is {patience!r}, expected seconds, 0 to give up at once")
        if concurrency != int(concurrency):
            raise RewardError(f"{where}: concurrency is {concurrency!r}, expected a whole number")

    def indices(self, length: int, fps: float) -> list[int]:
        async def look_up() -> list[int]:
            async with self._session(self.patience) as session:
                return await self._indices(session, length, fps)

        try:
            return settled(look_up())
        except Unanswered as error:
            raise RewardError(f"reward {self.name}: {error}") from error

    async def score(self, clips: Sequence[Clip]) -> Scores:
        async with self._session(self.patience) as session:
            try:
                for length, fps in {(len(clip.video), clip.fps) for clip in clips}:
                    await self._indices(session, length, fps)
            except Unanswered as error:
                self._give_up(error, len(clips))
                return gathered([], [], clips)
            sizes = [len(self._seen[len(clip.video), clip.fps]) * clip.video[0].numel() for clip in clips]
            parts = portions(clips, sizes, self.scope, self.request_bytes)
            gate = asyncio.Semaphore(int(self.concurrency))

            async def one(part: list[int]) -> Scores | None:
                async with gate:
                    return await self._scores(session, [clips[index] for index in part])

            answers = await asyncio.gather(*(one(part) for part in parts))
        return gathered(parts, answers, clips)

    async def _scores(self, session: Session, clips: Sequence[Clip]) -> Scores | None:
        """The answer to one request; None where there is none."""
        try:
            seen = [clip.frames(self._seen[len(clip.video), clip.fps]) for clip in clips]
            body = await asyncio.to_thread(encode_clips, seen)
            return decode_scores(await session.ask("POST", self.path, body), len(clips))
        except WireError as error:
            raise RewardError(f"reward {self.name}: {error}") from error
        except Unanswered as error:
            self._give_up(error, len(clips))
            return None

    async def _indices(self, session: Session, length: int, fps: float) -> list[int]:
        if (length, fps) not in self._seen:
            query = urlencode({"length": length, "fps": fps})
            said = await session.ask_json(f"{self.path}/frames?{query}")
            try:
                self._seen[length, fps] = check_indices(said.get("indices"), length)
            except WireError as error:
                raise RewardError(f"reward {self.name}: {self.url} answers with other {error}") from error
        return self._seen[length, fps]

    async def _fetch_scope(self) -> str:
        try:
            async with self._session(patience=0) as session:
                served = (await session.ask_json("/rewards")).get("rewards")
        except Unanswered as error:
            raise RewardError(f"reward {self.name}: {error}; start python -m rewards.serve there first") from error
        if not isinstance(served, Mapping) or self.name not in served:
            listed = f"; it serves {', '.join(served)}" if isinstance(served, Mapping) else ""
            raise RewardError(f"reward {self.name}: {self.url} has no reward of this name{listed}")
        said = served[self.name]
        if not isinstance(said, Mapping) or said.get("scope") not in SCOPES:
            raise RewardError(f"reward {self.name}: {self.url} does not say its scope")
        return said["scope"]

    def _session(self, patience: float) -> Session:
        return Session(self.url, self._headers, self._tls, f"reward {self.name}", self.timeout, patience)

    def _give_up(self, error: Unanswered, num: int) -> None:
        cause = str(error)
        self.failures[cause] += 1
        if self.failures[cause] == 1:
            log.warning("reward %s: %s; %d clips are masked (said once, counted in failures)", self.name, cause, num)


def remote(url: str, name: str, **options: Any) -> Reward:
    """The reward `name` of the server at `url`; asynchronous, so it runs side by side with other rewards.

    Pixels go out in 256 levels (what overshoots [0, 1] is clipped), and only the frames that the reward looks at. The
    clips of one call are split into requests of bounded size, groups kept whole where the reward's scope is "group".
    A request that fails for a while is repeated; one that fails for good masks its clips (valid False), is logged once
    a cause and counted in `failures`. No gradients. Proxies named in the environment are not used.

    Args:
        scope: the reward's scope; None asks the server, which has to run by then.
        token_env: environment variable that holds the server's token.
        timeout: seconds for one answer, its wait in the server's queue included.
        patience: seconds in which a request is repeated after a lost connection, a time-out or a busy server (408, 502,
            503, 504), with growing pauses and no less than the server asks for; also how long a call waits in all while
            nothing is answered.
        request_mb: bytes of frames in one request, at most, unless one clip or group has more.
        concurrency: requests at once.
    Raises: RewardError for a server that cannot be reached, does not know the name or refuses the token, and for clips
        that the server or its reward refuses.
    """
    return RemoteReward(url, name, **options)


def portions(clips: Sequence[Clip], sizes: Sequence[int], scope: str, most: float) -> list[list[int]]:
    """Divide clips into requests of at most `most` bytes and REQUEST_CLIPS clips: indices of the clips of each.

    What has to be seen in one call stays together, whatever its size: a clip, a group or, for scope "batch", all.
    """
    units: dict[int, list[int]] = {}
    for index, clip in enumerate(clips):
        units.setdefault({"clip": index, "group": clip.group, "batch": 0}[scope], []).append(index)
    parts: list[list[int]] = []
    room = 0.0
    for unit in units.values():
        size = sum(sizes[index] for index in unit)
        if not parts or size > room or len(parts[-1]) + len(unit) > REQUEST_CLIPS:
            parts.append([])
            room = most
        parts[-1] += unit
        room -= size
    return parts


def gathered(parts: Sequence[Sequence[int]], answers: Sequence[Scores | None], clips: Sequence[Clip]) -> Scores:
    """The answers to all requests in the order of the clips, on the device of the first; masked where there is none."""
    num, device = len(clips), clips[0].video.device

    def placed(values: Sequence[Tensor | None], width: tuple[int, ...] = ()) -> Tensor:
        whole = torch.full((num, *width), math.nan)
        for part, some in zip(parts, values, strict=True):
            if some is not None:
                whole[list(part)] = some
        return whole.to(device)

    found = [answer for answer in answers if answer is not None]
    dims = dict.fromkeys(name for answer in found for name in answer.dims)
    dense, widths = None, {None if answer.dense is None else answer.dense.shape[1] for answer in found}
    if len(widths) == 1 and None not in widths:
        dense = placed([answer and answer.dense for answer in answers], (widths.pop(),))
    return Scores(
        placed([answer and answer.total for answer in answers]),
        {name: placed([answer and answer.dims.get(name) for answer in answers]) for name in dims},
        dense,
        placed([answer and answer.valid.float() for answer in answers]) == 1,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
