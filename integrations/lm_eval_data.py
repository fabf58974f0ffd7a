"""POPE and ScienceQA for lm-eval: what the task files name. The same TSVs, prompts and rules as the `vlmeval` path.

A task finds its TSV in `--metadata tsv=FILE`, else as POPE.tsv (ScienceQA_TEST.tsv, ...) in `--metadata lmu_data=DIR`, else in
$LMUData, else in ~/LMUData. Rates are fractions, [0, 1], as everywhere in lm-eval.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hipp_ext.evals.pope import RULES, SPLITS, split_rates
from hipp_ext.evals.questions import table_questions
from hipp_ext.evals.runs import table_rows
from hipp_ext.evals.scienceqa import UNREADABLE, option_letter
from hipp_ext.evals.tables import Table, locate, read_table
from hipp_ext.files.untrusted import read_picture

# ------------------------------------------------------------------------------------------------------ TSV -> documents


def load_pope(**given: Any) -> dict[str, Any]:
    """POPE's questions as {"test": datasets.Dataset}; see `_load`."""
    return _load("POPE", **given)


def load_scienceqa(**given: Any) -> dict[str, Any]:
    """ScienceQA's test questions with a picture as {"test": datasets.Dataset}; see `_load`."""
    return _load("ScienceQA_TEST", **given)


def load_scienceqa_val(**given: Any) -> dict[str, Any]:
    """ScienceQA's validation questions with a picture as {"test": datasets.Dataset}; see `_load`."""
    return _load("ScienceQA_VAL", **given)


def _load(
    name: str, tsv: str | None = None, lmu_data: str | None = None, **_: Any
) -> dict[str, Any]:
    """One document per question: index, prompt, answer, category, options (JSON), image (SHA-256), image_path.

    Args:
        name: of the benchmark.
        tsv: its file.
        lmu_data: folder of the TSVs.
        _: lm-eval passes the model's arguments too.

    Raises:
        DataError: there is no such file, or something is wrong with it.
    """
    from datasets import Dataset

    name, path = locate(f"{name}={tsv}" if tsv else name, lmu_data)
    table = read_table(path, _picture_folder(path.parent), name=name)
    asked, rows = table_questions(table), table_rows(table)
    return {
        "test": Dataset.from_list(
            [_document(table, *pair) for pair in zip(asked, rows, strict=True)]
        )
    }


def _document(table: Table, asked: Any, row: Any) -> dict[str, str]:
    return {
        "index": row.index,
        "prompt": asked.prompt,
        "answer": row.answer,
        "category": row.category,
        "options": json.dumps(row.options),
        "image": row.image,
        "image_path": asked.image_path,
        "data": table.name,
    }


def _picture_folder(beside: Path) -> Path:
    """Where decoded pictures go: by their content, beside the TSV; elsewhere if that folder cannot be written."""
    if os.access(beside, os.W_OK):
        return beside / "images" / "by-content"
    return Path(tempfile.mkdtemp(prefix="hipp-pictures-"))


# --------------------------------------------------------------------------------------------------- documents -> numbers


def doc_to_image(doc: dict) -> list[Any]:
    """The document's picture, RGB, in a list."""
    return [read_picture(doc["image_path"])]


def pope_results(doc: dict, results: Sequence[str]) -> dict[str, Any]:
    """Metric name -> what the question adds to it: [label, said, times counted, picture]; None outside the metric's split.

    "overall" counts a question once for each of its splits, as VLMEvalKit does.
    """
    own = doc["category"].split(",")
    times = {"overall": len(own), **{split: int(split in own) for split in SPLITS}}
    found: dict[str, Any] = {}
    for rule, read in RULES.items():
        said = read(results[0])
        for split, count in times.items():
            item = [doc["answer"], said, count, doc["image"]] if count else None
            found |= {f"{rule}_{metric}_{split}": item for metric in ("f1", "accuracy", "yes_rate")}
        found |= {
            f"{rule}_{metric}": found[f"{rule}_f1_overall"] for metric in ("f1_se", "accuracy_se")
        }
    return found | {
        "vlmeval_unknown_rate": found["vlmeval_f1_overall"]
    }  # by the authors' rule there is none


def scienceqa_results(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is right, and whether it cannot be read as an option."""
    said = option_letter(results[0], json.loads(doc["options"]))
    return {
        "accuracy": float(said == doc["answer"]),
        "unknown_rate": float(said == UNREADABLE != doc["answer"]),
    }


def _aggregate(rate: str) -> Callable[[Sequence[Any]], float]:
    def aggregate(items: Sequence[Any]) -> float:
        counted = [item for item in items if item is not None for _ in range(item[2])]
        if not counted:
            return math.nan  # the file has no question of this split
        labels, said, _, images = zip(*counted, strict=True)
        return split_rates(said, labels, images, errors=rate.endswith("_se"))[rate] / 100

    aggregate.__name__ = rate
    return aggregate


f1, accuracy, yes_rate, unknown_rate = map(
    _aggregate, ("f1", "accuracy", "yes_rate", "unknown_rate")
)
f1_se, accuracy_se = map(_aggregate, ("f1_se", "accuracy_se"))
