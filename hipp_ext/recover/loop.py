"""The loop of one process: steps, evaluations and checkpoints, from the last one on.

accelerate does what it has: DDP, FSDP2, autocast, `no_sync`. transformers' Trainer (5.17) is not
used: killed while it writes a checkpoint, it goes on from the half of it; it cannot resume its
optimizer on several CPU processes (evals/studies/LOG.md); and it has no local steps.
"""

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hipp_ext.calibration import Batch
from hipp_ext.comm import LQSGDState, OuterLoop
from hipp_ext.errors import HippError
from hipp_ext.progress import progress_bar
from hipp_ext.recover.checkpoints import Checkpoints, Progress
from hipp_ext.recover.counts import summed
from hipp_ext.recover.evaluation import Measure, evaluate
from hipp_ext.recover.objectives import CrossEntropy, Objective
from hipp_ext.recover.parameters import trained
from hipp_ext.recover.passes import make_passes
from hipp_ext.recover.processes import Processes, WeightedLoss, moved
from hipp_ext.recover.settings import RecoverResult, RecoverSettings
from hipp_ext.training import (
    cosine_factor,
    lr_factor,
    make_optimizers,
    step_optimizers,
    whole_tensor,
)


class Run:
    """What a run works with on this process.

    With sharding a twin of the model is trained, with modules of its own, so that the model itself
    is left as a plain one.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        settings: RecoverSettings,
        objective: Objective,
        group: Processes,
        measure: Measure | None,
    ):
        self.whole, self.data, self.settings, self.group = model, data, settings, group
        self.measure = measure
        self.evaluated = measure is not None or bool(len(getattr(data, "held", ())))
        self.token_mean = getattr(data, "token_mean", False)
        device = group.accelerator.device if group.sharded else next(model.parameters()).device
        self.model = _twin(model) if group.sharded else model
        self.loss = WeightedLoss(self.model, objective, device)
        if not isinstance(objective, CrossEntropy):  # which has nothing to prepare
            first = next(data.batches(group.rank, group.workers, 0))[0]
            objective.prepare(self.model, moved(first, next(model.parameters()).device))
        self.wrapped, self.state = group.wrap(self.loss, settings)
        plain = settings.optimizer == "adamw" or settings.train != "full"
        self.optimizers = make_optimizers(
            self.model, settings.lr, None if plain else settings.muon_lr
        )
        self.outer = group.outer_loop(self.model, settings, self.state)
        self.saved = [*self.optimizers, *([self.outer.optimizer] if self.outer else [])]

    def train(self, checkpoints: Checkpoints, show_bar: bool) -> RecoverResult:
        """Train to the end, from the last checkpoint on; the model then has the weights to keep."""
        settings, group = self.settings, self.group
        progress = checkpoints.load(self.model, self.saved, self.state)
        if self.outer:
            self.outer.begin(-(-progress.step // (settings.local_steps or 1)))
        if self.evaluated and not progress.evaluations:
            self._evaluate(progress, checkpoints)
        self.model.train()
        items = self.data.batches(group.rank, group.workers, progress.step * settings.accumulation)
        with progress_bar(show_bar, "recovering", settings.steps, progress.step) as show:
            while progress.step < settings.steps and not self._stopped(progress):
                own = [next(items) for _ in range(settings.accumulation)]
                self._step(progress, own)
                show(progress.step, _note(progress))
                last = progress.step == settings.steps
                if self.evaluated and (last or progress.step % settings.evaluation_steps == 0):
                    self._evaluate(progress, checkpoints)
                elif last or progress.step % settings.checkpoint_steps == 0:
                    self._save(progress, checkpoints)
        kept = progress.step
        if self.evaluated and settings.keep != "last" and progress.best_step is not None:
            kept = progress.best_step
            checkpoints.load_weights(self.model, kept)
        self.model.eval()
        return RecoverResult(
            losses=progress.losses,
            stats=_stats(self.outer or self.state),
            evaluations=progress.evaluations,
            step=kept,
            skipped={int(row): why for row, why in progress.skipped.items()},
            rows=progress.rows,
            tokens=progress.tokens,
        )

    def give_back(self) -> None:
        """Copy what was trained into the model itself, where a twin was trained."""
        if self.model is not self.whole:
            with torch.no_grad():
                for own, p in zip(
                    trained(self.whole).values(), trained(self.model).values(), strict=True
                ):
                    own.copy_(whole_tensor(p.detach()))

    def _step(self, progress: Progress, items: Sequence[Sequence[Batch]]) -> None:
        settings, group, step = self.settings, self.group, progress.step
        # A seed per step, so that dropout is the same in a resumed run.
        torch.manual_seed(settings.seed + 7919 * (step * group.workers + group.rank))
        passes = make_passes(items, group, self.loss.objective, self.token_mean)
        total, bad = 0.0, list[Batch]()
        for number, part in enumerate(passes):
            last = number + 1 == len(passes)
            with contextlib.nullcontext() if last else group.accelerator.no_sync(self.wrapped):
                losses = torch.stack([found["loss"] for found in self.wrapped(part)])
                losses.sum().backward()
            total += float(losses.detach().double().sum())
            finite = losses.isfinite().tolist()
            bad += [b for b, good in zip(part.batches, finite, strict=True) if not good]
        every = [batch for own in items for batch in own]
        rows = sum(len(getattr(b, "rows", b["input_ids"])) for b in every)
        counts = [rows, summed(map(self.loss.objective.counts, every)).learnt]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        # With local steps every process has a norm of its own.
        numbers = [total / group.workers, *counts, float(whole_tensor(norm))]
        mean, rows, tokens, size = group.total(numbers)
        if not math.isfinite(mean):
            raise self._not_finite(f"loss of step {step + 1} is {mean}", bad)
        if not math.isfinite(size):
            raise self._not_finite(f"gradient of step {step + 1} has the norm {size}", every)
        step_optimizers(self.optimizers, _lr_factor(step, settings))
        progress.step += 1
        progress.losses.append(mean)
        progress.rows += int(rows)
        progress.tokens += int(tokens)
        if self.outer and settings.ends_round(progress.step):
            self.outer.exchange()

    def _not_finite(self, what: str, batches: Sequence[Batch]) -> HippError:
        """The error, with the rows of all processes that may be the cause."""
        own = sorted({row for batch in batches for row in getattr(batch, "rows", ())})
        rows = sorted({row for found in self.group.gathered(own) for row in found})
        named = f" Rows of the file in these batches: {', '.join(map(str, rows))}." if rows else ""
        return HippError(
            f"The {what}: a smaller learning rate may help (--lr, --muon-lr). The last checkpoint "
            f"stays; a run with other settings needs another folder than it.{named}"
        )

    def _evaluate(self, progress: Progress, checkpoints: Checkpoints) -> None:
        """Evaluate the held-out rows, and write a checkpoint."""
        found = evaluate(self.loss, self.data, self.group, self.measure)
        progress.evaluations.append({"step": float(progress.step), **found})
        self._save(progress, checkpoints)

    def _save(self, progress: Progress, checkpoints: Checkpoints) -> None:
        for skipped in self.group.gathered(dict(getattr(self.data, "skipped", {}))):
            progress.skipped |= {str(row): why for row, why in skipped.items()}
        checkpoints.save(progress, self.model, self.saved, self.state)

    def _stopped(self, progress: Progress) -> bool:
        return self.settings.patience is not None and progress.since_best >= self.settings.patience


def _stats(state: LQSGDState | OuterLoop | None) -> dict[str, Any] | None:
    """The statistics of a run; those of its last step are lost where a run was resumed after it."""
    if state is None:
        return None
    return {n: value for n, value in state.stats().items() if not n.endswith("_last_step")}


def _lr_factor(step: int, settings: RecoverSettings) -> float:
    warmup = settings.warmup_steps
    if settings.schedule == "cosine":
        return cosine_factor(step, settings.steps, warmup=warmup)
    return lr_factor(step, settings.steps, warmup=warmup, decay=0.7)


def _note(progress: Progress) -> str:
    note = f"loss {progress.losses[-1]:.3f}"
    if progress.evaluations and "loss" in progress.evaluations[-1]:
        note += f", held out {progress.evaluations[-1]['loss']:.3f}"
    return note


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules, whose tensors share the memory of the model's."""
    aliases: dict[int, Any] = {id(b): b.detach() for b in model.buffers()}
    for p in model.parameters():
        aliases[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    return copy.deepcopy(model, aliases)
