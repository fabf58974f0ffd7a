"""The model `hipp` of lmms-eval: a model folder, pruned or not.

This file imports lmms-eval, and lmms-eval imports it by the name that `lmms_eval.manifest` gives.
"""

# pyright: reportMissingImports=false

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.evals.hipp_vlm import HippVLM
from hipp_ext.files.untrusted import read_picture, rgb_picture

DTYPES = ("auto", "float32", "bfloat16", "float16")
NEW_TOKENS = 1024  # of an answer, where the task does not say


class HippLMM(lmms):
    """A model folder, pruned or not, that answers questions with pictures or without.

    Answers are those of `vlmeval`: greedy unless the task asks for a temperature, from the model's
    chat template, without surrounding whitespace. As in lmms-eval's own chat models, an answer does
    not end at a task's `until`.

    Args:
        pretrained: the folder.
        device: device such as "cuda:0". Default: the GPU if there is one, else the CPU.
        dtype: one of `DTYPES`; "auto": as stored.
        batch_size: questions that are asked together.
        max_batch_size: not used; lmms-eval passes it.
        unknown: other arguments, which are refused.

    Raises:
        CheckpointError: the folder is incomplete, or an argument is unknown or out of range.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if not isinstance(pretrained, str):
            raise CheckpointError("--model hipp needs a folder: --model_args pretrained=./pruned")
        if unknown:
            raise CheckpointError(
                f"--model hipp does not take {', '.join(unknown)}: its arguments are pretrained, "
                "device, dtype and batch_size"
            )
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype={dtype}: one of {', '.join(DTYPES)} is needed")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise CheckpointError(f"batch_size={batch_size}: a whole number above 0 is needed")
        self.batch_size = int(batch_size)
        self._vlm: HippVLM | None = HippVLM(pretrained, device=device, dtype=dtype)
        self.device = self._vlm.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            DataError: a question has media that are no pictures.
        """
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for places, settings in self._batches(requests):
                chats = [self._chat(requests[place]) for place in places]
                for place, answer in zip(places, self._answers(chats, settings), strict=True):
                    answers[place] = answer
                bar.update(len(places))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not there, as in lmms-eval's other chat models."""
        raise DataError("--model hipp answers questions; it has no tasks by log-likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not there."""
        raise DataError("--model hipp answers single questions; it has no tasks of several rounds")

    def clean(self) -> None:
        """Free the memory of the model; lmms-eval calls this when all questions are asked."""
        self._vlm = None
        super().clean()

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Places of requests with equal settings, and these settings as `generate` takes them."""
        alike = defaultdict[str, list[int]](list)
        for place, request in enumerate(requests):
            settings = generation_settings(request.args[2])
            alike[json.dumps(settings, sort_keys=True)].append(place)
        for settings, places in alike.items():
            for first in range(0, len(places), self.batch_size):
                yield places[first : first + self.batch_size], json.loads(settings)

    def _chat(self, request: Any) -> ChatMessages:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))

    def _answers(self, chats: Sequence[ChatMessages], settings: Mapping[str, Any]) -> list[str]:
        vlm = self._vlm
        assert vlm is not None, "lmms-eval asks before it cleans"
        texts = [vlm.render(chat.to_hf_messages()) for chat in chats]
        pictures = [_pictures(chat) for chat in chats]
        answers = [""] * len(chats)
        for seen in (True, False):  # processors take pictures for all texts or for none
            own = [place for place, found in enumerate(pictures) if bool(found) == seen]
            if own:
                given = [texts[i] for i in own], [pictures[i] for i in own]
                for place, answer in zip(own, vlm.answer(*given, **settings), strict=True):
                    answers[place] = answer
        return answers


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs`, as options of transformers' `generate`."""
    temperature = float(given.get("temperature") or 0)
    chosen: dict[str, Any] = {
        "max_new_tokens": given.get("max_new_tokens") or NEW_TOKENS,
        "num_beams": given.get("num_beams") or 1,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        chosen["temperature"] = temperature
        names = ("top_p", "top_k")
        chosen |= {name: given[name] for name in names if given.get(name) is not None}
    return chosen


def _pictures(chat: ChatMessages) -> list[Image.Image]:
    """The pictures of a chat, RGB."""
    pictures, *others = chat.extract_media()
    if any(others):
        raise DataError("--model hipp takes pictures and text; a question has a video or sound")
    return [_picture(picture) for picture in pictures]


def _picture(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, bytes):
        return rgb_picture(given)
    if isinstance(given, str):
        return read_picture(given)
    raise DataError(f"a picture is a {type(given).__name__}; images, bytes and paths are known")
