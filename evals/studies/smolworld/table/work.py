"""About how much work cells are, for the estimate at the start and the time that is left.

Work is counted in tokens that pass the dense model once in the type of evaluation.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from hipp_ext.evals.studies.smolworld.conversations import PER_STEP
from hipp_ext.evals.studies.smolworld.table.cells import Cell, slug
from hipp_ext.evals.studies.smolworld.table.methods import METHODS
from hipp_ext.evals.studies.smolworld.table.sizes import Sizes
from hipp_ext.recover.teacher_files import HEADER

# Tokens of one row: what a picture and the words before a question are, and the question itself.
PICTURE, QUESTION, CHOICE, CAPTION, WRITTEN, LESSON = 40, 24, 45, 30, 28, 110
PER_PICTURE = 9.5  # questions of POPE
DECODING = 5.0  # a token that is written one after the other, in tokens of a prompt
WIDE = 2.5  # a token in float32
OFTEN, SCORING, FITTING = 18.0, 3.0, 4.0  # passes of anchored signals, of scores, of least squares
SOLVING = 35_000.0  # of least squares, whatever the calibration
LEARNING = 4.0  # passes of a training step
QUANTISED = 2.2  # times as slow is a model whose 8 bits are simulated
PRUNED = 0.75  # part of the model that becomes smaller with the pruning_ratio
# On two cores in bfloat16, of a model with PARAMETERS.
TOKENS_PER_SECOND, PARAMETERS = 1500.0, 140e6


class Work:
    """What cells cost.

    Args:
        sizes: how much is measured.
        has: whether a shared piece of work is done, by its name: "anchored", "TPE 0.3 1", ...
    """

    def __init__(self, sizes: Sizes, has: Callable[[str], bool]):
        self.sizes, self._has = sizes, has
        self._counted: set[str] = set()

    def of(self, cells: Iterable[Cell]) -> list[float]:
        """The tokens of each cell; what cells share is counted with the first of them."""
        self._counted.clear()
        return [self._shared(cell) + self._own(cell) for cell in cells]

    def _own(self, cell: Cell) -> float:
        s = self.sizes
        asked = s.pictures * (PICTURE + PER_PICTURE * QUESTION) + s.choices * (PICTURE + CHOICE)
        asked += s.pictures * (2 * (PICTURE + CAPTION) + WRITTEN * (1 + DECODING))
        tokens = asked * (1 - PRUNED * cell.ratio)
        tokens *= QUANTISED if cell.variant == "W8A8" else 1.0
        if cell.repair != "none":
            tokens += FITTING * WIDE * self._calibration + SOLVING
        if cell.repair == "distil":
            tokens += LEARNING * self._lessons
        return tokens

    def _shared(self, cell: Cell) -> float:
        tokens = self._once("precision", WIDE * self.sizes.pictures / 4 * 10 * (PICTURE + QUESTION))
        if cell.repair == "distil":
            tokens += self._once("teacher", WIDE * self._lessons)
        if cell.method not in METHODS:
            return tokens
        method = METHODS[cell.method]
        if method.effort is not None:
            passes = OFTEN if method.effort == "anchored" else SCORING
            tokens += self._once(method.effort, WIDE * (SCORING + passes) * self._calibration)
        if method.make is not None:
            tokens += self._once(cell.method, WIDE * SCORING * self._calibration)
        if method.searches:
            n = self.sizes.search
            one = n * (PICTURE + QUESTION) + n * (PICTURE + CHOICE)
            name = f"{method.search_name} {cell.ratio} {cell.seed}"
            tokens += self._once(name, self.sizes.evaluations * one * (1 - PRUNED * cell.ratio))
        return tokens

    def _once(self, name: str, tokens: float) -> float:
        if name in self._counted or self._has(name):
            return 0.0
        self._counted.add(name)
        return tokens

    @property
    def _calibration(self) -> float:
        return self.sizes.calibration * (2 * PICTURE + QUESTION + CHOICE + (PICTURE + CAPTION) / 4)

    @property
    def _lessons(self) -> float:
        return self.sizes.steps * sum(PER_STEP) * LESSON


def done(folder: Path, name: str) -> bool:
    """Whether a shared piece of work, by the name that `Work` gives it, is in a table's folder."""
    if name == "precision":
        return (folder / "precision.json").exists()
    if name == "teacher":
        return (folder / "teacher" / HEADER).exists()
    if name in ("anchored", "fisher"):
        # The name of a file is a digest: with one of two it is not known whose it is.
        return len(list((folder / "signals").glob("*.safetensors"))) > 1
    if name in METHODS:
        return any((folder / "plans").glob(f"{slug(name)}-*.json"))
    kind, ratio, seed = name.rsplit(" ", 2)
    return any((folder / "searches").glob(f"{kind}-{100 * float(ratio):g}-{seed}*"))
