"""What `vlmeval` evaluates: a model folder, or a model on a server. Both answer and have a name."""

import gc
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from hipp_ext.evals.hipp_vlm import MAX_NEW_TOKENS, HippVLM
from hipp_ext.evals.measuring import about
from hipp_ext.evals.prediction_log import PredictionLog
from hipp_ext.evals.predictions import answer_rows
from hipp_ext.evals.runs import shown_name
from hipp_ext.evals.served import ServedVLM, answer_each
from hipp_ext.files import content_hash


class Evaluated(Protocol):
    """A model to evaluate.

    Attributes:
        name: its name in tables, and of its folders of results.
        source: where it is, for messages.
        model_hash: SHA-256 of what identifies it.
        settings: settings that change its answers.
    """

    name: str
    source: str
    settings: dict[str, Any]

    @property
    def model_hash(self) -> str: ...

    def made(self) -> dict[str, Any]:
        """When and on what it answers; see `measuring.about`."""
        ...

    def answer(
        self,
        log: PredictionLog,
        indices: Sequence[str],
        message: Callable[[int], list[dict]],
        *,
        progress: str | None,
        limit: int | None,
    ) -> None:
        """Add the answers that the log lacks; arguments as `predictions.answer_rows`."""

    def close(self) -> None:
        """Free what the answers needed."""


class FolderModel:
    """A checked model folder, loaded when the first answer is missing."""

    def __init__(self, folder: Path, *, device: str, dtype: str, batch_size: int):
        self.folder = folder
        self.name, self.source = shown_name(folder), str(folder)
        self.settings: dict[str, Any] = {
            "max_new_tokens": MAX_NEW_TOKENS,
            "decoding": "greedy",
            "dtype": dtype,
            "device": device.partition(":")[0],
        }
        self._hash = cache(partial(content_hash, folder))  # once, when it is needed
        self._place = (device, dtype)
        self._batch_size = batch_size
        self._loaded: HippVLM | None = None

    @property
    def model_hash(self) -> str:
        return self._hash()

    def made(self) -> dict[str, Any]:
        return about(self._place[0])

    def answer(
        self,
        log: PredictionLog,
        indices: Sequence[str],
        message: Callable[[int], list[dict]],
        *,
        progress: str | None,
        limit: int | None,
    ) -> None:
        answer_rows(
            self._load,
            log,
            indices,
            message,
            batch_size=self._batch_size,
            progress=progress,
            limit=limit,
        )

    def close(self) -> None:
        self._loaded = None
        gc.collect()  # the next model needs the memory now

    def _load(self) -> HippVLM:
        if self._loaded is None:
            self._loaded = HippVLM(self.folder, *self._place)
        return self._loaded


class ServedModel:
    """A model on a server.

    Its hash is that of the address, the name, and what the server says of the model: the weights
    themselves cannot be seen.
    """

    def __init__(self, vlm: ServedVLM):
        self._vlm = vlm
        self.name = served_name(vlm.name)
        self.source = f"{vlm.name} at {vlm.base_url}"
        self.settings: dict[str, Any] = {
            "max_new_tokens": vlm.max_new_tokens,
            "decoding": "greedy",
            "base_url": vlm.base_url,
            "served_name": vlm.name,
            "server_says": json.dumps(vlm.told, sort_keys=True),
        }

    @property
    def model_hash(self) -> str:
        return hashlib.sha256(json.dumps(self._vlm.identity, sort_keys=True).encode()).hexdigest()

    def made(self) -> dict[str, Any]:
        """What the server runs on is not known."""
        return about("cpu") | {"device": f"the server {self._vlm.base_url}", "threads": None}

    def answer(
        self,
        log: PredictionLog,
        indices: Sequence[str],
        message: Callable[[int], list[dict]],
        *,
        progress: str | None,
        limit: int | None,
    ) -> None:
        answer_each(self._vlm, log, indices, message, progress=progress, limit=limit)

    def close(self) -> None:
        """Nothing is held between requests."""


def served_name(name: str) -> str:
    """The name of a served model as that of a folder: "--" for "/", as in VLMEvalKit."""
    name = re.sub(r"[/\\]", "--", name)
    return shown_name(Path(name)) if name.strip(".") else "model"
