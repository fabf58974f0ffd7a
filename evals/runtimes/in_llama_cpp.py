"""llama.cpp in this process, on GGUF files that are exported for it."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from hipp_ext.evals.runtimes import Serving
    from hipp_ext.evals.runtimes.worker import Generate

_KEPT: list[Any] = []  # the temporary folder of the file, which lives as long as the process


def prepare(folder: str, serving: "Serving") -> str:
    """A GGUF file of the folder."""
    from hipp_ext.integrations.llama_cpp import export_gguf

    _KEPT.append(place := tempfile.TemporaryDirectory())
    weights: Any = serving.weights
    return str(export_gguf(folder, Path(place.name) / "model.gguf", type=weights).path)


def load(file: str, serving: "Serving") -> "Generate":
    """A function (token ids, new tokens) -> (seconds to the first, seconds per further token)."""
    try:
        import xllamacpp  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("xllamacpp", "gguf") from None
    runtime: Any = xllamacpp
    params = runtime.CommonParams()
    params.model.path = file
    params.n_ctx = serving.tokens + serving.new_tokens + 8
    params.n_batch = params.n_ubatch = max(serving.tokens, 32)
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = serving.threads
    params.warmup = False
    server = runtime.Server(params)

    def generate(ids: Any, new_tokens: int) -> tuple[float, float]:
        order = {"prompt": list(ids), "n_predict": new_tokens, "temperature": 0}
        order |= {"ignore_eos": True, "cache_prompt": False}
        result = server.handle_completions(order)
        result = json.loads(result) if isinstance(result, str) else result
        times = result["timings"]
        if (times["prompt_n"], times["predicted_n"]) != (len(ids), new_tokens):
            raise DataError(f"llama.cpp read and wrote other numbers of tokens: {times}")
        # The first token comes with the prompt; its time is with those of the others.
        return times["prompt_ms"] / 1000, times["predicted_ms"] / 1000 / (new_tokens - 1)

    return generate
