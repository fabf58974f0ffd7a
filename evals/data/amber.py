"""Makes VLMEvalKit's AMBER TSV, the discriminative part of AMBER, from its authors' files.

The folder data/ of the authors' repository holds query/query_discriminative.json (id, image, query)
and annotations.json (id, type, truth). The pictures, AMBER_1.jpg and so on, are a download of their
own.

Source: arXiv 2311.07397 and the authors' repository.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.amber import KINDS
from hipp_ext.evals.data.writing import file_pictures, write_table
from hipp_ext.files import content_hash
from hipp_ext.files.untrusted import read_json, shown, the_only_one

QUERIES, ANNOTATIONS = "query/query_discriminative.json", "annotations.json"


def write_amber(
    source: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write the discriminative questions to the TSV `out`; returns its path.

    The index is the authors' id and the category their type. The questions have no ending, because
    VLMEvalKit adds one when it asks them.

    Args:
        source: the authors' repository, or its folder data.
        images: folder of the pictures.
        out: path of the TSV, such as $LMUData/AMBER.tsv.
        overwrite: replace an existing file.
        progress: show a progress bar on stderr.

    Raises:
        DataError: a file is missing or not in the authors' form, a question has no annotation, or a
            picture is missing or broken.
        OutputExistsError, WriteError: see `write_table`.
    """
    folder = Path(source).expanduser()
    folder = folder / "data" if (folder / "data" / ANNOTATIONS).is_file() else folder
    annotations = _annotations(folder / ANNOTATIONS)
    rows = [
        _row(folder / QUERIES, query, annotations) for query in _entries(folder / QUERIES, "image")
    ]
    pictures = file_pictures(images, [str(row["image_path"]) for row in rows])
    files = [folder / QUERIES, folder / ANNOTATIONS]
    made = {"made_by": "hipp data amber", "files": {f.name: content_hash(f) for f in files}}
    return write_table(out, rows, pictures, source=made, overwrite=overwrite, progress=progress)


def _entries(path: Path, needed: str) -> list[dict[str, Any]]:
    """The objects of a list, each with an id and the field `needed`; ids are distinct."""
    data = read_json(path)
    if not isinstance(data, list) or not data:
        raise DataError(f"{path} is not a file of AMBER: a list of questions is needed")
    seen = set()
    for entry in data:
        number = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(number, bool) or not isinstance(number, int) or needed not in entry:
            raise DataError(
                f"{path} is not a file of AMBER: an entry needs id and {needed}, and one is "
                f"{shown(entry, 100)}"
            )
        if number in seen:
            raise DataError(f"{path}: the id {number} occurs more than once")
        seen.add(number)
    return data


def _annotations(path: Path) -> dict[int, tuple[str, str]]:
    """Type and truth of each discriminative question, by id."""
    found = {}
    for entry in _entries(path, "type"):
        kind, truth = entry["type"], entry.get("truth")
        if kind == "generative":
            continue
        if not isinstance(kind, str) or kind not in KINDS or truth not in ("yes", "no"):
            raise DataError(
                f"{path}: id {entry['id']} has the type {shown(kind, 60)!r} and the truth "
                f"{shown(truth, 60)!r}; known types are {', '.join(KINDS)}, and truths yes and no"
            )
        found[entry["id"]] = kind, truth
    return found


def _row(
    path: Path, query: Mapping[str, Any], annotations: Mapping[int, tuple[str, str]]
) -> dict[str, object]:
    number, where = query["id"], f"{path}: id {query['id']}"
    image, text = the_only_one(query["image"], where), query.get("query")
    if not isinstance(image, str) or not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} needs the texts image and query")
    if number not in annotations:
        raise DataError(
            f"{where} has no annotation of a discriminative question in {ANNOTATIONS}. Are the two "
            "files of one version?"
        )
    kind, truth = annotations[number]
    row: dict[str, object] = {"index": number, "image_path": image, "question": text}
    return row | {"answer": truth.capitalize(), "category": kind}
