"""SmolLM2-135M, pruned by the plans of the study of serving, on text."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipp_ext import load_pruned, prune
from hipp_ext.evals.studies.real_lm.text import row_losses
from hipp_ext.evals.studies.real_lm.text_rows import TextRows, labelled
from hipp_ext.evals.studies.recovery.cells import ARMS, Arm, Cell, Start
from hipp_ext.evals.studies.recovery.task import Design, Measured
from hipp_ext.evals.studies.recovery.text import RecoveryText
from hipp_ext.evals.studies.serving.versions import Version, make_versions, version_folders
from hipp_ext.recover import CachedTeacher, RecoverSettings, precompute, recover

BATCH = 4  # rows
TOP_K = 64
LOSS = "loss"
FULL, LORA = (2e-4, 5e-4), (1e-3, 3e-3)
DESIGN = Design(
    seeds={0.3: 3, 0.2: 1, 0.4: 1},
    lrs={
        name: LORA if arm.train == "lora" else FULL
        for name, arm in ARMS.items()
        if arm.compression is None
    },
    steps=100,
    search_steps=25,
    step_seconds=3.0,
    shared_minutes=15,
    extra=[Cell(ratio=0.3, arm=name, seed=0) for name in ("no reconstruction", "LoRA")],
)


class SmolLM2:
    """See `Task`. Items are the rows of the test, their values the loss [nats per token].

    Args:
        load: returns (dense model, tokenizer).
        folder: folder of the teacher's distributions, and of the pruned models.
        models: folder of models of the study of serving, or for them; None: in `folder`.
        make_text: tokenizer -> the text.
        design: what is run.
        batch: rows of a step.
    """

    name = "smollm2"
    what = "Perplexity on rows of Python's help topics that nothing was trained on."

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        folder: Path,
        *,
        models: Path | None = None,
        make_text: Callable[[Any], RecoveryText] = RecoveryText,
        design: Design = DESIGN,
        batch: int = BATCH,
    ):
        self.design, self.batch, self._folder = design, batch, folder
        self._dense, self._tokenizer = load()
        self._text = make_text(self._tokenizer)
        folders = version_folders(models or folder / "models")
        names = {r: Version(shape="free", ratio=r).name for r in design.seeds}
        self._models = {ratio: folders[name] for ratio, name in names.items()}
        self._missing = {name: folders[name] for name in names.values()}

    @property
    def identity(self) -> dict[str, Any]:
        """See `Task`."""
        return {"text": self._text.digest, "batch": self.batch, "top_k": TOP_K}

    def dense(self) -> Any:
        """See `Task`."""
        return self._dense

    def pruned(self, ratio: float, start: Start) -> Any:
        """See `Task`: the free widths of the study of serving, which are reconstructed; their
        plans alone make the sliced ones.
        """
        make_versions(self._missing, self._dense, self._tokenizer, self._text.corpus)
        found = load_pruned(self._models[ratio])
        return found if start == "reconstructed" else prune(self._dense, found.hipp_plan)

    def recovered(
        self, ratio: float, arm: Arm, *, lr: float, steps: int, seed: int, folder: Path
    ) -> tuple[Any, dict[str, Any]]:
        """See `Task`."""
        model, text = self.pruned(ratio, arm.start), self._text
        settings = RecoverSettings(
            steps=steps,
            optimizer="adamw",
            lr=lr,
            schedule="cosine",
            train=arm.train,
            precision="bf16",
            seed=seed,
        )
        data = TextRows(text.train, batch_size=self.batch, seed=seed)
        teacher = self._teacher if arm.teacher else None
        recover(model, data, settings, folder=folder, teacher=teacher)
        return model, {}

    def validate(self, model: Any) -> float:
        """See `Task`: the loss."""
        return float(row_losses(model, self._text.validation).mean())

    def measure(self, model: Any) -> Measured:
        """See `Task`."""
        return {LOSS: row_losses(model, self._text.test).tolist()}

    def clusters(self) -> dict[str, list[str]]:
        """See `Task`: every row is one."""
        return {LOSS: [str(i) for i in range(len(self._text.test))]}

    @functools.cached_property
    def _teacher(self) -> CachedTeacher:
        """The dense model's distributions in bfloat16 on all rows, which all cells share."""
        batches = [labelled(rows) for rows in self._text.train.split(8)]
        folder = self._folder / "teacher"
        return precompute(
            copy.deepcopy(self._dense).bfloat16(),
            batches,
            folder,
            top_k=TOP_K,
            processor=self._tokenizer,
            progress=True,
            log=print,
        )
