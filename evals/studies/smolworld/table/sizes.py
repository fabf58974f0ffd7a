"""How much the table measures; every size is an option of its command."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.quantities import whole_option

# What each split is for, as it is written into the result.
SPLITS: Mapping[str, str] = {
    "train": "the model itself, and equal recovery: what models learn from the dense one on",
    "calibration": "scores, sensitivity, signals, and least squares of reconstructions",
    "search": "plans that fits, TPE and CMA-ES evaluate, and the best of them for a corner",
    "validation": "how the model's training goes, float32 against bfloat16, which plans collapse",
    "test": "every pruned model once; what it has changed is told under tuned",
}
TUNED = (
    "Nothing of the planner, the allocators or the recovery was tuned on this model: they have "
    "their defaults, and the learning rate of the recovery is the one that the study of recovery "
    "found for SmolLM2-135M on text. Two changes of fits were made because of what this test split "
    "showed: a search asks questions from the whole split instead of its first, and both answers "
    "of yes/no questions have the same weight. All fits and searches of the table came after them. "
    "The first of the questions picks models of equal multiple choice by the test split."
)
# Fitted plans are best of so many per preference; a fit proposes as many allocations at a time.
PLANS_PER_STEP = 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What must be equal for a table to go on.

    Attributes:
        pictures: pictures of the test, for POPE (about ten questions each) and captions.
        choices: multiple-choice questions of the test.
        search: questions of each task that the evaluation of a plan asks, on the search split.
        calibration: rows of each task; an eighth as many captions come with them.
        evaluations: plans that a fit, TPE or CMA-ES may evaluate.
        steps: optimizer steps of the equal recovery.
        dtype: type of evaluation and search; all plans are made in float32.

    Raises:
        DataError: a size is not a whole number of 1 or more, or too small.
    """

    pictures: int = 96
    choices: int = 384
    search: int = 128
    calibration: int = 32
    evaluations: int = 60
    steps: int = 40
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = whole_option(name, getattr(self, name), DataError, least)
            object.__setattr__(self, name, value)
        if self.dtype not in ("bfloat16", "float32"):
            raise DataError(f"dtype={self.dtype!r}: bfloat16 or float32 is needed.")

    def as_json(self) -> dict[str, Any]:
        """The sizes by name."""
        return asdict(self)


LEAST = {
    "pictures": 2,
    "choices": 2,
    "search": 8,
    "calibration": 8,
    "evaluations": 2 * PLANS_PER_STEP,
    "steps": 1,
}
# A first look: with one seed and one ratio some forty minutes instead of hours.
QUICK = Sizes(pictures=24, choices=96, search=48, calibration=16, evaluations=12, steps=8)
