"""Which parameters are trained, in which type; adapters come and go within a run."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import HippError, MissingExtraError
from hipp_ext.recover.settings import RecoverSettings

HALF = (torch.bfloat16, torch.float16)
FINGERPRINT = 64  # numbers of each parameter that is not trained


@contextlib.contextmanager
def prepared(model: nn.Module, settings: RecoverSettings) -> Iterator[nn.Module]:
    """Inside the block only the chosen parameters have `requires_grad`, and they are float32.

    Afterwards they have the types that they had, and adapters are merged; after an error, removed.

    Yields:
        The model to run: `model`, or peft's wrapper of it.

    Raises:
        HippError: the model has no parameters of the chosen kind.
        MissingExtraError: peft is needed, and not installed.
    """
    before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    model.requires_grad_(settings.train == "full")
    adapted: Any = None
    try:
        if settings.train == "norms":
            for p in _norms(model):
                p.requires_grad_(True)
        frozen = _vision(model) if settings.freeze_vision else {}
        for p in frozen.values():
            p.requires_grad_(False)
        if settings.train == "lora":
            adapted = _with_adapters(model, settings, frozen)
        running = model if adapted is None else adapted
        if not any(p.requires_grad for p in running.parameters()):
            raise HippError(f"{type(model).__name__} has no {settings.train} to train.")
        for p in running.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        yield running
        if adapted is not None:
            adapted.merge_and_unload()
            adapted = None
    finally:
        if adapted is not None:
            adapted.unload()
        for name, p in model.named_parameters():
            grad, dtype = before[name]
            p.data, p.grad = p.data.to(dtype), None
            p.requires_grad_(grad)


def in_bfloat16(model: nn.Module, settings: RecoverSettings) -> bool:
    """Whether the passes run in bfloat16. Called before `prepared`."""
    if settings.precision == "auto":
        return any(p.dtype in HALF for p in model.parameters())
    return settings.precision == "bf16"


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_digest(model: nn.Module) -> str:
    """A digest of the first numbers of each parameter that is not trained. A checkpoint has none of
    them, so a run must go on with the same ones."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            some = p.detach().flatten()[:FINGERPRINT].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _norms(model: nn.Module) -> list[Tensor]:
    return [
        p
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    ]


def _vision(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {n: p for n, p in model.named_parameters() if "vision" in n or "visual" in n}
    if not found:
        raise HippError(f"{type(model).__name__} has no parameters of a vision tower to freeze.")
    return found


def _with_adapters(
    model: nn.Module, settings: RecoverSettings, frozen: Mapping[str, Tensor]
) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtraError("peft", "recover") from None
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and f"{name}.weight" not in frozen
    ]
    if not layers:
        raise HippError(f"{type(model).__name__} has no linear layers for adapters.")
    torch.manual_seed(settings.seed)
    options: dict[str, Any] = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha}
    config = LoraConfig(target_modules=layers, **options)
    return get_peft_model(model, config)  # type: ignore[arg-type]
