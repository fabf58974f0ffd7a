"""The fields of what `hipp latency` writes that a report uses, with strict types and bounds. The
files are untrusted, as in `record_types`.
"""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from hipp_ext.evals.record_types import Count, Made, Strict

MAX_MODELS = 64  # in one report or latency measurement, because each makes the figures taller

_Measured = Annotated[float, Field(ge=1e-9, le=1e15, allow_inf_nan=False)]
_Rounds = Annotated[list[_Measured], Field(min_length=1, max_length=10_000)]


def _nan_is_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


# Where the system does not tell how much memory a process takes, it is NaN.
_Memory = Annotated[_Measured | None, BeforeValidator(_nan_is_none)]


class _Ratio(Strict):
    median: _Measured
    least: _Measured | None = None
    most: _Measured | None = None
    n: Count | None = None
    low: _Measured | None = None
    high: _Measured | None = None


class _Median(Strict):
    median: _Measured


class _Spread(_Median):
    low: _Measured
    high: _Measured


class _Faster(Strict):
    prefill_speedup: _Ratio | None = None
    decode_speedup: _Ratio | None = None

    @model_validator(mode="after")
    def _both(self) -> "_Faster":
        if (self.prefill_speedup is None) != (self.decode_speedup is None):
            raise ValueError("prefill_speedup and decode_speedup go together")
        return self


class _Cost(_Faster):
    parameters: Annotated[int, Field(ge=1, le=10**15)]
    prefill_gflops: _Measured
    prefill_ms: _Spread
    decode_ms: _Spread
    weights_mib: _Measured
    peak_mib: _Measured


class _Load(Strict):
    rows: Count
    repeats: Count
    warmup: Count
    seed: int | None = None
    quick: bool = False


class Latency(Strict):
    """A result of `hipp latency`."""

    command: str
    date: str | None = None
    versions: dict[str, str] | None = None
    device: str
    threads: Count
    load: _Load
    models: Annotated[dict[str, _Cost], Field(min_length=1, max_length=MAX_MODELS)]


class _Serving(Strict):
    runtime: str
    weights: str
    tokens: Count
    new_tokens: Count
    repeats: Count
    rounds: Count
    threads: Count
    seed: int | None = None
    quick: bool = False


class _Served(_Faster):
    prefill_ms: _Rounds
    decode_ms: _Rounds
    memory_mib: Annotated[list[_Memory], Field(max_length=10_000)]


class Served(Made):
    """A result of `hipp latency --runtime`."""

    command: str | None = None
    serving: _Serving
    models: Annotated[dict[str, _Served], Field(min_length=1, max_length=MAX_MODELS)]
