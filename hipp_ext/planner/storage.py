"""A planner as a folder: JSON for what it is, safetensors for policy and signals, JSONL for the archive."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hipp_ext import scorers
from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError, CheckpointError, PlanError, PreferenceError
from hipp_ext.files import new_folder, write_atomic
from hipp_ext.groups import Group
from hipp_ext.planner.archive import Archive
from hipp_ext.planner.cost import Cost, CostKind
from hipp_ext.planner.experience import Experience
from hipp_ext.planner.fit_folder import ARCHIVE
from hipp_ext.planner.policy import Policy, new_policy
from hipp_ext.planner.state import FEATURES, Signals
from hipp_ext.preference import Preference
from hipp_ext.scorers import MRS, Scorer

HEADER, POLICY, SIGNALS = "planner.json", "policy.safetensors", "signals.safetensors"
DAMAGE = (OSError, ValidationError, safetensors.SafetensorError, RuntimeError, KeyError, PreferenceError, BudgetError)


@dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """What a planner's folder holds; see `HiPPPlanner` for each."""

    preference: Preference
    pruning_ratio: float | None
    bounds: Bounds
    scorer: Scorer | None
    mrs: MRS | None
    policy: Policy
    signals: Signals | None
    experience: Experience


def write_planner(path: str | Path, saved: Saved, overwrite: bool) -> None:
    """Write the folder `path`, whole or not at all."""
    signals, experience = saved.signals, saved.experience
    header = Header(
        preference=saved.preference.as_tuple(), pruning_ratio=saved.pruning_ratio, round_to=saved.bounds.round_to,
        min_keep=saved.bounds.min_keep, policy_width=saved.policy.width,
        scorer=saved.scorer.name if saved.scorer else None, mrs=saved.mrs.name if saved.mrs else None,
        signals=SignalsHeader.of(signals) if signals else None, fitted_on=experience.ranking,
        plans=len(experience.archive), cost=experience.cost.kind if experience.cost else None, dense=experience.dense,
        evaluator=experience.evaluator,
    )  # fmt: skip
    with new_folder(path, overwrite) as folder:
        write_atomic(folder / HEADER, header.model_dump_json(indent=1))
        safetensors.torch.save_file(saved.policy.state_dict(), folder / POLICY)
        if signals:
            table = {"cost": experience.cost.table.contiguous()} if experience.cost else {}
            safetensors.torch.save_file(signal_tensors(signals) | table, folder / SIGNALS)
        Archive(folder / ARCHIVE).append(experience.archive.records)


def read_planner(folder: Path, scorer: Scorer | None, mrs: MRS | None) -> Saved:
    """What `write_planner` wrote; scorers as for `HiPPPlanner.load`.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
        PlanError: a scorer has to be given, or another one is.
    """
    try:
        header = Header.model_validate_json((folder / HEADER).read_bytes())
        scorer, mrs = scorer_called(header.scorer, scorer, "scorer"), scorer_called(header.mrs, mrs, "mrs")
        policy = new_policy(width=header.policy_width, features=FEATURES + (mrs is not None))
        policy.load_state_dict(safetensors.torch.load_file(folder / POLICY))
        tensors = safetensors.torch.load_file(folder / SIGNALS) if header.signals else {}
        signals = header.signals.build(tensors) if header.signals else None
        cost = Cost(kind=header.cost, table=tensors["cost"]) if header.cost else None
        preference, bounds = Preference(*header.preference), Bounds(round_to=header.round_to, min_keep=header.min_keep)
    except DAMAGE as error:
        raise CheckpointError(f"{folder} is not a complete planner folder of this version: {error}") from None
    records = Archive(folder / ARCHIVE).records
    if header.plans != len(records):
        raise CheckpointError(
            f"{folder} is not a complete planner folder: {ARCHIVE} holds {len(records)} of {header.plans} plans."
        )
    experience = Experience(
        records=records, ranking=header.fitted_on, cost=cost, dense=header.dense, evaluator=header.evaluator
    )
    return Saved(
        preference=preference, pruning_ratio=header.pruning_ratio, bounds=bounds, scorer=scorer, mrs=mrs, policy=policy,
        signals=signals, experience=experience,
    )  # fmt: skip


def scorer_called(name: str | None, given: Any, argument: str) -> Any:
    """The scorer that a planner was saved with: one of ours by its name alone, any other as it is `given` again.

    Raises:
        PlanError: it has to be given, or another one is.
    """
    if given is not None:
        if given.name != name:
            raise PlanError(f"The planner was saved with {argument}={name}, not {given.name}.")
        return given
    if name is not None and name not in scorers.__all__:
        raise PlanError(f"The planner was saved with {argument}={name}: give it again, HiPPPlanner.load(path, {argument}=...).")
    return None if name is None else getattr(scorers, name)()


class SignalsHeader(BaseModel):
    model_config = ConfigDict(extra="forbid")
    groups: tuple[Group, ...]
    scorer: str
    digest: str
    calibration: str

    @classmethod
    def of(cls, signals: Signals) -> "SignalsHeader":
        return cls(groups=signals.groups, scorer=signals.scorer, digest=signals.digest, calibration=signals.calibration)

    def build(self, tensors: Mapping[str, torch.Tensor]) -> Signals:
        return Signals(
            groups=self.groups, scorer=self.scorer, digest=self.digest, calibration=self.calibration,
            sensitivity=tensors["sensitivity"], visual=tensors["visual"],
            scores={g.name: tensors[f"scores.{g.name}"] for g in self.groups},
            flow_shares={g.name: tensors[f"flow_shares.{g.name}"] for g in self.groups}, mrs=tensors.get("mrs"),
        )  # fmt: skip


class Header(BaseModel):
    """Contents of planner.json.

    Attributes:
        fitted_on: the `Signals.ranking` that the archive's plans were evaluated with; None: there are none.
        plans: how many the archive holds.
        cost: what the fit rewarded; its table lies beside the signals. None: there was no fit.
        dense: what the fit's evaluator said of the dense model.
        evaluator: its digest; None: it has none.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[4] = 4
    preference: tuple[float, float, float]
    pruning_ratio: Annotated[float, Field(ge=0, lt=1)] | None
    round_to: int
    min_keep: float | Mapping[str, float]
    policy_width: int
    scorer: str | None
    mrs: str | None
    signals: SignalsHeader | None
    fitted_on: str | None
    plans: int
    cost: CostKind | None
    dense: dict[str, float] | None
    evaluator: str | None


def signal_tensors(signals: Signals) -> dict[str, torch.Tensor]:
    tensors = {"sensitivity": signals.sensitivity, "visual": signals.visual}
    if signals.mrs is not None:
        tensors["mrs"] = signals.mrs
    for part in ("scores", "flow_shares"):
        tensors |= {f"{part}.{n}": t for n, t in getattr(signals, part).items()}
    return {k: v.contiguous() for k, v in tensors.items()}
