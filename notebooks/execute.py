"""Executes the notebooks of this folder and keeps what a rerun repeats.

    python notebooks/execute.py           # all of them
    python notebooks/execute.py 02 05

Progress bars and other output on stderr are shown here and not kept, and neither are times, ids of
cells and the addresses of objects, so that a rerun on the same machine changes nothing.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
KEPT = ("tags",)  # metadata of a cell
LONGEST = 900  # seconds
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main(names: list[str]) -> None:
    """Execute the notebooks whose file names begin with one of `names`, or all."""
    os.environ.update(QUIET)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            resources = {"metadata": {"path": place}}
            NotebookClient(notebook, timeout=LONGEST, resources=resources).execute()
        for text in tidy(notebook):
            print(text, file=sys.stderr, end="")
        nbformat.write(notebook, path)
        print(
            f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB"
        )


def tidy(notebook: NotebookNode) -> list[str]:
    """Leave out what another run would not repeat; returns what stood on stderr."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    errors = []
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = {name: cell.metadata[name] for name in KEPT if name in cell.metadata}
        if cell.cell_type != "code":
            continue
        errors += [o.text for o in cell.outputs if o.get("name") == "stderr"]
        cell.outputs = _joined(o for o in cell.outputs if o.get("name") != "stderr")
        for output in cell.outputs:
            data = output.get("data", {})
            if plain := data.get("text/plain"):
                data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", plain)
    return errors


def _joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """The outputs, with text that was printed in pieces in one."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and "text" in output and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    main(sys.argv[1:])
