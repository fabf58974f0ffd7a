"""MRPF: score -> allocate -> prune -> recalibrate -> adversarial fine-tuning, in one call that survives being killed."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hipp_ext.attacks import check_precision
from hipp_ext.errors import BudgetError, DataError
from hipp_ext.files import write_atomic
from hipp_ext.files.untrusted import read_json, read_plain
from hipp_ext.quantities import take_numbers
from hipp_ext.robust.allocation import (
    Bounds,
    Cost,
    allocate,
    channel_costs,
    default_floor,
    uniform_counts,
)
from hipp_ext.robust.data import ImageData
from hipp_ext.robust.identity import data_identity, describe, digest
from hipp_ext.robust.losses import TRADES, AdversarialLoss
from hipp_ext.robust.models import fixed_layers
from hipp_ext.robust.scoring import ScoreSettings, score
from hipp_ext.robust.training import Report, TrainSettings, recalibrate, restored, train
from hipp_ext.scorers.group_loss import ChannelGroup
from hipp_ext.units import top_units

Kept = dict[str, tuple[int, ...]]  # group -> the channels of the dense model that stay


@dataclass(frozen=True, kw_only=True)
class MRPFSettings:
    """What `mrpf` does.

    Attributes:
        pruning_ratio: of the channels, where the budget is that of the uniform plan at this ratio.
        budget: instead, the share of the cost that may stay, in (0, 1].
        cost: what the budget counts.
        scores: how modules and channels are scored.
        alpha: how sharply the allocation follows the sensitivity; 0 is uniform.
        bounds: least and greatest share of a module's channels that stays; None: at least `default_floor` of it.
        rounds: 1 prunes in one shot; more prune by equal factors, and score and fine-tune anew each time.
        train: the fine-tuning of every round.
        recalibrate: measure batch norms again under attack before fine-tuning.
    """

    pruning_ratio: float = 0.5
    budget: float | None = None
    cost: Literal["macs", "parameters"] = "macs"
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    alpha: float = 0.25
    bounds: Bounds | None = None
    rounds: int = 1
    train: TrainSettings = field(default_factory=TrainSettings)
    recalibrate: bool = True

    def __post_init__(self) -> None:
        optional = () if self.budget is None else ("budget",)
        take_numbers(
            self, BudgetError, wholes=("rounds",), finites=("pruning_ratio", "alpha", *optional)
        )
        if self.budget is not None and not 0 < self.budget <= 1:
            raise BudgetError(
                f"budget is the share of {self.cost} that may stay, above 0 and at most 1; got {self.budget}."
            )
        if not 0 <= self.pruning_ratio < 1:
            raise BudgetError(
                f"pruning_ratio is the share of channels to remove, in [0, 1); got {self.pruning_ratio}."
            )
        if self.rounds < 1:
            raise BudgetError(f"rounds must be at least 1, got {self.rounds}.")
        if self.cost not in ("macs", "parameters"):
            raise BudgetError(f"A budget counts macs or parameters, not {self.cost!r}.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise BudgetError(f"alpha must be a number of at least 0, got {self.alpha}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class MRPFResult:
    """What `mrpf` made.

    Attributes:
        model: the pruned and fine-tuned network, in eval mode.
        kept: group -> channels of the dense model that stayed.
        sensitivity: per round, group -> sensitivity [nats].
        macs, parameters: shares of the dense model's.
        history: per round, the mean training loss of every epoch.
    """

    model: nn.Module
    kept: Kept
    sensitivity: tuple[Mapping[str, float], ...]
    macs: float
    parameters: float
    history: tuple[tuple[float, ...], ...]


def mrpf(
    model: nn.Module,
    data: ImageData,
    settings: MRPFSettings | None = None,
    *,
    loss: AdversarialLoss | None = None,
    folder: str | Path | None = None,
    ignored: Sequence[nn.Module] | None = None,
    say: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> MRPFResult:
    """Prune a robust network where it matters least to its robustness, and train it to be robust again.

    Args:
        model: images in [0, 1] -> logits, adversarially trained; it is not changed, and neither are the caller's random state,
            its train/eval flags or requires_grad.
        data: scored and trained on its training images only.
        loss: of the fine-tuning; None: TRADES at the scores' epsilon. Any function (model, images, labels, seed) -> mean loss.
        folder: for scores, checkpoints and a log (JSON lines). The same call on a folder of a run that was killed goes on
            there and ends with the weights of an undisturbed run. None: nothing is written.
        ignored: layers whose output channels stay; None: what `hipp_ext.robust.models.fixed_layers` knows.
        say: called with a line per stage; report: after every epoch.

    Raises:
        BudgetError: no allocation within the bounds meets the budget.
        DataError: images outside [0, 1], labels out of range, or a folder of another run.
        AttackError: epsilon is not above zero, or training diverged.
        UnsupportedModelError: torch-pruning cannot trace the model, or it is in half precision.
        MissingExtraError: torch-pruning is not installed.

    Source: MRPF (arXiv 2410.15176), abstract: pruning ratios per layer from module robustness sensitivity, with any adversarial
    training method.
    Differs from the paper: its formulas, settings and code are not public; sensitivity, allocation, ranking, recalibration and
    defaults are ours.
    """
    settings = settings or MRPFSettings()
    loss = loss or TRADES(epsilon=settings.scores.epsilon)
    check_precision(model)
    example = data.train.rows(slice(0, 1))[0].to(next(model.parameters()).device)
    names = {m: n for n, m in model.named_modules()}
    fixed = [names[m] for m in (fixed_layers(model) if ignored is None else ignored)]
    journal = _Journal(folder, lambda: _identity(model, data, settings, loss, fixed), say)
    with restored(model):
        work = _Work(model, fixed, example, settings)
        current, history = copy.deepcopy(model), []
        for number in range(settings.rounds):
            plan = journal.once(
                f"round-{number + 1}", lambda n=number, m=current: work.plan(m, data, n)
            )
            current = work.prune(current, plan)
            if settings.recalibrate:
                recalibrate(current, data.train, settings.scores.epsilon, seed=settings.scores.seed)
            checkpoint = journal.path(f"round-{number + 1}.safetensors")
            history.append(
                tuple(
                    train(current, data, loss, settings.train, checkpoint=checkpoint, report=report)
                )
            )
            journal.log({"round": number + 1, "losses": history[-1]})
    macs, parameters, full = *work.costs, [g.width for g in work.groups]
    keeps = [len(work.kept[g.name]) for g in work.groups]
    return MRPFResult(
        model=current.eval(),
        kept=dict(work.kept),
        sensitivity=tuple(work.sensitivity),
        history=tuple(history),
        macs=macs(keeps) / macs(full),
        parameters=parameters(keeps) / parameters(full),
    )


class _Work:
    """The dense model's groups and costs, and what is left of them round by round."""

    def __init__(
        self, model: nn.Module, ignored: Sequence[str], example: Any, settings: MRPFSettings
    ):
        self.settings, self.example, self.ignored = settings, example, ignored
        self.groups = self._groups(model)
        self.costs = channel_costs(model, example, self.groups)
        self.kept: Kept = {g.name: tuple(range(g.width)) for g in self.groups}
        self.sensitivity: list[dict[str, float]] = []
        cost, widths = self.cost, [g.width for g in self.groups]
        share = settings.budget
        # A module's cost goes by the channels of two, so this share of it leaves about its root of the channels.
        channels = 1 - settings.pruning_ratio if share is None else share**0.5
        bounds = self.bounds = settings.bounds or Bounds(floor=default_floor(1 - channels))
        self.target = (
            cost(uniform_counts(widths, settings.pruning_ratio))
            if share is None
            else int(share * cost(widths))
        )
        self.least, _ = bounds.of(widths)
        if cost(self.least) > self.target:  # before anything long is run
            allocate([1.0] * len(widths), widths, cost, self.target, bounds=bounds)

    @property
    def cost(self) -> Cost:
        return self.costs[0 if self.settings.cost == "macs" else 1]

    def plan(self, model: nn.Module, data: ImageData, number: int) -> dict[str, Any]:
        """Sensitivity and kept channels (of the dense model) for round `number`."""
        groups, done = self._groups(model), (number + 1) / self.settings.rounds
        dense = self.cost([g.width for g in self.groups])
        budget = self.target if done == 1 else int(dense * (self.target / dense) ** done)
        scores = score(model, data.train, groups, self.settings.scores)
        keeps = allocate(
            scores.sensitivity,
            [g.width for g in groups],
            self.cost,
            budget,
            alpha=self.settings.alpha,
            bounds=Bounds(floor=0, cap=self.bounds.cap if number == 0 else 1.0),
            least=self.least,
        )
        kept = {
            g.name: [self.kept[g.name][u] for u in top_units(r, k)]
            for g, r, k in zip(groups, scores.ranking, keeps, strict=True)
        }
        sensitivity = {g.name: s for g, s in zip(groups, scores.sensitivity, strict=True)}
        return {
            "sensitivity": sensitivity,
            "kept": kept,
            "budget": budget,
            "cost": self.cost(keeps),
        }

    def prune(self, model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
        """`model` with the plan carried out; the plan counts channels of the dense model, `model` has those kept so far."""
        from hipp_ext.integrations.torch_pruning_channels import prune_channels

        place = {
            name: {c: i for i, c in enumerate(channels)} for name, channels in self.kept.items()
        }
        prune_channels(
            model,
            self.example,
            {n: [place[n][c] for c in channels] for n, channels in plan["kept"].items()},
        )
        self.kept = {name: tuple(channels) for name, channels in plan["kept"].items()}
        self.sensitivity.append(dict(plan["sensitivity"]))
        return model

    def _groups(self, model: nn.Module) -> tuple[ChannelGroup, ...]:
        from hipp_ext.integrations.torch_pruning_channels import find_channel_groups

        return find_channel_groups(
            model, self.example, ignored=[model.get_submodule(n) for n in self.ignored]
        )


class _Journal:
    """What a run leaves in its folder, and what the next one finds there."""

    def __init__(
        self,
        folder: str | Path | None,
        identity: Callable[[], Mapping[str, Any]],
        say: Callable[[str], None] | None,
    ):
        self.folder, self.say = None if folder is None else Path(folder), say or (lambda _: None)
        if self.folder is None:
            return
        path, text = (
            self.folder / "run.json",
            json.dumps(identity(), indent=1, sort_keys=True) + "\n",
        )
        if path.exists() and read_plain(path) != text.encode():
            raise DataError(
                f"{folder} holds another run: its model, data, loss, fixed layers or settings differ ({path}). Choose another "
                "folder."
            )
        if not path.exists():
            write_atomic(path, text)

    def path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gave, from the file of an earlier run where there is one."""
        path = self.path(f"{name}.json")
        if path is not None and path.exists():
            return _read_stage(path)
        start = time.perf_counter()
        self.say(f"{name}: scoring and allocating")
        made = make()
        if path is not None:
            write_atomic(path, json.dumps({**made, "digest": _digest(made)}, indent=1) + "\n")
        self.log(
            {
                "stage": name,
                "seconds": time.perf_counter() - start,
                "cost": made["cost"],
                "budget": made["budget"],
            }
        )
        return made

    def log(self, event: Mapping[str, Any]) -> None:
        self.say(", ".join(f"{k} {v}" for k, v in event.items()))
        if self.folder is not None:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"time": time.time(), **event}) + "\n")


def _digest(made: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def _read_stage(path: Path) -> dict[str, Any]:
    """What a stage left; a bit that has changed would make another model of it without a word."""
    try:
        made = read_json(path)
        digest_there = made.pop("digest")
        if digest_there != _digest(made):
            raise ValueError("it is not what was written")
    except (DataError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it to score again.") from error
    return made


def _identity(
    model: nn.Module,
    data: ImageData,
    settings: MRPFSettings,
    loss: AdversarialLoss,
    ignored: Sequence[str],
) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    return {
        "model": digest(model.state_dict()),
        "data": data_identity(data),
        "loss": describe(loss),
        "ignored": sorted(ignored),
        "settings": asdict(settings),
    }
