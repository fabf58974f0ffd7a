"""A model folder, pruned or not, as a model that answers questions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import CheckpointError
from hipp_ext.files.untrusted import read_picture, rgb_picture
from hipp_ext.model_folder import check_files, read_folder

if TYPE_CHECKING:
    from transformers import GenerationConfig

MAX_NEW_TOKENS = 16  # enough for a yes, a no or a letter in a short sentence
_KEPT_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_KEPT_SETTINGS += ("use_cache", "cache_implementation", "cache_config", "max_cache_len")


def check_model_folder(path: str | Path, *, pictures: bool = True) -> Path:
    """The absolute path of a complete model folder; of the weights only headers are read.

    The last component stays as it was typed, even if it is a link, because results are named after
    it.

    Args:
        path: path of the folder.
        pictures: whether the folder must have a processor for images.

    Raises:
        CheckpointError: it is not a folder, or its configuration, weights or processor are missing
            or damaged.
    """
    folder = Path(path).expanduser()
    if folder.name in ("", ".."):  # "." and ".." have the name of the folder that they lead to
        folder = folder.resolve()
    folder = folder.parent.resolve() / folder.name
    if not folder.is_dir():
        raise CheckpointError(
            f"{path} is not a folder. Models are given as local folders, as save_pruned writes them"
        )
    check_files(folder)  # first, because a pipe in the place of config.json is not missing
    read_folder(folder)
    for part, files in {
        "processor": ("processor_config.json", "preprocessor_config.json"),
        "tokenizer": ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }.items():
        if (pictures or part == "tokenizer") and not any(
            (folder / file).is_file() for file in files
        ):
            raise CheckpointError(
                f"{folder} has no {part} ({' or '.join(files)}). Save it beside the model: "
                "save_pruned(model, folder, processor=processor), or "
                "processor.save_pretrained(folder)"
            )
    return folder


class HippVLM:
    """A model folder, pruned or not, that answers questions about images.

    It has the methods that VLMEvalKit calls on a model, so VLMEvalKit accepts it. It does not
    derive from VLMEvalKit's base class, because that would import all of VLMEvalKit.

    Args:
        model_path: folder with weights, configuration and processor.
        device: device such as "cuda:0". Default: the GPU if there is one, else the CPU.
        dtype: dtype such as "bfloat16". Default: as stored.
        max_new_tokens: maximum length of an answer [tokens].

    Raises:
        CheckpointError: the folder is incomplete, or its processor takes no images or has no chat
            template.
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

        from hipp_ext.surgery.checkpoint import load_pruned, resolve_device

        folder = check_model_folder(model_path)
        try:
            # With None, transformers would ask on standard input whether to run code of the folder.
            self.processor = AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # untrusted files make transformers raise almost anything
            raise CheckpointError(f"the processor in {folder} cannot be loaded: {error}") from error
        if not hasattr(self.processor, "image_processor"):
            raise CheckpointError(
                f"the processor in {folder} takes no pictures: {type(self.processor).__name__}"
            )
        if not getattr(self.processor, "chat_template", None):
            raise CheckpointError(
                f"the processor in {folder} has no chat template, so it cannot be asked questions"
            )
        tokenizer = self.processor.tokenizer
        # The answer continues the last token, which must not be padding.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model: Any = load_pruned(
            folder,
            device=resolve_device(device),
            dtype=None if dtype in (None, "auto") else getattr(torch, dtype),
        )
        self.model.generation_config = plain_greedy(self.model)
        self.max_new_tokens = max_new_tokens

    def set_dump_image(self, dump_image: Callable) -> None:
        """VLMEvalKit passes its function that writes images; messages name files already."""

    def generate(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to one VLMEvalKit message: a list of {"type": "image" | "text", "value": path
        or text}.
        """
        return self.generate_batch([message])[0]

    def generate_batch(self, messages: Sequence[list[dict]]) -> list[str]:
        """The greedy answers to several messages, without special tokens and surrounding
        whitespace.
        """
        texts, images = [], []
        for message in messages:
            texts.append(self._rendered(message))
            images.append([_picture(part["value"]) for part in message if part["type"] == "image"])
        return self.answer(texts, images)

    def answer(
        self, texts: Sequence[str], images: Sequence[list[Any]], **settings: Any
    ) -> list[str]:
        """The answers to chats, without special tokens and surrounding whitespace.

        Args:
            texts: the chats, as `render` returns them.
            images: the pictures of each chat; every chat has some, or none has.
            settings: options of `generate`. Default: greedy, `max_new_tokens` at most.
        """
        import torch

        from hipp_ext.calibration import tokenise
        from hipp_ext.evals.generation import place

        greedy = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        batch = tokenise(self.processor, texts, images if any(images) else None)
        inputs = place(batch, self.model)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, **greedy | settings, pad_token_id=self.processor.tokenizer.pad_token_id
            )
        answers = out[:, inputs["input_ids"].shape[1] :]
        return [
            text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)
        ]

    def _rendered(self, message: list[dict]) -> str:
        content = [
            {"type": "image"}
            if part["type"] == "image"
            else {"type": "text", "text": str(part["value"])}
            for part in message
        ]
        return self.render([{"role": "user", "content": content}])

    def render(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """The text of a chat, with a mark for each picture, ready for the answer.

        Args:
            turns: dicts of role and content, as transformers' chat templates take them.

        Raises:
            CheckpointError: the template of the folder cannot be used.
        """
        from jinja2 import TemplateError

        try:
            return self.processor.apply_chat_template(turns, add_generation_prompt=True)
        except TemplateError as error:
            raise CheckpointError(
                f"the chat template of {self.model.name_or_path} cannot be used: {error}"
            ) from error


def _picture(value: str | bytes) -> Any:
    """The image of a message, which holds its path, as in VLMEvalKit, or its bytes."""
    return rgb_picture(value) if isinstance(value, bytes) else read_picture(value)


def plain_greedy(model: Any) -> "GenerationConfig":
    """Greedy generation settings that change no logit; of the model's own, special tokens and the
    cache are kept.

    Other settings of generation_config.json (a repetition penalty, a minimum length, suppressed or
    forced tokens, stop strings, ...) improve chats, but would measure another model.
    """
    from transformers import GenerationConfig

    own = {name: getattr(model.generation_config, name, None) for name in _KEPT_SETTINGS}
    return GenerationConfig(**{name: value for name, value in own.items() if value is not None})
