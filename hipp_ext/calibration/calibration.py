"""Calibration: batches by task, checked once for each kind of model, passed on as one object."""

import functools
import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.calibration.batches import TASKS, Batch, Batches, Task, batches_digest, check_batch
from hipp_ext.calibration.processors import check_processor, find_processor, image_token_id
from hipp_ext.errors import CalibrationError

ROWS = 64  # number of built-in questions where no calibration is given
BUILT_IN = (
    "The calibration is on the built-in questions, which are about a toy world. Pass data of the "
    "kind that the model is used for: calibration=Calibration.from_file(FILE, processor) or "
    "calibration=batches in Python, --calibration FILE on the command line."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Batches to measure a model on, by task.

    Every public function takes one as `calibration=`, and makes one, by `Calibration.of`, of what
    else it may be given: an iterable of batches, batches by task, or None.

    Attributes:
        by_task: the batches of every task; the same ones for both where tasks are not known apart.
        skipped: rows of the user's files that were left out, one line each with the reason.
    """

    by_task: Mapping[Task, tuple[Batch, ...]]
    skipped: tuple[str, ...] = ()
    _checked: set[tuple[int, int | None]] = field(default_factory=set, init=False, repr=False)

    @functools.cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The batches of all tasks, each once."""
        return tuple({id(b): b for task in TASKS for b in self.by_task[task]}.values())

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of the batches of every task."""
        one, other = (batches_digest(self.by_task[task]) for task in TASKS)
        return one if one == other else hashlib.sha256(f"{one} {other}".encode()).hexdigest()

    @property
    def rows(self) -> int:
        """Number of rows in all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @classmethod
    def from_batches(cls, batches: Batches | Mapping[Task, Batches]) -> "Calibration":
        """A calibration on the user's own batches.

        Args:
            batches: dicts of the tensors that the model's forward takes (input_ids,
                attention_mask, pixel_values, ...; labels where a scorer needs a loss); or a mapping
                from "utility" and "robustness" to such batches.

        Raises:
            CalibrationError: there are no batches, or a task has none.
        """
        if not isinstance(batches, Mapping):
            return cls(by_task=dict.fromkeys(TASKS, _collected(batches)))
        given: dict[Any, Any] = dict(batches)
        if "input_ids" in given:
            raise CalibrationError(
                "A calibration is a list of batches: pass [batch] for a single one."
            )
        _check_tasks(given, "batches")
        # One generator for both tasks can be read once.
        distinct = {id(own): own for own in given.values()}
        collected = {key: _collected(own) for key, own in distinct.items()}
        return cls(by_task={task: collected[id(given[task])] for task in TASKS})

    @classmethod
    def from_file(
        cls,
        path: str | Path | Mapping[Task, str | Path],
        processor: Any,
        *,
        image_folder: str | Path | None = None,
        rows: int | None = None,
        sequence_length: int | None = None,
        batch_size: int = 8,
    ) -> "Calibration":
        """A calibration on the rows of the user's file, through the model's own chat template.

        Which files are read:

        - VLMEvalKit tables (.tsv): question, answer, options, hint, image (base64) or image_path;
        - chats (.jsonl, .json): {"messages": [{"role", "content"}]} with text and image parts, as
          OpenAI writes them, or {"conversations": [{"from", "value"}], "image": ...} as LLaVA does;
        - texts: .txt in chunks of `sequence_length` tokens, .jsonl and .json with {"text": ...};
        - a folder that `datasets` saved to disk, with rows of these shapes.

        A chat ends with the last answer that begins within `sequence_length` tokens, and that
        answer is its `labels`. The labels of a text are its tokens. Batches hold rows of
        similar length, padded on the left.

        Args:
            path: the file; or {"utility": path, "robustness": path}, a file for each task.
            processor: processor of the model; of a language model, its tokenizer.
            image_folder: folder that paths of pictures start from, and must not lead out of; None:
                the folder of the file. Pictures at http addresses are not fetched.
            rows: number of rows, evenly spaced over the file; None: 128, as Wanda and SparseGPT
                take. Rows that do not fit are not replaced.
            sequence_length: tokens after which a row is cut; None: 2048, or what the tokenizer
                allows, if that is less.
            batch_size: rows of a batch.

        Warns:
            UserWarning: rows were left out, how many and why (a picture that cannot be read, no
                text, pictures or the answer beyond `sequence_length`, ...); `skipped` names all.

        Raises:
            CalibrationError: the file is of no kind that is read, or none of its rows can be used.
            DataError: the file cannot be read, or is damaged.
        """
        from hipp_ext.calibration.reading import read_files

        paths = path if isinstance(path, Mapping) else dict.fromkeys(TASKS, path)
        _check_tasks(paths, "files")
        by_task, skipped = read_files(
            paths, processor, image_folder, rows, sequence_length, batch_size
        )
        return cls(by_task=by_task, skipped=skipped)

    @classmethod
    def testbed(cls, model: nn.Module, processor: Any = None, rows: int = ROWS) -> "Calibration":
        """A calibration on the testbed's pictures and questions, by task; for a language model, on
        those of its questions that need no picture.

        Args:
            model: the model to calibrate.
            processor: processor or tokenizer of `model`; None: the one beside its weights.
            rows: number of questions.

        Raises:
            CalibrationError: there is no processor, or it does not belong to the model.
        """
        processor = processor or find_processor(model)
        if processor is None:
            folder = getattr(getattr(model, "config", None), "_name_or_path", "")
            raise CalibrationError(
                f"No calibration data: pass calibration= (batches of {type(model).__name__}"
                ".forward's tensors, or Calibration.from_file(...)), or processor= to calibrate on "
                "the built-in pictures. None lies beside the model's weights"
                f" ({folder or 'it was not loaded from a folder'})."
            )
        check_processor(model, processor)
        from hipp_ext.testbed import calibration_tasks, calibration_texts

        pictured = getattr(processor, "image_processor", None) is not None
        if not pictured and image_token_id(model) is not None:
            raise CalibrationError(
                f"The built-in calibration has pictures, and {type(processor).__name__} takes "
                "none: pass the model's processor, or calibration=."
            )
        made: Any = (calibration_tasks if pictured else calibration_texts)(processor, n=rows)
        return cls.from_batches(made)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        given: "CalibrationLike | None" = None,
        processor: Any = None,
        rows: int = ROWS,
    ) -> "Calibration":
        """The calibration that `given` stands for, checked for `model`.

        Args:
            model: the model to calibrate.
            given: a Calibration, batches, or batches by task; None: the testbed's.
            processor: processor for the testbed's pictures; None: the one beside the weights that
                `model` was loaded from.
            rows: number of the testbed's questions.

        Warns:
            UserWarning: the testbed's questions are used for a model that is not the testbed's.

        Raises:
            CalibrationError: there are no batches, no processor to make them, or a batch does not
                fit the model.
        """
        if given is None:
            calibration = cls.testbed(model, processor, rows)
            from hipp_ext.testbed import is_testbed

            if not is_testbed(model):
                warnings.warn(BUILT_IN, stacklevel=3)
        else:
            calibration = given if isinstance(given, cls) else cls.from_batches(given)  # type: ignore[arg-type]
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        if (kind := (size, image_token_id(model))) not in calibration._checked:
            for own in {id(own): own for own in calibration.by_task.values()}.values():
                for index, batch in enumerate(own):
                    check_batch(model, batch, index)
            calibration._checked.add(kind)
        return calibration


CalibrationLike = Calibration | Batches | Mapping[Task, Batches]


def _collected(batches: Iterable[Any]) -> tuple[Batch, ...]:
    collected = []
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                "A calibration batch is a dict of the tensors that the model's forward takes "
                "(input_ids, attention_mask, pixel_values, ...), as a processor returns them; got "
                f"a {type(batch).__name__}."
            )
        collected.append({k: v for k, v in batch.items() if k != "labels" or v is not None})
    if not collected:
        raise CalibrationError("The calibration holds no batches.")
    return tuple(collected)


def _check_tasks(given: Mapping[Any, Any], what: str) -> None:
    """Raise CalibrationError unless there is something for each task, and nothing else."""
    if set(given) != set(TASKS):
        raise CalibrationError(
            f"A calibration by task has {what} for {' and '.join(TASKS)}; "
            f"got {sorted(map(str, given))}."
        )
