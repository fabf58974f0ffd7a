"""A server that speaks OpenAI's protocol: http.server listens, a folder's model answers."""

import base64
import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hipp_ext.evals.hipp_vlm import HippVLM

DROP, HANG = "drop", "hang"  # faults: close the connection; do not answer


@dataclass
class Running:
    """A server. Tests read what it was asked, and tell it to fail.

    Attributes:
        address: base URL.
        rows: what /v1/models lists.
        bodies, headers: of the questions asked so far.
        faults: instead of the next answers: a status, (status, message), DROP, HANG, or None.
        delay: waiting time before each answer [s].
        listed: answer of /v1/models in the place of the rows, as an object or as bytes.
        together: largest number of questions that were open at the same time.
    """

    address: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    faults: list[Any] = field(default_factory=list)
    delay: float = 0.0
    together: int = 0
    open: int = 0
    key: str | None = None
    listed: Any = None
    ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serving(
    folder: Path | None = None, names: tuple[str, ...] = ("org/tiny",), key: str | None = None
) -> Iterator[Running]:
    """A server of one model under several names, on this machine."""
    vlm = HippVLM(folder, "cpu") if folder else None
    rows = [
        {"id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": str(folder)}
        for name in names
    ]
    state, lock = Running(rows=rows, key=key), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, content: Any, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refuse(self, status: int, message: str) -> None:
            self.reply(status, {"error": {"message": message}}, retry_after_ms="20")

        def allowed(self) -> bool:
            sent = self.headers.get("Authorization")
            if state.key is None or sent == f"Bearer {state.key}":
                return True
            self.refuse(401, f"wrong key {sent}")
            return False

        def do_GET(self) -> None:
            if self.path != "/v1/models":
                self.refuse(404, "no such place")
            elif self.allowed():
                now = {"created": int(time.time())}
                rows = {"object": "list", "data": [row | now for row in state.rows]}
                self.reply(200, rows if state.listed is None else state.listed)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions" or not self.allowed():
                return
            with lock:
                state.bodies.append(body)
                state.headers.append(self.headers)
                fault = state.faults.pop(0) if state.faults else None
                state.open += 1
                state.together = max(state.together, state.open)
            try:
                if fault == HANG:
                    state.ended.wait(60)
                    return
                time.sleep(state.delay)
                self.answer(body, fault)
            finally:
                with lock:
                    state.open -= 1

        def answer(self, body: dict[str, Any], fault: Any) -> None:
            if fault == DROP:
                self.close_connection = True
                return
            if fault is not None:
                return self.refuse(*((fault, "a fault") if isinstance(fault, int) else fault))
            if body["temperature"] != 0 or body["model"] not in [row["id"] for row in state.rows]:
                return self.refuse(400, "only greedy answers of this model")
            with lock:
                text = _generated(vlm, body)
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
            self.reply(
                200,
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [choice],
                },
            )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # connections that the client gave up
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()


def _generated(vlm: Any, body: dict[str, Any]) -> str:
    """What the model says to the only message of a request."""
    (message,) = body["messages"]
    parts = []
    for part in message["content"]:
        if part["type"] == "text":
            parts.append({"type": "text", "value": part["text"]})
        else:
            start, _, data = part["image_url"]["url"].partition(",")
            assert start == "data:image/png;base64"
            parts.append({"type": "image", "value": base64.b64decode(data, validate=True)})
    vlm.max_new_tokens = body["max_tokens"]
    return vlm.generate(parts)
