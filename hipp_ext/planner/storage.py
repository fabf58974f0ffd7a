"""A planner as a folder: JSON for what it is, safetensors for policy and signals, JSONL for the archive."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from hipp_ext import scorers
from hipp_ext.groups import Group
from hipp_ext.planner.state import Signals
from hipp_ext.scorers import Scorer


def scorer_called(name: str | None) -> Scorer | None:
    if name is not None and name not in scorers.__all__:
        raise KeyError(f"the scorer {name} is not one of hipp_ext.scorers; make the planner with scorer= again")
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
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    preference: tuple[float, float, float]
    pruning_ratio: float | None
    round_to: int
    min_keep: float | dict[str, float]
    policy_width: int
    scorer: str | None
    mrs: str | None = None
    signals: SignalsHeader | None
    fitted_on: str | None = None


def signal_tensors(signals: Signals) -> dict[str, torch.Tensor]:
    tensors = {"sensitivity": signals.sensitivity, "visual": signals.visual}
    if signals.mrs is not None:
        tensors["mrs"] = signals.mrs
    for part in ("scores", "flow_shares"):
        tensors |= {f"{part}.{n}": t for n, t in getattr(signals, part).items()}
    return {k: v.contiguous() for k, v in tensors.items()}
