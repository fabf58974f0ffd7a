"""SmolLM2-135M, pruned by the plans of the study of serving, on text."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext import load_pruned, prune
from hipp_ext.evals.studies.real_lm.text import TEST_BATCH, losses_of, next_logits, row_losses
from hipp_ext.evals.studies.real_lm.text_rows import TextRows, labelled
from hipp_ext.evals.studies.recovery.cells import BASE, LABELS, Arm, Cell, Start
from hipp_ext.evals.studies.recovery.task import Design, Measured
from hipp_ext.evals.studies.recovery.text import RecoveryText, Rows
from hipp_ext.evals.studies.serving.versions import Version, make_versions, version_folders
from hipp_ext.recover import CachedTeacher, RecoverSettings, precompute, recover

BATCH = 4  # rows
TOP_K = 64
LOSS, OTHER, KL = "loss", "loss, other text", "KL to dense"
SEARCHED = (2e-4, 5e-4)  # of the two arms that all others differ from in one thing
DESIGN = Design(
    seeds={0.3: 3, 0.2: 3, 0.4: 3},
    lrs={BASE: SEARCHED, LABELS: SEARCHED, "LoRA": (1e-3,)},
    steps=100,
    search_steps=25,
    step_seconds=3.0,
    shared_minutes=15,
    extra=[
        Cell(ratio=0.3, arm=name, seed=0)
        for name in ("no reconstruction", "LoRA", "teacher and labels")
    ],
)


class SmolLM2:
    """See `Task`. Items are rows. Their values are the loss on the test and on text of another
    kind, and the KL divergence from the dense model on the test [nats per token].

    Args:
        load: returns (dense model, tokenizer).
        folder: folder of the teacher's distributions, and of the pruned models.
        models: folder of models of the study of serving, or for them; None: in `folder`.
        make_text: tokenizer -> the text.
        design: what is run.
        batch: rows of a step.
    """

    name = "smollm2"
    what = (
        "Perplexity on rows of Python's help topics that nothing was trained on, and on WordNet's "
        "glosses, a kind of text that is not in the training data; KL divergence from the dense "
        "model on the topics [nats per token]."
    )

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
            cross_entropy_share=arm.labels,
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
        text = self._text
        losses, divergences = losses_and_divergences(model, self._dense, text.test)
        found = {LOSS: losses, KL: divergences}
        if len(text.other):
            found[OTHER] = row_losses(model, text.other)
        return {name: values.tolist() for name, values in found.items()}

    def clusters(self) -> dict[str, list[str]]:
        """See `Task`: every row is one."""
        rows = [str(i) for i in range(len(self._text.test))]
        return {LOSS: rows, KL: rows} | ({OTHER: rows} if len(self._text.other) else {})

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


@torch.no_grad()
def losses_and_divergences(
    model: nn.Module, dense: nn.Module, rows: Rows
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """For each row the loss, as `row_losses`, and the mean of KL(dense || model) over its tokens
    [nats per token], float64.
    """
    losses, divergences = [], []
    for ids in rows.split(TEST_BATCH):
        logits = next_logits(model, ids)
        losses.append(losses_of(logits, ids))
        said, wanted = (x.log_softmax(-1) for x in (logits, next_logits(dense, ids)))
        each = nn.functional.kl_div(said, wanted, reduction="none", log_target=True).sum(-1)
        divergences.append(each.mean(1))
    return torch.cat(losses).double(), torch.cat(divergences).double()
