"""Every notebook runs from start to end, as a reader would run it, and its committed outputs are of
that kind.
"""

import ast
import copy
import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FEW = {  # values of a notebook's first cell with which it runs in seconds
    "01": "QUESTIONS, STEPS = 8, 1",
    "02": "QUESTIONS = 24",
    "03": "CONVERSATIONS, QUESTIONS, STEPS, STEPS_ON_TWO = 160, 8, 2, 1",
    "04": "TRAIN, TEST, ROWS, EPOCHS, RETRAIN = 100, 20, 16, 1, 1",
    "05": "QUESTIONS = 12",
}
MAX_NOTEBOOK_BYTES = 400_000  # of a committed notebook; pictures may be small
MACHINE = ("/home/", "/tmp/", "/root/", "site-packages", "\\u001b", "it/s]", "Traceback")
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks, so that torch is imported once."""
    assert KernelSpecManager().find_kernel_specs()["python3"]  # of this environment
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, value in tool().QUIET.items():
            patch.setenv(name, value)
        yield manager
    if manager.has_kernel:
        run_sync(manager.shutdown_kernel)(now=True)


def tool():
    """notebooks/execute.py, which writes the committed outputs."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> list[str]:
    """What a cell shows: text, pictures, tables."""
    return [
        kind
        for output in cell.outputs
        for kind in (sorted(output.data) if "data" in output else [output.name])
    ]


@named
def test_a_notebook_runs_and_its_outputs_are_of_that_kind(path, kernel, tmp_path):
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    notebook = copy.deepcopy(committed)
    first = next(
        i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())
    )
    few = new_code_cell(FEW[path.name[:2]])
    assert {n.id for n in names(few)} <= {n.id for n in names(notebook.cells[first])}
    notebook.cells.insert(first + 1, few)
    notebook.cells.insert(0, new_code_cell("%reset -f"))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=kernel, timeout=240, resources=place).execute()
    tool().tidy(notebook)
    ran = [cell for cell in code_cells(notebook) if cell.id not in (few.id, notebook.cells[0].id)]
    assert [kinds(cell) for cell in code_cells(committed)] == [kinds(cell) for cell in ran]


def names(cell: NotebookNode) -> list[ast.Name]:
    return [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)]


@named
def test_a_notebook_is_committed_with_outputs_and_without_this_machine(path):
    notebook, text = nbformat.read(path, as_version=4), path.read_text()
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(kinds, cells), [])
    assert os.path.getsize(path) < MAX_NOTEBOOK_BYTES
    assert not [trace for trace in MACHINE if trace in text]
    tidied = copy.deepcopy(notebook)
    assert tool().tidy(tidied) == [] and tidied == notebook


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[:2] != "04"], ids=lambda p: p.stem)
def test_a_reader_with_a_model_may_leave_out_the_cell_of_the_toy(path):
    parameters, toy, *rest = code_cells(nbformat.read(path, as_version=4))
    assert "testbed.load()" in toy.source
    used = {n.id for cell in rest for n in names(cell)}
    assert not (made(toy) - set().union(*map(made, rest))) & used
    assert made(parameters) & used


def made(cell: NotebookNode) -> set[str]:
    """Names that a cell assigns or imports."""
    imports = (ast.Import, ast.ImportFrom)
    nodes = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, imports)]
    assigned = {n.id for n in names(cell) if isinstance(n.ctx, ast.Store)}
    return assigned | {(a.asname or a.name).split(".")[0] for node in nodes for a in node.names}


def test_there_is_a_notebook_for_every_set_of_values():
    assert [path.name[:2] for path in NOTEBOOKS] == sorted(FEW)
