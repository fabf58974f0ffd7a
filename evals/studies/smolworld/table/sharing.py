"""Several processes measure the cells of one folder, each one model at a time.

On CPUs two processes with a thread each do more than one with two threads.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process

from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.methods import METHODS
from hipp_ext.evals.studies.smolworld.table.place import Place
from hipp_ext.evals.studies.smolworld.table.recovering import teach
from hipp_ext.evals.studies.smolworld.table.study import TableStudy


def in_processes(
    study: TableStudy, place: Place, cells: Sequence[Cell], processes: int, threads: int
) -> Iterator[Cell]:
    """Measure cells at the same time, and yield each when it is done.

    What all cells share is made here first, and two that need the same plan are not begun together
    before it is there.

    Args:
        study: the study, which is locked.
        place: what opens the same study in other processes.
        cells: the cells.
        processes: number of processes.
        threads: CPU threads of all of them together.
    """
    _make_shared(study, cells)
    waiting, running = list(cells), dict[Future[None], Cell]()
    with ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_open,
        initargs=(place, max(1, threads // processes)),
    ) as pool:
        while waiting or running:
            busy = {_plan(cell) for cell in running.values()}
            for cell in list(waiting):
                if len(running) < processes and (_plan(cell) not in busy or study.planned(cell)):
                    waiting.remove(cell)
                    busy.add(_plan(cell))
                    running[pool.submit(_measure, cell)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)


def _make_shared(study: TableStudy, cells: Sequence[Cell]) -> None:
    unplanned = [cell for cell in cells if cell.ratio and not study.planned(cell)]
    for effort in {METHODS[cell.method].effort for cell in unplanned} - {None}:
        study.bench.signals(effort)
    if any(cell.repair == "distil" for cell in cells):
        teach(study.bench)


def _plan(cell: Cell) -> tuple[str, int]:
    """Equal for cells whose plans one search or allocator makes."""
    method = METHODS.get(cell.method)
    return (method.search_name if method and method.searches else cell.method), cell.seed


_studies: list[TableStudy] = []  # of this process


def end_with_parent() -> None:
    """End this process when the one that started it does, even by kill -9.

    A process that goes on would write into a folder that another run may have locked since.
    """
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _open(place: Place, threads: int) -> None:
    end_with_parent()
    _studies.append(place.study((), threads))


def _measure(cell: Cell) -> None:
    _studies[-1].measure(cell)
