import os
from importlib import import_module

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes and dtypes at the tensor boundaries are checked in tests only.
TENSOR_MODULES = ["hipp_ext.answers", "hipp_ext.units", "hipp_ext.scorers", "hipp_ext.comm.codec"]
TENSOR_MODULES += [f"hipp_ext.planner.{name}" for name in ("state", "policy", "reward", "grpo")]
with install_import_hook(TENSOR_MODULES, "beartype.beartype"):
    for module in TENSOR_MODULES:
        import_module(module)

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Signals that commands keep do not come from, or go to, the user's home; all processes of one run share them."""
    place = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "XDG_CACHE_HOME",
            str((place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "cache"),
        )
        yield


@pytest.fixture(scope="module")
def few_rows():
    """Where neither the test nor the command under test says how much calibration data: little, so that signals are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hipp_ext.planner.planner.ROWS", 8)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
