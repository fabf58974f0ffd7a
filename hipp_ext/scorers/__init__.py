"""Scorers: calibration batches -> scores, one number per unit, higher = keep. One paper, one file."""

from hipp_ext.scorers.base import Scorer
from hipp_ext.scorers.flap import FLAP
from hipp_ext.scorers.magnitude import Magnitude
from hipp_ext.scorers.mrs import MRS
from hipp_ext.scorers.synflow import SynFlow
from hipp_ext.scorers.taylor import Taylor
from hipp_ext.scorers.visual_sensitivity import VisualSensitivity
from hipp_ext.scorers.wanda_sp import WandaSP

__all__ = [
    "FLAP",
    "MRS",
    "Magnitude",
    "Scorer",
    "SynFlow",
    "Taylor",
    "VisualSensitivity",
    "WandaSP",
]
