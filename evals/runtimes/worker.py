"""The process that measures one model in one runtime; prints one line of JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

Generate = Callable[[Sequence[int], int], tuple[float, float]]
MODULES = {"transformers": "in_transformers", "llama.cpp": "in_llama_cpp", "vllm": "in_vllm"}


def main(order: str) -> None:
    """Measure what `order` says, see `hipp_ext.evals.runtimes.Serving`."""
    given: dict[str, Any] = json.loads(order)
    from hipp_ext.evals.measuring import resident
    from hipp_ext.evals.runtimes import Serving
    from hipp_ext.evals.runtimes.prompts import prompts

    folder = given.pop("folder")
    serving = Serving(**given)
    module = import_module(f"hipp_ext.evals.runtimes.{MODULES[serving.runtime]}")
    prepared = module.prepare(folder, serving)
    before = resident("VmRSS", reset=True)
    generate: Generate = module.load(prepared, serving)
    times = [generate(ids, serving.new_tokens) for ids in prompts(folder, serving)]
    memory = resident("VmHWM") - before
    prefill, decode = zip(*times[1:], strict=True)
    print(json.dumps({"prefill": prefill, "decode": decode, "memory_mib": memory}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
