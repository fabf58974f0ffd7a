"""A planner as a folder: JSON for what it is, safetensors for policy and signals, JSONL for the archive."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hipp_ext import scorers
from hipp_ext.budget import Bounds
from hipp_ext.calibration import TASKS
from hipp_ext.errors import BudgetError, CheckpointError, PlanError, PreferenceError
from hipp_ext.files import content_hash, new_folder, write_atomic
from hipp_ext.files.sealed import seal, text_digest, unseal
from hipp_ext.groups import Group
from hipp_ext.plan import MAX_GROUPS, MAX_UNITS
from hipp_ext.planner.archive import Archive, fit_groups
from hipp_ext.planner.cost import CostKind, read_cost
from hipp_ext.planner.experience import Experience
from hipp_ext.planner.fit_folder import ARCHIVE
from hipp_ext.planner.policy import Policy, new_policy
from hipp_ext.planner.state import FEATURES, Signals
from hipp_ext.preference import Preference
from hipp_ext.scorers import MRS, Scorer
from hipp_ext.sensitivity.measured import PRUNE_LEVELS

HEADER, POLICY, SIGNALS = "planner.json", "policy.safetensors", "signals.safetensors"
MAX_HEADER = 16 << 20  # bytes
DAMAGE = (
    CheckpointError,
    OSError,
    ValidationError,
    RuntimeError,
    KeyError,
    PreferenceError,
    BudgetError,
)


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
        preference=saved.preference.as_tuple(),
        pruning_ratio=saved.pruning_ratio,
        round_to=saved.bounds.round_to,
        min_keep=saved.bounds.min_keep,
        policy_width=saved.policy.width,
        scorer=saved.scorer.name if saved.scorer else None,
        mrs=saved.mrs.name if saved.mrs else None,
        signals=SignalsHeader.of(signals) if signals else None,
        fitted_on=experience.ranking,
        plans=len(experience.archive),
        cost=experience.cost.kind if experience.cost else None,
        dense=experience.dense,
        evaluator=experience.evaluator,
    )
    with new_folder(path, overwrite) as folder:
        # Each file knows its own digest, and the header those of the others: a planner is all of one piece.
        header.files[POLICY] = _write(folder / POLICY, saved.policy.state_dict())
        if signals:
            table = {"cost": experience.cost.table.contiguous()} if experience.cost else {}
            header.files[SIGNALS] = _write(folder / SIGNALS, signal_tensors(signals) | table)
        header.sha256 = header.digest()
        write_atomic(folder / HEADER, header.model_dump_json(indent=1))
        Archive(folder / ARCHIVE).append(experience.archive.records)


def read_planner(folder: Path, scorer: Scorer | None, mrs: MRS | None) -> Saved:
    """What `write_planner` wrote; scorers as for `HiPPPlanner.load`.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
        PlanError: a scorer has to be given, or another one is.
    """
    try:
        header = _read_header(folder / HEADER)
        scorer, mrs = (
            scorer_called(header.scorer, scorer, "scorer"),
            scorer_called(header.mrs, mrs, "mrs"),
        )
        policy = new_policy(width=header.policy_width, features=FEATURES + (mrs is not None))
        policy.load_state_dict(_tensors(folder, POLICY, header))
        tensors = _tensors(folder, SIGNALS, header) if header.signals else {}
        signals = header.signals.build(tensors) if header.signals else None
        cost = (
            read_cost(header.cost, tensors["cost"], len(signals.groups))
            if header.cost and signals
            else None
        )
        preference, bounds = (
            Preference(*header.preference),
            Bounds(round_to=header.round_to, min_keep=header.min_keep),
        )
    except DAMAGE as error:
        raise CheckpointError(
            f"{folder} is not a complete planner folder of this version: {str(error)[:1000]}"
        ) from None
    records = Archive(folder / ARCHIVE).records
    if header.plans != len(records):
        raise CheckpointError(
            f"{folder} is not a complete planner folder: {ARCHIVE} holds {len(records)} of {header.plans} plans."
        )
    if not fit_groups(records, signals.groups if signals else ()):
        raise CheckpointError(
            f"{folder} is not a complete planner folder: {ARCHIVE} holds plans of another model."
        )
    experience = Experience(
        records=records,
        ranking=header.fitted_on,
        cost=cost,
        dense=header.dense,
        evaluator=header.evaluator,
    )
    return Saved(
        preference=preference,
        pruning_ratio=header.pruning_ratio,
        bounds=bounds,
        scorer=scorer,
        mrs=mrs,
        policy=policy,
        signals=signals,
        experience=experience,
    )


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a sealed file; returns its digest."""
    content = seal(tensors)
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def _tensors(folder: Path, name: str, header: "Header") -> dict[str, torch.Tensor]:
    tensors, _ = unseal(folder / name)
    if content_hash(folder / name) != header.files.get(name):
        raise CheckpointError(f"{name} is not the file that {HEADER} names.")
    return tensors


def _read_header(path: Path) -> "Header":
    if not path.is_file() or path.stat().st_size > MAX_HEADER:
        raise CheckpointError(f"{path} is missing, or no file of a planner.")
    header = Header.model_validate_json(path.read_bytes())
    if header.sha256 != header.digest():
        raise CheckpointError(f"{path.name} does not have the digest that it was written with.")
    return header


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
        raise PlanError(
            f"The planner was saved with {argument}={name}: give it again, HiPPPlanner.load(path, {argument}=...)."
        )
    return None if name is None else getattr(scorers, name)()


def _check_groups(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """What numbers of a file could make too much of."""
    for g in groups:
        if not (
            1 <= g.width <= MAX_UNITS
            and 0 <= g.layer < 2**31
            and 1 <= g.columns < 2**31
            and g.unit_flops < 2**62
        ):
            raise ValueError(f"{g.name} is no group of a model")
    if len({g.name for g in groups}) != len(groups) or not groups:
        raise ValueError("there are no groups, or two of a name")
    if min(g.unit_parameters for g in groups) < 1 or sum(g.parameters for g in groups) >= 2**62:
        raise ValueError("no model has so many parameters")
    return groups


class SignalsHeader(BaseModel):
    model_config = ConfigDict(extra="forbid")
    groups: Annotated[
        tuple[Group, ...], Field(max_length=MAX_GROUPS), AfterValidator(_check_groups)
    ]
    scorer: str
    digest: str
    calibration: str

    @classmethod
    def of(cls, signals: Signals) -> "SignalsHeader":
        return cls(
            groups=signals.groups,
            scorer=signals.scorer,
            digest=signals.digest,
            calibration=signals.calibration,
        )

    def build(self, tensors: Mapping[str, torch.Tensor]) -> Signals:
        """The signals.

        Raises:
            CheckpointError: they are of other shapes than the groups say, or hold what cannot have been measured.
        """
        signals = Signals(
            groups=self.groups,
            scorer=self.scorer,
            digest=self.digest,
            calibration=self.calibration,
            sensitivity=tensors["sensitivity"],
            visual=tensors["visual"],
            scores={g.name: tensors[f"scores.{g.name}"] for g in self.groups},
            flow_shares={g.name: tensors[f"flow_shares.{g.name}"] for g in self.groups},
            mrs=tensors.get("mrs"),
        )
        n, measured = (
            len(self.groups),
            {"sensitivity": signals.sensitivity, "visual": signals.visual},
        )
        shapes: dict[str, tuple[int, ...]] = {
            "sensitivity": (len(TASKS), n, len(PRUNE_LEVELS)),
            "visual": (n,),
            "mrs": (n,),
        }
        if signals.mrs is not None:
            measured["mrs"] = signals.mrs
        for g in self.groups:
            measured |= {
                f"scores.{g.name}": signals.scores[g.name],
                f"flow_shares.{g.name}": signals.flow_shares[g.name],
            }
            shapes |= {f"scores.{g.name}": (g.width,), f"flow_shares.{g.name}": (g.width,)}
        for name, values in measured.items():
            if (
                values.dtype != torch.float32
                or values.shape != shapes[name]
                or not bool(values.isfinite().all())
            ):
                raise CheckpointError(
                    f"{name} is no signal: {values.dtype} of shape {tuple(values.shape)}."
                )
            if name in ("sensitivity", "visual") and bool((values < 0).any()):
                raise CheckpointError(f"{name} is below zero.")
        return signals


class Header(BaseModel):
    """Contents of planner.json.

    Attributes:
        fitted_on: the `Signals.ranking` that the archive's plans were evaluated with; None: there are none.
        plans: how many the archive holds.
        cost: what the fit rewarded; its table lies beside the signals. None: there was no fit.
        dense: what the fit's evaluator said of the dense model.
        evaluator: its digest; None: it has none.
        files: SHA-256 of the files beside it.
        sha256: of the header without this field.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[5] = 5
    preference: tuple[float, float, float]
    pruning_ratio: Annotated[float, Field(ge=0, lt=1)] | None
    round_to: int
    min_keep: float | Mapping[str, float]
    policy_width: Annotated[int, Field(ge=1, le=4096)]
    scorer: str | None
    mrs: str | None
    signals: SignalsHeader | None
    fitted_on: str | None
    plans: int
    cost: CostKind | None
    dense: dict[str, float] | None
    evaluator: str | None
    files: dict[str, str] = {}
    sha256: str = ""

    def digest(self) -> str:
        """What `sha256` should say."""
        return text_digest(self.model_dump_json(exclude={"sha256"}))


def signal_tensors(signals: Signals) -> dict[str, torch.Tensor]:
    tensors = {"sensitivity": signals.sensitivity, "visual": signals.visual}
    if signals.mrs is not None:
        tensors["mrs"] = signals.mrs
    for part in ("scores", "flow_shares"):
        tensors |= {f"{part}.{n}": t for n, t in getattr(signals, part).items()}
    return {k: v.contiguous() for k, v in tensors.items()}
