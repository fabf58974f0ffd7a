"""Which models the questions need; those that the table measured are not measured again."""

from collections.abc import Mapping, Sequence

from hipp_ext.evals.studies.smolworld.table.cells import CHIEF, CORNERS, RATIOS, Cell
from hipp_ext.evals.studies.smolworld.table.methods import (
    ANCHORED,
    FISHER,
    FITTED,
    FLAP_ADAPTIVE,
    OWL_LEVELS,
    SIGNAL_SHUFFLED,
    UNIFORM,
    UNTRAINED,
    VISUAL,
    VISUAL_SHUFFLED,
)

WIDELY = (UNIFORM, FLAP_ADAPTIVE, ANCHORED)  # methods of question a
HALVED = (UNIFORM, ANCHORED)  # of question f
QUANTISED = (UNIFORM, FLAP_ADAPTIVE, OWL_LEVELS, FISHER, ANCHORED, UNTRAINED)  # of question g
HALF, W8A8 = "half of the picture", "W8A8"


def plain(method: str, **chosen: object) -> Cell:
    """A cell at the chief ratio."""
    return Cell(**{"method": method, "ratio": CHIEF, **chosen})  # type: ignore[arg-type]


def seeded(method: str, corner: str, seeds: int) -> list[Cell]:
    """The fits of a corner at the chief ratio."""
    return [plain(method, corner=corner, seed=seed) for seed in range(seeds)]


def needed(seeds: int, ratios: Sequence[float] = RATIOS) -> Mapping[str, Sequence[Cell]]:
    """Letter of the question -> its cells; all of them need the dense model, too.

    Args:
        seeds: number of fits of a corner.
        ratios: of question a.
    """
    fits = [cell for corner in CORNERS for cell in seeded(FITTED, corner, seeds)]
    untrained = [plain(UNTRAINED, corner=corner) for corner in CORNERS]
    reconstructed = [plain(m, repair="reconstruct") for m in dict.fromkeys((*HALVED, *QUANTISED))]
    return {
        "a": [
            Cell(method=method, ratio=ratio, repair=repair)
            for repair in ("none", "reconstruct")
            for method in WIDELY
            for ratio in ratios
        ],
        "b": [c for c in (*untrained, *fits) if c.corner != "middle"],
        "c": [
            *(plain(method) for method in (UNIFORM, VISUAL, VISUAL_SHUFFLED)),
            *seeded(FITTED, "robustness", seeds),
            *seeded(SIGNAL_SHUFFLED, "robustness", seeds),
        ],
        "d": [],
        "e": [*untrained, *fits],
        "f": [
            Cell(variant=HALF),
            *(c for c in reconstructed if c.method in HALVED),
            *(plain(m, repair="reconstruct", variant=HALF) for m in HALVED),
        ],
        "g": [
            Cell(variant=W8A8),
            *(c for c in reconstructed if c.method in QUANTISED),
            *(plain(m, repair="reconstruct", variant=W8A8) for m in QUANTISED),
        ],
    }
