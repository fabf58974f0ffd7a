"""The parts of VLMEvalKit that hipp-ext uses, without their side effects.

VLMEvalKit is only imported when a function here is called, because the import takes 10 to 20
seconds.
"""

import contextlib
import csv
import functools
import importlib
import io
import logging
import math
import os
import ssl
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hipp_ext.errors import MissingExtraError
from hipp_ext.evals.benchmark_tables import PICTURE, groups_of
from hipp_ext.evals.benchmarks import scored_rows
from hipp_ext.evals.hipp_vlm import HippVLM, check_model_folder
from hipp_ext.evals.tables import ALIASES, KNOWN, YES_NO, Table, data_root, locate, read_table
from hipp_ext.files import write_atomic


def import_vlmeval() -> ModuleType:
    """Import vlmeval without the side effects of its import, and return the module.

    These would be: TLS certificates are no longer verified, the root logger gets a handler, an
    error about a file .env is logged, ~/LMUData is created, and autograd is switched off.

    Raises:
        MissingExtraError: vlmeval or one of its dependencies is not installed.
    """
    if sys.modules.get("vlmeval") is not None:
        return sys.modules["vlmeval"]
    import torch

    home_data, root = Path.home() / "LMUData", logging.getLogger()
    existed, handlers, disabled = home_data.exists(), list(root.handlers), root.manager.disable
    context = ssl._create_default_https_context
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled()):
            warnings.simplefilter("ignore")
            vlmeval = importlib.import_module("vlmeval")
            for part in ("config", "dataset", "vlm"):
                importlib.import_module(f"vlmeval.{part}")
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "vlmeval", "vlmeval") from error
    finally:
        logging.disable(disabled)
        ssl._create_default_https_context = context
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        if not existed:
            with contextlib.suppress(OSError):  # it does not exist or is not empty
                home_data.rmdir()
    return vlmeval


@functools.cache
def _dataset_classes() -> dict[str, type]:
    """VLMEvalKit's classes of yes/no and multiple-choice data by name, for a checked local TSV with
    any MD5.
    """
    dataset = import_vlmeval().dataset

    class LocalTable:
        """Reads a Table instead of a download, and keeps indices and images away from VLMEvalKit's
        `eval`.
        """

        DATASET_MD5: dict[str, str] = {}
        data: Any

        def __init__(
            self, dataset: str = "POPE", skip_noimg: bool = True, table: Table | None = None
        ):
            self._table = table
            # Otherwise VLMEvalKit creates ~/LMUData.
            with _environment(**({"LMUData": str(table.path.parent)} if table else {})):
                super().__init__(dataset, skip_noimg)  # type: ignore[call-arg]

        def load_data(self, dataset: str):
            if self._table is None:
                name, path = locate(dataset)
                self._table = read_table(path, data_root() / "images" / "by-content", name=name)
            return self._table.frame.assign(index=range(len(self._table.frame)))

        def post_build(self, dataset: str) -> None:
            assert self._table is not None  # load_data has run
            self.data["index"] = self._table.frame["index"].tolist()

    class LocalPOPE(LocalTable, dataset.ImageYORNDataset):
        DATASET_URL = {name: "" for name, kind in KNOWN.items() if kind == YES_NO}

    class LocalScienceQA(LocalTable, dataset.ImageMCQDataset):
        choice = [name for name, kind in KNOWN.items() if kind != YES_NO]
        DATASET_URL = dict.fromkeys([*choice, *ALIASES], "")

    return {name: cls for cls in (LocalPOPE, LocalScienceQA) for name in cls.DATASET_URL}


def register(models: Mapping[str, str | Path] | None = None) -> None:
    """Register local files of the known benchmarks, `HippVLM` and model folders with VLMEvalKit in
    this process.

    Afterwards `vlmeval.dataset.build_dataset("POPE")` reads <LMUData>/POPE.tsv with any MD5 and
    never downloads it. A VLMEvalKit configuration may contain `{"class": "HippVLM", "model_path":
    ...}` and the names of `models`. The function can be called again.

    Args:
        models: model folders by name.

    Raises:
        MissingExtraError: VLMEvalKit is not installed.
        CheckpointError: a folder is not a complete model folder.
    """
    folders = {name: check_model_folder(folder) for name, folder in (models or {}).items()}
    vlmeval = import_vlmeval()
    vlmeval.vlm.HippVLM = HippVLM
    for name, folder in folders.items():
        vlmeval.config.supported_VLM[name] = functools.partial(HippVLM, model_path=str(folder))
    for name, cls in _dataset_classes().items():
        setattr(vlmeval.dataset, cls.__name__, cls)
        if cls not in vlmeval.dataset.DATASET_CLASSES:
            # VLMEvalKit takes the first class that knows a name.
            vlmeval.dataset.DATASET_CLASSES.insert(0, cls)
        if name not in vlmeval.dataset.SUPPORTED_DATASETS:
            vlmeval.dataset.SUPPORTED_DATASETS.append(name)


def open_dataset(table: Table, limit: int | None) -> Any:
    """The VLMEvalKit dataset of a table's first `limit` rows.

    Inside VLMEvalKit it has the name of a known benchmark, because VLMEvalKit chooses prompt and
    metric by the name. Its index is the row number, because VLMEvalKit looks rows up by an
    index that it reads from a file, where "007" becomes 7.
    """
    other = "POPE" if table.kind == YES_NO else "ScienceQA_TEST"
    name = table.name if table.name in KNOWN else other
    dataset = _dataset_classes()[name](name, table=table)
    return first_rows(dataset, len(dataset.data) if limit is None else limit)


def first_rows(dataset: Any, n: int) -> Any:
    """Keep the first `n` rows of the dataset, and return it."""
    dataset.data = dataset.data.iloc[:n].assign(index=range(min(n, len(dataset.data))))
    return dataset


def score(dataset: Any, answers: Sequence[str], keep: Path) -> dict[str, dict[str, float]]:
    """VLMEvalKit's own table, by exact matching: {split: {column: percent}}. Its files are copied
    to `keep`.

    The scoring uses a new folder, because VLMEvalKit uses existing results beside the answers
    without a check.
    """
    # Not beside `keep`: VLMEvalKit replaces ".tsv" anywhere in a path, and the name of a model's
    # folder may contain it.
    with tempfile.TemporaryDirectory(prefix="hipp-scoring-") as folder, _scoring_environment():
        file = Path(folder) / f"{dataset.dataset_name}.tsv"
        frame = _scored(dataset, answers)
        frame.to_csv(file, sep="\t", index=False, quoting=csv.QUOTE_ALL)
        result = dataset.evaluate(str(file), model="exact_matching", nproc=1)
        for kept in sorted(Path(folder).glob("*.[ct]sv")):
            data = kept.read_bytes()
            write_atomic(
                keep / kept.name, _in_order(data.decode()) if kept.suffix == ".csv" else data
            )
    # VLMEvalKit returns yes/no in percent and multiple choice in [0, 1].
    scale = 1 if dataset.TYPE == "Y/N" else 100
    table = {
        str(row.pop("split", "none")): {
            str(column): scale * float(value)
            for column, value in row.items()
            if not math.isnan(float(value))
        }
        for row in result.to_dict("records")
    }
    # VLMEvalKit's order is that of a set, which differs between processes.
    return dict(sorted(table.items()))


def _scored(dataset: Any, answers: Sequence[str]) -> Any:
    """The rows with their answers, and with what VLMEvalKit's rating of the benchmark reads: the
    name of the picture in image_path (MME; any for AMBER), the parts of the index (HallusionBench).
    """
    frame = dataset.data.assign(prediction=list(answers))
    name = dataset.dataset_name
    if name == "MME":  # its rating fails on a picture with one question
        frame = frame.iloc[scored_rows(name, groups_of(name, frame))]
        return frame.assign(image_path=frame[PICTURE])
    if name == "AMBER":
        return frame.assign(image_path="-")
    if name == "HallusionBench":
        frame = frame.assign(index=dataset._table.frame["index"].tolist()[: len(frame)])
    return frame.drop(columns="image_path")


def _in_order(scores: str) -> str:
    """A CSV of scores with sorted rows, so that the same answers give the same bytes."""
    heading, *rows = csv.reader(io.StringIO(scores, newline=""))
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([heading, *sorted(rows)])
    return out.getvalue()


@contextlib.contextmanager
def _scoring_environment() -> Iterator[None]:
    """VLMEvalKit's settings for exact matching, without its progress bars."""
    with (
        _environment(
            PRED_FORMAT="tsv",  # the default, xlsx, cuts cells at 32,767 characters
            EVAL_FORMAT=None,
            VERBOSE=None,  # any value changes which answers match
        ),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set environment variables for the block; None removes them."""
    before = {name: os.environ.pop(name, None) for name in values}
    try:
        os.environ.update({name: value for name, value in values.items() if value is not None})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
