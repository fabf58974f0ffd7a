"""What to keep where. A plan is data: it can be made on one machine, mailed, read, edited, diffed,
applied on another.

JSON, one group a line; the kept units are written as ranges ("0-5,8"), which stay short and diff
well.
"""

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from hipp_ext.errors import PlanError
from hipp_ext.files import require_new, write_atomic
from hipp_ext.files.untrusted import MAX_COMMAND
from hipp_ext.groups import AttentionUnit, ExpertUnit, Kind, LeftWhole, Tower
from hipp_ext.kinds import KINDS
from hipp_ext.quantities import whole

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
COMMANDS = "commands"  # among the notes
MAX_COMMANDS = 100  # that are believed
# Of a file, so that a small one cannot fill the memory. Llama-3.1-405B has 252 groups of 6.7
# million units in all.
MAX_BYTES, MAX_GROUPS, MAX_UNITS, MAX_FIELDS = 32 << 20, 20_000, 10_000_000, 20


@dataclass(frozen=True, kw_only=True)
class PlanGroup:
    """One group of a plan: `keep` of `width` units stay, namely those in `kept` (sorted indices).

    Where none stays, the block is dropped. With several `sections` (query heads, see
    `Group.sections`) each of them keeps the same number.
    """

    tower: Tower
    layer: int
    kind: Kind
    width: int
    kept: tuple[int, ...]
    unit_parameters: int
    sections: int = 1

    def __post_init__(self) -> None:
        for name in ("layer", "width", "unit_parameters", "sections"):
            object.__setattr__(
                self, name, _whole(getattr(self, name), name)
            )  # numpy's numbers are no JSON
        kept = tuple(self.kept)
        if set(map(type, kept)) - {int}:
            kept = tuple(_whole(unit, "kept") for unit in kept)
        object.__setattr__(self, "kept", kept)
        if not self.width >= 1:
            raise PlanError(f"{self.name} has {self.width} units; a group has one or more.")
        if kept and not (
            kept[0] >= 0
            and kept[-1] < self.width
            and all(a < b for a, b in itertools.pairwise(kept))
        ):
            raise PlanError(
                f"{self.name}: kept units must be distinct, sorted and below {self.width}: "
                f"{_short(kept[:100])}"
            )
        self._check_sections()

    def _check_sections(self) -> None:
        if self.sections < 1 or self.width % self.sections:
            raise PlanError(
                f"{self.name}: {self.width} units cannot be divided into {self.sections} sections."
            )
        size, each = self.width // self.sections, len(self.kept) // self.sections
        if self.sections == 1 or (
            len(self.kept) == each * self.sections
            and all(unit // size == place // each for place, unit in enumerate(self.kept))
        ):
            return
        starts = range(0, size * min(self.sections, 100), size)
        counts = [
            bisect.bisect_left(self.kept, start + size) - bisect.bisect_left(self.kept, start)
            for start in starts
        ]
        raise PlanError(
            f"{self.name}: each of the {self.sections} sections of {size} units must keep the same "
            f"number; they keep {counts}{', ...' if self.sections > 100 else ''}."
        )

    @property
    def name(self) -> str:
        """Key of the group, such as "language.3.ffn"; the same as `Group.name`."""
        return f"{self.tower}.{self.layer}.{self.kind}"

    @property
    def place(self) -> str:
        """Place of the block in its layer, "attention" or "ffn"; the same as `Group.place`."""
        return KINDS[self.kind].place

    @property
    def keep(self) -> int:
        """Number of units that stay."""
        return len(self.kept)


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Which units of every group stay. Frozen; `apply` it with `hipp_ext.prune` or
    `hipp_ext.masked`.

    Attributes:
        groups: one entry per group of the towers that were planned, also where everything stays.
        preference: (utility, robustness, compression) it was made for, or None.
        scorer: name of the scorer that ranked the units, or None.
        notes: whatever the maker wants to say; plain JSON values.
        left_whole: parts of layers that no group has units of, see `find_groups`.
    """

    groups: tuple[PlanGroup, ...]
    preference: tuple[float, float, float] | None = None
    scorer: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    left_whole: tuple[LeftWhole, ...] = ()

    def __post_init__(self) -> None:
        names = [g.name for g in self.groups]
        if not names:
            raise PlanError("A plan needs at least one group.")
        if len(set(names)) != len(names):
            twice = sorted(n for n, c in Counter(names).items() if c > 1)
            raise PlanError(f"A plan names a group twice: {_short(twice)}")
        for tower in self.towers:
            if not any(g.keep for g in self.groups if g.tower == tower):
                raise PlanError(f"A plan must keep a unit of the {tower} tower; this keeps none.")

    @property
    def pruning_ratio(self) -> float:
        """Removed parameters / prunable parameters, in [0, 1). Exact: counted from the units,
        biases included.
        """
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
    def attention_unit(self) -> AttentionUnit:
        """The unit of its attention groups: "query" if any of them are query heads.

        Those of layers that share keys with each other are query heads with either unit.
        """
        return "query" if any(g.kind == "query_heads" for g in self.groups) else "kv"

    @property
    def expert_unit(self) -> ExpertUnit:
        """The unit of its mixtures of experts: "channel" if any of them are channels."""
        return "channel" if any(g.kind == "expert_channels" for g in self.groups) else "expert"

    @property
    def keep_counts(self) -> dict[str, int]:
        """Group name -> number of units that stay."""
        return {g.name: g.keep for g in self.groups}

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that made the plan and its model, in order, as far as they are recorded."""
        found = self.notes.get(COMMANDS)
        known = found if isinstance(found, list | tuple) else []
        fits = all(isinstance(line, str) and len(line) <= MAX_COMMAND for line in known)
        return tuple(known) if fits and len(known) <= MAX_COMMANDS else ()

    def after(self, *commands: str) -> "PruningPlan":
        """A copy that records further commands, such as `hipp prune`, behind those it has."""
        return self.replace(notes={**self.notes, COMMANDS: [*self.commands, *commands]})

    def table(self) -> "Table":
        """The layers as a table, which rich prints and notebooks show: how many units stay."""
        from hipp_ext.plan_table import layer_table

        return layer_table(self.groups)

    def replace(self, **changes: Any) -> "PruningPlan":
        """A copy with some attributes changed."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """The plan as JSON text, readable and diffable: one group a line."""
        head = {
            "format": FORMAT,
            "pruning_ratio": self.pruning_ratio,
            "preference": self.preference,
            "scorer": self.scorer,
            "notes": dict(self.notes),
        }
        if self.left_whole:
            head["left_whole"] = [asdict(part) for part in self.left_whole]
        lines = [
            json.dumps(
                {
                    "tower": g.tower,
                    "layer": g.layer,
                    "kind": g.kind,
                    "width": g.width,
                    "keep": g.keep,
                    "kept": _ranges(g.kept),
                    "unit_parameters": g.unit_parameters,
                }
                | ({"sections": g.sections} if g.sections > 1 else {})
            )
            for g in self.groups
        ]
        return (
            json.dumps(head, indent=1)[:-2]
            + ',\n "groups": [\n  '
            + ",\n  ".join(lines)
            + "\n ]\n}\n"
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> "PruningPlan":
        """The plan in `text`.

        Raises:
            PlanError: the text is not JSON, has missing, unknown or wrongly typed fields, or
                contradicts itself (a keep count that is not the number of kept units, a ratio that
                is not the groups'), or it is larger than any model's: above MAX_BYTES, MAX_GROUPS
                or MAX_UNITS.
        """
        data = _read(text)
        plan = cls(
            groups=tuple(g.build() for g in data.groups),
            preference=None
            if data.preference is None
            else (data.preference[0], data.preference[1], data.preference[2]),
            scorer=data.scorer,
            notes=data.notes,
            left_whole=tuple(LeftWhole(**dict(part)) for part in data.left_whole),
        )
        if not abs(plan.pruning_ratio - data.pruning_ratio) <= 1e-9:  # NaN too
            raise PlanError(
                f"The plan says pruning_ratio {data.pruning_ratio}, its groups say "
                f"{plan.pruning_ratio}. After editing "
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
        path = Path(path)
        if not path.is_file():  # a pipe would block, a device never end
            raise PlanError(
                f"{path} is no plan file."
                if path.exists()
                else f"There is no plan at {path}. `hipp plan` makes one."
            )
        try:
            with path.open("rb") as file:
                return cls.from_json(file.read(MAX_BYTES + 1))
        except OSError as error:
            raise PlanError(f"{path} could not be read: {error.strerror}.") from None
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def __str__(self) -> str:
        kept = ", ".join(f"{g.name} {g.keep}/{g.width}" for g in self.groups)
        return f"PruningPlan(pruning_ratio={self.pruning_ratio:.4f}: {kept})"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _GroupFile(_Strict):
    tower: Tower
    layer: int = Field(ge=0, lt=100_000)
    kind: Kind
    width: int = Field(ge=1, le=MAX_UNITS)
    keep: int
    kept: str = Field(pattern=r"^(\d+(-\d+)?(,\d+(-\d+)?)*)?$")  # empty: the block is dropped
    unit_parameters: int = Field(ge=1, lt=2**63)
    sections: int = Field(default=1, ge=1, le=MAX_UNITS)

    def build(self) -> PlanGroup:
        name, spans = f"{self.tower}.{self.layer}.{self.kind}", self._spans()
        named = sum(last + 1 - first for first, last in spans)
        if named != self.keep:
            raise PlanError(f"{name} says keep {self.keep} and names {named} kept units.")
        kept = tuple(itertools.chain.from_iterable(range(first, last + 1) for first, last in spans))
        return PlanGroup(
            tower=self.tower,
            layer=self.layer,
            kind=self.kind,
            width=self.width,
            kept=kept,
            unit_parameters=self.unit_parameters,
            sections=self.sections,
        )

    def _spans(self) -> list[tuple[int, int]]:
        """First and last unit of every range, checked before any is expanded: "0-999999999999" must
        not fill the memory.
        """
        name, spans, end = f"{self.tower}.{self.layer}.{self.kind}", [], -1
        for part in self.kept.split(",") if self.kept else []:
            first, _, last = part.partition("-")
            if len(first) > 9 or len(last) > 9 or int(last or first) >= self.width:
                raise PlanError(
                    f"{name}: kept units {_short(part)} are not below its width {self.width}."
                )
            begin, before = int(first), end
            end = int(last or first)
            if not before < begin <= end:
                raise PlanError(
                    f"{name}: kept units must be distinct, sorted and below {self.width}: {part} "
                    f"follows {before}."
                )
            spans.append((begin, end))
        return spans


class _LeftWholeFile(_Strict):
    module: str
    type: str
    reason: str


class _PlanFile(_Strict):
    format: Literal[1]
    pruning_ratio: float
    preference: list[float] | None = Field(min_length=3, max_length=3)
    scorer: str | None
    notes: dict[str, Any]
    left_whole: list[_LeftWholeFile] = Field(default=[], max_length=MAX_GROUPS)
    groups: list[_GroupFile]


def _read(text: str | bytes) -> _PlanFile:
    """The fields of a plan file. What could be too much is counted first: every wrong field costs
    an error of its own.
    """
    if len(text) > MAX_BYTES:
        raise PlanError(f"Not a pruning plan: it has more than {MAX_BYTES} bytes.")
    try:
        data = from_json(text)
    except (ValueError, TypeError) as error:  # TypeError: a text with half a character
        raise PlanError(f"Not a pruning plan: file: Invalid JSON: {error}") from None
    groups = data.get("groups") if isinstance(data, dict) else None
    if isinstance(groups, list) and len(groups) > MAX_GROUPS:
        raise PlanError(f"Not a pruning plan: it has {len(groups)} groups, more than {MAX_GROUPS}.")
    objects = [data, *groups] if isinstance(groups, list) else [data]
    if any(isinstance(entry, dict) and len(entry) > MAX_FIELDS for entry in objects):
        raise PlanError(f"Not a pruning plan: it has an object of more than {MAX_FIELDS} fields.")
    try:
        plan = _PlanFile.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5]
        )
        raise PlanError(f"Not a pruning plan: {_short(problems)}") from None
    if (units := sum(g.width for g in plan.groups)) > MAX_UNITS:
        raise PlanError(
            f"Not a pruning plan: its groups have {units} units, more than {MAX_UNITS}."
        )
    return plan


def _whole(value: Any, name: str) -> int:
    if (number := whole(value)) is None:
        raise PlanError(f"{name}={value!r}: a whole number is needed.")
    return number


def _short(value: Any, most: int = 1000) -> str:
    """`value` as text, cut where a message would fill the screen."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _ranges(indices: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for i in indices:
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
