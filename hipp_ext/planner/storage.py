"""A planner as a folder: JSON for settings, safetensors for tensors, JSONL for plans."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hipp_ext import scorers
from hipp_ext.budget import Bounds
from hipp_ext.errors import CheckpointError, PlanError
from hipp_ext.files import content_hash, new_folder, write_atomic
from hipp_ext.files.sealed import seal, text_digest, unseal
from hipp_ext.files.untrusted import MAX_COMMAND
from hipp_ext.groups import AttentionUnit, ExpertUnit, Partial, Tower
from hipp_ext.planner.archive import Archive, fit_groups
from hipp_ext.planner.cost import CostKind
from hipp_ext.planner.fit import ARCHIVE
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.policy import new_policy
from hipp_ext.planner.signal_cache import read_signals, sealed_signals
from hipp_ext.planner.state import FEATURES
from hipp_ext.preference import Preference
from hipp_ext.scorers import MRS, Scorer
from hipp_ext.sensitivity.efforts import Effort

HEADER, POLICY, SIGNALS = "planner.json", "policy.safetensors", "signals.safetensors"
HISTORY = (
    "ranking",
    "cost",
    "dense",
    "evaluator",
    "command",
)  # fields of FitHistory beside its archive
MAX_HEADER_BYTES = 16 << 20


class Header(BaseModel):
    """Contents of planner.json; see `HiPPPlanner` and `FitHistory`.

    Attributes:
        plans: number of plans in the archive.
        files: SHA-256 of the tensor files beside it.
        sha256: SHA-256 of the header without this field.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    preference: tuple[float, float, float]
    pruning_ratio: Annotated[float, Field(ge=0, lt=1)] | None
    bounds: Bounds
    policy_width: Annotated[int, Field(ge=1, le=4096)]
    scorer: str | None
    effort: Effort
    attention_unit: AttentionUnit = "kv"
    expert_unit: ExpertUnit = "expert"
    towers: tuple[Tower, ...] = ("language",)
    partial: Partial = "refuse"
    mrs: str | None
    ranking: str | None
    plans: int
    cost: CostKind | None
    dense: dict[str, float] | None
    evaluator: str | None
    command: Annotated[str, Field(max_length=MAX_COMMAND)] | None = None
    files: dict[str, str] = {}
    sha256: str = ""

    def digest(self) -> str:
        """The right value of `sha256`."""
        return text_digest(self.model_dump_json(exclude={"sha256"}))


def write_planner(path: str | Path, planner: Any, overwrite: bool) -> None:
    """Write a HiPPPlanner to the folder `path`, whole or not at all."""
    history, files = planner.history, {POLICY: seal(planner.policy.state_dict())}
    if planner.signals:
        files[SIGNALS] = sealed_signals(planner.signals)
    header = Header(
        preference=planner.preference.as_tuple(),
        pruning_ratio=planner.pruning_ratio,
        bounds=planner.bounds,
        policy_width=planner.policy.width,
        scorer=planner.scorer and planner.scorer.name,
        effort=planner.effort,
        attention_unit=planner.attention_unit,
        expert_unit=planner.expert_unit,
        towers=planner.towers,
        partial=planner.partial,
        mrs=planner.mrs and planner.mrs.name,
        plans=len(history.archive),
        **{name: getattr(history, name) for name in HISTORY},
        # Each file has its own digest, and the header those of the others.
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
    header.sha256 = header.digest()
    with new_folder(path, overwrite) as folder:
        for name, content in files.items():
            write_atomic(folder / name, content)
        write_atomic(folder / HEADER, header.model_dump_json(indent=1))
        Archive(folder / ARCHIVE).append(history.archive.records)


def read_planner(
    new: Callable[..., Any], folder: Path, scorer: Scorer | None, mrs: MRS | None
) -> Any:
    """The planner that `write_planner` wrote.

    Args:
        new: HiPPPlanner.
        folder: folder of the planner.
        scorer: as for `HiPPPlanner.load`.
        mrs: as for `HiPPPlanner.load`.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
        PlanError: a scorer has to be given, or another one is.
    """
    try:
        header = _read_header(folder / HEADER)
        scorer = scorer_called(header.scorer, scorer, "scorer")
        mrs = scorer_called(header.mrs, mrs, "mrs")
        policy = new_policy(width=header.policy_width, features=FEATURES + (mrs is not None))
        policy.load_state_dict(unseal(_same(folder, POLICY, header))[0])
        planner = new(
            Preference(*header.preference),
            pruning_ratio=header.pruning_ratio,
            bounds=header.bounds,
            scorer=scorer,
            mrs=mrs,
            effort=header.effort,
            attention_unit=header.attention_unit,
            expert_unit=header.expert_unit,
            towers=header.towers,
            partial=header.partial,
            policy=policy,
        )
        if SIGNALS in header.files:
            planner.signals = read_signals(_same(folder, SIGNALS, header))
    except PlanError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a complete planner folder of this version: {str(error)[:1000]}"
        ) from None
    records, wrong = Archive(folder / ARCHIVE).records, ""
    if header.plans != len(records):
        wrong = f"{len(records)} of {header.plans} plans"
    elif not fit_groups(records, planner.signals.groups if planner.signals else ()):
        wrong = "plans of another model"
    if wrong:
        raise CheckpointError(
            f"{folder} is not a complete planner folder: {ARCHIVE} holds {wrong}."
        )
    planner.history = FitHistory(
        archive=Archive(records=records), **{name: getattr(header, name) for name in HISTORY}
    )
    return planner


def _same(folder: Path, name: str, header: Header) -> Path:
    """The file `name`, if it is the one that was written with the header."""
    if not (path := folder / name).is_file():
        raise CheckpointError(f"{name} is missing.")
    if content_hash(path) != header.files.get(name):
        raise CheckpointError(f"{name} is not the file that {HEADER} names.")
    return path


def _read_header(path: Path) -> Header:
    if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is missing, or no file of a planner.")
    header = Header.model_validate_json(path.read_bytes())
    if header.sha256 != header.digest():
        raise CheckpointError(f"{path.name} does not have the digest that it was written with.")
    return header


def scorer_called(name: str | None, given: Any, argument: str) -> Any:
    """The scorer that a planner was saved with: ours by its name alone, others as given again.

    Raises:
        PlanError: the scorer has to be given, or another one is.
    """
    if given is not None:
        if given.name != name:
            raise PlanError(f"The planner was saved with {argument}={name}, not {given.name}.")
        return given
    ours = {kind.__name__: kind for kind in scorers.SCORERS.values()}
    if name is not None and name not in ours:
        raise PlanError(
            f"The planner was saved with {argument}={name}: give it again, "
            f"HiPPPlanner.load(path, {argument}=...)."
        )
    return None if name is None else ours[name]()
