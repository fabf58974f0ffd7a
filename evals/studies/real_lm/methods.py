"""The ways of choosing units that the study compares, and the plans that they make."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from hipp_ext.allocators import OWL, Allocator, FLAPAdaptive, GlobalThreshold, Sensitivity, Uniform
from hipp_ext.calibration import Calibration
from hipp_ext.evals.studies.real_lm.passes import counted_passes
from hipp_ext.evals.studies.real_lm.shortgpt import ShortGPT
from hipp_ext.groups import AttentionUnit, find_groups, total_parameters
from hipp_ext.plan import PruningPlan
from hipp_ext.scorers import FLAP, Magnitude, WandaSP
from hipp_ext.sensitivity.efforts import Effort
from hipp_ext.units import plan_from_counts
from hipp_ext.verification import verify_groups


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison.

    Attributes:
        make: pruning_ratio=... -> the allocator; None: torch-pruning's own pruner, without a plan.
        calibrated: its plans depend on the calibration.
        reconstructs: least squares may fit the layers that its plans make narrower.
        bias: layers get FLAP's bias when they are pruned.
    """

    make: Callable[..., Allocator] | None
    calibrated: bool = True
    reconstructs: bool = True
    bias: bool = False


def _hipp(effort: Effort, attention_unit: AttentionUnit = "kv") -> Method:
    return Method(make=partial(Sensitivity, effort=effort, attention_unit=attention_unit))


HIPP = "hipp, anchored"
METHODS: Mapping[str, Method] = {
    "uniform, Magnitude": Method(make=partial(Uniform, scorer=Magnitude()), calibrated=False),
    "torch-pruning": Method(make=None, calibrated=False, reconstructs=False),
    "uniform, WandaSP": Method(make=partial(Uniform, scorer=WandaSP())),
    "uniform, FLAP": Method(make=partial(Uniform, scorer=FLAP())),
    "global threshold": Method(make=partial(GlobalThreshold, scorer=WandaSP())),
    "FLAP adaptive": Method(make=partial(FLAPAdaptive, scorer=FLAP())),
    "FLAP, with its bias": Method(
        make=partial(FLAPAdaptive, scorer=FLAP()), reconstructs=False, bias=True
    ),
    "OWL": Method(make=partial(OWL, scorer=WandaSP())),
    # Layers go whole, so their scores are not read: take those that cost nothing.
    "ShortGPT": Method(make=partial(ShortGPT, scorer=Magnitude()), reconstructs=False),
    "hipp, fisher": _hipp("fisher"),
    "hipp, query heads": _hipp("fisher", "query"),
    HIPP: _hipp("anchored"),
    "hipp, measured": _hipp("measured"),
}


def make_plans(
    make: Callable[..., Allocator],
    model: nn.Module,
    calibration: Calibration,
    ratios: Sequence[float],
) -> dict[float, PruningPlan]:
    """Ratio -> the plan that `make(pruning_ratio=ratio).plan(model)` returns.

    The ratio counts the parameters of KV groups and FFN, for query heads as well: with either unit
    the same number of parameters goes.

    What does not depend on the ratio is measured once. The notes of a plan say what it would have
    cost alone: "seconds", and "passes", forward passes over the calibration.
    """
    allocator = make(pruning_ratio=ratios[0])
    groups = find_groups(model, attention_unit=allocator.attention_unit)
    larger = total_parameters(find_groups(model)) / total_parameters(groups)
    scorer: Any = allocator.scorer or WandaSP()
    tokens = sum(batch["input_ids"].numel() for batch in calibration.batches)
    verify_groups(model, groups)  # once for each model, on four tokens: no part of a method
    start = time.perf_counter()
    with counted_passes(model, groups) as passes:
        scores = scorer(model, calibration, groups=groups)
        measured = allocator.measure(model, groups, scores, calibration)
    shared = time.perf_counter() - start
    plans = {}
    for ratio in ratios:
        start = time.perf_counter()
        of_ratio = replace(allocator, pruning_ratio=ratio * larger)
        counts = of_ratio.keep_counts(groups, scores, measured)
        cost = {
            "seconds": shared + time.perf_counter() - start,
            "passes": passes.over(groups, tokens),
        }
        plans[ratio] = plan_from_counts(groups, counts, scores, scorer=scorer.name, notes=cost)
    return plans
