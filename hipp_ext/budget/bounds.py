"""Which keep counts the groups of a plan may have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from hipp_ext.errors import BudgetError
from hipp_ext.groups import Group
from hipp_ext.quantities import finite, whole

MIN_KEEP = 0.1
Drop = Literal["none", "blocks", "layers"]
Shape = Literal["free", "uniform", "layers", "stock"]


class Part(NamedTuple):
    """Groups that keep equally many units, because one field of a configuration holds their width.

    Attributes:
        members: indices of the groups.
        counts: allowed keep counts, ascending.
    """

    members: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Which keep counts a group may have.

    Attributes:
        round_to: the input columns that stay are a multiple of this (kernels and quantisation
            groups prefer 64 or 128). A group that stays whole is always allowed. 1: no constraint.
        min_keep: least fraction of the units of a group that stays, in [0, 1]; at least one unit
            always stays, and of experts as many as a token is sent to. A mapping from group name to
            fraction sets it for single groups; the default applies to the others.
        max_keep: largest fraction of the units of a group that stays, in [min_keep, 1].
        drop: "blocks": a group may also keep nothing, then its attention or FFN block is dropped;
            "layers": only both blocks of a layer together; "none": no block is dropped. A tower
            always keeps one block, or layer, at least.
        shape: "free": every group has a count of its own. "uniform": all layers keep the same
            number of heads and the same FFN width; which units these are still differs by layer.
            "layers": whole layers go, and the others stay as they are; sets min_keep=1 and
            drop="layers". "stock": "uniform" or "layers", whichever loses less; it is for
            allocators that measure the loss, others take what is nearer to their allocation. Of all
            shapes but "free", stock `from_pretrained` loads the pruned model.
    """

    round_to: int = 1
    min_keep: float | Mapping[str, float] = MIN_KEEP
    max_keep: float = 1.0
    drop: Drop = "none"
    shape: Shape = "free"

    def __post_init__(self) -> None:
        multiple = whole(self.round_to)
        if multiple is None or not 1 <= multiple < 2**31:  # numpy counts in 64 bits
            raise BudgetError(f"round_to={self.round_to!r}: a whole number of 1 or more is needed.")
        # Plain numbers, because numpy's cannot be written as JSON.
        object.__setattr__(self, "round_to", multiple)
        object.__setattr__(self, "max_keep", _fraction("max_keep", self.max_keep))
        if isinstance(self.min_keep, Mapping):
            fractions = {n: _fraction("min_keep", f) for n, f in self.min_keep.items()}
            object.__setattr__(self, "min_keep", fractions)
            largest = max(fractions.values(), default=0.0)
        else:
            largest = _fraction("min_keep", self.min_keep)
            object.__setattr__(self, "min_keep", largest)
        if largest > self.max_keep:
            raise BudgetError(f"min_keep={self.min_keep} is larger than max_keep={self.max_keep}.")
        if self.drop not in get_args(Drop):
            raise BudgetError(f"drop={self.drop!r}: one of {get_args(Drop)} is needed.")
        if self.shape not in get_args(Shape):
            raise BudgetError(f"shape={self.shape!r}: one of {get_args(Shape)} is needed.")
        if self.shape == "layers":
            self._only_layers()
        elif self.shape != "free" and self.drop != "none":
            raise BudgetError(
                f"shape={self.shape!r} and drop={self.drop!r} exclude each other: only free shapes "
                "drop blocks or layers on request."
            )

    def _only_layers(self) -> None:
        """Set what shape="layers" stands for."""
        if self.drop == "blocks" or self.max_keep < 1 or self.min_keep not in (MIN_KEEP, 1.0):
            raise BudgetError(
                "shape='layers' drops whole layers and leaves the others as they are: omit drop, "
                "min_keep and max_keep."
            )
        object.__setattr__(self, "min_keep", 1.0)
        object.__setattr__(self, "drop", "layers")

    @property
    def alternatives(self) -> tuple["Bounds", ...]:
        """The bounds that a plan may choose among: one for each shape that "stock" stands for."""
        if self.shape != "stock":
            return (self,)
        return replace(self, shape="uniform"), Bounds(shape="layers")

    def uniform_parts(self, groups: Sequence[Group]) -> list[Part]:
        """The groups that keep equally many units, and how many these may be.

        Raises:
            BudgetError: the groups of a part differ, or no count is allowed.
        """
        (least, step), most = self.steps(groups), self.most(groups)
        keys = [(g.tower, g.kind) for g in groups]
        parts = []
        for key in dict.fromkeys(keys):
            members = np.array([i for i, k in enumerate(keys) if k == key])
            one, i = groups[members[0]], members[0]
            if any(groups[m].width != one.width for m in members):
                widths = sorted({groups[m].width for m in members})
                raise BudgetError(
                    f"shape={self.shape!r} needs layers of equal widths to begin with; the "
                    f"{one.kind} groups of the {one.tower} tower have {widths}."
                )
            low = max(least[m] for m in members)
            steps = range(low, most[i] + 1, step[i])
            common = steps if one.stock_counts is None else one.stock_counts
            counts = sorted({*steps, int(most[i])}.intersection({*common, one.width}))
            if not counts:
                raise BudgetError(
                    f"No keep count of the {one.kind} groups fits all layers alike: the "
                    f"configuration can name {list(common)}, and {low} to {most[i]} in steps of "
                    f"{step[i]} are allowed."
                )
            parts.append(Part(members, np.array(counts, dtype=np.int64)))
        return parts

    def steps(self, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
        """(least keep count that is no drop, units per step) of every group; see also `most`."""
        if isinstance(self.min_keep, Mapping) and (
            unknown := set(self.min_keep) - {g.name for g in groups}
        ):
            raise BudgetError(f"min_keep names groups that are not there: {sorted(unknown)}.")
        step = np.array([g.multiple(self.round_to) for g in groups], dtype=np.int64)
        fractions = [self._min_keep(g.name) for g in groups]
        least = _least(fractions, [g.width for g in groups], step)
        floors = np.array([g.least for g in groups], dtype=np.int64)
        floors = np.minimum(-(-floors // step) * step, [g.width for g in groups])
        return np.maximum(least, floors), step

    def most(self, groups: Sequence[Group]) -> np.ndarray:
        """Largest allowed keep count of every group."""
        least, step = self.steps(groups)
        return _most(self.max_keep, [g.width for g in groups], least, step)

    def smallest(self, groups: Sequence[Group]) -> np.ndarray:
        """Keep counts of the plan that removes most."""
        cost = np.array([g.unit_parameters for g in groups], dtype=np.int64)
        return min((b._smallest(groups) for b in self.alternatives), key=lambda c: int(cost @ c))

    def _smallest(self, groups: Sequence[Group]) -> np.ndarray:
        least, _ = self.steps(groups)
        if self.shape == "uniform":
            for members, counts in self.uniform_parts(groups):
                least[members] = counts[0]
            return least
        if self.drop == "none":
            return least
        parts = self.dropped_together(groups)
        cost = np.array([g.unit_parameters for g in groups], dtype=np.int64) * least
        smallest = np.zeros_like(least)
        for tower in {g.tower for g in groups}:
            rows = [r for r in parts if groups[int(np.argmax(r))].tower == tower]
            stays = np.array([g.tower == tower for g in groups]) & ~parts.any(0)
            if not stays.any():
                stays = min(rows, key=lambda row: int(cost[row].sum()))
            smallest[stays] = least[stays]
        return smallest

    def of_widths(self, widths: Sequence[int]) -> tuple[list[int], list[int]]:
        """(least, most) keep counts of groups of these widths, whose units are single channels.

        Raises:
            BudgetError: `min_keep` is a mapping, and widths have no names.
        """
        if isinstance(self.min_keep, Mapping):
            raise BudgetError(
                f"min_keep={self.min_keep!r}: one number for all groups is needed here."
            )
        step = np.full(len(widths), self.round_to, dtype=np.int64)
        least = _least([self.min_keep] * len(widths), widths, step)
        return least.tolist(), _most(self.max_keep, widths, least, step).tolist()

    def allow(self, groups: Sequence[Group], counts: np.ndarray) -> np.ndarray:
        """Whether the keep counts of plans are allowed: (plans, groups) -> (plans,) bool."""
        return np.any([b._allow(groups, counts) for b in self.alternatives], axis=0)

    def _allow(self, groups: Sequence[Group], counts: np.ndarray) -> np.ndarray:
        if self.shape == "uniform":
            fits = [
                np.isin(counts[:, p.members[0]], p.counts)
                & (counts[:, p.members] == counts[:, p.members[:1]]).all(1)
                for p in self.uniform_parts(groups)
            ]
            return np.all(fits, axis=0)
        (least, step), most = self.steps(groups), self.most(groups)
        inside = (counts >= least) & (counts <= most)
        allowed = inside & ((counts == most) | ((counts - least) % step == 0))
        if self.drop == "none":
            return allowed.all(1)
        parts = self.dropped_together(groups)
        gone = (counts == 0) & parts.any(0)
        together = np.array([(gone[:, row].all(1) == gone[:, row].any(1)) for row in parts]).all(0)
        towers = [np.array([g.tower == t for g in groups]) for t in {g.tower for g in groups}]
        something = np.array([~gone[:, row].all(1) for row in towers]).all(0)
        return (allowed | gone).all(1) & together & something

    def dropped_together(self, groups: Sequence[Group]) -> np.ndarray:
        """(parts, groups) bool: which groups may be dropped, and which only together.

        With shape="layers" a layer that the configuration of the tower cannot leave out has none.
        """
        if self.drop == "blocks":
            return np.eye(len(groups), dtype=bool)[[g.droppable for g in groups]]
        layers = [(g.tower, g.layer) for g in groups]
        parts = np.array([[at == layer for at in layers] for layer in dict.fromkeys(layers)])
        parts = parts[(np.array([g.droppable for g in groups]) | ~parts).all(1)]
        if self.shape == "free":
            return parts
        goes = np.array([g.removable for g in groups])
        return parts[(goes | ~parts).all(1)]

    def _min_keep(self, name: str) -> float:
        if isinstance(self.min_keep, Mapping):
            return self.min_keep.get(name, MIN_KEEP)
        return self.min_keep


def _fraction(name: str, value: object) -> float:
    number = finite(value)
    if number is None or not 0 <= number <= 1:
        raise BudgetError(f"{name}={value!r}: a fraction between 0 and 1 is needed.")
    return number


def _least(fractions: Sequence[float], widths: Sequence[int], step: np.ndarray) -> np.ndarray:
    exact = np.array(fractions) * np.array(widths) - 1e-9
    floor = np.maximum(1, np.ceil(exact)).astype(np.int64)
    return np.minimum(-(-floor // step) * step, widths)


def _most(
    fraction: float, widths: Sequence[int], least: np.ndarray, step: np.ndarray
) -> np.ndarray:
    if fraction == 1:
        return np.array(widths, dtype=np.int64)
    whole_units = np.floor(fraction * np.array(widths) + 1e-9).astype(np.int64)
    return np.maximum(least, whole_units // step * step)
