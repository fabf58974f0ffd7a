"""Allocators: groups, scores and a budget -> how many units of every group stay. One a file."""

from hipp_ext.allocators.base import Allocator
from hipp_ext.allocators.flap import FLAPAdaptive
from hipp_ext.allocators.global_threshold import GlobalThreshold
from hipp_ext.allocators.owl import OWL
from hipp_ext.allocators.sensitivity import Sensitivity
from hipp_ext.allocators.uniform import Uniform

ALLOCATORS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "global_threshold": GlobalThreshold,
    "flap": FLAPAdaptive,
    "owl": OWL,
    "sensitivity": Sensitivity,
}

__all__ = [
    "ALLOCATORS",
    "OWL",
    "Allocator",
    "FLAPAdaptive",
    "GlobalThreshold",
    "Sensitivity",
    "Uniform",
]
