"""Makes VLMEvalKit's MME TSV from the folder that its authors distribute.

MME_Benchmark_release_version holds a folder for each of the 14 subtasks, in newer releases below
MME_Benchmark. Each picture has a text file of its name with two lines, question, tab, Yes or No.
Pictures and texts lie together, or in images/ and questions_answers_YN/.

Source: arXiv 2306.13394 and the authors' release.
"""

from pathlib import Path

from hipp_ext.errors import DataError
from hipp_ext.evals.data.writing import file_pictures, write_table
from hipp_ext.evals.mme import PER_PICTURE, SUBTASKS
from hipp_ext.files.untrusted import read_plain, shown

_INNER, _IMAGES, _TEXTS = "MME_Benchmark", "images", "questions_answers_YN"
_COLUMNS = ("index", "image_path", "question", "answer", "category")
_ENDINGS = (".jpg", ".png", ".jpeg")
_TEXT_BYTES = 1 << 20  # two questions


def write_mme(
    source: str | Path, out: str | Path, *, overwrite: bool = False, progress: bool = False
) -> Path:
    """Write the questions of all 14 subtasks to the TSV `out`; returns its path.

    The subtask becomes the category, and image_path names the picture within the release.

    Args:
        source: the folder MME_Benchmark_release_version.
        out: path of the TSV, such as $LMUData/MME.tsv.
        overwrite: replace an existing file.
        progress: show a progress bar on stderr.

    Raises:
        DataError: a subtask is missing, a picture has not two questions, a line is not in the
            authors' form, or a picture is missing or broken.
        OutputExistsError, WriteError: see `write_table`.
    """
    root = _root(Path(source).expanduser())
    rows: list[dict[str, object]] = []
    names = []
    for subtask in SUBTASKS:
        for text, picture in _files(root / subtask):
            name = picture.relative_to(root).as_posix()
            for question, answer in _questions(text):
                cells = (len(rows), name, question, answer, subtask)
                rows.append(dict(zip(_COLUMNS, cells, strict=True)))
                names.append(name)
    made = {"made_by": "hipp data mme", "files": root.name}
    pictures = file_pictures(root, names)
    return write_table(out, rows, pictures, source=made, overwrite=overwrite, progress=progress)


def _root(source: Path) -> Path:
    """The folder of the subtasks."""
    root = source / _INNER if (source / _INNER).is_dir() else source
    missing = [name for name in SUBTASKS if not (root / name).is_dir()]
    if missing:
        raise DataError(
            f"{root} has no folder {', '.join(missing)}; the folder MME_Benchmark_release_version "
            f"is needed, with the {len(SUBTASKS)} subtasks of MME"
        )
    return root


def _files(folder: Path) -> list[tuple[Path, Path]]:
    """The text file and the picture of each pair of questions of a subtask, in order of names."""
    split = (folder / _TEXTS).is_dir()
    texts, images = (folder / _TEXTS, folder / _IMAGES) if split else (folder, folder)
    found = []
    for text in sorted(texts.glob("*.txt")):
        names = [f"{text.stem}{end}" for one in _ENDINGS for end in (one, one.upper())]
        there = [images / name for name in names if (images / name).is_file()]
        if not there:
            raise DataError(
                f"{text}: there is no picture {text.stem}.jpg or .png in {images}. All are needed: "
                "without some of them it would be another data set"
            )
        found.append((text, there[0]))
    if not found:
        raise DataError(f"{texts} holds no questions (*.txt)")
    return found


def _questions(file: Path) -> list[tuple[str, str]]:
    """The two questions of a picture, each with Yes or No."""
    try:
        text = read_plain(file, _TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from None
    found = []
    for number, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        question, tab, answer = line.rstrip().rpartition("\t")
        if not tab or not question.strip() or answer.strip() not in ("Yes", "No"):
            raise DataError(
                f"{file}, line {number}: a question, a tab, and Yes or No are needed, not "
                f"{shown(line, 100)!r}"
            )
        found.append((question.strip(), answer.strip()))
    if len(found) != PER_PICTURE:
        raise DataError(
            f"{file}: MME asks {PER_PICTURE} questions about a picture, and here are {len(found)}"
        )
    return found
