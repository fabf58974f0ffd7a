"""What to keep where. A plan is data: it can be made on one machine, mailed, read, edited, diffed, applied on another.

JSON, one group a line; the kept units are written as ranges ("0-5,8"), which stay short and diff well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hipp_ext.errors import PlanError
from hipp_ext.files import require_new, write_atomic
from hipp_ext.groups import Kind, Tower

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PlanGroup:
    """One group of a plan: `keep` of `width` units stay, namely those in `kept` (sorted indices)."""

    tower: Tower
    layer: int
    kind: Kind
    width: int
    kept: tuple[int, ...]
    unit_parameters: int

    def __post_init__(self) -> None:
        kept = self.kept
        if not 1 <= len(kept) <= self.width:
            raise PlanError(f"{self.name} keeps {len(kept)} of {self.width} units: 1 to {self.width} must stay.")
        if any(b <= a for a, b in zip(kept, kept[1:], strict=False)) or kept[0] < 0 or kept[-1] >= self.width:
            raise PlanError(f"{self.name}: kept units must be distinct, sorted and below {self.width}: {_ranges(kept)}")

    @property
    def name(self) -> str:
        """Key of the group, such as "language.3.ffn"; the same as `Group.name`."""
        return f"{self.tower}.{self.layer}.{self.kind}"

    @property
    def keep(self) -> int:
        """Number of units that stay."""
        return len(self.kept)


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Which units of every group stay. Frozen; `apply` it with `hipp_ext.prune` or `hipp_ext.masked`.

    Attributes:
        groups: one entry per group of the towers that were planned, also where everything stays.
        preference: (utility, robustness, compression) it was made for, or None.
        scorer: name of the scorer that ranked the units, or None.
        notes: whatever the maker wants to say; plain JSON values.
    """

    groups: tuple[PlanGroup, ...]
    preference: tuple[float, float, float] | None = None
    scorer: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [g.name for g in self.groups]
        if not names:
            raise PlanError("A plan needs at least one group.")
        if len(set(names)) != len(names):
            raise PlanError(f"A plan names a group twice: {sorted(n for n in set(names) if names.count(n) > 1)}")

    @property
    def pruning_ratio(self) -> float:
        """Removed parameters / prunable parameters, in [0, 1). Exact: counted from the units, biases included."""
        return 1 - self.kept_parameters / sum(g.width * g.unit_parameters for g in self.groups)

    @property
    def kept_parameters(self) -> int:
        """Parameters of all units that stay."""
        return sum(g.keep * g.unit_parameters for g in self.groups)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers that the plan covers."""
        return tuple(dict.fromkeys(g.tower for g in self.groups))

    @property
    def keep_counts(self) -> dict[str, int]:
        """Group name -> number of units that stay."""
        return {g.name: g.keep for g in self.groups}

    def replace(self, **changes: Any) -> "PruningPlan":
        """A copy with some attributes changed."""
        return replace(self, **changes)

    def to_tp_kwargs(self, model: Any) -> dict[str, Any]:
        """Keyword arguments for torch-pruning's own pruner: `tp.pruner.BasePruner(model, inputs, **plan.to_tp_kwargs(model))`.

        Raises:
            PlanError: the plan does not fit the model.
            UnsupportedModelError: the stock pruner cannot carry this plan out on this model; the message says why.
            MissingExtraError: torch-pruning is not installed.
        """
        from hipp_ext.integrations.torch_pruning import stock_arguments

        return stock_arguments(self, model)

    def to_json(self) -> str:
        """The plan as JSON text, readable and diffable: one group a line."""
        head = {"format": FORMAT, "pruning_ratio": self.pruning_ratio, "preference": self.preference,
                "scorer": self.scorer, "notes": dict(self.notes)}  # fmt: skip
        lines = [
            json.dumps({"tower": g.tower, "layer": g.layer, "kind": g.kind, "width": g.width, "keep": g.keep,
                        "kept": _ranges(g.kept), "unit_parameters": g.unit_parameters})
            for g in self.groups
        ]  # fmt: skip
        return json.dumps(head, indent=1)[:-2] + ',\n "groups": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "PruningPlan":
        """The plan in `text`.

        Raises:
            PlanError: the text is not JSON, has missing, unknown or wrongly typed fields, or contradicts itself
                (a keep count that is not the number of kept units, a ratio that is not the groups').
        """
        try:
            data = _PlanFile.model_validate_json(text, strict=True)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5])
            raise PlanError(f"Not a pruning plan: {problems}") from None
        plan = cls(
            groups=tuple(g.build() for g in data.groups),
            preference=data.preference,
            scorer=data.scorer,
            notes=data.notes,
        )
        if not abs(plan.pruning_ratio - data.pruning_ratio) <= 1e-9:  # NaN too
            raise PlanError(
                f"The plan says pruning_ratio {data.pruning_ratio}, its groups say {plan.pruning_ratio}. After editing "
                "groups by hand, set pruning_ratio to the second figure."
            )
        return plan

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the plan to `path`, whole or not at all.

        Raises:
            OutputExistsError: `path` exists and `overwrite` is False.
        """
        require_new(path, overwrite)
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """The plan in the file `path`. Raises PlanError as `from_json` does, naming the file."""
        try:
            return cls.from_json(Path(path).read_bytes())
        except FileNotFoundError:
            raise PlanError(f"There is no plan at {path}.") from None
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def __str__(self) -> str:
        kept = ", ".join(f"{g.name} {g.keep}/{g.width}" for g in self.groups)
        return f"PruningPlan(pruning_ratio={self.pruning_ratio:.4f}: {kept})"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _GroupFile(_Strict):
    tower: Tower
    layer: int = Field(ge=0, lt=100_000)
    kind: Kind
    width: int = Field(ge=1, lt=10_000_000)
    keep: int
    kept: str = Field(max_length=50_000_000, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")
    unit_parameters: int = Field(ge=1, lt=2**63)

    def build(self) -> PlanGroup:
        name = f"{self.tower}.{self.layer}.{self.kind}"
        kept: list[int] = []
        for part in self.kept.split(","):
            first, _, last = part.partition("-")
            # Bounded before it is built: "0-999999999999" must not fill the memory.
            if len(first) > 9 or len(last) > 9 or int(last or first) >= self.width:
                raise PlanError(f"{name}: kept units {part} are not below its width {self.width}.")
            kept.extend(range(int(first), int(last or first) + 1))
        if len(kept) != self.keep:
            raise PlanError(f"{name} says keep {self.keep} and names {len(kept)} kept units.")
        return PlanGroup(
            tower=self.tower, layer=self.layer, kind=self.kind, width=self.width, kept=tuple(kept),
            unit_parameters=self.unit_parameters,
        )  # fmt: skip


class _PlanFile(_Strict):
    format: Literal[1]
    pruning_ratio: float
    preference: tuple[float, float, float] | None
    scorer: str | None
    notes: dict[str, Any]
    groups: tuple[_GroupFile, ...]


def _ranges(indices: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for i in indices:
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
