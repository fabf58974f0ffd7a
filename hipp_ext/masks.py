"""Plan + scores -> which units stay: boolean keep masks (True = keep) and sorted indices."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hipp_ext.errors import PlanError
from hipp_ext.groups import Group
from hipp_ext.plan import PlanGroup, PruningPlan

Scores = Mapping[str, Float[Tensor, " width"]]
KeepMasks = dict[str, Bool[Tensor, " width"]]


def unit_order(scores: Float[Tensor, " width"]) -> Int[Tensor, " width"]:
    """Indices of the units, highest score first; among equals the lower index comes first."""
    return torch.argsort(scores, descending=True, stable=True)


def top_units(scores: Float[Tensor, " width"], keep: int) -> tuple[int, ...]:
    """Sorted indices of the `keep` units with the highest scores."""
    return tuple(sorted(unit_order(scores)[:keep].tolist()))


def unit_entries(units: Int[Tensor, " kept"], size: int) -> Int[Tensor, " entries"]:
    """Indices of the rows or columns that `units` own, `size` each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def take_units(values: Tensor, units: Int[Tensor, " kept"], size: int, dim: int) -> Tensor:
    """The rows (dim 0) or columns (dim 1) that `units` own, in their order; a copy.

    As blocks of whole units: copying a head at once is several times faster than copying its columns.
    """
    blocks = values.unflatten(dim, (-1, size))
    return blocks.index_select(dim, units.to(values.device)).flatten(dim, dim + 1)


def plan_from_counts(
    groups: Sequence[Group],
    counts: Sequence[int],
    scores: Scores,
    *,
    preference: tuple[float, float, float] | None = None,
    scorer: str | None = None,
    notes: Mapping[str, object] | None = None,
) -> PruningPlan:
    """The plan that keeps, in every group, as many units as `counts` says: those with the highest scores.

    Raises:
        PlanError: scores are missing for a group, have another length than its width, or are not finite.
    """
    check_scores(groups, scores)
    return PruningPlan(
        groups=tuple(
            PlanGroup(
                tower=g.tower, layer=g.layer, kind=g.kind, width=g.width, kept=top_units(scores[g.name], k),
                unit_parameters=g.unit_parameters,
            )
            for g, k in zip(groups, counts, strict=True)
        ),
        preference=preference, scorer=scorer, notes=dict(notes or {}),
    )  # fmt: skip


def check_scores(groups: Sequence[Group], scores: Scores) -> None:
    """Raise PlanError unless there is one finite score per unit of every group."""
    for g in groups:
        if g.name not in scores:
            raise PlanError(f"No scores for {g.name}; there are scores for {sorted(scores)}.")
        if scores[g.name].shape != (g.width,):
            raise PlanError(f"{g.name} has {g.width} units and scores of shape {tuple(scores[g.name].shape)}.")
        if not torch.isfinite(scores[g.name]).all():
            raise PlanError(f"The scores of {g.name} hold NaN or infinity.")


def keep_masks(plan: PruningPlan) -> KeepMasks:
    """Group name -> boolean mask over its units, True = keep."""
    masks = {}
    for g in plan.groups:
        masks[g.name] = torch.zeros(g.width, dtype=torch.bool)
        masks[g.name][list(g.kept)] = True
    return masks
