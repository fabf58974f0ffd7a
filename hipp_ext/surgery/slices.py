"""Many plans on one model, fast: units are sorted once, then every plan is a set of slices of the same weights."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hipp_ext.errors import PlanError
from hipp_ext.groups import Group, sync_sizes
from hipp_ext.surgery.prune import group_parameters, shared_parameters
from hipp_ext.units import check_scores, take_units, unit_order

Shrink = Callable[[Sequence[int]], None]


@contextlib.contextmanager
def sliced(
    model: nn.Module, groups: Sequence[Group], scores: Mapping[str, Tensor]
) -> Iterator[Shrink]:
    """Inside the block, `shrink(counts)` makes `model` compute as if pruned to those keep counts; as often as you like.

    On entry the units of every group are sorted in place, best first, so the units that any plan keeps are the first
    ones: a plan is a view of each weight, no number is copied, and a forward costs what the pruned model's costs. On
    exit, whatever happened inside, weights and sizes are what they were, to the bit. Needs no second copy of the weights.

    Outputs equal those of `prune(model, plan_from_counts(groups, counts, scores))` up to the order of summation. Not for
    training, and not for a static cache: the model's config goes on naming the dense widths.

    Args:
        model: with plain floating-point linear layers.
        groups: the ones that shrink; others stay whole.
        scores: group name -> score per unit.

    Raises:
        PlanError: scores that do not fit, or counts outside 1..width.
        UnsupportedModelError: a layer is quantised, adapted, or shares its weight. Nothing was changed.
    """
    check_scores(groups, scores)
    shared = shared_parameters(model)
    slots = [
        _Slot(group, model.get_parameter(name), size, dim)
        for group in groups
        for name, size, dim in group_parameters(model, group, shared)
    ]
    orders = {g.name: unit_order(scores[g.name]) for g in groups}
    widths = [g.width for g in groups]

    def shrink(counts: Sequence[int]) -> None:
        if len(counts) != len(groups) or any(
            not 1 <= k <= w for k, w in zip(counts, widths, strict=True)
        ):
            raise PlanError(f"Keep counts {list(counts)} do not fit groups of {widths} units.")
        keep = {g.name: k for g, k in zip(groups, counts, strict=True)}
        for slot in slots:
            slot.show(keep[slot.group.name])
        for group in groups:
            sync_sizes(model, group, keep[group.name])

    sorted_slots: list[_Slot] = []
    try:
        for slot in slots:
            sorted_slots.append(slot)
            slot.sort(orders[slot.group.name])
        yield shrink
    finally:
        for slot in sorted_slots:
            slot.restore(orders[slot.group.name])
        for group in groups:
            sync_sizes(model, group, group.width)


class _Slot:
    """One parameter of a group: `size` rows (dim 0) or columns (dim 1) belong to a unit."""

    def __init__(self, group: Group, parameter: Tensor, size: int, dim: int):
        self.group, self.parameter, self.size, self.dim = group, parameter, size, dim
        self.dense = parameter.data  # the whole weight: as it came, then sorted, then as it came
        self.sorted = False

    def sort(self, order: Tensor) -> None:
        # One assignment after the work is done: interrupted before it, the weight is still the old one.
        self.dense, self.sorted = self._permuted(order), True
        self.parameter.data = self.dense

    def show(self, keep: int) -> None:
        self.parameter.data = self.dense.narrow(self.dim, 0, keep * self.size)

    def restore(self, order: Tensor) -> None:
        if self.sorted:
            self.dense, self.sorted = self._permuted(torch.argsort(order)), False
        self.parameter.data = self.dense

    def _permuted(self, order: Tensor) -> Tensor:
        return take_units(self.dense, order, self.size, self.dim)
