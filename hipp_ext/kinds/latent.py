"""Attention over a latent (MLA): a unit is a head, with its query, key and value.

Queries, keys and values of all heads are made of latents, which are shared: the projections to the
latents, and what is rotated, stay.
"""

from typing import Any

from torch import Tensor

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import LATENT_ATTENTION, LATENT_PARTS
from hipp_ext.kinds.base import BlockKind
from hipp_ext.kinds.skips import Skip, SkipAttention
from hipp_ext.kinds.slices import Slice
from hipp_ext.projections import inputs_of, matrix_of


class LatentAttention(BlockKind):
    """Attention blocks of DeepSeek's make, whose keys and values are up-projected from a latent.

    A unit owns its rows of the up-projections (q_b_proj, or q_proj where queries have no latent,
    and kv_b_proj, where a head's keys and values lie side by side) and its columns of o_proj.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    name = "latent_attention"
    place = "attention"
    names = LATENT_ATTENTION
    unit = "heads"
    fields = ("num_attention_heads", "num_key_value_heads")

    def width(self, block: Any, name: str) -> int:
        """Number of heads."""
        head_dim = getattr(block, "v_head_dim", None)
        if not isinstance(head_dim, int) or inputs_of(block.o_proj) % head_dim:
            raise UnsupportedModelError(
                f"{name} ({type(block).__name__}) has no v_head_dim that divides its o_proj."
            )
        return inputs_of(block.o_proj) // head_dim

    def check_rest(self, block: Any, name: str, width: int) -> None:
        """Beside the up-projections only what makes the latents may stand there."""
        known = {*self.names.consumers, *(n for names in self.names.producers for n in names)}
        for part, _ in block.named_parameters():
            if part.partition(".")[0] not in known | LATENT_PARTS:
                raise UnsupportedModelError(
                    f"{name}.{part}: it is not known whether it has entries for the {width} heads."
                )

    def passed_on(self, block: Any) -> tuple[Tensor, int]:
        """Absolute weights from the hidden states to the values of all heads, over the latent."""
        heads = self.width(block, "")
        values = matrix_of(block.kv_b_proj).unflatten(0, (heads, -1))[:, -block.v_head_dim :]
        latent = matrix_of(block.kv_a_proj_with_mqa)[: values.shape[-1]]
        gain = block.kv_a_layernorm.weight.abs()
        return (values.flatten(0, 1).abs() * gain) @ latent.abs(), block.v_head_dim

    def context_flops(self, owns: tuple[Slice, ...], context: int) -> int:
        """Scores over a head's key dimensions, weighted sum over its value dimensions."""
        return 2 * (owns[0].size + owns[-1].size) * context

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Number of heads."""
        return {"num_heads": width, "num_key_value_heads": width}

    def config(self, block: Any, columns: int, width: int, named: Any) -> dict[str, int]:
        """Number of heads, which all have a key and a value."""
        return dict.fromkeys(self.fields, width)

    def stock_counts(
        self, config: Any, tower: str, common: int, block: Any, columns: int
    ) -> tuple[int, ...]:
        """Those that divide the hidden size, which some configurations insist on."""
        return (*(n for n in range(1, common) if config.hidden_size % n == 0), common)

    def set_common_width(self, config: Any, tower: str, width: int) -> None:
        """Number of heads, which all have a key and a value."""
        for field in self.fields:
            setattr(config, field, width)

    def skip(self, block: Any) -> Skip:
        """A module that returns nothing and keeps the cache counting."""
        return SkipAttention(self.name, block)
