"""What `vlmevalkit.evaluate` does: checked input, one model after another, one data set after another, numbers to files.

The loop between VLMEvalKit's prompts and its scores is ours, because VLMEvalKit's goes one question at a time, takes old
answers for new ones when only the weights or the pictures changed, and ends well whatever failed.
"""

import dataclasses
import gc
import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError, MissingExtraError
from hipp_ext.evals.pope import pope_scores
from hipp_ext.evals.prediction_log import PredictionLog, open_log, writing
from hipp_ext.evals.predictions import MAX_NEW_TOKENS, HippVLM, answer_rows, check_model_folder
from hipp_ext.evals.runs import PREDICTIONS, result_folder, shown_name, write_questions
from hipp_ext.evals.scienceqa import scienceqa_scores
from hipp_ext.evals.tables import GROUP_COLUMNS, YES_NO, Table, locate, read_table, row_options
from hipp_ext.files import content_hash, write_atomic
from hipp_ext.integrations.vlmevalkit_host import first_rows, import_vlmeval, open_dataset, score

DTYPES = ("float32", "bfloat16", "float16")
_KEY = 2  # counts changes of how questions are asked: answers kept from before are not those of now


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """What one model scored on one data set; the same is in `results.json`. All rates are percentages, [0, 100].

    Attributes:
        model: name of the model's folder.
        model_hash: SHA-256 of the folder's contents.
        data: name of the data set.
        data_hash: SHA-256 of its rows and pictures.
        n: questions asked (fewer than the file has when a limit was given).
        metrics: "vlmevalkit": the table that VLMEvalKit prints, as {split: {column: number}} ("Overall" is the F1 on
            POPE); then POPE's "vlmeval" and "official": {split: fields of POPEScores}, or ScienceQA's "accuracy":
            {group: fields of ChoiceScores}. A standard error that cannot be taken is None.
        settings: what shaped the answers.
        official_file: whether the data is the published file; None where there is none.
        without_image: rows of the file left out because they have no picture.
        predictions: the file of answers, JSONL.
        seconds: time for answering what was not answered before, and for scoring.
        command: the command line; None for a call from Python.
    """

    model: str
    model_hash: str
    data: str
    data_hash: str
    n: int
    metrics: dict[str, Any]
    settings: dict[str, Any]
    official_file: bool | None
    without_image: int
    predictions: str
    seconds: float
    command: str | None = None


def evaluate(
    model_dirs: str | Path | Sequence[str | Path],
    data: str | Sequence[str],
    *,
    lmu_data: str | Path | None = None,
    work_dir: str | Path = "outputs",
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    verbose: bool = False,
) -> list[EvalRecord]:
    """Scores of every model on every data set; all input is checked before the first model is loaded.

    Answers are kept under `work_dir` by the content of model, data and settings: a run that was stopped goes on where
    it stopped, and nothing is taken from another model, another picture or another dtype. Its answers are those of a run
    that was never stopped, to the byte, unless the batch size was changed in between.

    Args:
        model_dirs: model folders, pruned or not, each with its processor.
        data: POPE, ScienceQA_VAL, ScienceQA_TEST (or ScienceQA), or NAME=PATH for a TSV of your own.
        lmu_data: folder of the TSVs; else $LMUData, else ~/LMUData.
        work_dir: gets <model>-<hash>/<data>/results.json; <model> is the last part of the path, as it was given.
        limit: only the first questions of each data set count; None is all.
        batch_size: questions per forward pass.
        device: None is the GPU if there is one.
        dtype: one of `DTYPES`; None is as stored.
        progress: progress bars on stderr.
        verbose: print every answer.

    Raises:
        DataError, CheckpointError, MissingExtraError: see `tables.read_table`, `predictions.check_model_folder`.
        OutputBusyError: another process is answering the same questions with the same model in this `work_dir`.
        WriteError: the disk is full, or `work_dir` cannot be written.
    """
    job = prepare(
        model_dirs,
        data,
        lmu_data=lmu_data,
        work_dir=work_dir,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
        verbose=verbose,
    )
    return [record for folder in job.folders for record in evaluate_model(job, folder)]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Checked input of an evaluation."""

    folders: list[Path]
    tables: list[Table]
    work_dir: Path
    limit: int | None
    batch_size: int
    device: str
    dtype: str
    progress: bool
    verbose: bool
    command: str | None = None


def prepare(
    model_dirs: str | Path | Sequence[str | Path],
    data: str | Sequence[str],
    *,
    lmu_data: str | Path | None,
    work_dir: str | Path,
    limit: int | None,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    progress: bool,
    verbose: bool,
    command: str | None = None,
) -> Job:
    """The arguments of `evaluate`, checked; reads the data, but imports neither VLMEvalKit nor a model."""
    from hipp_ext.surgery.checkpoint import resolve_device

    if importlib.util.find_spec("vlmeval") is None:
        raise MissingExtraError("vlmeval", "vlmeval")
    if (limit is not None and limit < 1) or batch_size < 1:
        raise DataError(f"limit and batch_size must be 1 or more, not {limit} and {batch_size}")
    if dtype not in (None, "auto", *DTYPES):
        raise DataError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    work_dir = Path(work_dir).expanduser().resolve()
    given = [model_dirs] if isinstance(model_dirs, str | Path) else model_dirs
    folders = list(dict.fromkeys(check_model_folder(folder) for folder in given))
    found = list(
        dict.fromkeys(locate(one, lmu_data) for one in ([data] if isinstance(data, str) else data))
    )
    if not folders or not found:
        raise DataError("nothing to evaluate: give at least one model folder and one data set")
    for folder in folders:
        if work_dir.is_relative_to(folder.resolve()):
            raise DataError(
                f"the work folder {work_dir} lies in the model folder {folder}, and would change its hash"
            )
    if len({name for name, _ in found}) < len(found):
        raise DataError(
            f"two files for one name: {', '.join(f'{name}={path}' for name, path in found)}"
        )
    tables = [read_table(path, work_dir / "images", name=name) for name, path in found]
    return Job(
        folders=folders,
        tables=tables,
        work_dir=work_dir,
        limit=limit,
        batch_size=batch_size,
        device=resolve_device(device),
        dtype=dtype or "auto",
        progress=progress,
        verbose=verbose,
        command=command,
    )


def evaluate_model(job: Job, folder: Path) -> Iterator[EvalRecord]:
    """The records of one model of a job, each as soon as it is there.

    The model is loaded once, and only if an answer is missing.
    """
    import_vlmeval()
    model_hash = content_hash(folder)
    loaded: list[HippVLM] = []

    def vlm() -> HippVLM:
        if not loaded:
            loaded.append(HippVLM(folder, job.device, job.dtype))
        return loaded[0]

    try:
        for table in job.tables:
            yield _evaluate_table(job, folder, model_hash, table, vlm)
    finally:
        loaded.clear()
        gc.collect()  # the next model needs the memory now


def _evaluate_table(
    job: Job, folder: Path, model_hash: str, table: Table, vlm: Callable[[], HippVLM]
) -> EvalRecord:
    start = time.perf_counter()
    place = result_folder(job.work_dir, folder, model_hash) / table.name
    settings = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "decoding": "greedy",
        "dtype": job.dtype,
        "device": job.device.partition(":")[0],
    }
    key = hashlib.sha256(
        json.dumps([_KEY, model_hash, table.content_hash, settings]).encode()
    ).hexdigest()[:16]
    indices = [str(index) for index in table.frame["index"].tolist()]
    with open_log(place / f"run-{key}" / PREDICTIONS, indices) as log, writing(place):
        answers, metrics = _answered(job, folder, table, log, indices, vlm)
        record = EvalRecord(
            model=shown_name(folder),
            model_hash=model_hash,
            data=table.name,
            data_hash=table.content_hash,
            n=len(answers),
            metrics=metrics,
            settings=settings,
            official_file=table.official,
            without_image=table.without_image,
            predictions=str(log.path),
            seconds=time.perf_counter() - start,
            command=job.command,
        )
        # By way of the folder that is held: what a killed process leaves there is swept.
        file = log.path.with_name("results.json")
        write_atomic(file, json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n")
        os.replace(file, place / file.name)
    return record


def _answered(
    job: Job,
    folder: Path,
    table: Table,
    log: PredictionLog,
    indices: Sequence[str],
    vlm: Callable[[], HippVLM],
) -> tuple[list[str], dict[str, Any]]:
    """The answers to the wanted questions, and all metrics of them."""
    write_questions(table, log.path.parent)
    dataset = open_dataset(table, None)  # of all rows: the last batch is asked whole
    name = shown_name(folder)
    title = f"{name} on {table.name}" if job.progress else None
    answer_rows(
        vlm,
        log,
        indices,
        dataset.build_prompt,
        batch_size=job.batch_size,
        progress=title,
        limit=job.limit,
    )
    indices = indices[: job.limit]
    answers = [log.answers[index] for index in indices]
    if job.verbose:
        for index, answer in zip(indices, answers, strict=True):
            print(f"{name} {table.name} {index}: {answer!r}")
    theirs = score(first_rows(dataset, len(answers)), answers, log.path.parent / "vlmevalkit")
    return answers, {"vlmevalkit": theirs, **_metrics(table, answers)}


def _metrics(table: Table, answers: Sequence[str]) -> dict[str, Any]:
    """Our numbers for the answers to a table's first rows, as plain data that JSON can hold."""
    frame, n = table.frame.iloc[: len(answers)], len(answers)
    if table.kind == YES_NO:
        rules = pope_scores(
            answers, frame["answer"].tolist(), frame["category"].tolist(), table.images[:n]
        )
        return {
            rule: {split: _plain(scores) for split, scores in splits.items()}
            for rule, splits in rules.items()
        }
    groups = {column: frame[column].tolist() for column in GROUP_COLUMNS if column in frame}
    scores = scienceqa_scores(answers, frame["answer"].tolist(), row_options(frame), groups)
    return {"accuracy": {group: _plain(own) for group, own in scores.items()}}


def _plain(scores: Any) -> dict[str, float | None]:
    """A dataclass as a dict, with None for NaN, which JSON does not have."""
    return {
        name: None if math.isnan(value) else value
        for name, value in dataclasses.asdict(scores).items()
    }
