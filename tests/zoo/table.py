"""docs/families.md: what can be pruned in every family. `python tests/zoo/table.py` rewrites it."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, LeftWhole, Tower, find_groups, left_whole
from hipp_ext.integrations.serving import pruned_refusals
from hipp_ext.kinds import KINDS
from zoo import FAMILIES
from zoo.family import Family

FILE = Path(__file__).parents[2] / "docs" / "families.md"
COMMAND = ".venv/bin/python tests/zoo/table.py"
COLUMNS = (
    "class in transformers",
    "attention",
    "FFN",
    "experts",
    "vision",
    "projector",
    "drop",
    "export",
    "left whole, or why it is refused",
)
HEAD = f"""# Model families

What hipp-ext prunes in {len(FAMILIES)} model configurations of transformers, tried on tiny models
with random weights (`tests/test_zoo.py`: pruned equals masked, saved equals loaded, generation,
answers). `{COMMAND}` writes this page, and a test compares it with the code.

- **attention, FFN, experts**: the units that a plan chooses among. Where query heads share keys,
  `--attention-unit query` is there besides KV groups.
- **vision, projector**: the same of the vision tower, and of the MLP that leads from there to the
  language tower; none where that is a single layer.
- **drop**: what `--drop` takes out: single blocks, or whole layers too.
- **export**: runtimes that serve a model with uneven layers: `hipp export gguf`, vLLM with the
  plug-in.
- **left whole, or why it is refused**: parts that cannot be pruned, with the reason. Where a tower
  has such parts beside others, give `--partial report` (`partial="report"`). "No block of a known
  kind": hipp-ext does not know what the part computes. "0 lists of layers": that tower has no list
  of layers with attention of a known form.

{" | ".join(("| family", *COLUMNS))} |
{"|---" * (len(COLUMNS) + 1)}|
"""
WORDS = 140  # characters of a reason


def line(name: str, family: Family, model: nn.Module) -> str:
    """The row of a family."""
    groups, reasons = mapped(model)
    vision, projector = (), ()
    if family.sees:
        vision, left = mapped(model, "vision")
        projector, _ = mapped(model, "projector")
        reasons += [f"vision: {reason}" for reason in left]
    attention = units(g for g in groups if g.place == "attention")
    cells = (
        name,
        family.architecture,
        attention + ", query heads" * has_query_heads(model, groups),
        units(g for g in groups if g.kind == "ffn"),
        units(g for g in groups if g.place == "ffn" and g.kind != "ffn"),
        units(vision),
        units(projector),
        dropped(groups),
        exports(model) if groups else "",
        "; ".join(reasons),
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def mapped(model: nn.Module, tower: Tower = "language") -> tuple[Sequence[Group], list[str]]:
    """The groups of a tower, and what has none, with the reason."""
    groups: Sequence[Group] = ()
    parts: Sequence[LeftWhole] = ()
    try:
        parts = left_whole(model, (tower,))
        groups = find_groups(model, (tower,), partial="report")
    except UnsupportedModelError as error:
        if not parts:
            return (), [short(str(error))]
    alike: dict[str, str] = {}
    for part in parts:
        alike.setdefault(part.type, part.reason.removeprefix(f"{part.module}."))
    return groups, [short(f"{kind}: {reason}") for kind, reason in alike.items()]


def units(groups: Iterable[Group]) -> str:
    """What the units of groups are called."""
    return ", ".join(dict.fromkeys(KINDS[g.kind].unit for g in groups))


def has_query_heads(model: nn.Module, groups: Sequence[Group]) -> bool:
    """Whether attention can be divided into query heads as well as into KV groups."""
    if not any(g.kind == "attention" for g in groups):
        return False
    try:
        queries = find_groups(model, attention_unit="query", partial="report")
    except UnsupportedModelError:  # a KV group's queries, keys and values side by side
        return False
    return any(g.kind == "query_heads" for g in queries)


def dropped(groups: Sequence[Group]) -> str:
    """What can be taken out of the language tower."""
    if not groups:
        return ""
    return "blocks, layers" if any(g.removable for g in groups) else "blocks"


def exports(model: nn.Module) -> str:
    """Runtimes that serve a model of the family with uneven layers."""
    names = {"gguf": "GGUF", "vllm": "vLLM"}
    refused = {key: pruned_refusals(model.config, key) for key in names}  # type: ignore[arg-type]
    return ", ".join(name for key, name in names.items() if not refused[key])


def short(text: str) -> str:
    """The first clause of a message, without the numbers of layers."""
    text = re.split(r" (?:Its modules|Modules of the tower|Linear layers of known)\b", text)[0]
    text = re.sub(
        r"^Looked for the layers .* and found (\d+) lists of .*", r"\1 lists of layers", text
    )
    text = re.sub(r"^\w+ has no vision tower; .*", "no vision tower", text)
    text = re.sub(r"\.\d+\b", "", text)
    return text if len(text) <= WORDS else text[:WORDS].rsplit(" ", 1)[0] + " ..."


def main() -> None:
    """Write the page."""
    rows = [line(name, family, family.build()) for name, family in FAMILIES.items()]
    FILE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
