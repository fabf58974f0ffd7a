"""A planner as a folder: JSON for what it is, safetensors for policy and signals, JSONL for the archive."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from hipp_ext import scorers
from hipp_ext.errors import PlanError
from hipp_ext.groups import Group
from hipp_ext.planner.cost import CostKind
from hipp_ext.planner.state import Signals


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
        fitted_on: digest of the model that the archive's plans were evaluated on; None: that of the signals.
        plans: how many the archive holds; None: not known.
        cost: what the fit rewarded; its table lies beside the signals. None: parameters.
        dense: what the fit's evaluator said of the dense model.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[2] = 2
    preference: tuple[float, float, float]
    pruning_ratio: float | None
    round_to: int
    min_keep: float | dict[str, float]
    policy_width: int
    scorer: str | None
    mrs: str | None = None
    signals: SignalsHeader | None
    fitted_on: str | None = None
    plans: int | None = None
    cost: CostKind | None = None
    dense: dict[str, float] | None = None


def signal_tensors(signals: Signals) -> dict[str, torch.Tensor]:
    tensors = {"sensitivity": signals.sensitivity, "visual": signals.visual}
    if signals.mrs is not None:
        tensors["mrs"] = signals.mrs
    for part in ("scores", "flow_shares"):
        tensors |= {f"{part}.{n}": t for n, t in getattr(signals, part).items()}
    return {k: v.contiguous() for k, v in tensors.items()}
