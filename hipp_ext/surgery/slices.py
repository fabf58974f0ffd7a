"""Many plans on one model, fast: units are sorted once, then every plan is a set of slices."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from hipp_ext.errors import PlanError
from hipp_ext.groups import Group, check_sliceable, sync_sizes
from hipp_ext.kinds.slices import Change, Slice, change_units, chosen_units, first_units, tensor_in
from hipp_ext.surgery.drop import replace_modules, skip_modules
from hipp_ext.units import check_scores, unit_order
from hipp_ext.verification import verify_groups

Shrink = Callable[[Sequence[int]], None]


@contextlib.contextmanager
def sliced(
    model: nn.Module, groups: Sequence[Group], scores: Mapping[str, Tensor]
) -> Iterator[Shrink]:
    """Inside the block, `shrink(keep_counts)` makes `model` compute as if pruned, as often as
    needed.

    On entry the units of every group are sorted in place, best first, so the units that any plan
    keeps are the first ones: a plan is a view of each weight, no number is copied, and a forward
    costs what the pruned model's costs. (Of query heads the first ones of every section stay, of
    fused projections those of every part: such weights are copied for every plan.) On exit,
    whatever happened inside, weights and sizes are what they were, to the bit. No second copy of
    other weights is needed.

    Outputs equal those of `prune(model, plan_from_counts(groups, keep_counts, scores))` up to the
    order of summation. Not for training, and not for a static cache: the model's config goes on
    naming the dense widths.

    Args:
        model: with plain floating-point linear layers.
        groups: the groups that shrink; others stay whole.
        scores: group name -> score per unit.

    Raises:
        PlanError: scores that do not fit, or keep counts outside 0..width, or that sections of a
            group cannot share.
        UnsupportedModelError: a layer is quantised, adapted, or shares its weight, or see
            `verify_groups`. Nothing was changed.
    """
    check_scores(groups, scores)
    check_sliceable(model, groups)
    verify_groups(model, groups)
    weights = [_Weight(model, group, part) for group in groups for part in group.cuts]
    orders = {g.name: _section_by_section(scores[g.name], g.sections) for g in groups}
    skips = {g.name: skip_modules(model, [g]) for g in groups}
    dropped: dict[str, nn.Module] = {}  # what stood where a skip stands now

    def restore_blocks() -> None:
        replace_modules(model, dropped)
        dropped.clear()

    def shrink(keep_counts: Sequence[int]) -> None:
        if len(keep_counts) != len(groups) or any(
            not (0 if g.droppable else g.least) <= k <= g.width or k % g.sections or 0 < k < g.least
            for k, g in zip(keep_counts, groups, strict=True)
        ):
            sizes = [
                f"{g.sections} x " * (g.sections > 1)
                + f"{g.width // g.sections}"
                + f", {g.least} at least" * (g.least > g.sections)
                for g in groups
            ]
            raise PlanError(
                f"Keep counts {list(keep_counts)} do not fit groups of [{', '.join(sizes)}] units."
            )
        restore_blocks()
        keep = {g: k or g.width for g, k in zip(groups, keep_counts, strict=True)}
        for weight in weights:
            weight.show(keep[weight.group])
        for group, width in keep.items():
            sync_sizes(model, group, width)
        for group, count in zip(groups, keep_counts, strict=True):
            if count == 0:
                dropped.update(replace_modules(model, skips[group.name]))

    begun: list[_Weight] = []
    try:
        for weight in weights:
            begun.append(weight)
            weight.sort(orders[weight.group.name])
        yield shrink
    finally:
        restore_blocks()
        for weight in begun:
            weight.restore(orders[weight.group.name])
        for group in groups:
            sync_sizes(model, group, group.width)


def _section_by_section(scores: Tensor, sections: int) -> Tensor:
    """The order of the units, best first within each section."""
    return unit_order(scores, sections).view(-1, sections).T.flatten()


class _Weight:
    """One parameter that units of a group own parts of."""

    def __init__(self, model: nn.Module, group: Group, slices: Sequence[Slice]):
        self.group, self.slices = group, slices
        self.parameter = tensor_in(model, slices[0].parameter)
        self.dense = self.parameter.data  # the whole weight: as it came, sorted, as it came
        self.sorted = False

    def sort(self, order: Tensor) -> None:
        # One assignment after the work is done: interrupted before it, the weight is still the old.
        self.dense, self.sorted = self._permuted(order), True
        self.parameter.data = self.dense

    def show(self, keep: int) -> None:
        self.parameter.data = self._changed(first_units(keep, self.group.sections))

    def restore(self, order: Tensor) -> None:
        if self.sorted:
            self.dense, self.sorted = self._permuted(order.argsort()), False
        self.parameter.data = self.dense

    def _permuted(self, order: Tensor) -> Tensor:
        return self._changed(chosen_units(order))

    def _changed(self, change: Change) -> Tensor:
        return change_units(self.dense, self.slices, self.group.width, change)
