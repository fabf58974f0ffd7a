"""The fields of results.json, summary.json and latency.json that a report uses, with strict types
and bounds.

Such a file is untrusted: a text in place of a number would reach the page, an infinite number the
axis of a figure. Other fields are left out.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hipp_ext.errors import DataError

MAX_MODELS = 64  # in one report or latency measurement, because each makes the figures taller

_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_Measured = Annotated[float, Field(ge=1e-9, le=1e15, allow_inf_nan=False)]
_Finite = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=10**15)]


class Strict(BaseModel):
    """Base of what is read from such a file."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Choice(Strict):
    n: _Count = 0
    accuracy: _Percent
    accuracy_se: _Percent | None


class _YesNo(_Choice):
    f1: _Percent
    f1_se: _Percent | None
    yes_rate: _Percent
    yes_rate_se: _Percent | None


_Scores = dict[str, dict[str, Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None]]


class _Metrics(Strict):
    accuracy: dict[str, _Choice] | None = None
    vlmeval: dict[str, _YesNo] | None = None
    official: dict[str, Any] | None = None
    scores: dict[str, _Scores] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "_Metrics":
        pope = self.vlmeval is not None and self.official is not None
        if self.accuracy is None and self.scores is None and not pope:
            raise ValueError("accuracy is needed, or scores, or both vlmeval and official")
        return self


class Record(Strict):
    """A results.json of `vlmeval`."""

    model: str
    model_hash: str
    data: str
    data_hash: str
    n: _Count
    metrics: _Metrics
    settings: dict[str, str | int | float | bool | None]
    predictions: str
    command: str | None = None


class _Ratio(Strict):
    median: _Measured


class _Spread(_Ratio):
    low: _Measured
    high: _Measured


class _Cost(Strict):
    parameters: Annotated[int, Field(ge=1, le=10**15)]
    prefill_gflops: _Measured
    prefill_ms: _Spread
    decode_ms: _Spread
    weights_mib: _Measured
    peak_mib: _Measured
    prefill_speedup: _Ratio | None = None
    decode_speedup: _Ratio | None = None

    @model_validator(mode="after")
    def _both(self) -> "_Cost":
        if (self.prefill_speedup is None) != (self.decode_speedup is None):
            raise ValueError("prefill_speedup and decode_speedup go together")
        return self


class _Load(Strict):
    rows: _Count
    repeats: _Count
    warmup: _Count
    seed: int | None = None


class Latency(Strict):
    """A result of `hipp latency`."""

    command: str
    device: str
    threads: _Count
    load: _Load
    models: Annotated[dict[str, _Cost], Field(min_length=1, max_length=MAX_MODELS)]


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
    parameters: _Count | None
    records: dict[str, Record]


class Summary(Strict):
    """A summary.json of `hipp demo`."""

    entries: Annotated[list[_Entry], Field(max_length=MAX_MODELS)]
    commands: list[str]
    seeds: list[str]
    planner: str | None


def checked(kind: type[Strict], data: Any, wrong: str) -> dict[str, Any]:
    """The fields of `kind` that `data` has, as plain data.

    Raises:
        DataError: a field is missing, has another type or is out of bounds. The message is `wrong`
            and names the field.
    """
    try:
        return kind.model_validate(data).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise DataError(
            f"{wrong}: {'.'.join(map(str, first['loc']))[:200]!r}: {first['msg']}"
        ) from None
