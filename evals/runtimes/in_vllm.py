"""vLLM in this process, on model folders as they are."""

import os
import time
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import MissingExtraError

if TYPE_CHECKING:
    from hipp_ext.evals.runtimes import Serving
    from hipp_ext.evals.runtimes.worker import Generate

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # memory is that of this process
    "VLLM_NO_USAGE_STATS": "1",
}


def prepare(folder: str, serving: "Serving") -> str:
    """The folder itself."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    return folder


def load(folder: str, serving: "Serving") -> "Generate":
    """A function (token ids, new tokens) -> (seconds to the first, seconds per further token)."""
    try:
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtraError("vllm", "vllm") from None
    llm = LLM(
        folder,
        dtype=DTYPES[serving.weights or "f32"],
        max_model_len=serving.tokens + serving.new_tokens + 8,
        enable_prefix_caching=False,
        enforce_eager=True,
    )

    def seconds(ids: Any, new_tokens: int) -> float:
        settings = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": list(ids)}], settings, use_tqdm=False)
        return time.perf_counter() - start

    def generate(ids: Any, new_tokens: int) -> tuple[float, float]:
        first = seconds(ids, 1)
        return first, (seconds(ids, new_tokens) - first) / (new_tokens - 1)

    return generate
