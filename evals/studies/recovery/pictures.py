"""The testbed's model, pruned by the plans of the planner, on pictures and questions."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipp_ext import HiPPPlanner, Preference, PruningPlan, load_pruned, prune, save_pruned, testbed
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.pope import SPLITS
from hipp_ext.evals.studies.recovery.cells import BASE, LABELS, Arm, Cell, Start
from hipp_ext.evals.studies.recovery.task import Design, Measured
from hipp_ext.files.sealed import unseal
from hipp_ext.recover import RecoverSettings, TestbedData, recover

PREFERENCE = (0.4, 0.4, 0.2)
POPE, CHOICE = "POPE", "ScienceQA"
MUON = 10  # Muon's learning rate over AdamW's
PROCESSES = ("LQ-SGD", "all-reduce")
DESIGN = Design(
    seeds={0.6: 3, 0.4: 3},
    lrs={name: (1e-3, 3e-3) for name in (BASE, LABELS)} | {name: (1e-3,) for name in PROCESSES},
    steps=150,
    search_steps=75,
    step_seconds=1.0,
    shared_minutes=2,
    extra=[
        *(Cell(ratio=ratio, arm="no reconstruction", seed=0) for ratio in (0.6, 0.4)),
        *(Cell(ratio=0.4, arm=name, seed=0) for name in PROCESSES),
        *(
            Cell(ratio=ratio, arm="teacher and labels", seed=seed)
            for ratio in (0.6, 0.4)
            for seed in range(3)
        ),
    ],
)


def pruning_plan(model: Any, processor: Any, ratio: float = 0.4) -> PruningPlan:
    """The untrained planner's plan for PREFERENCE."""
    return HiPPPlanner(Preference(*PREFERENCE), pruning_ratio=ratio).plan(
        model, processor=processor
    )


class Testbed:
    """See `Task`. Items are the test's questions, their values 100 for a correct answer, else 0.

    A POPE question that belongs to several splits counts once for each, as in VLMEvalKit.

    Args:
        design: what is run.
        questions: most questions of each task and split; None: all.
        make_plan: model, processor and pruning_ratio -> a plan.
    """

    __test__ = False  # pytest would collect the class
    name = "testbed"
    what = "Accuracy on the test split in percent; errors are clustered by picture."

    def __init__(
        self,
        *,
        design: Design = DESIGN,
        questions: int | None = None,
        make_plan: Callable[[Any, Any, float], PruningPlan] = pruning_plan,
    ):
        self.design, self._most = design, questions
        self._make_plan = make_plan
        self._plans: dict[float, PruningPlan] = {}
        self._model, self._processor = testbed.load()
        self._asked = {
            split: [testbed.questions(task, split, questions) for task in (POPE, CHOICE)]
            for split in ("validation", "test")
        }

    @property
    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return {"preference": PREFERENCE, "questions": self._most}

    def dense(self) -> Any:
        """See `Task`."""
        return self._model

    def pruned(self, ratio: float, start: Start) -> Any:
        """See `Task`: the model pruned by the plan of `make_plan`."""
        if ratio not in self._plans:
            self._plans[ratio] = self._make_plan(self._model, self._processor, ratio)
        plan = self._plans[ratio]
        reconstruct = start == "reconstructed"
        return prune(self._model, plan, reconstruct=reconstruct, processor=self._processor)

    def recovered(
        self, ratio: float, arm: Arm, *, lr: float, steps: int, seed: int, folder: Path
    ) -> tuple[Any, dict[str, Any]]:
        """See `Task`: of two processes also the bytes that the first one sent."""
        model = self.pruned(ratio, arm.start)
        if arm.compression is not None:
            return self._by_two(model, arm.compression, lr, steps, seed, folder)
        settings = RecoverSettings(
            steps=steps,
            lr=lr,
            muon_lr=MUON * lr,
            train=arm.train,
            cross_entropy_share=arm.labels,
            seed=seed,
        )
        teacher = self._model if arm.teacher else None
        recover(model, TestbedData(self._processor, seed), settings, folder=folder, teacher=teacher)
        return model, {}

    def _by_two(
        self, model: Any, compression: str, lr: float, steps: int, seed: int, folder: Path
    ) -> tuple[Any, dict[str, Any]]:
        """The model after `hipp recover` on two processes, as a user starts it."""
        before, after = folder / "pruned", folder / "recovered"
        if not before.exists():
            save_pruned(model, before, self._processor)
        if not after.exists():
            launch = "-m torch.distributed.run --standalone --nproc-per-node=2 -m hipp_ext recover"
            chosen = f"--steps {steps} --lr {lr} --muon-lr {MUON * lr} --seed {seed}"
            command = [sys.executable, *launch.split(), str(before), "-o", str(after)]
            command += [*chosen.split(), "--compression", compression]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        sent = _bytes(folder / "recovered.recover") if compression == "lqsgd" else {}
        return load_pruned(after), sent

    def validate(self, model: Any) -> float:
        """See `Task`: minus the mean margin of both tasks."""
        scores = self._validation.scores(model)
        return -(scores["pope"].margin + scores["choice"].margin) / 2

    def measure(self, model: Any) -> Measured:
        """See `Task`."""
        scores = self._test.scores(model)
        answers = (scores["pope"].answers, scores["choice"].answers)
        return self._by_split(
            *(
                [100.0 * (a == q.answer) for a, q in zip(given, asked, strict=True)]
                for given, asked in zip(answers, self._asked["test"], strict=True)
            )
        )

    def clusters(self) -> dict[str, list[str]]:
        """See `Task`: the pictures; a question without one is a cluster of its own."""
        return self._by_split(
            *(
                [q.picture or f"question {i}" for i, q in enumerate(asked)]
                for asked in self._asked["test"]
            )
        )

    def _by_split(self, pope: list[Any], choice: list[Any]) -> dict[str, list[Any]]:
        """The values of POPE's questions, all and by split, and those of the other task."""
        kinds = [question.category.split(",") for question in self._asked["test"][0]]
        pairs = [(s, v) for own, v in zip(kinds, pope, strict=True) for s in own]
        parts = {f"{POPE} {split}": [v for s, v in pairs if s == split] for split in SPLITS}
        return {POPE: [v for _, v in pairs], **parts, CHOICE: choice}

    def _evaluator(self, split: str) -> Evaluator:
        """A recovery changes the vision tower too, so pictures are embedded at every call."""
        towers = ("language", "vision")
        return Evaluator(self._model, self._processor, *self._asked[split], towers=towers)

    @functools.cached_property
    def _test(self) -> Evaluator:
        return self._evaluator("test")

    @functools.cached_property
    def _validation(self) -> Evaluator:
        return self._evaluator("validation")


def _bytes(checkpoints: Path) -> dict[str, int]:
    """Bytes that rank 0 sent, and that fp32 all-reduce would have sent."""
    file = next(checkpoints.glob("step-*/lqsgd.rank0.safetensors"))
    counts = unseal(file)[1]["counts"]
    return {"bytes": counts["bytes_sent"], "fp32_bytes": counts["dense_bytes"]}
