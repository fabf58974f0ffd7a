"""vLLM's server on a pruned folder: a picture and a question over HTTP.

The package for CPUs has no `vllm serve`, which asks for the version of a package named vllm; the
server that it starts is run as a module.
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from served import TOKENS, by_transformers
from shapes import SHAPES
from tiny import noisy
from tiny_llava import llava
from vlm_tables import write_tsv

from hipp_ext import load_pruned, prune, save_pruned

LOADING = 300  # seconds


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory, free_port):
    """(address, folder, processor, questions) of a server for a pruned LLaVA."""
    tmp_path = tmp_path_factory.mktemp("server")
    model, processor, prompts = llava()
    folder = save_pruned(prune(noisy(model), SHAPES["free"](model)), tmp_path / "pruned", processor)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = f"--port {free_port} --dtype float32 --enforce-eager --max-model-len 256"
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *options.split(), "--served-model-name", "pruned"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{free_port}"
    try:
        _wait(process, address, tmp_path / "log")
        yield address, folder, processor, prompts
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait(process: Any, address: str, log: Any) -> None:
    for _ in range(LOADING):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"No answer within {LOADING} s: {log.read_text()[-2000:]}")


def png(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def asked(image: dict[str, Any], question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def test_the_server_answers_as_transformers_does(server):
    address, folder, processor, prompts = server
    model = load_pruned(folder)
    text, picture = prompts[0]
    question = text.removeprefix("<image> ")
    rendered = processor.apply_chat_template(
        asked({"type": "image"}, question), add_generation_prompt=True
    )
    [expected] = by_transformers(model, [(rendered, picture)], processor)

    url = f"data:image/png;base64,{png(picture)}"
    image = {"type": "image_url", "image_url": {"url": url}}
    body = {
        "model": "pruned",
        "messages": asked(image, question),
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)["choices"][0]["logprobs"]["content"]
    except urllib.error.HTTPError as error:
        pytest.fail(error.read().decode())
    assert [int(t["token"].removeprefix("token_id:")) for t in answer] == expected.tokens
    assert [t["logprob"] for t in answer] == pytest.approx(expected.logprobs, abs=1e-3)


def test_the_served_model_has_the_scores_of_its_folder(server, tmp_path):
    """`vlmeval --base-url`, in the environment that has VLMEvalKit."""
    address, folder, _, prompts = server
    rows = [
        {
            "index": number,
            "image": png(picture),
            "question": text.removeprefix("<image> "),
            "answer": ("Yes", "No")[number % 2],
            "category": "random",
        }
        for number, (text, picture) in enumerate(prompts)
    ]
    table = write_tsv(tmp_path / "POPE.tsv", rows)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            os.environ.get("HIPP_PYTHON", ".venv/bin/python"),
            Path(__file__).parent / "evaluate_served.py",
            folder,
            address,
            table,
        ],
        check=True,
        cwd=root,
        stdout=subprocess.PIPE,
    )
    (_, ours, expected), (name, theirs, metrics) = json.loads(done.stdout)
    assert name == "pruned" and theirs == ours and len(set(ours)) > 2
    assert metrics == expected
