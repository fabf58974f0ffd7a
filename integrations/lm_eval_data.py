"""POPE and ScienceQA for lm-eval and lmms-eval: the functions that the task files name.

The TSVs, prompts and rules are those of `vlmeval`. Rates are fractions, [0, 1], as everywhere in
lm-eval.
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
from hipp_ext.evals.tables import locate, read_table
from hipp_ext.files.untrusted import read_picture


def load(
    benchmark: str, tsv: str | None = None, lmu_data: str | None = None, **_: Any
) -> dict[str, Any]:
    """The questions of a benchmark as {"test": datasets.Dataset}.

    A document has the fields index, prompt, answer, category, group, options (JSON), image
    (SHA-256), image_path and data.

    Args:
        benchmark: name of the benchmark, one of `tables.KNOWN`.
        tsv: file of the benchmark.
        lmu_data: folder of <benchmark>.tsv, where `tsv` is None; default: $LMUData, else ~/LMUData.
        _: arguments of the model, which lm-eval passes too.

    Raises:
        DataError: the file does not exist, or is not a table of the benchmark.
    """
    from datasets import Dataset

    name, path = locate(f"{benchmark}={tsv}" if tsv else benchmark, lmu_data)
    table = read_table(path, _picture_folder(path.parent), name=name)
    documents = [
        {
            "index": row.index,
            "prompt": question.prompt,
            "answer": row.answer,
            "category": row.category,
            "group": row.group,
            "options": json.dumps(row.options),
            "image": row.image,
            "image_path": question.image_path,
            "data": table.name,
        }
        for question, row in zip(table_questions(table), table_rows(table), strict=True)
    ]
    return {"test": Dataset.from_list(documents)}


def _picture_folder(beside: Path) -> Path:
    """Folder of decoded images: beside the TSV, or a temporary one if that cannot be written."""
    if os.access(beside, os.W_OK):
        return beside / "images" / "by-content"
    return Path(tempfile.mkdtemp(prefix="hipp-pictures-"))


def doc_to_image(doc: dict) -> list[Any]:
    """A list with the document's image, RGB."""
    return [read_picture(doc["image_path"])]


def pope_results(doc: dict, results: Sequence[str]) -> dict[str, Any]:
    """What the question adds to each metric: [label, prediction, times counted, image]; None
    outside its splits.

    "overall" counts a question once for each of its splits, as VLMEvalKit does.
    """
    own = doc["category"].split(",")
    times = {"overall": len(own), **{split: int(split in own) for split in SPLITS}}
    found: dict[str, Any] = {}
    for rule, read in RULES.items():
        prediction = read(results[0])
        for split, count in times.items():
            item = [doc["answer"], prediction, count, doc["image"]] if count else None
            found |= {f"{rule}_{metric}_{split}": item for metric in ("f1", "accuracy", "yes_rate")}
        overall = found[f"{rule}_f1_overall"]
        found |= {f"{rule}_{metric}": overall for metric in ("f1_se", "accuracy_se")}
    # The authors' rule can read every answer.
    return found | {"vlmeval_unknown_rate": found["vlmeval_f1_overall"]}


def scienceqa_results(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is correct, and whether it cannot be read as an option."""
    letter = option_letter(results[0], json.loads(doc["options"]))
    return {
        "accuracy": float(letter == doc["answer"]),
        "unknown_rate": float(letter == UNREADABLE != doc["answer"]),
    }


def _aggregation(rate: str) -> Callable[[Sequence[Any]], float]:
    def aggregate(items: Sequence[Any]) -> float:
        counted = [item for item in items if item is not None for _ in range(item[2])]
        if not counted:
            return math.nan  # the file has no question of this split
        labels, predictions, _, images = zip(*counted, strict=True)
        return split_rates(predictions, labels, images, errors=rate.endswith("_se"))[rate] / 100

    aggregate.__name__ = rate
    return aggregate


f1, accuracy, yes_rate, unknown_rate, f1_se, accuracy_se = map(
    _aggregation, ("f1", "accuracy", "yes_rate", "unknown_rate", "f1_se", "accuracy_se")
)
