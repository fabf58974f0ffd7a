"""What a family says of itself: a configuration, and what its forward takes besides text."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from zoo.sizes import BOS, IMAGE, LANGUAGE, TEXT, VOCAB, small

Inputs = Callable[[int, torch.Generator], dict[str, Any]]
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
MULTIMODAL = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model of random weights that is built in a fraction of a second.

    Attributes:
        architecture: the model's class in transformers.
        configuration: makes its configuration.
        prompt: the tokens before the text: image tokens and what stands around them.
        inputs: makes what the forward takes besides tokens, for a number of rows.
    """

    architecture: str
    configuration: Callable[[], Any]
    prompt: tuple[int, ...] = (BOS,)
    inputs: Inputs = lambda rows, generator: {}

    @property
    def cls(self) -> Any:
        """The model's class."""
        return getattr(transformers, self.architecture)

    @property
    def sees(self) -> bool:
        """Whether the model takes more than text."""
        return len(self.prompt) > 1

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, float32; no bias is 0 and no norm 1, so that a wrong slice shows
        in the logits.
        """
        torch.manual_seed(seed)
        model = self.cls(self.configuration()).float().eval()
        model.config.architectures = [self.architecture]  # as in every folder
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model

    def batch(self, rows: int = 2, length: int = 6, seed: int = 0) -> dict[str, Any]:
        """Inputs of the model's forward, unpadded: the prompt, then random text."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(TEXT, VOCAB, (rows, length), generator=generator)
        ids = torch.cat([torch.tensor([self.prompt] * rows), text], 1)
        mask = torch.ones_like(ids)
        batch = {"input_ids": ids, "attention_mask": mask} | self.inputs(rows, generator)
        if "mm_token_type_ids" in inspect.signature(self.cls.forward).parameters:
            batch["mm_token_type_ids"] = (ids == IMAGE).long()
        return batch


def language(name: str, **given: Any) -> Family:
    """A language model; `given` replaces fields of the configuration that `small` makes."""
    architecture = given.pop("architecture", None) or CAUSAL[name]
    return Family(architecture=architecture, configuration=lambda: small(name, LANGUAGE, **given))


def sees(name: str, prompt: int | tuple[int, ...], inputs: Inputs, **given: Any) -> Family:
    """A model of text and pictures or sound; `prompt` is what stands for one of them, or the number
    of image tokens.
    """
    architecture = given.pop("architecture", None) or MULTIMODAL[name]
    tokens = (IMAGE,) * prompt if isinstance(prompt, int) else prompt
    return Family(
        architecture=architecture,
        configuration=lambda: small(name, LANGUAGE, **_copied(given)),
        prompt=(BOS, *tokens),
        inputs=inputs,
    )


def _copied(value: Any) -> Any:
    """`small` takes dictionaries apart."""
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
