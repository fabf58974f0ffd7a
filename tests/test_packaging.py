"""The wheel holds the product and no study; importing the core brings in no host."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import yaml

import hipp_ext

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "evals/studies"
PRODUCT = [
    path
    for top in ("hipp_ext", "integrations", "evals")
    for path in sorted((ROOT / top).rglob("*.py"))
    if not path.is_relative_to(STUDIES)
]


def test_every_folder_of_the_product_is_listed_and_no_study():
    """An unlisted folder imports from a clone, but is missing from the wheel: right for studies."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for path in PRODUCT:
        top, *rest = path.parent.relative_to(ROOT).parts
        found.add(".".join((top, *rest) if top == "hipp_ext" else ("hipp_ext", top, *rest)))
        assert (path.parent / "__init__.py").exists(), path
    assert set(setuptools["packages"]) == found
    assert not any("studies" in str(entry) for entry in setuptools["package-data"].items())


def test_the_product_imports_no_study():
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            else:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("hipp_ext.evals.studies") for name in names), path


def test_the_core_imports_no_host_and_no_heavy_extra():
    hosts = (
        "torch_pruning",
        "llmcompressor",
        "vlmeval",
        "lm_eval",
        "lmms_eval",
        "gguf",
        "xllamacpp",
        "torchattacks",
        "torchvision",
        "pandas",
        "matplotlib",
    )
    assert _imported(hosts, by="from hipp_ext import *; import hipp_ext.testbed") == "[]"


def test_the_command_line_waits_for_torch_only_where_it_needs_it():
    assert _imported(("torch", "transformers", "numpy"), by="import hipp_ext.cli") == "[]"


def _imported(names: tuple[str, ...], by: str) -> str:
    code = f"import sys\n{by}\nprint([name for name in {names} if name in sys.modules])"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_top_level_names_do_not_leak():
    code = "import hipp_ext.evals.pope, hipp_ext.integrations.vlmevalkit"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sys.prefix))
    for name in ("evals", "integrations"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], cwd=Path(sys.prefix), capture_output=True
        )
        assert done.returncode != 0


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(hipp_ext, name).__name__ == name for name in hipp_ext.__all__)
    assert set(hipp_ext.__all__) <= set(dir(hipp_ext))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hipp_ext.nonsense  # noqa: B018


def test_the_citation_names_the_version_and_the_three_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == hipp_ext.__version__ and cited["license"] == "Apache-2.0"
    papers = [paper["url"].rpartition("/")[2] for paper in cited["references"]]
    assert papers == ["2603.06270", "2410.15176", "2506.17974"]
