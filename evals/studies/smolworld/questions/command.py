"""The command of the questions."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.measuring import RESULTS, Save
from hipp_ext.evals.studies.smolworld.packages import MODEL
from hipp_ext.evals.studies.smolworld.table.command import (
    Calibration,
    Choices,
    Concepts,
    Dtype,
    Evaluations,
    Model,
    Out,
    Pictures,
    Processes,
    Quick,
    Search,
    Seeds,
    Steps,
    Threads,
    chosen_sizes,
    default_ratios,
)

if TYPE_CHECKING:
    from hipp_ext.evals.studies.smolworld.table.study import TableStudy

LETTERS = {
    "a": "does pruning raise hallucination at equal accuracy",
    "b": "does a preference steer",
    "c": "does visual sensitivity help",
    "d": "does synaptic flow catch collapse",
    "e": "does a fit add to sensitivity",
    "f": "does pruning go with half of the picture's tokens",
    "g": "does W8A8 change the order",
}
NAME = "smolworld_questions"


def questions(
    model: Model = MODEL,
    out: Out = Path("outputs/table"),
    question: Annotated[
        list[str] | None,
        typer.Option(help=f"{'; '.join(f'{k}: {v}' for k, v in LETTERS.items())}. Default: all."),
    ] = None,
    plans: Annotated[int, typer.Option(min=2, help="Random plans of question d.")] = 32,
    seeds: Seeds = None,
    quick: Quick = False,
    pictures: Pictures = None,
    choices: Choices = None,
    search: Search = None,
    calibration: Calibration = None,
    evaluations: Evaluations = None,
    steps: Steps = None,
    dtype: Dtype = None,
    concepts: Concepts = None,
    threads: Threads = 2,
    processes: Processes = 1,
    save: Save = False,
) -> None:
    """Answer questions about pruning with "yes", "no" or "not shown", by rules written before.

    OUT may be the table's folder, with the same sizes: what it measured is not measured again. A
    killed run goes on. Result and section for RESULTS.md are written to OUT, and with --save the
    result to evals/studies/results.

    `python -m hipp_ext.evals.studies.smolworld questions --save`
    """
    from hipp_ext.evals.studies.smolworld.questions.needed import needed
    from hipp_ext.evals.studies.smolworld.table.cells import Cell
    from hipp_ext.evals.studies.smolworld.table.place import Place
    from hipp_ext.evals.studies.smolworld.table.start import run, start

    letters = question or list(LETTERS)
    if unknown := set(letters) - set(LETTERS):
        raise DataError(f"No question has the letter {sorted(unknown)}; there are {list(LETTERS)}.")
    sizes = chosen_sizes(
        quick,
        pictures=pictures,
        choices=choices,
        search=search,
        calibration=calibration,
        evaluations=evaluations,
        steps=steps,
        dtype=dtype,
    )
    fits = seeds or (1 if quick else 2)
    ratios = default_ratios(quick)
    by_letter = needed(fits, ratios)
    cells = [Cell(), *(cell for letter in letters for cell in by_letter[letter])]
    place = Place(model=model, out=out, sizes=sizes, ratios=ratios, concepts=concepts)
    study = start(place, list(dict.fromkeys(cells)), threads)
    with study.locked():
        for _ in run(study, place, processes, threads):
            pass
        found = answers(study, letters, fits, plans)
        result = write_answers(study.bench.identity, found, fits, out, save)
    for own in result["questions"].values():
        typer.echo(f"{own['question']} {own['answer']}")


def answers(study: "TableStudy", letters: list[str], seeds: int, plans: int) -> dict[str, Any]:
    """Letter -> finding as JSON values."""
    from hipp_ext.evals.studies.smolworld.questions.asking import ON_TEST, fitting
    from hipp_ext.evals.studies.smolworld.questions.collapse import collapse
    from hipp_ext.evals.studies.smolworld.questions.contrasts import Contrasts
    from hipp_ext.evals.studies.smolworld.questions.curves import curves

    contrasts, folder = Contrasts(study.rows(), study.bench.asked, seeds), study.folder
    found = {}
    for letter in sorted(set(letters)):
        if letter == "d":
            own = collapse(study.bench, plans, folder / "collapse")
        elif letter == "e":
            reached = curves(folder / "searches", seeds)
            own = fitting(contrasts, study.bench.sizes.evaluations, reached)
        else:
            own = ON_TEST[letter](contrasts)
        found[letter] = own.as_json()
    return found


def write_answers(
    identity: dict[str, Any], found: dict[str, Any], seeds: int, out: Path, save: bool
) -> dict[str, Any]:
    """Write JSON and section to `out`, and with `save` the first to the results; earlier answers
    of the same folder to other questions stay if they are from as many seeds."""
    from hipp_ext.evals.measuring import describe
    from hipp_ext.evals.studies.measuring import command_line
    from hipp_ext.evals.studies.smolworld.questions.section import section
    from hipp_ext.evals.studies.smolworld.table.sizes import SPLITS, TUNED
    from hipp_ext.files import write_atomic

    file = out / f"{NAME}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    kept = before["questions"] if before.get("seeds") == seeds else {}
    values = {
        "identity": identity,
        "seeds": seeds,
        "splits": dict(SPLITS),
        "tuned": TUNED,
        "questions": dict(sorted((kept | found).items())),
    }
    result = describe(command_line(), values, "cpu")
    for place in [out, *([RESULTS] if save else [])]:
        write_atomic(place / f"{NAME}.json", json.dumps(result, indent=1) + "\n")
    write_atomic(out / f"{NAME}.md", section(result))
    return result
