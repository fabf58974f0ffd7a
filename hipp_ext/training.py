"""What the training loops share: optimizers and the schedule of the learning rate."""

import math
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


def cosine_factor(step: int, steps: int, *, warmup: int) -> float:
    """Fraction of the peak learning rate at `step`: linear warm-up, half a cosine down to zero.

    Source: SGDR (arXiv 1608.03983, equation 5), one period, with a warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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
        f"{number}.{index}.{key}": whole_tensor(torch.as_tensor(value))
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
        parameters = [p for group in optimizers[int(number)].param_groups for p in group["params"]]
        own = spread_as(parameters[int(index)], tensor)
        states[int(number)].setdefault(int(index), {})[key] = own
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )


def whole_tensor(tensor: Any) -> Tensor:
    """The tensor; if its parts are spread over processes (FSDP2), whole and on the CPU. A
    collective."""
    return tensor.full_tensor().cpu() if _is_spread(tensor) else tensor


def spread_as(parameter: Any, whole: Tensor) -> Tensor:
    """`whole`, spread over the processes if `parameter` is, and of its shape. A collective."""
    if not _is_spread(parameter) or whole.shape != parameter.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def _is_spread(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose import takes half a second


def _hidden(name: str) -> bool:
    return ".layers." in name and "vision" not in name and "visual" not in name
