"""The cells of the table: which model each is, and which of them are run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hipp_ext.budget import check_ratio
from hipp_ext.errors import DataError
from hipp_ext.evals.studies.smolworld.table.methods import IN_TABLE, METHODS
from hipp_ext.preference import Preference

Corner = Literal["middle", "utility", "robustness"]
Repair = Literal["none", "reconstruct", "distil"]
Variant = Literal["plain", "half of the picture", "W8A8"]
REPAIRS: tuple[Repair, ...] = get_args(Repair)
CORNERS: Mapping[Corner, Preference] = {
    "middle": Preference(0.5, 0.5, 0),
    "utility": Preference(1, 0, 0),
    "robustness": Preference(0, 1, 0),
}
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
CHIEF = 0.3  # the ratio of fits and of the equal recovery
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to measure.

    Attributes:
        method: key of METHODS, or "dense".
        ratio: pruning_ratio.
        corner: which preference the plan is for; methods without one have "middle".
        repair: "none", "reconstruct" (least squares) or "distil" (equal recovery after that).
        seed: seed of a fit or search; methods that do not search have 0.
        variant: what else is done to the model: only half of the picture's tokens are kept, or the
            language tower is quantised.
    """

    method: str = DENSE
    ratio: float = 0.0
    corner: Corner = "middle"
    repair: Repair = "none"
    seed: int = 0
    variant: Variant = "plain"

    @property
    def title(self) -> str:
        """What stands in messages."""
        parts = [self.method, *([self.corner] if self.corner != "middle" else [])]
        parts += [f"{self.ratio:.0%}"] if self.method != DENSE else []
        parts += [x for x in (self.repair, self.variant) if x not in ("none", "plain")]
        return ", ".join([*parts, *([f"seed {self.seed}"] if self.seed else [])])

    @property
    def name(self) -> str:
        """Name of its file."""
        return slug(f"{self.title}-{100 * self.ratio:g}")

    @property
    def plan_name(self) -> str:
        """Name of the file of its plan, which its repairs and variants share."""
        corner = "" if self.corner == "middle" else f"-{self.corner}"
        return slug(f"{self.method}{corner}-{100 * self.ratio:g}-{self.seed}")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which cells are run.

    Attributes:
        methods, repairs: empty: all of the table.
        ratios: of methods that do not search.
        fit_ratios: of those that do.
        seeds: number of seeds of a search.

    Raises:
        DataError: a method or repair is unknown.
        BudgetError: a ratio is outside [0, 1).
    """

    methods: Sequence[str] = ()
    ratios: Sequence[float] = RATIOS
    fit_ratios: Sequence[float] = (CHIEF,)
    repairs: Sequence[str] = ()
    seeds: int = 2

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(IN_TABLE):
            raise DataError(f"No method is called {sorted(unknown)}; there are {list(IN_TABLE)}.")
        if unknown := set(self.repairs) - set(REPAIRS):
            raise DataError(f"No repair is called {sorted(unknown)}; there are {list(REPAIRS)}.")
        for ratio in (*self.ratios, *self.fit_ratios):
            check_ratio(ratio)
            if not ratio:
                raise DataError("A ratio of 0 is the dense model, which is always measured.")
        if len(self.cells()) == 1:
            raise DataError(
                f"No model is left to measure: {self}. Equal recovery is measured at "
                f"{CHIEF:.0%} alone, the best evaluated plan without repairs alone, and whole "
                "layers are not reconstructed."
            )

    def cells(self) -> list[Cell]:
        """The dense model, and the cells in an order in which a short run is a whole picture."""
        repairs = self.repairs or REPAIRS
        chosen = self.methods or IN_TABLE
        cells = [c for name in chosen for c in self._of(name) if c.repair in repairs]

        def order(cell: Cell) -> Any:
            return cell.seed, REPAIRS.index(cell.repair), cell.ratio != CHIEF

        return [Cell(), *sorted(dict.fromkeys(cells), key=order)]

    def _of(self, name: str) -> Iterator[Cell]:
        method = METHODS[name]
        ratios = self.fit_ratios if method.searches else self.ratios
        for ratio in ratios:
            for repair in method.repairs:
                if repair == "distil" and ratio != CHIEF:
                    continue
                yield Cell(method=name, ratio=ratio, repair=repair)
        for ratio in self.fit_ratios if method.steered else ():
            for seed in range(self.seeds if method.searches else 1):
                for corner in CORNERS:
                    yield Cell(method=name, ratio=ratio, corner=corner, seed=seed)


def slug(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)
