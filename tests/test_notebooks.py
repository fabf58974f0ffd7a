"""Every notebook runs from start to end, with an empty namespace, as a reader would run it."""

import os
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MAX_NOTEBOOK_BYTES = 200_000  # of a committed notebook; pictures may be small


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks, so that torch is imported once: few questions, one thread."""
    assert KernelSpecManager().find_kernel_specs()["python3"]  # of this environment
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "NOTEBOOK_LIMIT": "12",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(tmp_path_factory.mktemp("notebooks")),
        }.items():
            patch.setenv(name, value)
        yield manager
    if manager.has_kernel:
        run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, kernel, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.insert(0, new_code_cell("%reset -f"))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=kernel, timeout=240, resources=place).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in code for output in cell.outputs]
    assert shown and not [output for output in shown if output.output_type == "error"]
    assert all(cell.execution_count for cell in code if cell.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_bulk_and_without_this_machine(path):
    text = path.read_text()
    assert os.path.getsize(path) < MAX_NOTEBOOK_BYTES
    assert "/home/" not in text and "/tmp/" not in text and "/root/" not in text


def test_there_are_notebooks():
    assert NOTEBOOKS
