"""Plan -> reward: what the evaluator measures, what the plan removes, how stable it leaves the network."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import DataError
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.policy import MAX_RATIO
from hipp_ext.planner.state import Signals
from hipp_ext.scorers.synflow import stability
from hipp_ext.surgery import masked

Evaluator = Callable[[nn.Module], Mapping[str, float]]
Scalarisation = Literal["linear", "tchebycheff"]
STABILITY_WEIGHT = 0.05
SMOOTHING = 0.1  # of the Tchebycheff scalarisation, in units of the objectives


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What one plan achieves; every component is maximised.

    Attributes:
        utility: from the evaluator; ours is 1 for certain and right, 0 for guessing.
        robustness: the same on POPE.
        compression: pruning_ratio of the plan, in [0, 1).
        stability: log of the retained synaptic flow, 0 for the dense model.
    """

    utility: float
    robustness: float
    compression: float
    stability: float

    def as_dict(self) -> dict[str, float]:
        """Component name -> value."""
        return asdict(self)

    def objectives(self) -> list[float]:
        """[utility, robustness, compression], the axes of the front."""
        return [self.utility, self.robustness, self.compression]


def measure(model: nn.Module, plan: PruningPlan, evaluator: Evaluator, signals: Signals) -> Reward:
    """The reward of `plan`, measured on the masked model.

    Raises:
        DataError: the evaluator's answer lacks "utility" or "robustness", or one of them is not a finite number.
    """
    with masked(model, plan):
        measured = evaluator(model)
    values = {}
    for name in ("utility", "robustness"):
        value = measured.get(name) if isinstance(measured, Mapping) else None
        if not isinstance(value, Real) or not math.isfinite(value):
            raise DataError(f"The evaluator must return finite numbers for 'utility' and 'robustness'; got {measured!r}.")
        values[name] = float(value)
    return Reward(**values, compression=plan.pruning_ratio, stability=stability(plan, signals.flow_shares))


def scalarise(
    objectives: Float[Tensor, "*batch 3"], preference: Float[Tensor, "*batch 3"], kind: Scalarisation
) -> Float[Tensor, " *batch"]:
    """One number per plan, higher = better for the preference.

    Compression counts as its share of MAX_RATIO, so that all three objectives run from 0 to about 1. "linear" is the weighted
    sum; "tchebycheff" the smooth Tchebycheff distance to the ideal point (1, 1, 1), which also reaches non-convex parts
    of the front and has its optimum inside the simplex for every preference.

    Source: smooth Tchebycheff, arXiv 2402.19078.
    """
    scaled = objectives / torch.tensor([1.0, 1.0, MAX_RATIO])
    if kind == "linear":
        return (preference * scaled).sum(-1)
    return -SMOOTHING * torch.logsumexp(preference * (1 - scaled) / SMOOTHING, -1)
