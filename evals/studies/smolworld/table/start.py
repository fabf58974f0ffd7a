"""Opens the study of a command, says how long it will take, and runs it."""

from collections.abc import Iterator, Sequence

from hipp_ext.evals.studies.smolworld.table.cells import Cell
from hipp_ext.evals.studies.smolworld.table.place import Place, log
from hipp_ext.evals.studies.smolworld.table.sharing import in_processes
from hipp_ext.evals.studies.smolworld.table.study import Row, TableStudy


def start(place: Place, cells: Sequence[Cell], threads: int) -> TableStudy:
    """The study of a command, whose estimate is printed."""
    study = place.study(cells, threads)
    log(
        f"{len(study.left())} of {len(study.cells)} models are left: about {study.minutes():.0f} "
        "minutes on two cores that compute in bfloat16; what is left is told after every model"
    )
    return study


def run(study: TableStudy, place: Place, processes: int, threads: int) -> Iterator[dict[str, Row]]:
    """What `TableStudy.run` yields, computed by some processes."""
    if processes == 1:
        return study.run()
    return study.run(
        lambda cells: in_processes(study, place, cells, processes=processes, threads=threads)
    )
