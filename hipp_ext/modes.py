"""Calling a model to measure something, and leaving it as it was."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def restored(model: nn.Module, *, random_state: bool = False) -> Iterator[None]:
    """After the block, train/eval modes and requires_grad are as they were before it.

    Args:
        model: its parameters may be replaced inside the block; flags are restored by name.
        random_state: also restore torch's random state, on the CPU and on the model's GPUs.
    """
    modes = [(m, m.training) for m in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices, enabled=random_state):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for name, p in model.named_parameters():
                p.requires_grad_(flags.get(name, p.requires_grad))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode; after it, modes are as they were before it."""
    with restored(model):
        model.eval()
        yield


@contextlib.contextmanager
def training_only(model: nn.Module, parameters: Collection[Tensor]) -> Iterator[None]:
    """Inside the block these parameters, and no others, require gradients."""
    chosen = {id(p) for p in parameters}
    with restored(model):
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)
        yield


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on inputs given as a mapping of keyword arguments, a sequence, or one tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


@contextlib.contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block `layer` computes `forward`; its hooks run as before."""
    own = layer.__dict__.get("forward")  # accelerate's hooks replace it on the instance, too
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own  # type: ignore[method-assign]
