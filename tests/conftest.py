import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from jaxtyping import install_import_hook

# These refuse arguments of a wrong type themselves, with messages that are tested; checks of the
# last would draw from Python's global generator, whose state a test compares.
UNCHECKED = {
    "hipp_ext.attacks",
    "hipp_ext.planner.cost",
    "hipp_ext.planner.fit",
    "hipp_ext.robust.evaluation",
    "hipp_ext.robust.losses",
}


def annotated_modules() -> list[str]:
    """The modules with jaxtyping annotations, whose shapes and dtypes are checked in tests."""
    root, found = Path(__file__).parents[1], []
    for folder in ("hipp_ext", "evals", "integrations"):
        for file in (root / folder).rglob("*.py"):
            if "\nfrom jaxtyping import" in file.read_text("utf-8"):
                name = ".".join(file.relative_to(root).with_suffix("").parts)
                found.append(name if folder == "hipp_ext" else f"hipp_ext.{name}")
    return [name for name in found if name not in UNCHECKED]


install_import_hook(annotated_modules(), "beartype.beartype")  # for the whole run
torch.set_num_threads(1)

LONG_FILES = {"test_zoo.py", "test_notebooks.py"}


def pytest_collection_modifyitems(items):
    """The longest files come first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_collection_finish():
    """What was imported stays, and need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Commands keep signals in a folder of the test run, which all its processes share."""
    place = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "XDG_CACHE_HOME",
            str((place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "cache"),
        )
        yield


@pytest.fixture(scope="module")
def few_rows():
    """Few rows of calibration data by default, so that signals are measured quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hipp_ext.planner.planner.ROWS", 8)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
