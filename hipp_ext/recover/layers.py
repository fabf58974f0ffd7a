"""Hidden states after layers of the dense language tower, in the dense and in the pruned model."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import tower_layers
from hipp_ext.plan import PruningPlan
from hipp_ext.recover.places import Places
from hipp_ext.surgery.drop import layer_numbers
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE

LayerStates = dict[int, Float[Tensor, "positions width"]]


def layers_in_student(student: nn.Module, chosen: Sequence[int], layers: int) -> dict[int, int]:
    """Layer of the dense tower -> layer of the student after which the stream is the same.

    A dropped layer adds nothing to the stream: the last layer that is left below it counts.

    Args:
        student: the pruned model; its plan tells which layers are gone.
        chosen: numbers of layers of the dense tower, from 0.
        layers: how many the dense tower has.

    Raises:
        PlanError: a number is out of range, nothing is left below a layer, or the student has fewer
            layers and no plan.
    """
    if wrong := [n for n in chosen if not 0 <= n < layers]:
        raise PlanError(f"hidden_layers: {wrong[0]}; the dense model has layers 0 to {layers - 1}.")
    count = len(tower_layers(student, "language"))
    plan: PruningPlan | None = getattr(student, PLAN_ATTRIBUTE, None)
    if count == layers:
        return {n: n for n in chosen}
    if plan is None:
        raise PlanError(
            f"The student has {count} of the teacher's {layers} layers and no plan that says "
            "which; hidden states cannot be compared. Load it with load_pruned, or leave out "
            "hidden_share."
        )
    numbers = layer_numbers(plan, count)
    found = {}
    for n in chosen:
        left = [old for old in numbers if old <= n]
        if not left:
            raise PlanError(
                f"hidden_layers: {n}; the student has no layer up to this one. Name those from "
                f"{min(numbers)} on (hidden_layers=, --hidden-layers)."
            )
        found[n] = numbers[max(left)]
    return found


@contextlib.contextmanager
def recorded(model: nn.Module, numbers: Mapping[int, int], places: Places) -> Iterator[LayerStates]:
    """Yield a dict: name of a layer -> its output at the places, from a forward pass in the block.

    It is to be read after the block.

    Args:
        model: a model with a language tower.
        numbers: name of each layer that is recorded -> its number in this tower.
        places: positions whose hidden states are kept.

    Raises:
        UnsupportedModelError: in the block, a layer returns no hidden states per token, or they are
            cut from the graph by reentrant checkpoints.
    """
    states: LayerStates = {}
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())

    def keep(names: list[int], layer: nn.Module, _: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.ndim != 3:
            raise UnsupportedModelError(
                f"{type(layer).__name__} returns {tuple(hidden.shape)}, not hidden states of shape "
                "(rows, tokens, width): leave out hidden_share."
            )
        if not learns:
            states.update(dict.fromkeys(names, places.of(hidden)))
        elif torch.is_grad_enabled():
            # The places are chosen after the pass: a checkpointed layer is computed again without
            # this hook, and has to save the same tensors as before.
            states.update(dict.fromkeys(names, hidden))

    layers = tower_layers(model, "language")
    with contextlib.ExitStack() as stack:
        for number in set(numbers.values()):
            names = [name for name, own in numbers.items() if own == number]
            hook = functools.partial(keep, names)
            stack.callback(layers[number].register_forward_hook(hook).remove)
        yield states
    if learns:
        states.update({name: places.of(hidden) for name, hidden in states.items()})
    if missing := sorted(set(numbers) - set(states)):
        raise UnsupportedModelError(
            f"The hidden states after layer {missing[0]} of {type(model).__name__} cannot be "
            "trained: reentrant checkpoints cut them from the graph. Use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or leave out hidden_share."
        )


def hidden_distance(
    student: LayerStates, teacher: Mapping[int, Float[Tensor, "positions width"]]
) -> Float[Tensor, ""]:
    """Mean over the layers of the mean squared difference, divided by the teacher's mean square.

    0 for equal states, 1 for a student that is 0 everywhere; float32.

    Source: Minitron (arXiv 2407.14679, section 3), intermediate state loss.
    Differs from the paper: each layer is normalised by the teacher's mean square, because the size
    of hidden states grows with depth; and no linear map stands between the models, because pruning
    here keeps the hidden size.
    """
    distances = list[Tensor]()
    for number, own in teacher.items():
        found = student[number].float()
        goal = own.float().to(found.device)
        distance = (found - goal).square().mean() / goal.square().mean()
        distances.append(distance if not distances else distance.to(distances[0].device))
    return torch.stack(distances).mean()
