"""Readers of MME, AMBER and HallusionBench: their authors' files, and the tables made of them."""

from pathlib import Path
from typing import Any

from fuzz.data_readers import answerable, no_other_pictures
from fuzz.table import TABLE

_WRITES: dict[str, Any] = {"check": no_other_pictures, "errors": ("DataError", "WriteError")}


def make_mme(folder: Path) -> None:
    from benchmark_files import draw_mme

    draw_mme(folder, pictures=1)


def make_amber(folder: Path) -> None:
    from benchmark_files import draw_amber

    draw_amber(folder, pictures=2)


def make_hallusionbench(folder: Path) -> None:
    from benchmark_files import draw_hallusionbench

    draw_hallusionbench(folder)


def make_tables(folder: Path) -> None:
    from tempfile import TemporaryDirectory

    import pandas as pd
    from benchmark_files import write_all

    with TemporaryDirectory() as drawn:
        for file in write_all(Path(drawn)).glob("*.tsv"):
            frame = pd.read_csv(file, sep="\t")
            frame.to_csv(folder / file.name, sep="\t", index=False)  # without quotes


@TABLE.reads("mme", make_mme, **_WRITES)
def read_mme(folder: Path) -> Any:
    from hipp_ext.evals.data.mme import write_mme

    return [write_mme(folder, folder.parent / "out/MME.tsv")]


@TABLE.reads("amber", make_amber, **_WRITES)
def read_amber(folder: Path) -> Any:
    from hipp_ext.evals.data.amber import write_amber

    return [write_amber(folder, folder / "image", folder.parent / "out/AMBER.tsv")]


@TABLE.reads("hallusionbench", make_hallusionbench, **_WRITES)
def read_hallusionbench(folder: Path) -> Any:
    from hipp_ext.evals.data.hallusionbench import write_hallusionbench

    out = folder.parent / "out/HallusionBench.tsv"
    return [write_hallusionbench(folder, folder / "hallusion_bench", out)[0]]


def answered(tables: Any, folder: Path) -> None:
    """As `answerable`, and every share of the scores is between 0 and 100."""
    for questions, rows, scores in tables:
        answerable((questions, rows), folder)
        for splits in scores.values():
            for numbers in splits.values():
                assert 0 <= numbers["accuracy"] <= 100, f"an accuracy of {numbers['accuracy']}"


@TABLE.reads("tsv-benchmarks", make_tables, check=answered)
def read_tables(folder: Path) -> Any:
    """The tables of the benchmarks that have columns or checks of their own, asked and scored."""
    from hipp_ext.evals.benchmarks import BENCHMARKS, benchmark_scores, scored_rows
    from hipp_ext.evals.questions import table_questions
    from hipp_ext.evals.runs import table_rows
    from hipp_ext.evals.tables import read_table

    found = []
    for name in BENCHMARKS:
        table = read_table(folder / f"{name}.tsv", folder.parent / "pictures", name=name)
        rows = table_rows(table)
        assert scored_rows(name, [row.group for row in rows])
        scores = benchmark_scores(name, ["Yes"] * len(rows), rows)
        found.append((table_questions(table), rows, scores))
    return found
