"""`hipp bench query`: a query on a 32-layer model's signals, unfitted and fitted, and the whole of plan() on the testbed."""

import statistics
import time
from typing import Any

import torch
from hipp_ext.evals.bench.measuring import paired_times, report

from hipp_ext import testbed
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.groups import Group, Kind
from hipp_ext.planner import HiPPPlanner, Signals
from hipp_ext.planner.archive import Record
from hipp_ext.planner.cost import Cost
from hipp_ext.planner.evaluation import Keeps
from hipp_ext.planner.experience import Experience
from hipp_ext.planner.policy import MAX_RATIO, new_policy
from hipp_ext.planner.reward import Reward
from hipp_ext.preference import Preference

EVALUATED = 300
FITTED = f"query of a planner that has evaluated {EVALUATED} plans [ms]"


def signals_of_7b_shape() -> Signals:
    """Random signals for the 64 groups of a LLaVA-1.5-7B language tower (32 heads, 11,008 channels, 32 layers)."""
    generator = torch.Generator().manual_seed(0)
    groups: list[Group] = []
    kinds: tuple[tuple[Kind, int, int, int], ...] = (("attention", 32, 128, 4 * 4096 * 128), ("ffn", 11_008, 1, 3 * 4096))
    for layer in range(32):
        for kind, width, columns, parameters in kinds:
            groups.append(
                Group(tower="language", layer=layer, kind=kind, width=width, producers=(), rows=(), consumer="",
                      columns=columns, unit_parameters=parameters, unit_flops=2 * parameters)
            )  # fmt: skip
    return Signals(
        groups=tuple(groups), scores={g.name: torch.rand(g.width, generator=generator) for g in groups}, scorer="random",
        sensitivity=torch.rand(64, 2, generator=generator), visual=torch.rand(64, generator=generator),
        digest="", calibration="",
        flow_shares={g.name: torch.rand(g.width, generator=generator) / g.width for g in groups},
    )  # fmt: skip


def experience_of(signals: Signals) -> Experience:
    """EVALUATED plans of those groups, with random rewards."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for index, ratio in enumerate(torch.linspace(0.01, MAX_RATIO, EVALUATED).tolist()):
        allocation = torch.randn(len(signals.groups), generator=generator).tolist()
        utility, robustness = (1 - ratio * torch.rand(2, generator=generator)).tolist()
        reward = Reward(utility=utility, robustness=robustness, compression=ratio, stability=0.0)
        records.append(Record(step=0, index=index, preference=(1, 0, 0), pruning_ratio=ratio, allocation=tuple(allocation),
                              keeps=keep_counts(signals.groups, allocation, ratio), reward=reward))  # fmt: skip
    parameters = torch.tensor([float(g.width * g.unit_parameters) for g in signals.groups])
    cost = Cost(kind="parameters", table=torch.stack([0 * parameters, parameters], 1))
    return Experience(records=records, digest=signals.digest, cost=cost)


def run(repeats: int = 50, save: bool = False) -> dict[str, Any]:
    """Time both; returns and prints the result."""
    signals, policy = signals_of_7b_shape(), new_policy()
    wish, experience = Preference(0.4, 0.4, 0.2), experience_of(signals)

    def query() -> Keeps:
        ratio, allocation = policy.decide(signals, wish)
        return keep_counts(signals.groups, allocation, ratio)

    queries = {"query [ms]": query, FITTED: lambda: experience.as_good_as(query(), wish, signals, Bounds())}
    times = paired_times(queries, repeats, warmup=5)
    model, processor = testbed.load()
    start = time.perf_counter()
    HiPPPlanner(wish).plan(model, processor=processor)
    values: dict[str, Any] = {
        name: {"median": 1000 * statistics.median(seconds), "most": 1000 * max(seconds), "n": len(seconds), "target": 5}
        for name, seconds in times.items()
    }
    values |= {
        "plan() on the testbed, signals included [s]": {"value": time.perf_counter() - start, "n": 1, "target": 10},
    }
    return report("query", f"hipp bench query --repeats {repeats}", values, save)
