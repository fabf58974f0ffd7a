"""`hipp bench query`: one policy call on a 32-layer model's signals, and the whole of plan() on the testbed."""

import time
from typing import Any

import torch

from hipp_ext import testbed
from hipp_ext.budget import keep_counts
from hipp_ext.calibration import TASKS
from hipp_ext.evals.studies.measuring import paired_times, report
from hipp_ext.groups import Group, Kind
from hipp_ext.planner import HiPPPlanner, Signals
from hipp_ext.planner.policy import new_policy
from hipp_ext.preference import Preference
from hipp_ext.sensitivity.measured import PRUNE_LEVELS


def signals_of_7b_shape() -> Signals:
    """Random signals for the 64 groups of a LLaVA-1.5-7B language tower (32 heads, 11,008 channels, 32 layers)."""
    generator = torch.Generator().manual_seed(0)
    groups: list[Group] = []
    kinds: tuple[tuple[Kind, int, int, int], ...] = (
        ("attention", 32, 128, 4 * 4096 * 128),
        ("ffn", 11_008, 1, 3 * 4096),
    )
    for layer in range(32):
        for kind, width, columns, parameters in kinds:
            groups.append(
                Group(
                    tower="language",
                    layer=layer,
                    kind=kind,
                    width=width,
                    producers=(),
                    rows=(),
                    consumer="",
                    columns=columns,
                    unit_parameters=parameters,
                    unit_flops=2 * parameters,
                )
            )
    return Signals(
        groups=tuple(groups),
        scores={g.name: torch.rand(g.width, generator=generator) for g in groups},
        scorer="random",
        sensitivity=torch.rand(len(TASKS), 64, len(PRUNE_LEVELS), generator=generator).cumsum(2),
        visual=torch.rand(64, generator=generator),
        digest="",
        calibration="",
        flow_shares={g.name: torch.rand(g.width, generator=generator) / g.width for g in groups},
    )


def run(repeats: int = 50, save: bool = False) -> dict[str, Any]:
    """Time both; returns and prints the result."""
    signals, policy = signals_of_7b_shape(), new_policy()
    wish = Preference(0.4, 0.4, 0.2)

    def query() -> None:
        ratio, allocation = policy.decide(signals, wish)
        keep_counts(signals.groups, allocation, ratio)

    times = paired_times({"query": query}, repeats, warmup=5)["query"]
    model, processor = testbed.load()
    start = time.perf_counter()
    HiPPPlanner(wish, cache=None).plan(model, processor=processor)
    values = {
        "query [ms]": {
            "median": 1000 * sorted(times)[len(times) // 2],
            "most": 1000 * max(times),
            "n": len(times),
            "target": 5,
        },
        "plan() on the testbed, signals included [s]": {
            "value": time.perf_counter() - start,
            "n": 1,
            "target": 10,
        },
    }
    return report("query", f"hipp bench query --repeats {repeats}", values, save)
