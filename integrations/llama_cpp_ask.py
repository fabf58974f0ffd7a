"""llama.cpp's token ids of texts, in a process of its own: a tokenizer on which llama.cpp aborts
ends this process alone.

    python -m hipp_ext.integrations.llama_cpp_ask < {"file": ..., "texts": [[text, special], ...]}

prints a list of lists of ids. Exit code 3: xllamacpp cannot be imported.
"""

import json
import secrets
import sys
import urllib.request
from typing import Any

NO_LLAMA_CPP = 3
_CONTEXT = 32
_ERRORS = 1  # llama.cpp says why it refuses a file, and nothing else


def main() -> None:
    """Answer the question on stdin."""
    asked = json.load(sys.stdin)
    try:
        import xllamacpp
    except ImportError:
        sys.exit(NO_LLAMA_CPP)
    key = secrets.token_hex()
    try:
        server = _serve(xllamacpp, asked["file"], key)
    except RuntimeError:  # the reason stands on stderr
        sys.exit(1)
    json.dump([_ids(server, key, *text) for text in asked["texts"]], sys.stdout)


def _serve(xllamacpp: Any, path: str, key: str) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_gpu_layers, params.warmup = _CONTEXT, 0, False
    params.fit_params, params.verbosity, params.ui = False, _ERRORS, False
    params.api_keys = [key]
    return xllamacpp.Server(params)


def _ids(server: Any, key: str, text: str, special: bool) -> list[int]:
    body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    asked = urllib.request.Request(f"{server.listening_address}/tokenize", body, headers)
    # Not through a proxy that the environment names: the server is in this process.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asked) as answer:
        return json.load(answer)["tokens"]


if __name__ == "__main__":
    main()
