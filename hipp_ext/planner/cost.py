"""What "compression" counts: parameters or FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group

CostKind = Literal["parameters", "flops"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """Cost of the groups; `removed` is the objective "compression".

    The budget `pruning_ratio` always counts parameters, exactly; this is what the search rewards.

    Attributes:
        kind: what is counted.
        dense: (groups,) parameters, or FLOPs per token, of each whole group.
    """

    kind: CostKind
    dense: Float[Tensor, " groups"]

    def removed(self, fractions: Float[Tensor, "plans groups"]) -> Float[Tensor, " plans"]:
        """Fraction of the dense cost that plans with these keep fractions save; more = smaller."""
        return 1 - (fractions.double().clamp(0, 1) * self.dense).sum(1) / self.dense.sum()


def check_cost(kind: str) -> None:
    """Raise BudgetError unless `kind` is one of CostKind."""
    if kind not in get_args(CostKind):
        raise BudgetError(f"cost={kind!r}: one of {', '.join(get_args(CostKind))} is needed.")


def cost_of(groups: Sequence[Group], kind: CostKind, *, tokens: int = 640) -> Cost:
    """The cost of `groups`.

    Args:
        groups: groups of a model.
        kind: "parameters", or "flops": two per multiply-accumulate, per token with `tokens` keys
            in context.
        tokens: length of a typical prompt; LLaVA-1.5's image alone takes 576.

    Raises:
        BudgetError: the kind is unknown.
    """
    check_cost(kind)
    unit = [
        g.unit_parameters if kind == "parameters" else g.unit_flops + g.context_flops(tokens)
        for g in groups
    ]
    dense = [float(g.width * u) for g, u in zip(groups, unit, strict=True)]
    return Cost(kind=kind, dense=torch.tensor(dense, dtype=torch.float64))
