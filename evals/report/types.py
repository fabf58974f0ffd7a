"""The fields of summary.json and of CHAIR's scores.json that a report uses, with strict types and
bounds. The files are untrusted, as in `record_types`.
"""

from typing import Annotated

from pydantic import Field, model_validator

from hipp_ext.evals.record_types import Count, Made, Percent, Record, Strict
from hipp_ext.evals.report.timing_types import MAX_MODELS

_Finite = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class _Captions(Strict):
    image: list[str]
    named: list[Count]
    wrong: list[Count]
    found: list[Count]
    there: list[Count]

    @model_validator(mode="after")
    def _one_length(self) -> "_Captions":
        if len({len(own) for own in self.__dict__.values()}) > 1:
            raise ValueError("the lists have different lengths")
        return self


class Chair(Strict):
    """A scores.json of `hipp chair`."""

    model: str
    model_hash: str
    data: str
    n: Count
    images: Count
    chair_i: Percent
    chair_i_se: Percent | None
    chair_s: Percent
    chair_s_se: Percent | None
    recall: Percent
    recall_se: Percent | None
    silent: Percent
    mentions: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    settings: dict[str, str | int | float | bool | None]
    counts: _Captions | None = None
    made: Made | None = None
    command: str | None = None


class _Reward(Strict):
    utility: _Finite
    robustness: _Finite
    compression: _Finite
    utility_se: _Finite = 0.0
    robustness_se: _Finite = 0.0


class _Entry(Strict):
    name: str
    preference: str | None
    plan: str | None
    reward: _Reward | None
    parameters: Count | None
    records: dict[str, Record]


class Summary(Strict):
    """A summary.json of `hipp demo`."""

    entries: Annotated[list[_Entry], Field(max_length=MAX_MODELS)]
    commands: list[str]
    seeds: list[str]
    planner: str | None
