"""A tower that is run layer by layer, from what the layer below put out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hipp_ext.calibration import Batch
from hipp_ext.groups import Tower, tower_layers, tower_root
from hipp_ext.replay import Passed, decoder_inputs, starting_at
from hipp_ext.scorers.base import valid_tokens


class _Reached(Exception):
    """Ends a forward pass once it has come to what it was made for."""


@dataclass(kw_only=True, eq=False)
class Stream:
    """A call of a tower on a batch, and how far up it has come.

    Attributes:
        root: the tower.
        layers: its layers, in order.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        rows: numbers of the batch's rows in the calibration.
        valid: mask of the batch's tokens that are no padding; None: tokens are patches, those of a
            row side by side.
        below: what the layer that was passed last left behind.
    """

    root: nn.Module
    layers: Sequence[nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: range
    valid: Tensor | None
    below: Passed | None = None

    def inputs(
        self, number: int, *modules: nn.Module
    ) -> list[Float[Tensor, "tokens columns"]] | None:
        """Inputs of some modules of layer `number`; None where the model leaves that layer out.

        The layers below have been passed.

        Args:
            number: index of the layer.
            modules: in the order in which the layer runs them.
        """
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].flatten(0, -2))
            if module is modules[-1]:
                raise _Reached

        self._run(number, *(m.register_forward_pre_hook(look) for m in modules))
        return seen or None

    def pass_layer(self, number: int) -> None:
        """Compute layer `number`, from the output of the one below."""
        seen: list[Passed] = []

        def look(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append(Passed.of(kwargs, output))
            raise _Reached

        self._run(number, self.layers[number].register_forward_hook(look, with_kwargs=True))
        self.below = seen[0] if seen else self.below

    def _run(self, number: int, *handles: RemovableHandle) -> None:
        try:
            with starting_at(self.layers, number, self.below):
                self.root(*self.args, **self.kwargs)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def row_of(self, tokens: int) -> Int[Tensor, " tokens"]:
        """Number of the calibration row that each token belongs to; -1: it is padding."""
        count = len(self.rows)
        rows = self.rows.start + torch.arange(tokens) * count // tokens
        return rows if self.valid is None else rows.where(self.valid.flatten().cpu(), -1)


def streams(model: nn.Module, tower: Tower, batches: Sequence[Batch]) -> list[Stream]:
    """The calls of a tower on the batches, before its first layer; a vision tower may have none.

    Cost: embeddings, vision tower and projector run once.
    """
    root, layers = tower_root(model, tower), list(tower_layers(model, tower))
    found: list[Stream] = []
    done = 0
    for batch in batches:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handle = root.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            decoder_inputs(model, batch)
        finally:
            handle.remove()
        rows = range(done, done := done + len(batch["input_ids"]))
        valid = valid_tokens(batch) if tower == "language" else None
        found += [
            Stream(root=root, layers=layers, args=args, kwargs=kwargs, rows=rows, valid=valid)
            for args, kwargs in calls
        ]
    return found
