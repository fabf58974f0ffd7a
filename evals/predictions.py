"""Model folder and questions in, answers out: batched, greedy, and kept line by line so that nothing is asked twice."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hipp_ext.errors import CheckpointError, DataError, WriteError

MAX_NEW_TOKENS = 16  # a yes, a no or a letter, with room for a short sentence around it


def check_model_folder(path: str | Path, *, pictures: bool = True) -> Path:
    """`path`, absolute, if it is a whole model folder; looks at names and headers only, so it is fast.

    Args:
        pictures: whether a processor is needed beside the tokenizer.

    Raises:
        CheckpointError: not a folder, or the configuration, weights or processor are missing or damaged.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise CheckpointError(f"{path} is not a folder. Models are given as local folders, as save_pruned writes them")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is not a model folder, or it is half-written") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {error}") from error
    _check_weights(folder)
    for part, files in {
        "processor": ("processor_config.json", "preprocessor_config.json"),
        "tokenizer": ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }.items():
        if (pictures or part == "tokenizer") and not any((folder / file).is_file() for file in files):
            raise CheckpointError(
                f"{folder} has no {part} ({' or '.join(files)}). Save it beside the model: "
                "save_pruned(model, folder, processor=processor), or processor.save_pretrained(folder)"
            )
    return folder


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    files = {file.name for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from error
        if lost := sorted(wanted - files):
            raise CheckpointError(f"{folder} is half-written: {', '.join(lost)} named in {index.name} is missing")
    if not files:
        raise CheckpointError(f"{folder} has no weights (*.safetensors): it is half-written, or in another format")
    for name in sorted(files):
        try:
            with safe_open(str(folder / name), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name} is damaged or half-written: {error}") from error


class HippVLM:
    """A model folder that answers questions about pictures, pruned or not, on any device.

    Has the methods that VLMEvalKit calls on a model, so an object of it goes where VLMEvalKit takes a model. It does
    not derive from VLMEvalKit's base class, which could not be done without importing all of VLMEvalKit.

    Args:
        model_path: the folder: weights, configuration and processor.
        device: such as "cuda:0"; None is the GPU if there is one, else the CPU.
        dtype: such as "bfloat16"; None is as stored.
        max_new_tokens: longest answer [tokens].

    Raises:
        CheckpointError: the folder is incomplete, or its processor takes no pictures or has no chat template.
    """

    INTERLEAVE = True
    is_api = False

    def __init__(
        self,
        model_path: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        import torch
        from transformers import AutoProcessor

        from hipp_ext.checkpoint import load_pruned, resolve_device

        folder = check_model_folder(model_path)
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"the processor in {folder} cannot be loaded: {error}") from error
        if not hasattr(self.processor, "image_processor"):
            raise CheckpointError(f"the processor in {folder} takes no pictures: {type(self.processor).__name__}")
        if not getattr(self.processor, "chat_template", None):
            raise CheckpointError(f"the processor in {folder} has no chat template, so questions cannot be put to it")
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # the answer goes on from the last token, which must not be padding
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model: Any = load_pruned(
            folder, device=resolve_device(device), dtype=None if dtype in (None, "auto") else getattr(torch, dtype)
        )
        self.max_new_tokens = max_new_tokens

    def set_dump_image(self, dump_image: Callable) -> None:
        """VLMEvalKit offers its function for writing pictures; messages name files already."""

    def generate(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to one VLMEvalKit message: a list of {"type": "image" | "text", "value": path or text}."""
        return self.generate_batch([message])[0]

    def generate_batch(self, messages: Sequence[list[dict]]) -> list[str]:
        """The greedy answers to several messages, without special tokens and surrounding blanks."""
        import torch
        from PIL import Image

        texts, images = [], []
        for message in messages:
            content = [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": str(part["value"])}
                for part in message
            ]
            chat = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(chat, add_generation_prompt=True))
            images.append([Image.open(part["value"]).convert("RGB") for part in message if part["type"] == "image"])
        inputs = self.processor(images=images if any(images) else None, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            # The folder's own generation settings may sample or search; the benchmark is greedy.
            out = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        answers = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]


class PredictionLog:
    """Answers by row index in a JSONL file that only grows, so a killed run goes on where it stopped.

    Attributes:
        answers: row index (as text) to answer; filled from the file.

    Raises:
        DataError: a line before the last one is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.answers: dict[str, str] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the last line was cut off by a crash; the next one must not be glued to it
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.answers[str(entry["index"])] = str(entry["prediction"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.path}, line {number}, is damaged. Delete the file to start over") from None

    def add(self, answers: Iterable[tuple[str, str]]) -> None:
        """Append (index, answer) pairs.

        Raises:
            WriteError: the disk is full, say. What was written before counts; half a line is dropped when the file is read.
        """
        new = dict(answers)
        lines = [json.dumps({"index": index, "prediction": answer}) + "\n" for index, answer in new.items()]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise WriteError(
                f"{self.path}: answers could not be written: {error.strerror}. Those before are kept; make room, and the same "
                "command goes on from there"
            ) from error
        self.answers |= new


def answer_rows(
    vlm: Callable[[], Any],
    log: PredictionLog,
    indices: Sequence[str],
    message: Callable[[int], list[dict]],
    *,
    batch_size: int,
    progress: str | None,
) -> None:
    """Ask the model every row that the log does not hold, `batch_size` at a time, and log each batch.

    Args:
        vlm: gives the loaded model (`generate_batch`); called only if there is something to ask.
        log: holds the answers there are, and takes the new ones.
        indices: index of each row, as text.
        message: row number to its message.
        batch_size: rows per batch.
        progress: title of a progress bar on stderr, or None for no bar.
    """
    from tqdm import tqdm

    rows = [row for row, index in enumerate(indices) if index not in log.answers]
    if not rows:
        return
    model = vlm()
    bar = tqdm(total=len(indices), initial=len(indices) - len(rows), desc=progress, disable=progress is None)
    with contextlib.closing(bar):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers = model.generate_batch([message(row) for row in batch])
            log.add(zip([indices[row] for row in batch], answers, strict=True))
            bar.update(len(batch))
