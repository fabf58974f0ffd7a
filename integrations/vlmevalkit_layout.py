"""VLMEvalKit's own files beside ours, for scripts that read its output.

    <work-dir>/<model>/<model>_<data>.xlsx                  answers
    <work-dir>/<model>/<model>_<data>_auxmatch.xlsx         what was read from them
    <work-dir>/<model>/<model>_<data>_score.csv, _acc.csv   scores
    <work-dir>/<model>/status.json                          summary of the run

They are written after every evaluation from our answers and VLMEvalKit's scores of them, and never
read as answers. Those of another model of the same name are removed, as far as they were written
here.
"""

import contextlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import DataError
from hipp_ext.evals.prediction_log import writing
from hipp_ext.evals.tables import Table
from hipp_ext.files import write_atomic
from hipp_ext.files.temporaries import lock
from hipp_ext.files.untrusted import read_json
from hipp_ext.integrations.vlmevalkit_files import FORMATS, file_bytes, file_format

if TYPE_CHECKING:
    import pandas as pd

STATUS = "status.json"
_ANSWERS = ("", "_auxmatch", "_exact_matching_result")  # what follows <model>_<data> in a name
_SCORES = ("_score", "_acc")
_DATA = re.compile(r"[A-Za-z0-9][\w.-]{0,200}", re.ASCII)  # names of data sets; no paths
_LONGEST = 255 - len("_exact_matching_result.xlsx")  # bytes of <model>_<data>


@dataclass(frozen=True, kw_only=True)
class Export:
    """What becomes files of VLMEvalKit.

    Attributes:
        folder: <work-dir>/<model>.
        model_hash: hash of the model, as in our results.
        table: data set.
        answers: answers to its first rows.
        scored: folder with VLMEvalKit's files about these answers; None: they were not scored.
        benchmark: VLMEvalKit's name of the data set, with which these files begin.
        mode: "all", "infer" or "eval".
        command: command line; None for a call from Python.
    """

    folder: Path
    model_hash: str
    table: Table
    answers: Sequence[str]
    scored: Path | None
    benchmark: str
    mode: str
    command: str | None


def export(done: Export) -> None:
    """Write the files of one data set, each atomically, and remove those that they replace.

    Raises:
        WriteError: the folder cannot be written.
    """
    files = _files(done)
    with writing(done.folder), _locked(done.folder):
        status = _status(done.folder / STATUS)
        known = status.get("model_hash")
        if known not in (None, done.model_hash):
            for data in status["datasets"]:
                _remove(done.folder, data)
            status = {}
        _remove(done.folder, done.table.name, keep=files)
        for name, data in files.items():
            write_atomic(done.folder / name, data)
        write_atomic(done.folder / STATUS, _updated(status, done, next(iter(files))))


def _files(done: Export) -> dict[str, bytes]:
    """Content of each file by its name, the answers first."""
    stem, suffix = _stem(done.folder, done.table.name), file_format()
    base = done.table.frame.iloc[: len(done.answers)].drop(columns="image_path")
    base = base.assign(prediction=list(done.answers))
    files = {f"{stem}.{suffix}": file_bytes(base)}
    for path in sorted(done.scored.glob("*.[ct]sv")) if done.scored else ():
        part = path.stem.removeprefix(done.benchmark)
        if path.suffix == ".csv":
            files[f"{stem}{part}.csv"] = path.read_bytes()
        elif part:  # else the answers, under row numbers instead of the indices of the table
            files[f"{stem}{part}.{suffix}"] = file_bytes(_with_indices(path, base))
    return files


def _with_indices(path: Path, base: "pd.DataFrame") -> "pd.DataFrame":
    """VLMEvalKit's columns beside those of the table, whose rows it knows by their number."""
    import pandas as pd

    frame = pd.read_csv(path, sep="\t", keep_default_na=False)
    if "index" not in frame or sorted(frame["index"]) != list(range(len(base))):
        return frame
    frame = frame.set_index("index").sort_index()
    new = [column for column in frame if column not in base]
    return base.assign(**{column: frame[column].tolist() for column in new})


def _stem(folder: Path, data: str) -> str:
    model = folder.name.encode()[: max(1, _LONGEST - len(f"_{data}"))].decode(errors="ignore")
    return f"{model}_{data}"


def _remove(folder: Path, data: str, keep: Sequence[str] | dict[str, bytes] = ()) -> None:
    """Remove the files of a data set, except `keep`."""
    answers = [f"{part}.{suffix}" for part in _ANSWERS for suffix in FORMATS]
    for end in (*answers, *(f"{part}.csv" for part in _SCORES)):
        name = f"{_stem(folder, data)}{end}"
        if name not in keep:
            (folder / name).unlink(missing_ok=True)


def _status(path: Path) -> dict[str, Any]:
    """The status of the folder; without data sets if there is none that can be read."""
    try:
        status = read_json(path)
    except DataError:
        status = {}
    status = status if isinstance(status, dict) else {}
    datasets = status.get("datasets")
    datasets = datasets if isinstance(datasets, dict) else {}
    kept = {
        data: entry
        for data, entry in datasets.items()
        if isinstance(entry, dict) and _DATA.fullmatch(data)
    }
    return status | {"datasets": kept}


def _updated(status: dict[str, Any], done: Export, predictions: str) -> str:
    """status.json with this evaluation, by VLMEvalKit's own functions."""
    import pandas as pd
    from vlmeval.smp import build_eval_id, upsert_dataset_status, upsert_run_status

    scores = sorted(done.scored.glob("*.csv")) if done.scored else []
    with tempfile.TemporaryDirectory() as scratch:  # its lock would stay after a killed process
        (Path(scratch) / STATUS).write_text(json.dumps(status))
        upsert_run_status(
            scratch,
            eval_id=build_eval_id(),
            argv=shlex.split(done.command) if done.command else [],
            world_size=1,
            pred_format=file_format(),
            eval_format="csv",
            mode=done.mode,
            reuse=True,
            model_name=done.folder.name,
            model_hash=done.model_hash,
        )
        upsert_dataset_status(
            scratch,
            done.folder.name,
            done.table.name,
            status="done",
            prediction_file=predictions,
            judge_model="exact_matching",
            metrics_source=pd.read_csv(scores[0]) if scores else None,
            skip_reason=None if scores else "mode_infer",
        )
        return (Path(scratch) / STATUS).read_text()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder, and wait until no other process writes status.json in it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)
