"""MRPF: score, allocate, prune, recalibrate and fine-tune, in one resumable call."""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hipp_ext.attacks import check_precision
from hipp_ext.budget import Bounds, Cost, check_ratio
from hipp_ext.errors import BudgetError, CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import digest, seal, unseal
from hipp_ext.modes import restored
from hipp_ext.quantities import take_numbers
from hipp_ext.robust.allocation import allocate, default_min_keep, uniform_counts
from hipp_ext.robust.costs import channel_costs
from hipp_ext.robust.data import ImageData
from hipp_ext.robust.losses import TRADES, AdversarialLoss
from hipp_ext.robust.models import fixed_layers
from hipp_ext.robust.scoring import ScoreSettings, score
from hipp_ext.robust.training import (
    OnEpoch,
    TrainSettings,
    data_identity,
    loss_identity,
    recalibrate,
    train,
)
from hipp_ext.runs import RunFolder
from hipp_ext.scorers.channels import ChannelGroup
from hipp_ext.units import top_units

PLAN, LOG = "plan.safetensors", "log.jsonl"
Kept = dict[str, tuple[int, ...]]  # group -> the channels that stay


@dataclass(frozen=True, kw_only=True)
class MRPFSettings:
    """Settings of `mrpf`.

    Attributes:
        pruning_ratio: fraction of channels to remove. The budget is the cost of the uniform plan at
            this ratio.
        budget: instead of a ratio, the fraction of the cost that may stay, in (0, 1].
        cost: what the budget counts.
        scores: how groups and channels are scored.
        alpha: how closely the allocation follows the sensitivity; 0 is uniform.
        bounds: fractions of a group's channels that may stay; None: at least `default_min_keep`.
        train: settings of the fine-tuning.
        recalibrate: measure batch norms again, under attack, before fine-tuning.
    """

    pruning_ratio: float = 0.5
    budget: float | None = None
    cost: Literal["macs", "parameters"] = "macs"
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    alpha: float = 0.25
    bounds: Bounds | None = None
    train: TrainSettings = field(default_factory=TrainSettings)
    recalibrate: bool = True

    def __post_init__(self) -> None:
        optional = () if self.budget is None else ("budget",)
        take_numbers(self, BudgetError, finites=("pruning_ratio", "alpha", *optional))
        if self.budget is not None and not 0 < self.budget <= 1:
            raise BudgetError(
                f"budget is the fraction of {self.cost} that may stay, above 0 and at most 1; "
                f"got {self.budget}."
            )
        check_ratio(self.pruning_ratio)
        if self.cost not in ("macs", "parameters"):
            raise BudgetError(f"A budget counts macs or parameters, not {self.cost!r}.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise BudgetError(f"alpha must be a number of at least 0, got {self.alpha}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class MRPFResult:
    """What `mrpf` returns.

    Attributes:
        model: the pruned and fine-tuned network, in eval mode.
        kept: group -> channels of the dense model that stay.
        sensitivity: group -> sensitivity [nats].
        macs: MACs, as a fraction of the dense model's.
        parameters: parameters, as a fraction of the dense model's.
        history: mean training loss of every epoch.
    """

    model: nn.Module
    kept: Kept
    sensitivity: Mapping[str, float]
    macs: float
    parameters: float
    history: tuple[float, ...]


def mrpf(
    model: nn.Module,
    data: ImageData,
    settings: MRPFSettings | None = None,
    *,
    loss: AdversarialLoss | None = None,
    folder: str | Path | None = None,
    ignored: Sequence[nn.Module] | None = None,
    log: Callable[[str], None] | None = None,
    on_epoch: OnEpoch | None = None,
) -> MRPFResult:
    """Prune a robust network where its robustness suffers least, and fine-tune it adversarially.

    Args:
        model: images in [0, 1] -> logits, adversarially trained. It is not changed, and neither are
            the global random state, its train/eval modes and requires_grad.
        data: images to score and train on; its test images are not used.
        settings: None: the defaults.
        loss: loss of the fine-tuning; None: TRADES at the scores' epsilon. Any function (model,
            images, labels, seed) -> mean loss.
        folder: folder for scores, checkpoints and a log (JSON lines). The same call on the folder
            of an interrupted run resumes it and ends with the weights of an uninterrupted run. A
            loss is recognised by its repr. None: nothing is written.
        ignored: layers whose output channels stay; None: those that
            `hipp_ext.robust.models.fixed_layers` knows.
        log: called with one line of progress per stage.
        on_epoch: called after every epoch.

    Raises:
        BudgetError: no allocation within the bounds meets the budget.
        DataError: images outside [0, 1], or labels out of range.
        CheckpointError: `folder` holds another run, or is damaged.
        OutputBusyError: another process works in `folder`.
        AttackError: epsilon is not above zero, or training diverged.
        UnsupportedModelError: torch-pruning cannot trace the model, or it is in half precision.
        MissingExtraError: torch-pruning is not installed.

    Source: MRPF (arXiv 2410.15176), abstract: pruning ratios per layer from module robustness
    sensitivity, with any adversarial training method.
    Differs from the paper: its formulas, settings and code are not public; sensitivity, allocation,
    ranking, recalibration and defaults are ours.
    """
    from hipp_ext.integrations.torch_pruning_channels import find_channel_groups, prune_channels

    settings, log = settings or MRPFSettings(), log or (lambda _: None)
    loss = loss or TRADES(epsilon=settings.scores.epsilon)
    check_precision(model)
    example = data.train.rows(slice(0, 1))[0].to(next(model.parameters()).device)
    ignored = fixed_layers(model) if ignored is None else ignored
    identity = {
        "model": digest(model.state_dict()),
        "data": data_identity(data),
        "loss": loss_identity(loss),
        "ignored": sorted(n for n, m in model.named_modules() if m in set(ignored)),
        "settings": asdict(settings),
    }
    with restored(model, random_state=True), contextlib.ExitStack() as stack:
        groups = find_channel_groups(model, example, ignored=ignored)
        macs, parameters = channel_costs(model, example, groups)
        cost = macs if settings.cost == "macs" else parameters
        # An impossible budget is refused before the folder is made, and before the scoring.
        budget, bounds = _budget(groups, cost, settings)
        run = None if folder is None else stack.enter_context(RunFolder(folder, identity))
        record = _recorder(run, log)
        plan = None if run is None else _read_plan(run)
        if plan is None:
            start = time.perf_counter()
            log("score and allocate")
            plan = _plan(model, data, groups, cost, budget, bounds, settings)
            if run is not None:
                write_atomic(run / PLAN, seal({}, plan))
            seconds, spent = time.perf_counter() - start, {k: plan[k] for k in ("cost", "budget")}
            record({"stage": "plan", "seconds": seconds, **spent})
        pruned = copy.deepcopy(model)
        prune_channels(pruned, example, plan["kept"])
        if settings.recalibrate:
            recalibrate(pruned, data.train, settings.scores.epsilon, seed=settings.scores.seed)
        history = train(pruned, data, loss, settings.train, folder=run, on_epoch=on_epoch)
        record({"stage": "train", "losses": history})
    keep_counts, widths = [len(plan["kept"][g.name]) for g in groups], [g.width for g in groups]
    return MRPFResult(
        model=pruned.eval(),
        kept={name: tuple(channels) for name, channels in plan["kept"].items()},
        sensitivity=plan["sensitivity"],
        history=tuple(history),
        macs=macs(keep_counts) / macs(widths),
        parameters=parameters(keep_counts) / parameters(widths),
    )


def _budget(
    groups: Sequence[ChannelGroup], cost: Cost, settings: MRPFSettings
) -> tuple[int, Bounds]:
    """(largest cost, bounds of the keep counts); BudgetError where no allocation meets them."""
    widths, fraction = [g.width for g in groups], settings.budget
    if fraction is None:
        removed = settings.pruning_ratio
        budget = cost(uniform_counts(widths, removed))
    else:
        # A layer costs its input times its output channels, so this fraction of the cost leaves
        # about its square root of the channels.
        removed, budget = 1 - fraction**0.5, int(fraction * cost(widths))
    bounds = settings.bounds or Bounds(min_keep=default_min_keep(removed))
    allocate([1.0] * len(widths), widths, cost, budget, bounds=bounds)
    return budget, bounds


def _plan(
    model: nn.Module,
    data: ImageData,
    groups: Sequence[ChannelGroup],
    cost: Cost,
    budget: int,
    bounds: Bounds,
    settings: MRPFSettings,
) -> dict[str, Any]:
    """Sensitivity and kept channels per group, and what they cost; plain values."""
    scores = score(model, data.train, groups, settings.scores)
    widths, alpha = [g.width for g in groups], settings.alpha
    keep_counts = allocate(scores.sensitivity, widths, cost, budget, alpha=alpha, bounds=bounds)
    kept = zip(groups, scores.ranking, keep_counts, strict=True)
    return {
        "sensitivity": {g.name: s for g, s in zip(groups, scores.sensitivity, strict=True)},
        "kept": {g.name: list(top_units(ranking, k)) for g, ranking, k in kept},
        "budget": budget,
        "cost": cost(keep_counts),
    }


def _read_plan(run: RunFolder) -> dict[str, Any] | None:
    """The plan of an interrupted run, or None."""
    try:
        return unseal(run / PLAN)[1] if (run / PLAN).exists() else None
    except CheckpointError as error:
        raise run.damaged(error) from error


def _recorder(
    run: RunFolder | None, log: Callable[[str], None]
) -> Callable[[Mapping[str, Any]], None]:
    """A function that passes an event to `log`, and adds it to the log of the run."""
    if run is not None and (run / LOG).exists() and not (run / LOG).is_file():
        raise run.damaged(f"{LOG} is not a regular file")  # a pipe would block

    def record(event: Mapping[str, Any]) -> None:
        log(", ".join(f"{k} {v}" for k, v in event.items()))
        if run is not None:
            with (run / LOG).open("a") as file:
                file.write(json.dumps({"time": time.time(), **event}) + "\n")

    return record
