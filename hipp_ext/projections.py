"""Projections: layers that compute x W^T + b, whichever way round they keep their weight W.

nn.Linear keeps it as (outputs, inputs), and the Conv1D of GPT-2 as (inputs, outputs). What reads or
writes weights of blocks asks here, and has to do with matrices (outputs, inputs) alone.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.families import LINEAR_LAYERS, TRANSPOSED_LAYERS


def is_projection(module: object) -> bool:
    """Whether a module is a projection, packed or adapted ones of nn.Linear included."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


def is_plain_projection(module: object) -> bool:
    """Whether a module is a projection that computes with its weight as it is."""
    plain = (*LINEAR_LAYERS, *TRANSPOSED_LAYERS)
    return type(module) is nn.Linear or type(module).__name__ in plain


def projection(model: nn.Module, name: str) -> Any:
    """The projection called `name`."""
    module = model.get_submodule(name)
    assert is_projection(module), (name, type(module))
    return module


def outputs_of(layer: Any) -> int:
    """Number of outputs of a projection."""
    return layer.nf if _is_transposed(layer) else layer.out_features


def inputs_of(layer: Any) -> int:
    """Number of inputs of a projection."""
    return layer.nx if _is_transposed(layer) else layer.in_features


def output_dim(layer: Any) -> int:
    """The dimension of a projection's weight along which its outputs lie; inputs: the other one."""
    return int(_is_transposed(layer))


def matrix_of(layer: Any) -> Float[Tensor, "outputs inputs"]:
    """The weight of a projection: a view."""
    return layer.weight.T if _is_transposed(layer) else layer.weight


def as_stored(layer: Any, matrix: Float[Tensor, "outputs inputs"]) -> Tensor:
    """A matrix as the weight of a projection; the reverse of `matrix_of`."""
    return matrix.T.contiguous() if _is_transposed(layer) else matrix


def sync_features(module: Any) -> None:
    """Bring the numbers of inputs and outputs of a projection in line with its weight.

    Other modules are left alone.
    """
    if _is_transposed(module):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _is_transposed(module: object) -> bool:
    return any(base.__name__ in TRANSPOSED_LAYERS for base in type(module).__mro__)
