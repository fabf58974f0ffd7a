"""`python -m fuzz`: many cases for every reader, with a progress bar; goes on where the last run of
the same code stopped.
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from fuzz.running import MIB, ROOT, SECONDS, Case, Worker, cases, code_digest
from fuzz.table import all_readers
from hipp_ext.files import write_atomic

OUTCOMES = ("ok", "refused", "fault")
NOTES = "progress.json"


def main() -> int:
    readers, options = all_readers(), _options()
    names = options.reader or list(readers)
    again = options.seed is not None
    done = _begin(options.place, anew=options.fresh or again)
    with (
        Worker(options.place, options.seconds, options.mib) as worker,
        Progress(console=Console(stderr=True)) as bar,
    ):
        worker.kept.update(done["faults"])
        for name in names:
            own = done["readers"].setdefault(
                name, dict.fromkeys(("next", *OUTCOMES, "time", "slowest", "mib"), 0)
            )
            first = options.seed if again else own["next"]
            last = (
                first + options.cases
                if again
                else max(1, round(options.cases * readers[name].share))
            )
            task = bar.add_task(name, total=max(last - first, 0))
            for case in cases(worker, name, range(first, last)):
                _count(done, own, case)
                bar.update(task, advance=1, description=f"{name}: {own['fault']} faults")
                if case.seed % 20 == 0 or case.outcome == "fault" or case.seed + 1 == last:
                    write_atomic(options.place / NOTES, json.dumps(done))
    _summary(done, names)
    print(f"Folders of faults: {options.place / 'faults'}")
    return int(any(done["readers"][name]["fault"] for name in names))


def _begin(place: Path, anew: bool) -> dict:
    """What runs of the same code came to before; nothing, and an empty folder, where there are
    none.
    """
    notes = place / NOTES
    if (
        not anew
        and notes.exists()
        and (done := json.loads(notes.read_text()))["code"] == code_digest()
    ):
        return done
    if notes.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    return {"code": code_digest(), "readers": {}, "faults": {}}


def _count(done: dict, own: dict, case: Case) -> None:
    own[case.outcome] += 1
    own["next"], own["time"] = case.seed + 1, own["time"] + case.seconds
    own["slowest"], own["mib"] = max(own["slowest"], case.seconds), max(own["mib"], case.mib)
    if case.outcome == "fault":
        fault = done["faults"].setdefault(case.signature, {"count": 0, "first": str(case)})
        fault["count"] += 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument(
        "--cases",
        type=int,
        default=10_000,
        help="per reader; fewer for slow ones (default: 10,000)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="first seed, as of a fault to see again (default: where the last run stopped)",
    )
    parser.add_argument(
        "--reader",
        action="append",
        choices=list(all_readers()),
        help="only this one; may be repeated",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="that a case may take (default: %(default)s)"
    )
    parser.add_argument(
        "--mib", type=int, default=MIB, help="of memory that a case may take (default: %(default)s)"
    )
    parser.add_argument(
        "--place",
        type=Path,
        default=ROOT / "build/fuzz",
        help="folder for cases and faults (default: build/fuzz)",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    return parser.parse_args()


def _summary(done: dict, names: list[str]) -> None:
    table = Table("reader", "cases", *OUTCOMES, "time [s]", "slowest [s]", "most memory [MiB]")
    total: Counter[str] = Counter()
    for name in names:
        own = done["readers"][name]
        total.update({outcome: own[outcome] for outcome in OUTCOMES})
        counts = [own[outcome] for outcome in OUTCOMES]
        table.add_row(
            name,
            str(sum(counts)),
            *map(str, counts),
            f"{own['time']:.1f}",
            f"{own['slowest']:.1f}",
            str(own["mib"]),
        )
    table.add_section()
    table.add_row("all", str(sum(total.values())), *(str(total[outcome]) for outcome in OUTCOMES))
    console = Console()
    console.print(table, markup=False)
    for signature, fault in sorted(done["faults"].items()):
        console.print(
            f"[bold]{escape(signature)}[/bold] ({fault['count']} times), "
            f"first:\n{escape(fault['first'][:3000])}\n"
        )


if __name__ == "__main__":
    raise SystemExit(main())
