"""What the study needs to know of a model and its data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hipp_ext.evals.studies.recovery.cells import Arm, Cell, Start

Measured = dict[str, list[float]]  # measure -> value of each item of the test


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is run.

    Attributes:
        seeds: pruning_ratio -> number of seeds. The search is at the first one.
        lrs: arm -> learning rates that its search tries; of one alone there is no search. Arms
            that are only in `extra` may have none: they take that of distillation.
        steps, search_steps: steps of a cell, and of one of the search.
        step_seconds: about what a step takes on two cores, for the estimate.
        shared_minutes: about what is needed once takes, such as what the teacher says.
        extra: cells of other arms, beside those of every arm of `lrs` that has none here.
    """

    seeds: Mapping[float, int]
    lrs: Mapping[str, Sequence[float]]
    steps: int
    search_steps: int
    step_seconds: float
    shared_minutes: float
    extra: Sequence[Cell] = ()

    def cells(self) -> list[Cell]:
        """All cells, those of one seed after those of another: a short run is a whole picture."""
        apart = {cell.arm for cell in self.extra}
        cells = [
            Cell(ratio=ratio, arm=arm, seed=seed)
            for seed in range(max(self.seeds.values()))
            for ratio, seeds in self.seeds.items()
            for arm in self.lrs
            if seed < seeds and arm not in apart
        ]
        return [*cells, *self.extra]


class Task(Protocol):
    """A model, dense and pruned, what it learns from, and what is measured of it.

    Attributes:
        name: name in tables, and of its folder.
        design: what is run.
        what: a sentence on the measures and the data, for RESULTS.md.
    """

    name: str
    what: str
    design: Design

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a study to go on, as JSON values."""
        ...

    def dense(self) -> Any:
        """The dense model."""
        ...

    def pruned(self, ratio: float, start: Start) -> Any:
        """A pruned model, before its recovery."""
        ...

    def recovered(
        self, ratio: float, arm: Arm, *, lr: float, steps: int, seed: int, folder: Path
    ) -> tuple[Any, dict[str, Any]]:
        """A pruned model after its recovery, which has its checkpoints in `folder`; and what else
        is to be told of it.
        """
        ...

    def validate(self, model: Any) -> float:
        """What the search minimises, on the validation data."""
        ...

    def measure(self, model: Any) -> Measured:
        """The value of each item of the test, by measure."""
        ...

    def clusters(self) -> dict[str, list[str]]:
        """Measure -> the cluster of each item of the test; errors are taken over clusters."""
        ...
