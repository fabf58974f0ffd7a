"""Scorers: calibration batches -> one score per unit, higher = keep. One paper, one file."""

import dataclasses

from hipp_ext.scorers.base import Scorer
from hipp_ext.scorers.expert_use import ExpertUse
from hipp_ext.scorers.flap import FLAP
from hipp_ext.scorers.magnitude import Magnitude
from hipp_ext.scorers.mrs import MRS
from hipp_ext.scorers.synflow import SynFlow
from hipp_ext.scorers.taylor import Taylor
from hipp_ext.scorers.visual_sensitivity import VisualSensitivity
from hipp_ext.scorers.wanda_sp import WandaSP

SCORERS: dict[str, type[Scorer]] = {
    "wanda_sp": WandaSP,
    "flap": FLAP,
    "taylor": Taylor,
    "magnitude": Magnitude,
    "visual": VisualSensitivity,
    "mrs": MRS,
    "synflow": SynFlow,
    "expert_use": ExpertUse,
}


def says_all(scorer: Scorer) -> bool:
    """Whether all that the scores depend on is in `scorer.name`: it is one of SCORERS, and its
    settings are plain values or such scorers.
    """
    values = [getattr(scorer, f.name) for f in dataclasses.fields(scorer)]  # type: ignore[arg-type]
    return type(scorer) in SCORERS.values() and all(
        v is None or isinstance(v, str | int | float) or (isinstance(v, Scorer) and says_all(v))
        for v in values
    )


__all__ = [
    "FLAP",
    "MRS",
    "SCORERS",
    "ExpertUse",
    "Magnitude",
    "Scorer",
    "SynFlow",
    "Taylor",
    "VisualSensitivity",
    "WandaSP",
    "says_all",
]
