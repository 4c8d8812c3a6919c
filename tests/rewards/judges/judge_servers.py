"""Servers on this machine that judges are asked through: scripted ones, `transformers serve`, and a real model."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

START_SECONDS = 120


class ScriptedServer:
    """Answers each POST with what `script(request)` returns: an action, a function of the handler.

    `requests` are the bodies received, in order of arrival; `headers` those of the last one.
    """

    def __init__(self, script, port=0):
        self.script, self.requests, self.headers, self.stopping = script, [], {}, threading.Event()
        self.path = None
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(request)
                    outer.headers, outer.path = dict(self.headers), self.path
                    action = outer.script(request)
                with contextlib.suppress(ConnectionError):  # the client may have gone away
                    action(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads, self.http.stopping = True, self.stopping
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()


def in_turn(*actions):
    """A script: one action after the other, the last one for ever."""
    left = list(actions)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def sends(status, body, **headers):
    """An action: a response as it is."""

    def action(handler):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(content)

    return action


def says(text, logprobs=None, finish="stop"):
    """An action: a chat completion. logprobs: for each token, its text and {token: log-probability}."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if logprobs is not None:
        content = [
            {
                "token": token,
                "logprob": top.get(token, -9.0),
                "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()],
            }
            for token, top in logprobs
        ]
        choice["logprobs"] = {"content": content}
    return sends(200, {"choices": [choice]})


def hangs(handler):
    """An action: accepts the request and never answers."""
    handler.server.stopping.wait(60)


def trickles(handler):
    """An action: begins to answer, and sends a byte now and then."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b" ")


def drops(handler):
    """An action: closes the connection in the middle of the body."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def content_of(request):
    """The parts of the last message: texts, and images as uint8 arrays (H, W, 3)."""
    parts = request["messages"][-1]["content"]
    return [part["text"] if part["type"] == "text" else image(part["image_url"]["url"]) for part in parts]


def image(url):
    kind, _, data = url.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def dark_halves(request):
    """A script: a judge that finds one defect in each frame, the higher the darker the frame."""
    frames = [part.mean() / 255 for part in content_of(request) if not isinstance(part, str)]
    defects = [
        {"kind": "dark", "description": "", "frames": [i, i], "box": [0, 0, 500, max(1, round(1000 * (1 - frame)))]}
        for i, frame in enumerate(frames, 1)
    ]
    return says(json.dumps({"defects": defects}))


def brightness(request):
    """A script: a judge that likes bright videos, 1 (black) to 5 (white), in the format that the prompt asks for."""
    frames = [part.mean() / 255 for part in content_of(request) if not isinstance(part, str)]
    if "Video 2" in str(request["messages"]):
        half = len(frames) // 2
        first, second = np.mean(frames[:half]), np.mean(frames[half:])
        winner = "Tie" if first == second else f"Video {2 if second > first else 1} is better"
        return says(f"<think>hm</think><answer>{winner}</answer>")
    score = 1 + 4 * np.mean(frames)
    return says(f"Alignment Score (1-5): {score:.3f}\nPhysics Score (1-5): 3\nStyle Score (1-5): {6 - score:.3f}")


@contextlib.contextmanager
def transformers_serve(folder):
    """The URL of a `transformers serve` of a folder, stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
    reader.start()
    try:
        _wait_for(port, process, said)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def _wait_for(port, process, said):
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, b"".join(said).decode()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"no server after {START_SECONDS} s: {b''.join(said).decode()}")


class Reference:
    """Greedy decoding written by hand: one whole forward pass a token, and the log-softmax of its last row."""

    def __init__(self, folder):
        from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def complete(self, turns, num):
        """Texts of `num` tokens, and for each the log-probability of every token of the vocabulary."""
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        texts, rows = [], []
        for _ in range(num):
            with torch.no_grad():
                logp = self.model(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
            best = logp.argmax()
            texts.append(self.processor.tokenizer.decode([best]))
            rows.append(logp)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], best[None, None]], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 1).long()], 1)
        return texts, rows


@contextlib.contextmanager
def logprob_server(folder):
    """The URL of an OpenAI-compatible server with log-probabilities, around a real model (`Reference`)."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    reference = Reference(folder)
    tokenizer = reference.processor.tokenizer

    async def chat(request):
        body = await request.json()
        turns = [{"role": m["role"], "content": [_turn_part(p) for p in m["content"]]} for m in body["messages"]]
        texts, rows = reference.complete(turns, body["max_tokens"])
        content = []
        for text, row in zip(texts, rows, strict=True):
            best = row.topk(min(body.get("top_logprobs", 1), len(row)))
            top = [
                {"token": tokenizer.decode([i]), "logprob": p}
                for p, i in zip(*map(torch.Tensor.tolist, best), strict=True)
            ]
            content.append({"token": text, "logprob": top[0]["logprob"], "top_logprobs": top})
        message = {"role": "assistant", "content": "".join(texts)}
        choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": {"content": content}}
        return JSONResponse({"choices": [choice]})

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


def _turn_part(part):
    if part["type"] == "text":
        return part
    return {"type": "image", "image": Image.fromarray(image(part["image_url"]["url"]))}
