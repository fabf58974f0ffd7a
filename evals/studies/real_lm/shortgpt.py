"""ShortGPT: whole layers leave, those that change their input least."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.allocators import Allocator
from hipp_ext.calibration import Calibration
from hipp_ext.groups import tower_layers
from hipp_ext.modes import evaluating
from hipp_ext.scorers.base import Groups, Scores, forward_hidden, valid_tokens


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Allocator):
    """Removes the layers of least block influence, each whole.

    The influence of a layer is one minus the cosine similarity of its input and its output, mean
    over all tokens. Which units a scorer prefers does not matter.

    Source: ShortGPT (arXiv 2403.03853), section 3.
    Differs from the paper: the number of layers is the smallest that meets pruning_ratio.
    """

    needs_calibration = True

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        groups: Groups,
        scores: Scores,
        calibration: Calibration | None,
        progress: bool = False,
    ) -> Float[Tensor, " layers"]:
        """The influence of each layer, in [0, 2]."""
        assert calibration is not None
        layers = list(tower_layers(model, "language"))
        change, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
        counted = torch.empty(0)
        where = {layer: i for i, layer in enumerate(layers)}

        def look(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            change[where[layer]] += (1 - cosine)[counted.to(cosine.device)].double().sum().cpu()

        hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
        try:
            with evaluating(model):
                for batch in calibration.batches:
                    counted = valid_tokens(batch)
                    tokens += int(counted.sum())
                    forward_hidden(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return change / tokens

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        goal = self.pruning_ratio * sum(g.parameters for g in groups) - 1e-6
        gone: set[int] = set()
        for layer in torch.argsort(measured, stable=True).tolist():
            if sum(g.parameters for g in groups if g.layer in gone) >= goal:
                break
            gone.add(layer)
        return tuple(0 if g.layer in gone else g.width for g in groups)
