"""What is installed is what is here; importing the core brings in no host."""

import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def test_every_folder_with_code_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(part for part in (*prefix, *path.parent.relative_to(ROOT).parts))
        for top, prefix in (("hipp_ext", ()), ("integrations", ("hipp_ext",)), ("evals", ("hipp_ext",)))
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found
    assert all((path.parent / "__init__.py").exists() for top in ("hipp_ext", "integrations", "evals")
               for path in (ROOT / top).rglob("*.py"))  # fmt: skip


def test_the_core_imports_no_host_and_no_heavy_extra():
    hosts = ("torch_pruning", "llmcompressor", "vlmeval", "lm_eval", "torchattacks", "torchvision", "pandas", "matplotlib")
    code = f"import sys, hipp_ext, hipp_ext.testbed; print([h for h in {hosts} if h in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_top_level_names_do_not_leak():
    code = "import hipp_ext.evals.pope, hipp_ext.integrations.vlmevalkit"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sys.prefix))
    for name in ("evals", "integrations"):
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=Path(sys.prefix), capture_output=True)
        assert done.returncode != 0
