"""The table's files: JSON, two pictures, and a section for RESULTS.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipp_ext.evals.measuring import describe
from hipp_ext.evals.studies.measuring import RESULTS, command_line, keep_picture
from hipp_ext.evals.studies.smolworld.table.asked import Asked
from hipp_ext.evals.studies.smolworld.table.cells import CHIEF
from hipp_ext.evals.studies.smolworld.table.picture import ratios_picture, repairs_picture
from hipp_ext.evals.studies.smolworld.table.section import section
from hipp_ext.evals.studies.smolworld.table.sizes import SPLITS, TUNED
from hipp_ext.evals.studies.smolworld.table.summary import summarize
from hipp_ext.files import write_atomic

NAME = "smolworld_table"
NOTE = (
    "POPE and multiple choice: the likelier candidate as the first token of the answer, which is "
    "what greedy decoding says if it says a candidate at all. Captions are decoded greedily. "
    "Values are [value, standard error] in percent, errors clustered by picture; differences are "
    "paired by question. loss: nats per token of the right captions, mean over captions."
)


def write_table(
    rows: Mapping[str, Any], asked: Asked, about: Mapping[str, Any], folder: Path, save: bool
) -> dict[str, Any]:
    """Write JSON, pictures and section to `folder`, with `save` also all but the last to results.

    Args:
        rows: of `TableStudy.rows`.
        asked: the questions of the test.
        about: identity of the run, and what the narrow type changes.
        folder: the folder.
        save: see above.
    """
    values = {
        **about,
        "splits": dict(SPLITS),
        "tuned": TUNED,
        "note": NOTE,
        "questions": {
            "POPE": len(asked.pope),
            "multiple choice": len(asked.choice),
            "captions": len(asked.captions),
        },
        **summarize(rows, asked),
    }
    result = describe(command_line(), values, "cpu")
    for place in [folder, *([RESULTS] if save else [])]:
        write_atomic(place / f"{NAME}.json", compact(result))
    keep_picture(NAME, ratios_picture(result), save=save, folder=folder)
    keep_picture("smolworld_repairs", repairs_picture(result, CHIEF), save=save, folder=folder)
    write_atomic(folder / f"{NAME}.md", section(result))
    return result


def compact(result: Mapping[str, Any]) -> str:
    """JSON with a line for each value of the top level, and for each item of its lists."""
    lines = []
    for name, value in result.items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(name)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
