"""Every notebook runs from start to end, in a kernel of its own, as a reader would run it."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LARGEST_OUTPUT = 200_000  # [bytes] of a committed notebook; pictures may be small


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Few questions, one thread, no network, and the Python that runs the tests."""
    from jupyter_client.kernelspec import KernelSpecManager

    for name, value in {
        "NOTEBOOK_LIMIT": "24",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    assert KernelSpecManager().find_kernel_specs()[
        "python3"
    ]  # ipykernel's own, of this environment


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, quick, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert shown and not [o for o in shown if o.output_type == "error"]
    assert all(
        cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_bulk_and_without_this_machine(path):
    text = path.read_text()
    assert os.path.getsize(path) < LARGEST_OUTPUT
    assert "/home/" not in text and "/tmp/" not in text and "/root/" not in text


def test_there_are_notebooks():
    assert NOTEBOOKS
