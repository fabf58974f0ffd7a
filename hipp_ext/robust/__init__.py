"""Robust pruning (MRPF) of image classifiers, from data to evaluation.

data = load_data("digits")
result = mrpf(model, data, MRPFSettings(pruning_ratio=0.75), loss=TRADES(epsilon=0.1))
evaluate(result.model, data.test, 10, epsilon=0.1).worst
"""

from hipp_ext.attacks import APGD, PGD, Ball
from hipp_ext.budget import Bounds
from hipp_ext.image_attacks import ImageAttack
from hipp_ext.robust.allocation import allocate
from hipp_ext.robust.costs import channel_costs
from hipp_ext.robust.data import ImageData, Images
from hipp_ext.robust.evaluation import RobustReport, evaluate
from hipp_ext.robust.image_sets import load_data
from hipp_ext.robust.losses import AWP, MART, PGDAT, TRADES
from hipp_ext.robust.models import build_model
from hipp_ext.robust.pipeline import MRPFResult, MRPFSettings, mrpf
from hipp_ext.robust.scoring import ScoreSettings, score
from hipp_ext.robust.training import TrainSettings, train

__all__ = [
    "APGD",
    "AWP",
    "MART",
    "PGD",
    "PGDAT",
    "TRADES",
    "Ball",
    "Bounds",
    "ImageAttack",
    "ImageData",
    "Images",
    "MRPFResult",
    "MRPFSettings",
    "RobustReport",
    "ScoreSettings",
    "TrainSettings",
    "allocate",
    "build_model",
    "channel_costs",
    "evaluate",
    "load_data",
    "mrpf",
    "score",
    "train",
]
