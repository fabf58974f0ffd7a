"""The model, its questions by split, and what is measured of it once for all cells."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hipp_ext import load_pruned
from hipp_ext.calibration import Calibration, find_processor
from hipp_ext.errors import DataError
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.questions import drawn
from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.quiz import CHOICE, POPE, questions
from hipp_ext.evals.studies.smolworld.scenes import World
from hipp_ext.evals.studies.smolworld.table.asked import Asked, Paper
from hipp_ext.evals.studies.smolworld.table.examining import TOGETHER, Examiner
from hipp_ext.evals.studies.smolworld.table.rates import Values, changed
from hipp_ext.evals.studies.smolworld.table.rows import calibration_rows
from hipp_ext.evals.studies.smolworld.table.sizes import Sizes
from hipp_ext.files import write_atomic
from hipp_ext.groups import find_groups
from hipp_ext.planner import Signals
from hipp_ext.planner.signal_cache import cached_signals
from hipp_ext.planner.state import model_digest
from hipp_ext.sensitivity.efforts import Effort


class Bench:
    """What all cells share.

    Args:
        model: folder of a trained model.
        world: the world that it was trained on.
        sizes: how much is measured.
        folder: folder for signals, which are measured once.
        log: called with a line before each measurement.

    Attributes:
        dense: the model in float32, which plans are made for.
        processor: its processor.
    """

    def __init__(
        self, model: Path, world: World, sizes: Sizes, folder: Path, log: Callable[[str], None]
    ):
        self.world, self.sizes, self.folder, self.log = world, sizes, folder, log
        self.dense: Any = load_pruned(model, dtype=torch.float32)
        self.processor: Any = find_processor(self.dense)
        if self.processor is None:
            raise DataError(f"There is no processor in {model}, beside the model.")
        self.dtype = getattr(torch, sizes.dtype)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a table to go on."""
        return {
            "model": model_digest(self.dense, find_groups(self.dense)),
            "concepts": len(self.world.drawings.names),
            "packages": packages.digest(),
            "sizes": self.sizes.as_json(),
        }

    def fast(self, model: Any) -> Any:
        """A copy of a model in the type that models are evaluated in, or itself."""
        return model if model.dtype == self.dtype else copy.deepcopy(model).to(self.dtype)

    @functools.cached_property
    def quick(self) -> Any:
        """The dense model as it is evaluated."""
        return self.fast(self.dense)

    @functools.cached_property
    def calibration(self) -> Calibration:
        """Rows of the calibration split by task, with their answers."""
        return calibration_rows(self.world, self.processor, self.sizes.calibration)

    @functools.cache  # noqa: B019 (a bench lives as long as its process)
    def signals(self, effort: Effort) -> Signals:
        """Scores, sensitivity and further signals of the dense model, kept in the folder."""
        groups = find_groups(self.dense)
        return cached_signals(
            self.dense,
            self.calibration,
            self.folder / "signals",
            groups=groups,
            effort=effort,
            log=self.log,
            progress=True,
        )

    @functools.cached_property
    def quick_signals(self) -> Signals:
        """The anchored signals for `quick`: the same weights, rounded."""
        known = self.signals("anchored")
        digest = model_digest(self.quick, known.groups)
        return dataclasses.replace(known, digest=digest)

    @functools.cached_property
    def search(self) -> Evaluator:
        """What fits, TPE and CMA-ES evaluate plans with."""
        return self._evaluator("search", self.sizes.search)

    @functools.cached_property
    def validation(self) -> Evaluator:
        """What plans of the question on synaptic flow are evaluated with."""
        return self._evaluator("validation", self.sizes.search // 2)

    def _evaluator(self, split: str, n: int) -> Evaluator:
        """On `n` questions of each task, about as many pictures as the split has."""
        asked = (drawn(questions(self.world, task, split), n) for task in (POPE, CHOICE))
        return Evaluator(self.quick, self.processor, *asked, batch_size=TOGETHER)

    @functools.cached_property
    def test(self) -> Paper:
        """The questions of the test split."""
        return Paper.of(self.world, "test", self.sizes.pictures, self.sizes.choices)

    @functools.cached_property
    def asked(self) -> Asked:
        """The truth of `test`, kept in the folder."""
        file = self.folder / "asked.json"
        if not file.exists():
            truth = self.test.asked(self.world.drawings.names)
            write_atomic(file, json.dumps(truth.to_json()))
        return Asked.from_json(json.loads(file.read_text()))

    @functools.cached_property
    def _examiner(self) -> Examiner:
        return Examiner(self.quick, self.processor, self.test)

    def examine(self, model: Any, *, anew: bool = False, processor: Any = None) -> Values:
        """A model's answers to the test.

        Args:
            model: pruned from the dense one; it is evaluated in another type.
            anew: more than its language tower was changed.
            processor: its processor, if that is another one.
        """
        own = self.fast(model)
        asks = Examiner(own, processor or self.processor, self.test) if anew else self._examiner
        return asks(own)

    def precision(self) -> dict[str, Any]:
        """What the narrow type changes of the dense model's answers, on the validation split."""
        if self.dtype == torch.float32:
            return {"dtype": "float32"}
        paper = Paper.of(self.world, "validation", max(8, self.sizes.pictures // 4), 64)
        wide, narrow = (
            Examiner(model, self.processor, paper)(model) for model in (self.dense, self.quick)
        )
        change = changed(paper.asked(self.world.drawings.names), wide, narrow)
        return {"dtype": self.sizes.dtype, **change}
