"""HiPPPlanner: a preference in, a per-layer pruning plan out, in one policy call."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from hipp_ext import scorers
from hipp_ext.budget import Bounds, check_ratio, keep_counts, max_ratio
from hipp_ext.calibration import Calibration
from hipp_ext.errors import CheckpointError, PlanError
from hipp_ext.files import new_folder, write_atomic
from hipp_ext.groups import Group, Kind, Tower
from hipp_ext.masks import plan_from_counts
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.archive import Archive
from hipp_ext.planner.grpo import ARCHIVE, FitResult, FitSettings, Trainer
from hipp_ext.planner.policy import Policy, new_policy
from hipp_ext.planner.reward import Evaluator, Reward, measure
from hipp_ext.planner.state import Signals, measure_signals, model_digest
from hipp_ext.preference import Preference
from hipp_ext.scorers import Scorer

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FrontPlan:
    """A plan of the front with what was measured of it."""

    plan: PruningPlan
    reward: Reward


class HiPPPlanner:
    """Turns a preference into a pruning plan.

        plan = HiPPPlanner(Preference(utility=0.4, robustness=0.4, compression=0.2)).plan(model)

    Without a fit the policy is its prior: measured sensitivity says where to prune, the preference for compression how much.
    `fit` trains it on measured rewards. Signals are measured on first use and kept for the model they were measured on.

    Args:
        preference: what is wanted.
        pruning_ratio: parameters removed / prunable parameters, in [0, 1); None: the policy decides.
        policy: a fitted policy; None: an untrained one.
        scorer: ranks the units within a group; None: WandaSP.
        bounds: rounding and floors of the keep counts.
        seed: of the untrained policy.

    Raises:
        BudgetError: pruning_ratio is outside [0, 1).

    Source: HiPP-Prune (arXiv 2603.06270). What is its own and what ours: `Policy`, `grpo`, `VisualSensitivity`.
    """

    def __init__(
        self,
        preference: Preference,
        *,
        pruning_ratio: float | None = None,
        policy: Policy | None = None,
        scorer: Scorer | None = None,
        bounds: Bounds | None = None,
        seed: int = 0,
    ):
        if not isinstance(preference, Preference):
            raise TypeError(f"A Preference is needed, not {preference!r}.")
        if pruning_ratio is not None:
            check_ratio(pruning_ratio)
        self.preference = preference
        self.pruning_ratio = None if pruning_ratio is None else float(pruning_ratio)
        self.policy = policy or new_policy(seed)
        self.scorer, self.bounds = scorer, bounds or Bounds()
        self.signals: Signals | None = None
        self.archive = Archive()

    def plan(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        calibration: Calibration | None = None,
        preference: Preference | None = None,
        say: Say | None = None,
    ) -> PruningPlan:
        """The plan for `preference` (None: the planner's own). Never changes `model`.

        Args:
            processor: of a vision-language model; None: the one beside the model's weights.
            calibration: batches of the forward's tensors; None: the testbed's pictures and questions. Neither is read when
                the model's signals were already measured.
            say: called with a line before every measurement.

        Raises:
            BudgetError: pruning_ratio cannot be met within the bounds.
            CalibrationError: there is nothing to calibrate on, or it does not fit the model.
            UnsupportedModelError: the model's groups cannot be mapped.
        """
        wanted = preference or self.preference
        signals = self.measure(model, processor=processor, calibration=calibration, say=say)
        limit = max(0.0, max_ratio(signals.groups, self.bounds) - 1e-6)
        ratio, allocation = self.policy.decide(signals, wanted, self.pruning_ratio, limit)
        keeps = keep_counts(signals.groups, allocation, ratio, self.bounds)
        return self._plan(signals, keeps, wanted)

    def measure(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        calibration: Calibration | None = None,
        say: Say | None = None,
    ) -> Signals:
        """The model's signals: those at hand if they were measured on it with these weights, else measured now."""
        if self.signals is None or model_digest(model, self.signals.groups) != self.signals.digest:
            self.signals = measure_signals(model, calibration, processor=processor, scorer=self.scorer, progress=say)
        return self.signals

    def fit(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        settings: FitSettings | None = None,
        *,
        folder: str | Path | None = None,
        processor: Any = None,
        calibration: Calibration | None = None,
        progress: bool = True,
        say: Say | None = None,
    ) -> FitResult:
        """Train the policy by plan-level GRPO on `evaluator`; afterwards `plan` and `front` draw on what was learned.

        Args:
            model: masked while plans are evaluated, otherwise left alone.
            evaluator: model -> {"utility": ..., "robustness": ...}, higher = better, the same data at every call.
            settings: how many plans, how they are drawn, the seed.
            folder: for checkpoint and archive. A fit that was interrupted, by ctrl-C or kill -9, goes on from there and
                ends as if it had not been. None: nothing is kept.
            progress: show a progress bar.

        Raises:
            CheckpointError: the folder holds a fit with other settings or is damaged.
        """
        settings = settings or FitSettings()
        signals = self.measure(model, processor=processor, calibration=calibration, say=say)

        def reward(keeps: tuple[int, ...]) -> Reward:
            return measure(model, self._plan(signals, keeps, None), evaluator, signals)

        everything = measure(model, self._plan(signals, tuple(g.width for g in signals.groups), None), evaluator, signals)
        dense = {"utility": everything.utility, "robustness": everything.robustness}
        policy = copy.deepcopy(self.policy)  # an interrupted fit leaves the planner as it was
        trainer = Trainer(policy, signals, reward, settings, pruning_ratio=self.pruning_ratio, bounds=self.bounds,
                          folder=Path(folder) if folder is not None else None, dense=dense)  # fmt: skip
        history = _run(trainer, settings, progress)
        self.policy, self.archive = policy, trainer.archive
        return FitResult(steps=trainer.step, evaluations=len(trainer.archive), hypervolume=trainer.archive.hypervolume(),
                         history=tuple(history), folder=trainer.folder)  # fmt: skip

    def front(self) -> list[FrontPlan]:
        """The non-dominated plans among all that `fit` evaluated, by pruning_ratio, each with its measured reward.

        Raises:
            PlanError: the planner was not fitted.
        """
        if self.signals is None or not len(self.archive):
            raise PlanError(
                "The front is read from the archive of a fit: call fit(model, evaluator), or load a fitted planner."
            )
        signals = self.signals
        return [FrontPlan(plan=self._plan(signals, r.keeps, None), reward=r.reward) for r in self.archive.front()]

    def _plan(self, signals: Signals, keeps: tuple[int, ...], preference: Preference | None) -> PruningPlan:
        return plan_from_counts(signals.groups, keeps, signals.scores, scorer=signals.scorer,
                                preference=preference.as_tuple() if preference else None)  # fmt: skip

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write preference, policy, signals and archive to the folder `path`, whole or not at all."""
        with new_folder(path, overwrite) as folder:
            header = _Header(
                preference=self.preference.as_tuple(), pruning_ratio=self.pruning_ratio, round_to=self.bounds.round_to,
                min_keep=self.bounds.min_keep if isinstance(self.bounds.min_keep, float | int) else dict(self.bounds.min_keep),
                policy_width=self.policy.width, scorer=self.scorer.name if self.scorer else None,
                signals=_SignalsHeader.of(self.signals) if self.signals else None,
            )  # fmt: skip
            write_atomic(folder / "planner.json", header.model_dump_json(indent=1))
            safetensors.torch.save_file(self.policy.state_dict(), folder / "policy.safetensors")
            if self.signals:
                safetensors.torch.save_file(_signal_tensors(self.signals), folder / "signals.safetensors")
            archive = Archive(folder / ARCHIVE)
            archive.append(self.archive.records)

    @classmethod
    def load(cls, path: str | Path) -> "HiPPPlanner":
        """The planner that `save` wrote.

        Raises:
            CheckpointError: the folder is missing, incomplete or damaged.
        """
        folder = Path(path)
        try:
            header = _Header.model_validate_json((folder / "planner.json").read_bytes())
            policy = new_policy(width=header.policy_width)
            policy.load_state_dict(safetensors.torch.load_file(folder / "policy.safetensors"))
            tensors = safetensors.torch.load_file(folder / "signals.safetensors") if header.signals else {}
            utility, robustness, compression = header.preference
            planner = cls(Preference(utility, robustness, compression), pruning_ratio=header.pruning_ratio, policy=policy,
                          scorer=_scorer(header.scorer),
                          bounds=Bounds(round_to=header.round_to, min_keep=header.min_keep))  # fmt: skip
            planner.signals = header.signals.build(tensors) if header.signals else None
        except (OSError, ValidationError, safetensors.SafetensorError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"{folder} is not a complete planner folder: {error}") from None
        if (folder / ARCHIVE).exists():
            planner.archive.append(Archive(folder / ARCHIVE).records)
        return planner


def _run(trainer: Trainer, settings: FitSettings, progress: bool) -> list[float]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("plans"),
        TimeRemainingColumn(),
    ]
    per_step = settings.evaluations // max(settings.steps, 1)
    if trainer.pruning_ratio is not None:
        per_step //= settings.budgets
    history = []
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("fit", total=settings.steps * per_step, completed=trainer.step * per_step)
        while trainer.step < settings.steps:
            trainer.run_step(lambda: bar.advance(task))
            history.append(trainer.archive.hypervolume())
            bar.update(task, description=f"fit, hypervolume {history[-1]:.4f}")
    return history


def _scorer(name: str | None) -> Scorer | None:
    if name is not None and name not in scorers.__all__:
        raise KeyError(f"the scorer {name} is not one of hipp_ext.scorers; make the planner with scorer= again")
    return None if name is None else getattr(scorers, name)()


class _GroupFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tower: Tower
    layer: int
    kind: Kind
    width: int
    producers: tuple[str, ...]
    rows: tuple[int, ...]
    consumer: str
    columns: int
    unit_parameters: int
    unit_flops: int

    def build(self) -> Group:
        return Group(**dict(self))


class _SignalsHeader(BaseModel):
    model_config = ConfigDict(extra="forbid")
    groups: list[_GroupFile]
    scorer: str
    digest: str
    calibration: str

    @classmethod
    def of(cls, signals: Signals) -> "_SignalsHeader":
        return cls(groups=[_GroupFile(**asdict(g)) for g in signals.groups], scorer=signals.scorer, digest=signals.digest,
                   calibration=signals.calibration)  # fmt: skip

    def build(self, tensors: dict[str, torch.Tensor]) -> Signals:
        groups = tuple(g.build() for g in self.groups)
        return Signals(
            groups=groups, scorer=self.scorer, digest=self.digest, calibration=self.calibration,
            sensitivity=tensors["sensitivity"], visual=tensors["visual"],
            scores={g.name: tensors[f"scores.{g.name}"] for g in groups},
            flow_shares={g.name: tensors[f"flow_shares.{g.name}"] for g in groups},
        )  # fmt: skip


class _Header(BaseModel):
    """Contents of planner.json."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    preference: tuple[float, float, float]
    pruning_ratio: float | None
    round_to: int
    min_keep: float | dict[str, float]
    policy_width: int
    scorer: str | None
    signals: _SignalsHeader | None


def _signal_tensors(signals: Signals) -> dict[str, torch.Tensor]:
    tensors = {"sensitivity": signals.sensitivity, "visual": signals.visual}
    for part in ("scores", "flow_shares"):
        tensors |= {f"{part}.{n}": t for n, t in getattr(signals, part).items()}
    return {k: v.contiguous() for k, v in tensors.items()}
