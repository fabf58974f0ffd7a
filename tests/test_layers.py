"""Data flows down: a part of the library imports only from the parts that stand above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Every part may import from those above it, inside functions too. CONTRIBUTING.md describes each.
ORDER = (
    "errors",
    "quantities",
    "files",
    "progress",
    "runs",
    "steps",
    "prompts",
    "families",
    "projections",
    "modes",
    "kinds",
    "towers",
    "layer_parts",
    "groups",
    "fingerprint",
    "model_folder",
    "random_picture",
    "verification",
    "plan_table",
    "plan",
    "units",
    "budget.bounds",
    "budget.cost",
    "budget.uniform",
    "budget.counts",
    "budget",
    "latency_table",
    "limits",
    "calibration.processors",
    "calibration.batches",
    "calibration.encoding",
    "training",
    "testbed",
    "calibration",
    "attacks",
    "scorers",
    "replay",
    "output_head",
    "answers",
    "likelihood",
    "sensitivity",
    "allocators",
    "preference",
    "surgery",
    "planner",
    "comm",
    "recover",
    "shrink",
    "integrations.torch_pruning_probe",
    "integrations.torch_pruning_importance",
    "integrations.torch_pruning_graph",
    "integrations.torch_pruning_channels",
    "integrations.torch_pruning_stock",
    "integrations.torch_pruning",
    "image_attacks",
    "robust",
    "evals",
    "integrations",
    "evals.runtimes",
    "evals.demo",
    "cli",
    "__main__",
)


def modules() -> dict[str, Path]:
    """Module name without "hipp_ext." -> file; studies and the top-level lazy names left out."""
    found = {}
    for folder, prefix in (
        ("hipp_ext", ""),
        ("evals", "evals."),
        ("integrations", "integrations."),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = prefix + ".".join(p for p in parts if p != "__init__")
            found[name.rstrip(".")] = path
    return {n: p for n, p in found.items() if n and not n.startswith("evals.studies")}


MODULES = modules()


def imports(name: str) -> set[str]:
    """The library's modules that a module imports, at the top or inside functions."""
    wanted = set()
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {w.removeprefix("hipp_ext.") for w in wanted if w.startswith("hipp_ext.")}
    return {w for w in inside if w in MODULES and w != name}


def part(name: str) -> str:
    """The longest entry of ORDER that a module belongs to."""
    fits = [p for p in ORDER if name == p or name.startswith(p + ".")]
    assert fits, f"{name} has no place in ORDER"
    return max(fits, key=len)


def test_every_part_exists_and_every_module_has_a_part():
    assert {part(name) for name in MODULES} == set(ORDER)


def test_contributing_lists_every_folder_and_module_in_order():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = re.findall(r"^ {4}( *)(\S+)", text.partition("## The house")[2], re.M)
    listed, top = [], ""
    for indent, name in lines:
        top = top if indent else name
        listed.append(top + name if indent else name)
    tops = ("hipp_ext", "evals", "integrations", "tests", "notebooks")
    there = {f"{top}/" for top in tops}
    there |= {
        f"{p.relative_to(ROOT)}/"
        for top in tops[:3]
        for p in (ROOT / top).iterdir()
        if p.is_dir() and p.name[0] not in "_."
    }
    there |= {f"hipp_ext/{p.name}" for p in (ROOT / "hipp_ext").glob("[!_]*.py")}
    assert set(listed) == there and len(listed) == len(there)
    names = [re.split(r"[/.]", name)[1] for name in listed if name[:9] == "hipp_ext/"][1:]
    assert names == [name for name in ORDER if name in names]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_from_above(name):
    place = ORDER.index(part(name))
    below = sorted(m for m in imports(name) if ORDER.index(part(m)) > place)
    assert not below, f"{name} imports {below}, which stand below it"


def test_no_modules_import_each_other_in_a_circle():
    state: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != "open", " -> ".join((*path, name))
        if name not in state:
            state[name] = "open"
            for other in sorted(imports(name)):
                # A package's own file imports from its modules to export their names.
                if not (name.startswith(other + ".") and MODULES[other].name == "__init__.py"):
                    visit(other, (*path, name))
            state[name] = "done"

    for name in sorted(MODULES):
        visit(name, ())
