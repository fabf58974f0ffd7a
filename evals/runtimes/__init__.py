"""Time and memory of model folders in the runtimes that serve them.

Every measurement is a process of its own, so that memory is that of one model, and a runtime that
crashes takes nothing with it. The models take turns, round by round, so that the machine's load
affects all of them alike. Prompts are random tokens without pictures: what differs between a model
and its pruned versions is the language tower.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hipp_ext.errors import DataError
from hipp_ext.evals.measuring import paired_ratio
from hipp_ext.progress import progress_bar

Runtime = Literal["transformers", "llama.cpp", "vllm"]
WEIGHT_TYPES: Mapping[Runtime, Sequence[str]] = {
    "transformers": ("f32", "bf16", "f16"),
    "llama.cpp": ("f16", "f32", "bf16", "q8_0"),
    "vllm": ("f32", "bf16", "f16"),
}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How models are served, and what they generate.

    Attributes:
        runtime: "transformers", "llama.cpp" or "vllm".
        weights: type of the weights, see WEIGHT_TYPES; None: the runtime's first.
        tokens: length of the prompt.
        new_tokens: number of tokens generated, the first included.
        repeats: generations of a round that count, after one that does not.
        rounds: number of rounds; each starts a process for every model.
        threads: number of CPU threads.
        seed: random seed of the prompts.
        quick: whether this is a first look, with few and short runs.

    Raises:
        DataError: the runtime does not know the type of weights.
    """

    runtime: Runtime = "transformers"
    weights: str | None = None
    tokens: int = 256
    new_tokens: int = 33
    repeats: int = 3
    rounds: int = 3
    threads: int = 1
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        known = WEIGHT_TYPES[self.runtime]
        if self.weights not in (None, *known):
            raise DataError(
                f"weights {self.weights!r}: {self.runtime} is measured with {', '.join(known)}."
            )
        object.__setattr__(self, "weights", self.weights or known[0])


def measure_folders(
    folders: Mapping[str, Path], serving: Serving, *, show: bool = True
) -> dict[str, dict[str, Any]]:
    """Model name -> its figures.

    Args:
        folders: model folders; the first is what the others are compared with.
        serving: how.
        show: show a progress bar.

    Returns:
        For each model prefill_ms and decode_ms (per further token), one number per round, and
        memory_mib, what the process grew by from before the model was loaded to its peak. For all
        but the first prefill_speedup, decode_speedup and memory_ratio over the first, each as
        {median, least, most, n} over the rounds.

    Raises:
        DataError: a process failed; the message has its last lines.
    """
    names = list(folders)
    keys = ("prefill_ms", "decode_ms", "memory_mib")
    found: dict[str, dict[str, Any]] = {name: {key: [] for key in keys} for name in names}
    with progress_bar(show, f"models in {serving.runtime}", serving.rounds * len(names)) as update:
        for number in range(serving.rounds * len(names)):
            name = names[number % len(names)]
            update(number, name)
            for key, value in _in_process(folders[name], serving).items():
                found[name][key].append(value)
            update(number + 1, "")
    for name in names[1:]:
        series = {key: {n: found[n][key] for n in names} for key in keys}
        found[name] |= {
            "prefill_speedup": paired_ratio(series["prefill_ms"], names[0], name),
            "decode_speedup": paired_ratio(series["decode_ms"], names[0], name),
            "memory_ratio": paired_ratio(series["memory_mib"], name, names[0]),
        }
    return found


def _in_process(folder: Path, serving: Serving) -> dict[str, float]:
    """The figures of one round: medians over its repeats."""
    order = json.dumps({"folder": str(folder), **asdict(serving)})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"{__name__}.worker", order],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(serving.threads)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"prefill"')]
    if done.returncode or not lines:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(
            f"{folder.name} could not be measured in {serving.runtime}: "
            + " ".join(said[-3:] if said else ["the process ended without a word."])
        )
    result = json.loads(lines[-1])
    return {
        "prefill_ms": 1000 * statistics.median(result["prefill"]),
        "decode_ms": 1000 * statistics.median(result["decode"]),
        "memory_mib": result["memory_mib"],
    }
