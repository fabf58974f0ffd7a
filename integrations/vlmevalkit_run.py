"""The implementation of `vlmevalkit.evaluate`: input is checked, then each model is evaluated on
each data set.

The loop between VLMEvalKit's prompts and its scores is ours. VLMEvalKit's own loop asks one
question at a time, uses old answers again if only the weights or the images changed, and reports
success if something failed.
"""

import dataclasses
import gc
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError, MissingExtraError
from hipp_ext.evals.pope import pope_scores
from hipp_ext.evals.prediction_log import PredictionLog, open_log, writing
from hipp_ext.evals.predictions import MAX_NEW_TOKENS, HippVLM, answer_rows, check_model_folder
from hipp_ext.evals.runs import PREDICTIONS, result_folder, run_folder, shown_name, write_questions
from hipp_ext.evals.scienceqa import scienceqa_scores
from hipp_ext.evals.statistics import without_nan
from hipp_ext.evals.tables import GROUP_COLUMNS, YES_NO, Table, locate, read_table, row_options
from hipp_ext.files import content_hash, write_atomic
from hipp_ext.integrations.vlmevalkit_host import first_rows, import_vlmeval, open_dataset, score

DTYPES = ("float32", "bfloat16", "float16")
_KEY = 2  # version of how questions are asked; earlier answers are not used again


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """The scores of a model on a data set, as in `results.json`. All rates are percentages, [0,
    100].

    Attributes:
        model: name of the model's folder.
        model_hash: SHA-256 of the folder's contents.
        data: name of the data set.
        data_hash: SHA-256 of its rows and pictures.
        n: number of questions asked, which a limit may reduce.
        metrics: "vlmevalkit": the table that VLMEvalKit prints, as {split: {column: number}}
            ("Overall" is the F1 on POPE). Then "vlmeval" and "official" for POPE: {split: fields of
            POPEScores}, or "accuracy" for ScienceQA: {group: fields of ChoiceScores}. A standard
            error that cannot be computed is None.
        settings: settings that change the answers.
        official_file: whether the data is the published file; None if there is no published file.
        without_image: number of rows that were left out because they have no image.
        predictions: file of the answers, JSONL.
        seconds: time for new answers and for scoring [s].
        command: command line; None for a call from Python.
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

    @property
    def scores(self) -> dict[str, Any]:
        """Fields of POPEScores, by VLMEvalKit's rule, or of ChoiceScores, over all questions."""
        return self.metrics["accuracy" if "accuracy" in self.metrics else "vlmeval"]["overall"]

    @property
    def accuracy(self) -> float:
        """Share of correct answers over all questions [%]."""
        return self.scores["accuracy"]

    @property
    def accuracy_se(self) -> float | None:
        """Standard error of `accuracy` [percentage points]; None if it cannot be computed."""
        return self.scores["accuracy_se"]

    def __str__(self) -> str:
        error = "" if self.accuracy_se is None else f" ± {self.accuracy_se:.1f}"
        text = f"{self.model} on {self.data}: accuracy {self.accuracy:.1f}{error}%"
        if "yes_rate" in self.scores:
            text += f", F1 {self.scores['f1']:.1f}, {self.scores['yes_rate']:.0f}% answers yes"
        return f"{text} (n {self.scores['n']})"


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
    """The scores of every model on every data set; all input is checked before the first model is
    loaded.

    Answers are kept in `work_dir` by the contents of model, data and settings. A stopped run can
    continue, and answers of another model, image or dtype are never used. The answers of a
    continued run are the same, to the byte, as those of an uninterrupted one, unless the batch size
    was changed.

    Args:
        model_dirs: model folders, pruned or not, each with its processor.
        data: POPE, ScienceQA_VAL, ScienceQA_TEST (or ScienceQA), or NAME=PATH for your own TSV.
        lmu_data: folder of the TSVs. Default: $LMUData, else ~/LMUData.
        work_dir: folder of the results, <model>-<hash>/<data>/results.json; <model> is the last
            part of the path, as given.
        limit: number of questions of each data set, from the first. Default: all.
        batch_size: number of questions per forward pass.
        device: device of the models. Default: the GPU if there is one, else the CPU.
        dtype: one of `DTYPES`. Default: as stored.
        progress: show progress bars on stderr.
        verbose: print every answer.

    Raises:
        DataError, CheckpointError, MissingExtraError: see `tables.read_table`,
            `predictions.check_model_folder`.
        OutputBusyError: another process is answering the same questions with the same model in this
            `work_dir`.
        WriteError: the disk is full, or `work_dir` cannot be written.
    """
    job = prepare(
        model_dirs,
        data,
        lmu_data,
        work_dir,
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
    """The checked input of an evaluation."""

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
    lmu_data: str | Path | None,
    work_dir: str | Path,
    *,
    limit: int | None,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    **output: Any,
) -> Job:
    """The checked arguments of `evaluate`; reads the data, but loads neither VLMEvalKit nor a
    model.
    """
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
                f"the work folder {work_dir} is in the model folder {folder}, and would change "
                "its hash"
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
        **output,
    )


def evaluate_model(job: Job, folder: Path) -> Iterator[EvalRecord]:
    """The records of one model of a job, each as soon as it is computed.

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
    run = run_folder(place, [_KEY, model_hash, table.content_hash, settings])
    indices = [str(index) for index in table.frame["index"].tolist()]
    with open_log(run / PREDICTIONS, indices) as log, writing(place):
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
        text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"
        write_atomic(place / "results.json", text)
    return record


def _answered(
    job: Job,
    folder: Path,
    table: Table,
    log: PredictionLog,
    indices: Sequence[str],
    vlm: Callable[[], HippVLM],
) -> tuple[list[str], dict[str, Any]]:
    """The answers to the questions of the job, and their metrics."""
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
    """Our metrics of the answers to the first rows of a table, as plain data for JSON."""
    frame, n = table.frame.iloc[: len(answers)], len(answers)
    if table.kind == YES_NO:
        rules = pope_scores(
            answers, frame["answer"].tolist(), frame["category"].tolist(), table.images[:n]
        )
        return {
            rule: {split: without_nan(vars(scores)) for split, scores in splits.items()}
            for rule, splits in rules.items()
        }
    groups = {column: frame[column].tolist() for column in GROUP_COLUMNS if column in frame}
    scores = scienceqa_scores(answers, frame["answer"].tolist(), row_options(frame), groups)
    return {"accuracy": {group: without_nan(vars(own)) for group, own in scores.items()}}
