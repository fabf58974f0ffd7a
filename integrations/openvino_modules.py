"""What of a transformers model becomes an OpenVINO graph, as torch modules of plain tensors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.groups import block_of, find_groups

BATCH, TOKENS, PAST = 2, 5, 3  # of the example that is traced; all of them are dynamic
DYNAMIC: Any = torch.export.Dim.DYNAMIC


class Decoder(nn.Module):
    """The decoder with its head; keys and values come in and go out as plain tensors.

    Args:
        model: a language model, or a vision-language model whose decoder is one.
        embeds: take embeddings instead of token ids.
    """

    def __init__(self, model: Any, *, embeds: bool):
        super().__init__()
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.first = "inputs_embeds" if embeds else "input_ids"
        self.hidden = model.get_input_embeddings().embedding_dim
        # (layer, KV heads, head dimension) of the layers that keep a cache
        self.cached = tuple(_cached(model))

    def forward(
        self, inputs: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """(logits, keys and values of every layer with a cache)."""
        cache = _Cache(
            {layer: past[2 * i : 2 * i + 2] for i, (layer, *_) in enumerate(self.cached)}
        )
        hidden = self.decoder(
            **{self.first: inputs},
            attention_mask=_causal(attention_mask, inputs.shape[1], self.head.weight.dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.head(hidden), *(t for layer, *_ in self.cached for t in cache.present[layer])

    def names(self, prefix: str) -> list[str]:
        """Names of the keys and values, in the order of `past`."""
        return [
            f"{prefix}.{layer}.{part}" for layer, *_ in self.cached for part in ("key", "value")
        ]

    def example(self) -> tuple[Any, ...]:
        """Arguments of `forward`."""
        shape = (BATCH, TOKENS)
        inputs = torch.zeros(shape, dtype=torch.long)
        if self.first == "inputs_embeds":
            inputs = torch.zeros(*shape, self.hidden)
        past = [
            torch.zeros(BATCH, heads, PAST, size) for _, heads, size in self.cached for _ in "kv"
        ]
        mask = torch.ones(BATCH, PAST + TOKENS, dtype=torch.long)
        positions = torch.arange(PAST, PAST + TOKENS).repeat(BATCH, 1)
        return inputs, mask, positions, past

    def dynamic(self) -> dict[str, Any]:
        """Which dimensions of `example` may change."""
        rows = {0: DYNAMIC, 1: DYNAMIC}
        past = [{0: DYNAMIC, 2: DYNAMIC} for _ in self.cached for _ in "kv"]
        return {"inputs": rows, "attention_mask": rows, "position_ids": rows, "past": past}


class Pictures(nn.Module):
    """The vision tower and the projector of a LLaVA."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.model
        self.sides = model.config.vision_config.image_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of the picture."""
        config = self.model.config
        return torch.stack(
            self.model.get_image_features(
                pixel_values,
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            ).pooler_output
        )

    def example(self) -> Tensor:
        """A picture of the size that the tower was built for."""
        return torch.zeros(1, 3, self.sides, self.sides)


class _Cache:
    """Stands for transformers' cache while the model is traced: new entries behind old ones."""

    def __init__(self, past: Mapping[int, Sequence[Tensor]]):
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer; a layer without attention keeps none."""
        if layer not in self.past:
            return keys, values
        old_keys, old_values = self.past[layer]
        self.present[layer] = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        return self.present[layer]


def _cached(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    for group in find_groups(model, partial="report"):
        if group.kind == "attention":
            block = block_of(model, group)
            yield group.layer, block.k_proj.out_features // block.head_dim, block.head_dim


def _causal(attention_mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores, (batch, 1, tokens, past and new tokens)."""
    total = attention_mask.shape[1]
    places = torch.arange(total)
    earlier = places[None] <= (places[:tokens] + (total - tokens))[:, None]
    seen = earlier[None, None] & (attention_mask[:, None, None] != 0)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
