"""Makes VLMEvalKit's HallusionBench TSV from its authors' HallusionBench.json and pictures.

Questions without a picture are left out, 178 of the published 1129, as in VLMEvalKit.

Source: arXiv 2310.14566 and the authors' repository.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.data.pope import ENDING
from hipp_ext.evals.data.writing import file_pictures, write_table
from hipp_ext.evals.hallusionbench import NAME
from hipp_ext.files import content_hash
from hipp_ext.files.untrusted import read_json, shown, the_only_one

_TEXTS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question")
_NO_PICTURE = "0"


def write_hallusionbench(
    source: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    ending: str = ENDING,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[Path, int]:
    """Write the questions about pictures to the TSV `out`.

    The index tells set, figure and question, as in HallusionBench_VD_math_3_1_0; category is VD or
    VS, and l2-category such as VD_math.

    Args:
        source: HallusionBench.json, or the folder that holds it.
        images: the folder hallusion_bench with the pictures, such as VD/math/3_1.png.
        out: path of the TSV, such as $LMUData/HallusionBench.tsv.
        ending: text after each question that does not ask for yes or no already, because answers
            are read without a judge.
        overwrite: replace an existing file.
        progress: show a progress bar on stderr.

    Returns:
        `out`, and the number of questions without a picture, which are left out.

    Raises:
        DataError: the file is not in the authors' form, a question occurs twice, or a picture is
            missing or broken.
        OutputExistsError, WriteError: see `write_table`.
    """
    file = Path(source).expanduser()
    file = file / f"{NAME}.json" if file.is_dir() else file
    data = read_json(file)
    if not isinstance(data, list):
        raise DataError(f"{file} is not HallusionBench.json: a list of questions is needed")
    rows, names, without = [], [], 0
    for number, entry in enumerate(data, start=1):
        where = f"{file}, question {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is not an object: {shown(entry, 100)}")
        if entry.get("visual_input") == _NO_PICTURE:
            without += 1
            continue
        rows.append(_row(where, entry, ending))
        name = the_only_one(entry.get("filename"), where)
        if not isinstance(name, str) or not name:
            raise DataError(f"{where} has no filename, and its visual_input is not 0")
        names.append(name.removeprefix("./"))
    _refuse_repeated(file, rows)
    made = {"made_by": "hipp data hallusionbench", "ending": ending, "without_picture": without}
    made |= {"files": {file.name: content_hash(file)}}
    pictures = file_pictures(images, names)
    write_table(out, rows, pictures, source=made, overwrite=overwrite, progress=progress)
    return Path(out), without


def _row(where: str, entry: Mapping[str, Any], ending: str) -> dict[str, object]:
    texts = [entry.get(name) for name in _TEXTS]
    for name, text in zip(_TEXTS, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {name} must be a text, and is {shown(text, 60)!r}")
        if name != "question" and not text.isalnum():  # the parts of the index
            raise DataError(f"{where}: {name} must be letters and digits, not {shown(text, 60)!r}")
    if (answer := entry.get("gt_answer")) not in ("0", "1"):
        raise DataError(f"{where}: gt_answer is {shown(answer, 60)!r}; it must be '0' or '1'")
    category, kind, *numbers, question = map(str, texts)
    asks = "yes or no" in question.lower()
    return {
        "index": "_".join([NAME, category, kind, *numbers]),
        "question": question if asks else f"{question} {ending}".strip(),
        "answer": "Yes" if answer == "1" else "No",
        "category": category,
        "l2-category": f"{category}_{kind}",
    }


def _refuse_repeated(file: Path, rows: list[dict[str, object]]) -> None:
    indices = [row["index"] for row in rows]
    repeated = [index for index, n in Counter(indices).items() if n > 1]
    if repeated:
        raise DataError(f"{file}: the question {repeated[0]} occurs more than once")
