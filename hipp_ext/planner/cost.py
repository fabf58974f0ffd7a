"""What the objective "compression" counts: parameters or FLOPs."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.budget import Cost
from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group

CostKind = Literal["parameters", "flops"]


def check_cost(kind: str) -> None:
    """Raise BudgetError unless `kind` is one of CostKind."""
    if kind not in get_args(CostKind):
        raise BudgetError(f"cost={kind!r}: one of {', '.join(get_args(CostKind))} is needed.")


def cost_of(groups: Sequence[Group], kind: str, *, tokens: int = 640) -> Cost:
    """The cost of `groups`, named after its kind.

    Args:
        groups: groups of a model.
        kind: "parameters", or "flops": two per multiply-accumulate, of one prompt with one picture.
            Its tokens pass the language tower with `tokens` keys in context, those of the picture
            vision tower and projector (see `Group.picture_tokens`).
        tokens: length of a typical prompt; LLaVA-1.5's image alone takes 576.

    Raises:
        BudgetError: the kind is unknown.
    """
    check_cost(kind)
    if kind == "parameters":
        return Cost.parameters(groups)
    seen = [g.picture_tokens or tokens for g in groups]
    units = [
        max(n, 1) * (g.unit_flops + g.context_flops(n)) for n, g in zip(seen, groups, strict=True)
    ]
    return Cost(name=kind, terms=tuple((u, ((0, ((i, 1),)),)) for i, u in enumerate(units)))


def compression(
    cost: Cost, groups: Sequence[Group], plans: Sequence[Sequence[int]] | np.ndarray
) -> Float[Tensor, " plans"]:
    """Fraction of the dense cost that each plan saves, float64; more = smaller."""
    counts = np.asarray(plans, dtype=np.int64).reshape(-1, len(groups))
    return torch.from_numpy(1 - cost.many(counts) / cost([g.width for g in groups]))
