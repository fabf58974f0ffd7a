"""Images and questions -> calibration batches, each a dict of the tensors that the model's forward takes."""

import contextlib
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from hipp_ext.errors import CalibrationError

Task = Literal["utility", "robustness"]
TASKS: tuple[Task, ...] = get_args(Task)
ROWS = 64  # of the testbed's questions, where no calibration is given
Batch = dict[str, torch.Tensor]
Batches = Iterable[Mapping[str, torch.Tensor]]
Calibration = (
    Batches | Mapping[Task, Batches]
)  # by task, where it is known which questions are asked for what


def calibration_digest(tasks: Mapping[Task, Sequence[Batch]]) -> str:
    """Hex digest of the batches of every task."""
    one, other = (batches_digest(tasks[task]) for task in TASKS)
    return one if one == other else hashlib.sha256(f"{one} {other}".encode()).hexdigest()


def batches_digest(batches: Iterable[Batch]) -> str:
    """Hex digest of the batches: names, types, shapes and values."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
                digest.update(
                    value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
            else:  # some processors add plain values: the mode of Janus, for one
                digest.update(f"\0{name} {value!r}\0".encode())
    return digest.hexdigest()


def resolve_calibration(
    model: nn.Module,
    calibration: Calibration | None = None,
    processor: Any = None,
    rows: int = ROWS,
) -> list[Batch]:
    """The batches to measure on, checked.

    Args:
        model: what they are for.
        calibration: batches, those of all tasks where they come by task; None: the testbed's pictures and questions through
            `processor`, of a language model those that need no picture.
        processor: None: the one beside the weights that `model` was loaded from.
        rows: how many of the testbed's questions, where it comes to that.

    Raises:
        CalibrationError: there are no batches, no processor to make them, or a batch does not fit the model.
    """
    return all_batches(calibration_by_task(model, calibration, processor, rows))


def calibration_by_task(
    model: nn.Module,
    calibration: Calibration | None = None,
    processor: Any = None,
    rows: int = ROWS,
) -> dict[Task, list[Batch]]:
    """The same for each task; where the calibration does not tell tasks apart, all of it for each.

    Raises:
        CalibrationError: as for `resolve_calibration`, or a task has no batches.
    """
    if calibration is None:
        processor = processor or find_processor(model)
        if processor is None:
            raise CalibrationError(
                f"No calibration data: pass calibration= (batches of {type(model).__name__}.forward's tensors), or processor= "
                "to calibrate on the built-in pictures. None lies beside the model's weights"
                f" ({getattr(getattr(model, 'config', None), '_name_or_path', '') or 'it was not loaded from a folder'})."
            )
        check_processor(model, processor)
        from hipp_ext.testbed import calibration_tasks, calibration_texts

        pictured = getattr(processor, "image_processor", None) is not None
        if not pictured and image_token_id(model) is not None:
            raise CalibrationError(
                f"The built-in calibration has pictures, and {type(processor).__name__} takes none: pass the model's "
                "processor, or calibration=."
            )
        calibration = (calibration_tasks if pictured else calibration_texts)(processor, n=rows)
    if not isinstance(calibration, Mapping):
        batches = _checked(model, calibration)
        return dict.fromkeys(TASKS, batches)
    given: dict[Any, Any] = dict(calibration)
    if "input_ids" in given:
        raise CalibrationError("A calibration is a list of batches: pass [batch] for a single one.")
    if set(given) != set(TASKS):
        raise CalibrationError(
            f"A calibration by task has batches for {' and '.join(TASKS)}; got {sorted(map(str, given))}."
        )
    distinct = {
        id(batches): batches for batches in given.values()
    }  # one generator for both tasks can be read once
    checked = {key: _checked(model, batches) for key, batches in distinct.items()}
    return {task: checked[id(given[task])] for task in TASKS}


def all_batches(tasks: Mapping[Task, Sequence[Batch]]) -> list[Batch]:
    """The batches of all tasks, each once."""
    return list({id(batch): batch for task in TASKS for batch in tasks[task]}.values())


def encode(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Any],
    answers: Sequence[str] | None = None,
) -> Batch:
    """One left-padded batch: each prompt, with its image where there is one, through the processor's chat template.

    Args:
        processor: of a vision-language model with a chat template.
        prompts: user turns.
        images: a PIL image or None for each prompt.
        answers: appended after the prompt; then `labels` holds the answers' tokens and -100 elsewhere.

    Returns:
        input_ids, attention_mask, pixel_values, ... as the model's forward takes them, and labels with answers.
    """
    texts = []
    for prompt, image in zip(prompts, images, strict=True):
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": prompt}]
        message = {"role": "user", "content": content}
        texts.append(
            processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        )
    pictures = [[i] for i in images if i is not None]
    full = (
        texts
        if answers is None
        else [join_answer(t, a) for t, a in zip(texts, answers, strict=True)]
    )
    batch = tokenise(processor, full, pictures)
    if answers is not None:
        prompt_lengths = tokenise(processor, texts, pictures)["attention_mask"].sum(1)
        lengths = batch["attention_mask"].sum(1)
        from_end = torch.arange(batch["input_ids"].shape[1], 0, -1)
        is_answer = from_end[None] <= (lengths - prompt_lengths)[:, None]
        batch["labels"] = torch.where(is_answer, batch["input_ids"], -100)
    return batch


def tokenise(
    processor: Any, texts: Sequence[str], images: Sequence[Any] | None = None, **kwargs: Any
) -> Batch:
    """One left-padded batch of chats that a template has rendered, each with one beginning-of-text token.

    Many templates write that token themselves, and the tokenizer would add a second one; transformers'
    `processor.apply_chat_template(tokenize=True)` avoids it in the same way.

    Args:
        processor: a processor, or the tokenizer of a language model.
        texts: rendered by the processor's chat template.
        images: the pictures of each text that has any, as the processor takes them; None or empty: none.
        kwargs: further options of the processor.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    beginning = getattr(tokenizer, "bos_token", None)
    written = bool(beginning) and all(text.startswith(beginning) for text in texts)
    if written or all(_begins_twice(tokenizer, text) for text in texts):
        kwargs["add_special_tokens"] = False
    if images:
        kwargs["images"] = images
    # Only left padding puts the answer position of every row at the end.
    return dict(
        processor(
            text=list(texts), padding=True, padding_side="left", return_tensors="pt", **kwargs
        )
    )


def _begins_twice(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer puts before a text the token that it begins with; not every such token is called bos_token."""
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(plain) and tokenizer(text)["input_ids"][:2] == [plain[0]] * 2 != plain[:2]


def join_answer(text: str, answer: str) -> str:
    """Templates end in a line break or in "ASSISTANT:"; after the latter the answer follows a space."""
    return text + answer if text[-1:].isspace() else f"{text} {answer}"


def find_processor(model: nn.Module) -> Any | None:
    """The processor (or tokenizer) in the folder that `model` was loaded from; None where there is none."""
    from pathlib import Path

    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not folder or not Path(folder).is_dir():
        return None
    from transformers import AutoProcessor, AutoTokenizer

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones for a damaged file
        if image_token_id(model) is None:
            # A tokenizer that was saved from a processor still names it, and the pictures' part is gone.
            with contextlib.suppress(Exception):
                return AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        if (Path(folder) / "tokenizer_config.json").exists():
            warnings.warn(f"The processor in {folder} could not be loaded: {error}", stacklevel=2)
        return None


def check_processor(model: nn.Module, processor: Any) -> None:
    """Raise CalibrationError unless `processor` speaks the model's vocabulary and image token."""
    if processor is None:
        raise CalibrationError(
            "No processor was given, and none lies beside the model's weights: pass processor=."
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if len(tokenizer) > rows:
        raise CalibrationError(
            f"This processor does not belong to the model: its vocabulary has {len(tokenizer)} tokens, the model {rows}."
        )
    expected, token = image_token_id(model), getattr(processor, "image_token", None)
    if expected is not None and isinstance(token, str):
        actual = tokenizer.convert_tokens_to_ids(token)
        if actual != expected:
            raise CalibrationError(
                f"This processor does not belong to the model: its image token {token!r} has the id {actual}, the model "
                f"expects {expected}."
            )


def image_token_id(model: nn.Module) -> int | None:
    """Id of the token that stands for image features in `input_ids`; None for a model without images."""
    config = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _checked(model: nn.Module, calibration: Batches) -> list[Batch]:
    batches = []
    for batch in calibration:
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"A calibration batch is a dict of the tensors that {type(model).__name__}.forward takes (input_ids, "
                f"attention_mask, pixel_values, ...), as a processor returns them; got a {type(batch).__name__}."
            )
        batches.append({k: v for k, v in batch.items() if k != "labels" or v is not None})
    if not batches:
        raise CalibrationError("The calibration holds no batches.")
    for i, batch in enumerate(batches):
        _check_batch(model, batch, i)
    return batches


def _check_batch(model: nn.Module, batch: Batch, index: int) -> None:
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.numel() == 0:
        raise CalibrationError(
            f"Calibration batch {index} needs input_ids of shape (batch, tokens); it has {sorted(batch)}."
        )
    _check_of_tokens(batch, index)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if int(ids.max()) >= rows or int(ids.min()) < 0:
        raise CalibrationError(
            f"Calibration batch {index} holds token ids from {int(ids.min())} to {int(ids.max())}; the model has {rows}: "
            "a processor of another model?"
        )
    token = image_token_id(model)
    # Video-LLaVA calls its pictures pixel_values_images; videos have tokens of their own.
    has_pixels = any(
        k.startswith("pixel_values") and "video" not in k and v is not None
        for k, v in batch.items()
    )
    if token is not None and bool((ids == token).any()) != has_pixels:
        raise CalibrationError(
            f"Calibration batch {index} has {int((ids == token).sum())} image tokens (id {token}) and "
            f"{'pixel_values' if has_pixels else 'no pixel_values'}: a processor of another model?"
        )
    if has_pixels and token is None:
        raise CalibrationError(
            f"Calibration batch {index} has pixel_values, but {type(model).__name__} has no image token."
        )
    labels = batch.get("labels")
    if labels is not None and (
        int(labels.max()) >= rows or int(torch.where(labels == -100, 0, labels).min()) < 0
    ):
        raise CalibrationError(
            f"Calibration batch {index} has labels from {int(labels.min())} to {int(labels.max())}; they are token ids below "
            f"{rows}, or -100 where nothing is to be answered."
        )


def _check_of_tokens(batch: Batch, index: int) -> None:
    """Raise CalibrationError where what comes one for each token does not: other lengths would be read at wrong places."""
    shape = tuple(batch["input_ids"].shape)
    for name in ("input_ids", "attention_mask", "labels"):
        value: Any = batch.get(name)
        if value is None:
            continue
        got = (
            f"shape {tuple(value.shape)}"
            if isinstance(value, torch.Tensor)
            else f"a {type(value).__name__}"
        )
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            raise CalibrationError(
                f"Calibration batch {index} needs {name} of shape {shape}, as input_ids have; got {got}."
            )
        if name != "attention_mask" and (value.is_floating_point() or value.dtype == torch.bool):
            raise CalibrationError(
                f"Calibration batch {index} needs {name} of whole numbers, not of {value.dtype}."
            )
        if name == "attention_mask" and not bool(value.bool().any(1).all()):
            raise CalibrationError(
                f"Calibration batch {index} has a row whose attention_mask leaves no token; leave it out."
            )
