"""What the training loops share: optimizers and the schedule of the learning rate."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def make_optimizers(model: nn.Module, lr: float, muon_lr: float | None) -> list[Any]:
    """AdamW for the trained parameters of `model`, with Muon for its hidden matrices.

    Hidden matrices are the 2-D parameters in the layers of the language model. Muon needs about a
    third of Adam's steps for them on the testbed.

    Args:
        model: model whose parameters with `requires_grad` are trained.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon; None: AdamW trains all parameters.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if muon_lr is not None and p.dim() == 2 and _hidden(name)]
    ids = {id(p) for p in hidden}
    rest = [p for _, p in trained if id(p) not in ids]
    made: list[Any] = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if muon_lr is not None and hidden:
        made.append(torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.01))
    return made


def lr_factor(step: int, steps: int, *, warmup: int, decay: float) -> float:
    """Fraction of the peak learning rate at `step`: linear warm-up, plateau, linear decay to zero.

    Args:
        step: number of the step, from 0.
        steps: number of steps.
        warmup: steps of the warm-up.
        decay: fraction of the steps in which the rate falls.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def step_optimizers(optimizers: Sequence[Any], factor: float) -> None:
    """Step each optimizer at `factor` times its peak learning rate, and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad()


def optimizer_tensors(optimizers: Sequence[Any]) -> dict[str, Tensor]:
    """The states of the optimizers as tensors, for a file; see `load_optimizers`."""
    return {
        f"{number}.{index}.{key}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def load_optimizers(optimizers: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned into optimizers of the same parameters.

    Raises:
        ValueError, IndexError: the tensors belong to other optimizers.
    """
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        number, index, key = name.split(".", 2)
        states[int(number)].setdefault(int(index), {})[key] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )


def _hidden(name: str) -> bool:
    return ".layers." in name and "vision" not in name and "visual" not in name
