"""The model `hipp` of lm-eval: a model folder, pruned or not, in lm-eval's classes for Hugging Face
models.

This file imports lm-eval, and lm-eval imports it by the name that `lm_eval.register` gives.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from hipp_ext.calibration import tokenise
from hipp_ext.errors import CheckpointError
from hipp_ext.evals.hipp_vlm import check_model_folder, plain_greedy
from hipp_ext.files import content_hash
from hipp_ext.surgery.checkpoint import load_pruned

# Arguments that do not work with the widths of a pruned folder, or that run code of a checkpoint.
_REFUSED = ("parallelize", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file")
_REFUSED += ("trust_remote_code", "subfolder")
_IGNORED = ("revision", "gpus", "max_memory_per_gpu", "max_cpu_memory", "offload_folder")
_IGNORED += ("quantization_config",)
_DTYPES: dict[str, torch.dtype | None] = {"auto": None}
_DTYPES |= {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class _FromFolder:
    """Loads with `load_pruned`, because `from_pretrained` cannot rebuild layers of different
    widths.
    """

    pretrained: Any
    device: torch.device

    def _create_model(self, pretrained: str, dtype: Any = "auto", **kwargs: Any) -> None:
        rest = {name: value for name, value in kwargs.items() if name not in (*_REFUSED, *_IGNORED)}
        self._model = load_pruned(pretrained, device=self.device, dtype=_DTYPES[dtype], **rest)

    def _create_tokenizer(self, pretrained: Any, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        try:
            parent._create_tokenizer(pretrained, *args, **kwargs)
        except Exception as error:  # untrusted files make transformers raise almost anything
            raise CheckpointError(
                f"the processor or tokenizer in {pretrained} cannot be loaded: {error}"
            ) from error

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results; model_sha is the hash of the folder."""
        folder = self.pretrained if isinstance(self.pretrained, str) else self._model.name_or_path
        return {
            "model_num_parameters": sum(p.numel() for p in self._model.parameters()),
            "model_dtype": str(self._model.dtype),
            "model_revision": "local",
            "model_sha": content_hash(folder) if Path(folder).is_dir() else "",
        }


class HippTextLM(_FromFolder, HFLM):
    """A folder of a language model, for lm-eval's text tasks."""


class HippLM(_FromFolder, HFMultimodalLM):
    """A folder of an image-text-to-text model, for our POPE and ScienceQA tasks and for text tasks.

    `--model hipp` with a folder of a language model becomes `HippTextLM`. The batch size does not
    change answers, because padding is on the left and masked.

    Raises:
        CheckpointError: the folder is incomplete, or an argument asks for another way of loading.
    """

    chat_applied: bool
    processor: Any

    def _create_model(self, pretrained: str, dtype: Any = "auto", **kwargs: Any) -> None:
        super()._create_model(pretrained, dtype, **kwargs)
        # As in `vlmeval`. Settings of a task or of --gen_kwargs have priority.
        self._model.generation_config = plain_greedy(self._model)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> Any:
        """Called by lm-eval with the model's arguments."""
        given = arg_dict.get("pretrained")
        if not isinstance(given, str):
            raise CheckpointError("--model hipp needs a folder: --model_args pretrained=./pruned")
        if wrong := [name for name in _REFUSED if arg_dict.get(name)]:
            raise CheckpointError(
                f"--model hipp does not take {', '.join(wrong)}: it loads one folder onto one "
                "device"
            )
        if arg_dict.get("dtype", "auto") not in _DTYPES:
            raise CheckpointError(
                f"dtype={arg_dict['dtype']}: one of {', '.join(_DTYPES)} is needed"
            )
        folder = check_model_folder(given, pictures=False)
        # With None, transformers would ask on standard input whether to run code of the folder.
        arg_dict = {**arg_dict, "pretrained": str(folder), "trust_remote_code": False}
        if not _sees(folder):
            return HippTextLM.create_from_arg_obj(arg_dict, additional_config)
        check_model_folder(folder)
        return super().create_from_arg_obj(arg_dict, additional_config)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Any:
        """Called by `simple_evaluate` with "key=value,key=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers; those about images without surrounding whitespace, as in `vlmeval`."""
        pictures = bool(requests) and len(requests[0].args) > 2
        if pictures and not self.chat_applied:
            raise CheckpointError(
                "questions about pictures need the model's chat template: add --apply_chat_template"
            )
        parent: Any = super()
        answers = parent.generate_until(requests, disable_tqdm)
        return [answer.strip() for answer in answers] if pictures else answers

    def tok_batch_multimodal_encode(self, *args: Any, **kwargs: Any) -> Any:
        """lm-eval's batch, without the second beginning-of-text token that some tokenizers add to a
        chat.
        """
        processor = self.processor
        # lm-eval has no option for it.
        self.processor = functools.partial(_one_beginning, processor)
        try:
            parent: Any = super()
            return parent.tok_batch_multimodal_encode(*args, **kwargs)
        finally:
            self.processor = processor


def _one_beginning(processor: Any, *, text: list[str], images: Any, **given: Any) -> Any:
    from transformers import BatchFeature

    rest = {
        name: value for name, value in given.items() if name not in ("padding", "return_tensors")
    }
    return BatchFeature(tokenise(processor, text, images, **rest))


def _sees(folder: Path) -> bool:
    from transformers import AutoConfig

    try:
        return hasattr(
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
            "vision_config",
        )
    except Exception as error:  # untrusted files make transformers raise almost anything
        raise CheckpointError(f"{folder / 'config.json'} cannot be loaded: {error}") from error
