"""The HTTP of a reward server.

    GET  /health                                 {"ready": true, "rewards": {name: counts and queue}}
    GET  /rewards                                {"rewards": {name: {"scope": ..., "differentiable": false}}}
    GET  /rewards/{name}/frames?length=&fps=     {"indices": [...]}, the frames that the reward looks at
    POST /rewards/{name}                         clips in, scores out (rewards/serving/wire.py)

A refusal is {"error": "one line"}: 400 a question of another form, 401 no or another token, 404 no such reward, 408 a
body that comes too slowly, 413 one that is too large, 422 clips that the reward refuses, 500 clips that it fails on,
503 too much waits already (Retry-After says when to ask again).
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rewards.contract import Clip, Scores, one_line
from rewards.serving.wire import Limits, WireError, decode_clips, encode_scores
from rewards.serving.worker import QueueFull, ScoringFailed, Worker

LONGEST_CLIP = 100_000  # frames that a client may ask indices for
LINGER_SECONDS = 2.0  # a client that still writes when the connection closes may never see why
RETRY_SECONDS = 1

Endpoint = Callable[[Request], Awaitable[Response]]


class Bounds(NamedTuple):
    """What the server takes."""

    body: int = 256 * 2**20  # bytes of one question
    held: int = 1024 * 2**20  # bytes of all questions that are being read, wait or are scored
    seconds: float = 60.0  # for a body to come in
    question: Limits = Limits()


class Service:
    """The endpoints over the workers."""

    def __init__(self, workers: Mapping[str, Worker], token: str | None, bounds: Bounds):
        self.workers, self.bounds = workers, bounds
        self._authorization = f"Bearer {token}".encode() if token else None
        self._held: Counter[Request] = Counter()  # bytes

    def app(self) -> Starlette:
        routes = [
            ("/health", "GET", self.health),
            ("/rewards", "GET", self.rewards),
            ("/rewards/{name}/frames", "GET", self.frames),
            ("/rewards/{name}", "POST", self.score),
        ]
        return Starlette(
            routes=[Route(path, self._guarded(endpoint), methods=[method]) for path, method, endpoint in routes],
            exception_handlers={HTTPException: _refusal, ClientDisconnect: _gone},
        )

    async def health(self, request: Request) -> Response:
        ready = all(worker.alive for worker in self.workers.values())
        return JSONResponse({"ready": ready, "rewards": {name: w.health() for name, w in self.workers.items()}})

    async def rewards(self, request: Request) -> Response:
        said = {name: {"scope": w.reward.scope, "differentiable": False} for name, w in self.workers.items()}
        return JSONResponse({"rewards": said})

    async def frames(self, request: Request) -> Response:
        worker = self._worker(request)
        try:
            length, fps = int(request.query_params["length"]), float(request.query_params["fps"])
        except (KeyError, ValueError) as error:
            raise HTTPException(400, "expected ?length=<whole number>&fps=<number>") from error
        if not (1 <= length <= LONGEST_CLIP and 0 < fps <= 1000):
            raise HTTPException(400, f"expected a length of 1 to {LONGEST_CLIP} and fps above 0, at most 1000")
        try:
            return JSONResponse({"indices": await asyncio.to_thread(worker.indices, length, fps)})
        except ScoringFailed as error:
            raise _failed(error) from error

    async def score(self, request: Request) -> Response:
        worker = self._worker(request)
        try:
            worker.check_room()
            body = await asyncio.wait_for(self._read(request), self.bounds.seconds)
            clips = await asyncio.to_thread(decode_clips, body, self.bounds.question)
            del body
            return JSONResponse(encode_scores(await _answer(worker, clips, request)))
        except asyncio.TimeoutError as error:
            raise HTTPException(408, f"the body took more than {self.bounds.seconds:g} seconds") from error
        except WireError as error:
            raise HTTPException(400, str(error)) from error
        except QueueFull as error:
            raise _busy(f"reward {worker.name}: {worker.capacity} questions wait already") from error
        except ScoringFailed as error:
            raise _failed(error) from error
        finally:
            self._held.pop(request, None)

    async def _read(self, request: Request) -> bytes:
        """The body, in as far as it stays within the bounds."""
        size, most = request.headers.get("content-length", "0"), self.bounds.body
        too_large = HTTPException(413, f"a body of more than {most / 2**20:g} MB; ask about fewer clips at once")
        if not size.isascii() or not size.isdigit() or int(size) > most:
            raise too_large
        chunks = []
        async for chunk in request.stream():
            chunks.append(chunk)
            self._held[request] += len(chunk)
            if self._held[request] > most:
                raise too_large
            if sum(self._held.values()) > self.bounds.held:
                raise _busy(f"{self.bounds.held / 2**20:g} MB of questions are held already")
        return b"".join(chunks)

    def _worker(self, request: Request) -> Worker:
        name = request.path_params["name"]
        if name not in self.workers:
            raise HTTPException(404, f"no reward {one_line(name)}; served here: {', '.join(self.workers)}")
        return self.workers[name]

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            try:
                self._authorise(request)
                return await endpoint(request)
            except HTTPException:
                with suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: read to its end
                    await asyncio.wait_for(_discard(request), LINGER_SECONDS)
                raise

        return guarded

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self._authorization and not hmac.compare_digest(given, self._authorization):
            raise HTTPException(401, "expected the server's token (Authorization: Bearer ...)")


async def _answer(worker: Worker, clips: list[Clip], request: Request) -> Scores:
    """What the worker answers; its turn is given up when the client goes away."""
    answer = asyncio.wrap_future(worker.submit(clips))
    gone = asyncio.ensure_future(request.receive())  # after the body, only the disconnection is left to come
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _discard(request: Request) -> None:
    async for _ in request.stream():
        pass


def _failed(error: ScoringFailed) -> HTTPException:
    return HTTPException(422 if error.refused else 500, str(error))


def _busy(line: str) -> HTTPException:
    return HTTPException(503, line, {"Retry-After": str(RETRY_SECONDS)})


async def _refusal(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": one_line(error.detail)}, error.status_code, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
