"""The implementation of `vlmevalkit.evaluate`: input is checked, then each model is evaluated on
each data set.

The loop between VLMEvalKit's prompts and its scores is ours. VLMEvalKit's own loop asks one
question at a time, uses old answers again if only the weights or the images changed, and reports
success if something failed.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError
from hipp_ext.evals.benchmarks import BENCHMARKS, benchmark_scores
from hipp_ext.evals.pope import pope_scores
from hipp_ext.evals.prediction_log import PredictionLog, open_log, writing
from hipp_ext.evals.runs import PREDICTIONS, result_folder, run_folder, table_rows, write_questions
from hipp_ext.evals.scienceqa import scienceqa_scores
from hipp_ext.evals.statistics import without_nan
from hipp_ext.evals.tables import GROUP_COLUMNS, YES_NO, Table, row_options
from hipp_ext.files import write_atomic
from hipp_ext.integrations.vlmevalkit_host import first_rows, import_vlmeval, open_dataset, score
from hipp_ext.integrations.vlmevalkit_job import Job, Model, prepare
from hipp_ext.integrations.vlmevalkit_layout import Export, export
from hipp_ext.integrations.vlmevalkit_models import Evaluated

_KEY = 2  # version of how questions are asked; earlier answers are not used again


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """The scores of a model on a data set, as in `results.json`. All rates are percentages, [0,
    100].

    Attributes:
        model: name of the model's folder, or of the served model with "--" for "/".
        model_hash: SHA-256 of the folder's contents; of a served model, of its address, its name
            and what the server says of it.
        data: name of the data set.
        data_hash: SHA-256 of its rows and pictures.
        n: number of questions asked, which a limit may reduce.
        metrics: "vlmevalkit": the table that VLMEvalKit prints, as {split: {column: number}}
            ("Overall" is the F1 on POPE). Then "vlmeval" and "official" for POPE and RePOPE:
            {split: fields of POPEScores}, or "scores" for MME, AMBER and HallusionBench: {rule:
            {split: numbers as in their modules}}, or "accuracy" for ScienceQA: {group: fields of
            ChoiceScores}. A standard error that cannot be computed is None. Empty in mode "infer".
        settings: settings that change the answers.
        official_file: whether the data is the published file; None if there is no published file.
        without_image: number of rows that were left out because they have no image.
        predictions: file of the answers, JSONL.
        seconds: time for new answers and for scoring [s].
        command: command line; None for a call from Python.
        made: when, on what and with which versions it was scored, see `measuring.about`.
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
    made: dict[str, Any] | None = None

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
    models: Model | Sequence[Model],
    data: str | Sequence[str],
    *,
    lmu_data: str | Path | None = None,
    work_dir: str | Path = "outputs",
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    mode: str = "all",
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
        models: model folders, pruned or not, each with its processor; or `ServedVLM`s.
        data: names of `tables.KNOWN`, such as POPE or MME, or NAME=PATH for your own TSV.
        lmu_data: folder of the TSVs. Default: $LMUData, else ~/LMUData.
        work_dir: folder of the results, <model>-<hash>/<data>/results.json; <model> is the last
            part of the path, as given. VLMEvalKit's own files are beside them, in <model>.
        limit: number of questions of each data set, from the first. Default: all.
        batch_size: number of questions per forward pass of a folder's model.
        device: device of the folders' models. Default: the GPU if there is one, else the CPU.
        dtype: one of `DTYPES`, of the folders' models. Default: as stored.
        mode: "all"; "infer" only asks, and its records have no metrics; "eval" only scores the
            answers of earlier runs.
        progress: show progress bars on stderr.
        verbose: print every answer.

    Raises:
        DataError, CheckpointError, MissingExtraError: see `tables.read_table`,
            `predictions.check_model_folder`.
        DataError: in mode "eval", a question is not answered.
        ServerError: a server stopped answering, or refuses a question. Earlier answers are kept.
        OutputBusyError: another process is answering the same questions with the same model in this
            `work_dir`.
        WriteError: the disk is full, or `work_dir` cannot be written.
    """
    job = prepare(
        models,
        data,
        lmu_data,
        work_dir,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        mode=mode,
        progress=progress,
        verbose=verbose,
    )
    return [record for model in job.models for record in evaluate_model(job, model)]


def evaluate_model(job: Job, model: Evaluated) -> Iterator[EvalRecord]:
    """The records of one model of a job, each as soon as it is computed.

    The model is loaded once, and only if an answer is missing.
    """
    import_vlmeval()
    try:
        for table in job.tables:
            yield _evaluate_table(job, model, table)
    finally:
        model.close()


def _evaluate_table(job: Job, model: Evaluated, table: Table) -> EvalRecord:
    start = time.perf_counter()
    place = result_folder(job.work_dir, Path(model.name), model.model_hash) / table.name
    run = run_folder(place, [_KEY, model.model_hash, table.content_hash, model.settings])
    indices = [str(index) for index in table.frame["index"].tolist()]
    if job.mode == "eval" and not run.is_dir():
        raise _unanswered(model, table, len(indices[: job.limit]))
    with open_log(run / PREDICTIONS, indices) as log, writing(place):
        dataset = open_dataset(table, None)  # of all rows: the last batch is asked whole
        answers = _answers(job, model, table, log, dataset)
        scored, metrics = None, {}
        if job.mode != "infer":
            scored = run / "vlmevalkit"
            theirs = score(first_rows(dataset, len(answers)), answers, scored)
            metrics = {"vlmevalkit": theirs, **_metrics(table, answers)}
        record = EvalRecord(
            model=model.name,
            model_hash=model.model_hash,
            data=table.name,
            data_hash=table.content_hash,
            n=len(answers),
            metrics=metrics,
            settings=model.settings,
            official_file=table.official,
            without_image=table.without_image,
            predictions=str(log.path),
            seconds=time.perf_counter() - start,
            command=job.command,
            made=model.made(),
        )
        if scored:
            text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"
            write_atomic(place / "results.json", text)
        done = Export(
            folder=job.work_dir / job.exported_name(model),
            model_hash=model.model_hash,
            table=table,
            answers=answers,
            scored=scored,
            benchmark=dataset.dataset_name,
            mode=job.mode,
            command=job.command,
        )
        export(done)
    return record


def _answers(
    job: Job, model: Evaluated, table: Table, log: PredictionLog, dataset: Any
) -> list[str]:
    """The answers to the questions of the job."""
    indices = [str(index) for index in table.frame["index"].tolist()]
    asked = indices[: job.limit]
    if job.mode == "eval" and (missing := sum(index not in log.answers for index in asked)):
        raise _unanswered(model, table, missing)
    write_questions(table, log.path.parent)
    if job.mode != "eval":
        model.answer(
            log,
            indices,
            dataset.build_prompt,
            progress=f"{model.name} on {table.name}" if job.progress else None,
            limit=job.limit,
        )
    answers = [log.answers[index] for index in asked]
    if job.verbose:
        for index, answer in zip(asked, answers, strict=True):
            print(f"{model.name} {table.name} {index}: {answer!r}")
    return answers


def _unanswered(model: Evaluated, table: Table, missing: int) -> DataError:
    return DataError(
        f"{missing} questions of {table.name} are not answered by {model.source}, and mode eval "
        "asks none. Evaluate it with mode all, or infer first, with the same settings and limit"
    )


def _metrics(table: Table, answers: Sequence[str]) -> dict[str, Any]:
    """Our metrics of the answers to the first rows of a table, as plain data for JSON."""
    frame, n = table.frame.iloc[: len(answers)], len(answers)
    if table.name in BENCHMARKS:
        return {"scores": without_nan(benchmark_scores(table.name, answers, table_rows(table)[:n]))}
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
