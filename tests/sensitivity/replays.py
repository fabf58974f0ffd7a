"""Batches of the tiny models, padded or in other batches, and their replay."""

from collections.abc import Sequence

import torch
from models import IMAGE_TOKENS, batch, build
from torch import nn

from hipp_ext.calibration import Batch, Calibration
from hipp_ext.sensitivity.measured import Point
from hipp_ext.sensitivity.replay import CalibrationReplay


def replay_of(model: nn.Module, batches) -> CalibrationReplay:
    return CalibrationReplay(model, Calibration.of(model, batches))


def batch_for(name: str, **options) -> Batch:
    """A batch for a model; of text where it has no pictures in `models`."""
    return batch(name if name in IMAGE_TOKENS else "llama", **options)


def padded(given: Batch, tokens: int = 3) -> Batch:
    """The batch with padding on the left."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.functional.pad(value, (tokens, 0), value=fills[name]) if name in fills else value
        for name, value in given.items()
    }


def rows_of(given: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch of text."""
    return {name: value[list(rows)] for name, value in given.items()}


def points_of(groups) -> list[Point]:
    """For every group: one unit, half of them, all of them."""
    removals = ((g, k) for g in groups for k in sorted({1, g.width // 2, g.width}))
    return [Point(group=g, removed=k) for g, k in removals if k]


class AsFound:
    """The state of a model in training mode; `check()` asserts that it is the same again."""

    def __init__(self, name: str):
        self.model = build(name).train()
        self.model(**batch_for(name))  # transformers adds hooks of its own in the first pass
        self.model.get_output_embeddings().requires_grad_(False)
        next(self.model.children()).training = False
        self._before = self._state()
        self._weights = {n: p.clone() for n, p in self.model.named_parameters()}

    def check(self) -> None:
        assert self._state() == self._before
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is None, name
            assert torch.equal(parameter, self._weights[name]), name

    def _state(self):
        modules = [
            (
                name,
                module.training,
                "forward" in vars(module),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
            )
            for name, module in self.model.named_modules()
        ]
        return modules, [(n, p.requires_grad) for n, p in self.model.named_parameters()]


def with_dropout() -> nn.Module:
    """A model in training mode whose attention drops half of its weights there."""
    model = build("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model
