"""What else is done to a pruned model: it sees half of a picture, or is quantised."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.groups import tower_layers
from hipp_ext.towers import projected_tokens

IGNORED = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]


class KeptPatches(nn.Module):
    """A projector that takes those patches alone which the other patches attend to most.

    The order of the patches stays. Attention is that of the tower's last layer, mean over heads and
    patches.

    Args:
        projector: the model's own.
        tower_layer: the last layer of the vision tower.
        count: number of patches that are kept.

    Source: VisionZip (arXiv 2412.04467), for towers whose class token is trained for nothing.
    Differs from the paper: the patches that are left out are not merged into others.
    """

    def __init__(self, projector: nn.Module, tower_layer: Any, count: int):
        super().__init__()
        self.projector, self.count = projector, count
        self.attention = torch.empty(0)
        self.handle = tower_layer.self_attn.register_forward_pre_hook(self._look, with_kwargs=True)

    def forward(
        self, features: Float[Tensor, "pictures patches width"]
    ) -> Float[Tensor, "pictures kept hidden"]:
        """What the projector makes of the patches that are kept."""
        best = self.attention.topk(self.count).indices.sort().values
        return self.projector(features.gather(1, best[..., None].expand(-1, -1, features.shape[2])))

    @torch.no_grad()
    def _look(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        size = module.head_dim
        query = module.q_proj(hidden[:, 1:]).unflatten(-1, (-1, size))
        key = module.k_proj(hidden).unflatten(-1, (-1, size))
        logits = torch.einsum("bqhd,bkhd->bhqk", query, key).float() * size**-0.5
        self.attention = logits.softmax(-1).mean((1, 2))[:, 1:]  # without the class token


@contextlib.contextmanager
def half_of_the_picture(model: Any, processor: Any) -> Iterator[Any]:
    """Inside the block a LLaVA sees half of each picture's patches; yields the processor for it.

    The language model gets, and a prompt has, half as many tokens of a picture.
    """
    patches = projected_tokens(model.config)
    kept = patches // 2
    owner = model.model
    before = owner.multi_modal_projector
    owner.multi_modal_projector = KeptPatches(before, tower_layers(model, "vision")[-1], kept)
    fewer = copy.copy(processor)
    fewer.num_additional_image_tokens -= patches - kept
    try:
        yield fewer
    finally:
        owner.multi_modal_projector.handle.remove()
        owner.multi_modal_projector = before


def quantised(model: Any) -> Any:
    """`model`, whose language tower has weights and activations of 8 bits, in place.

    llm-compressor's W8A8: weights by output channel, activations by token. The numbers are those
    of 8 bits; the products are computed in the model's type.
    """
    # It keeps llm-compressor's import in bounds, so it comes first.
    import hipp_ext.integrations.llm_compressor  # noqa: F401

    from llmcompressor.entrypoints.oneshot import oneshot  # isort: skip
    from llmcompressor.modifiers.quantization import QuantizationModifier  # isort: skip

    recipe = QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=IGNORED)
    oneshot(model=model, recipe=[recipe], pipeline="datafree")
    return model
