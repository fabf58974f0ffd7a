"""Plan + scores -> which units stay: boolean keep masks (True = keep) and sorted indices."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hipp_ext.errors import PlanError
from hipp_ext.groups import Group, LeftWhole
from hipp_ext.plan import PlanGroup, PruningPlan
from hipp_ext.quantities import whole

Scores = Mapping[str, Float[Tensor, " width"]]
KeepMasks = dict[str, Bool[Tensor, " width"]]


def unit_order(scores: Float[Tensor, " width"], sections: int = 1) -> Int[Tensor, " width"]:
    """Indices of the units, highest score first; among equals the lower index comes first.

    With several sections: the best of every section, then the second of every section, and so on,
    so that the units of a rank stay or leave together. See `Group.sections`.
    """
    ranked = torch.argsort(scores.reshape(sections, -1), dim=1, descending=True, stable=True)
    first = torch.arange(sections, device=scores.device) * ranked.shape[1]
    return (ranked + first[:, None]).T.flatten()


def top_units(scores: Float[Tensor, " width"], keep: int, sections: int = 1) -> tuple[int, ...]:
    """Sorted indices of the `keep` units with the highest scores, the same number per section."""
    return tuple(sorted(unit_order(scores, sections)[:keep].tolist()))


def unit_entries(units: Int[Tensor, " kept"], size: int) -> Int[Tensor, " entries"]:
    """Indices of the rows or columns that `units` own, `size` each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def plan_from_counts(
    groups: Sequence[Group],
    counts: Sequence[Any],
    scores: Scores,
    *,
    preference: tuple[float, float, float] | None = None,
    scorer: str | None = None,
    notes: Mapping[str, object] | None = None,
    left_whole: Sequence[LeftWhole] = (),
) -> PruningPlan:
    """The plan that keeps, in every group, as many units as `counts` says: those with the highest
    scores.

    Arguments by keyword become attributes of the plan.

    Raises:
        PlanError: there is no count for a group, or one that is not a whole number from 0 (the
            block is dropped) to its width, or that its sections cannot share equally, or with which
            its block does not work; scores are
            missing for a group, have another length than its width, or are not finite.
    """
    check_scores(groups, scores)
    keep_counts = _checked_counts(groups, counts)
    return PruningPlan(
        groups=tuple(
            PlanGroup(
                tower=g.tower,
                layer=g.layer,
                kind=g.kind,
                width=g.width,
                kept=top_units(scores[g.name], k, g.sections),
                unit_parameters=g.unit_parameters,
                sections=g.sections,
            )
            for g, k in zip(groups, keep_counts, strict=True)
        ),
        preference=preference,
        scorer=scorer,
        notes=dict(notes or {}),
        left_whole=tuple(left_whole),
    )


def _checked_counts(groups: Sequence[Group], counts: Sequence[Any]) -> list[int]:
    """The keep counts as ints, whatever type of number they came in."""
    if len(counts) != len(groups):
        raise PlanError(f"There are {len(groups)} groups and {len(counts)} keep counts.")
    checked = []
    for g, given in zip(groups, counts, strict=True):
        keep = whole(given)
        # A slice would take what is out of range for all units, or for all but a few.
        if keep is None or not 0 <= keep <= g.width:
            raise PlanError(
                f"{g.name} cannot keep {given!r} of {g.width} units: a whole number from 0 to "
                f"{g.width} is needed."
            )
        if keep % g.sections:
            raise PlanError(
                f"{g.name} cannot keep {keep} of {g.width} units: its {g.sections} sections keep "
                f"the same number each, so a multiple of {g.sections} is needed."
            )
        if 0 < keep < g.least:
            raise PlanError(
                f"{g.name} cannot keep {keep} of {g.width} units: it needs {g.least} or none."
            )
        checked.append(keep)
    return checked


def check_scores(groups: Sequence[Group], scores: Scores) -> None:
    """Raise PlanError unless there is one finite score per unit of every group."""
    for g in groups:
        if g.name not in scores:
            raise PlanError(f"No scores for {g.name}; there are scores for {sorted(scores)}.")
        if scores[g.name].shape != (g.width,):
            raise PlanError(
                f"{g.name} has {g.width} units and scores of shape {tuple(scores[g.name].shape)}."
            )
        if not torch.isfinite(scores[g.name]).all():
            raise PlanError(f"The scores of {g.name} hold NaN or infinity.")


def keep_masks(plan: PruningPlan) -> KeepMasks:
    """Group name -> boolean mask over its units, True = keep."""
    masks = {}
    for g in plan.groups:
        masks[g.name] = torch.zeros(g.width, dtype=torch.bool)
        masks[g.name][list(g.kept)] = True
    return masks
