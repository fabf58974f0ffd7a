"""How long the blocks of a model take in the runtime that serves it, by their widths."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hipp_ext.errors import BudgetError, DataError
from hipp_ext.files import write_atomic
from hipp_ext.files.untrusted import read_plain, shown
from hipp_ext.groups import Group

Phase = Literal["decode", "prefill"]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Width = Annotated[int, Field(ge=1)]
BYTES = 1 << 20


def _ascending(entries: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if any(a[0] >= b[0] for a, b in itertools.pairwise(entries)):
        raise ValueError("units must be ascending")
    return entries


Entries = Annotated[
    list[tuple[Width, Milliseconds]], Field(min_length=2), AfterValidator(_ascending)
]


class Times(BaseModel):
    """Times of one phase [ms].

    Attributes:
        rest_ms: everything but the layers: embeddings, head, vision tower, the runtime itself.
        blocks: kind of group -> (units, time of one block with so many), units ascending. The last
            is the dense width.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    rest_ms: Milliseconds
    blocks: dict[str, Entries]

    def of_block(self, kind: str, units: np.ndarray) -> np.ndarray:
        """Times of blocks with `units` units; between two entries linear, and so below the first.

        A dropped block takes no time.
        """
        widths, times = np.array(self.blocks[kind]).T
        below = times[0] + (units - widths[0]) * (times[1] - times[0]) / (widths[1] - widths[0])
        inside = np.interp(units, widths, times)
        return np.where(
            units == 0, 0.0, np.where(units < widths[0], np.maximum(below, 0.0), inside)
        )


class LatencyTable(BaseModel):
    """Measured times of a model's blocks; `hipp latency --per-block` writes one.

    Attributes:
        runtime: what was measured, such as "llama.cpp".
        conditions: device, threads, prompt length and so on.
        layers: number of layers of the dense model.
        decode: times of one further token.
        prefill: times of the prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    runtime: str
    conditions: dict[str, str | int | float]
    layers: Width
    decode: Times
    prefill: Times

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_atomic(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """The table in a file.

        Raises:
            DataError: there is no such file, or it is no latency table.
        """
        data = read_plain(path, BYTES, "latency table")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"{shown(path)} is no latency table of `hipp latency --per-block`: {where}: "
                f"{first['msg']}"
            ) from None

    def check(self, groups: Sequence[Group]) -> None:
        """Raise BudgetError unless the table was measured on a model with these groups."""
        layers = len({(g.tower, g.layer) for g in groups})
        widths = {g.kind: g.width for g in groups}
        known = {kind: entries[-1][0] for kind, entries in self.decode.blocks.items()}
        if layers != self.layers or any(g.width != known.get(g.kind) for g in groups):
            raise BudgetError(
                f"The latency table was measured on a model of {self.layers} layers with {known} "
                f"units; this one has {layers} layers with {widths}."
            )

    def dense_ms(self, phase: Phase) -> float:
        """Time of the dense model [ms]."""
        times: Times = getattr(self, phase)
        return times.rest_ms + self.layers * sum(e[-1][1] for e in times.blocks.values())

    def latency(
        self, groups: Sequence[Group], keep_counts: Sequence[int] | np.ndarray, phase: Phase
    ) -> float:
        """Expected time of a plan [ms]: the rest, and the blocks it keeps.

        Args:
            groups: groups of the dense model.
            keep_counts: number of units that stay in each group.
            phase: "decode": one further token; "prefill": the prompt of the conditions.
        """
        times: Times = getattr(self, phase)
        counts = np.asarray(keep_counts)
        kinds = np.array([g.kind for g in groups])
        blocks = sum(float(times.of_block(k, counts[kinds == k]).sum()) for k in times.blocks)
        return times.rest_ms + blocks


@dataclass(frozen=True, kw_only=True)
class Run:
    """The measured time of one version of a model, whose layers are all alike.

    Attributes:
        widths: kind of group -> units in every layer.
        layers: number of layers.
        ms: its time.
    """

    widths: Mapping[str, int]
    layers: int
    ms: float


def block_times(runs: Sequence[Run]) -> Times:
    """The times of blocks that explain the times of whole models.

    What a layer takes in all follows from the run with fewer layers, and what its units take from
    the runs with narrower blocks. The remainder of a layer, which no unit explains (norms, kernel
    launches), is divided evenly among its blocks.

    Args:
        runs: the dense model's first; then one with fewer layers, and for every kind one or more
            with narrower blocks of that kind alone.
    """
    dense, *others = runs
    (fewer,) = (run for run in others if run.layers < dense.layers)
    layer = max(0.0, (dense.ms - fewer.ms) / (dense.layers - fewer.layers))
    saved: dict[str, dict[int, float]] = {kind: {} for kind in dense.widths}
    for run in others:
        for kind, width in run.widths.items():
            if width < dense.widths[kind]:
                saved[kind][width] = (dense.ms - run.ms) / dense.layers
    slopes = {
        kind: max(0.0, _slope([(dense.widths[kind] - w, ms) for w, ms in points.items()]))
        for kind, points in saved.items()
    }
    units = {kind: slopes[kind] * width for kind, width in dense.widths.items()}
    remainder = max(0.0, layer - sum(units.values())) / len(units)
    blocks = {}
    for kind, points in saved.items():
        whole = units[kind] + remainder
        entries = [(w, max(0.0, whole - ms)) for w, ms in sorted(points.items())]
        blocks[kind] = [*entries, (dense.widths[kind], whole)]
    explained = dense.layers * sum(entries[-1][1] for entries in blocks.values())
    return Times(rest_ms=max(0.0, dense.ms - explained), blocks=blocks)


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Slope of the line through the origin, least squares."""
    x, y = np.array(points, dtype=np.float64).T
    return float(x @ y / (x @ x))
