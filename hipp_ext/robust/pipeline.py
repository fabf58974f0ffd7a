"""MRPF: score, allocate, prune, recalibrate and fine-tune, in one resumable call."""

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
from hipp_ext.errors import BudgetError, CheckpointError, DataError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
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
    tensor_digest,
    train,
)
from hipp_ext.scorers.channels import ChannelGroup
from hipp_ext.units import top_units

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
        DataError: images outside [0, 1], labels out of range, or a folder of another run.
        AttackError: epsilon is not above zero, or training diverged.
        UnsupportedModelError: torch-pruning cannot trace the model, or it is in half precision.
        MissingExtraError: torch-pruning is not installed.

    Source: MRPF (arXiv 2410.15176), abstract: pruning ratios per layer from module robustness
    sensitivity, with any adversarial training method.
    Differs from the paper: its formulas, settings and code are not public; sensitivity, allocation,
    ranking, recalibration and defaults are ours.
    """
    from hipp_ext.integrations.torch_pruning_channels import find_channel_groups, prune_channels

    settings = settings or MRPFSettings()
    loss = loss or TRADES(epsilon=settings.scores.epsilon)
    check_precision(model)
    example = data.train.rows(slice(0, 1))[0].to(next(model.parameters()).device)
    ignored = fixed_layers(model) if ignored is None else ignored
    identity = {
        "model": tensor_digest(model.state_dict()),
        "data": data_identity(data),
        "loss": loss_identity(loss),
        "ignored": sorted(n for n, m in model.named_modules() if m in set(ignored)),
        "settings": asdict(settings),
    }
    run = _Run(folder, identity, log or (lambda _: None))
    with restored(model, random_state=True):
        groups = find_channel_groups(model, example, ignored=ignored)
        costs = dict(
            zip(("macs", "parameters"), channel_costs(model, example, groups), strict=True)
        )
        cost = costs[settings.cost]
        plan = run.scored_once(lambda: _plan(model, data, groups, cost, settings))
        pruned = copy.deepcopy(model)
        prune_channels(pruned, example, plan["kept"])
        if settings.recalibrate:
            recalibrate(pruned, data.train, settings.scores.epsilon, seed=settings.scores.seed)
        checkpoint = run.path("train.safetensors")
        history = train(
            pruned, data, loss, settings.train, checkpoint=checkpoint, on_epoch=on_epoch
        )
        run.record({"stage": "train", "losses": history})
    keep_counts, widths = [len(plan["kept"][g.name]) for g in groups], [g.width for g in groups]
    return MRPFResult(
        model=pruned.eval(),
        kept={name: tuple(channels) for name, channels in plan["kept"].items()},
        sensitivity=plan["sensitivity"],
        history=tuple(history),
        macs=costs["macs"](keep_counts) / costs["macs"](widths),
        parameters=costs["parameters"](keep_counts) / costs["parameters"](widths),
    )


def _plan(
    model: nn.Module,
    data: ImageData,
    groups: Sequence[ChannelGroup],
    cost: Cost,
    settings: MRPFSettings,
) -> dict[str, Any]:
    """Sensitivity and kept channels per group, and what they cost; plain values."""
    widths, fraction = [g.width for g in groups], settings.budget
    if fraction is None:
        removed = settings.pruning_ratio
        budget = cost(uniform_counts(widths, removed))
    else:
        # A layer costs its input times its output channels, so this fraction of the cost leaves
        # about its square root of the channels.
        removed, budget = 1 - fraction**0.5, int(fraction * cost(widths))
    bounds = settings.bounds or Bounds(min_keep=default_min_keep(removed))
    # An impossible budget is refused before the scoring, which takes long.
    allocate([1.0] * len(widths), widths, cost, budget, bounds=bounds)
    scores = score(model, data.train, groups, settings.scores)
    keep_counts = allocate(
        scores.sensitivity, widths, cost, budget, alpha=settings.alpha, bounds=bounds
    )
    kept = zip(groups, scores.ranking, keep_counts, strict=True)
    return {
        "sensitivity": {g.name: s for g, s in zip(groups, scores.sensitivity, strict=True)},
        "kept": {g.name: list(top_units(ranking, k)) for g, ranking, k in kept},
        "budget": budget,
        "cost": cost(keep_counts),
    }


class _Run:
    """The folder of a run: its plan, its checkpoint and its log."""

    def __init__(
        self, folder: str | Path | None, identity: Mapping[str, Any], log: Callable[[str], None]
    ):
        self.folder, self.log = None if folder is None else Path(folder), log
        self.identity = json.loads(json.dumps(identity))
        events = self.path("log.jsonl")
        if events is not None and events.exists() and not events.is_file():  # a pipe would block
            raise DataError(f"{events} is not a regular file. Remove it, or choose another folder.")

    def path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def scored_once(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The plan of an earlier run of this identity, else what `make` returns."""
        path = self.path("plan.safetensors")
        if path is not None and path.exists():
            return self._read(path)
        start = time.perf_counter()
        self.log("score and allocate")
        plan = make()
        if path is not None:
            write_atomic(path, seal({}, {"identity": self.identity, "plan": plan}))
        seconds = time.perf_counter() - start
        self.record(
            {"stage": "plan", "seconds": seconds, "cost": plan["cost"], "budget": plan["budget"]}
        )
        return plan

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            _, about = unseal(path)
            identity, plan = about["identity"], about["plan"]
        except (CheckpointError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}). Remove it to score again.") from error
        if identity != self.identity:
            raise DataError(
                f"{path.parent} holds another run: its model, data, loss, fixed layers or settings "
                "differ. Choose another folder."
            )
        return plan

    def record(self, event: Mapping[str, Any]) -> None:
        """Add an event to the log."""
        self.log(", ".join(f"{k} {v}" for k, v in event.items()))
        if (path := self.path("log.jsonl")) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"time": time.time(), **event}) + "\n")
