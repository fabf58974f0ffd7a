"""A transformers model as OpenVINO graphs with dynamic batch and length, cache kept as state."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hipp_ext.groups import block_of, find_groups
from hipp_ext.integrations.openvino_host import load

BATCH, TOKENS, PAST = 2, 5, 3  # of the example that is traced; all of them are dynamic


def decoder_graph(model: Any, *, embeds: bool) -> Any:
    """The language model as an `openvino.Model` as openvino_genai takes it.

    Inputs are input_ids (batch, tokens) or, with `embeds`, inputs_embeds (batch, tokens, hidden);
    attention_mask (batch, past and new tokens), position_ids (batch, tokens) and beam_idx (batch):
    the row of the cache that each row goes on from. The output is logits (batch, tokens, words).
    Keys and values are state: `reset_state` begins a new text.
    """
    decoder = Decoder(model, embeds=embeds)
    graph = _convert(decoder, decoder.example(), decoder.dynamic())
    names = [decoder.first, "attention_mask", "position_ids"]
    for port, name in zip(graph.inputs, [*names, *decoder.names("past_key_values")], strict=True):
        _rename(port, name)
    for port, name in zip(graph.outputs, ["logits", *decoder.names("present")], strict=True):
        _rename(port, name)
    _keep_state(graph, decoder)
    return graph


def embedding_graph(embedding: nn.Module) -> Any:
    """input_ids (batch, tokens) -> inputs_embeds (batch, tokens, hidden)."""
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    graph = _convert(embedding, (ids,), {"input": {0: _any(), 1: _any()}})
    _rename(graph.inputs[0], "input")
    _rename(graph.outputs[0], "inputs_embeds")
    return graph


def picture_graph(pictures: "Pictures") -> Any:
    """pixel_values (1, 3, height, width) -> features of the picture (1, tokens, hidden)."""
    graph = _convert(pictures, (pictures.example(),), {"pixel_values": None})
    _rename(graph.inputs[0], "pixel_values")
    _rename(graph.outputs[0], "last_hidden_state")
    return graph


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
        rows = {0: _any(), 1: _any()}
        past = [{0: _any(), 2: _any()} for _ in self.cached for _ in "kv"]
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
    for group in find_groups(model):
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


def _convert(module: nn.Module, example: tuple[Any, ...], dynamic: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        program = torch.export.export(module.eval(), example, dynamic_shapes=dict(dynamic))
    return load().convert_model(program)


def _keep_state(graph: Any, decoder: Decoder) -> None:
    """Make state of the keys and values, in the rows that beam_idx names."""
    ops, passes = load("openvino.opset13"), load("openvino.passes")
    past, present = decoder.names("past_key_values"), decoder.names("present")
    beam = ops.parameter([-1], np.int32, "beam_idx")
    _rename(beam.output(0), "beam_idx")
    shapes = [[-1, heads, -1, size] for _, heads, size in decoder.cached for _ in "kv"]
    for name, shape in zip(past, shapes, strict=True):
        port = graph.input(name)
        port.get_node().set_partial_shape(load().PartialShape(shape))
        readers = port.get_target_inputs()
        rows = ops.gather(port, beam, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(rows.output(0))
    graph.add_parameters([beam])
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(dict(zip(past, present, strict=True))))
    manager.run_passes(graph)
    _begin_empty(graph)


def _begin_empty(graph: Any) -> None:
    """Let the state of a new text hold no token, in as many rows as the inputs have."""
    ops = load("openvino.opset13")
    shape = ops.shape_of(graph.inputs[0].get_node(), "i64")
    batch = ops.gather(shape, ops.constant([0]), ops.constant(0))
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, size = node.get_output_partial_shape(0)
            rest = ops.constant([heads.get_length(), 0, size.get_length()], np.int64)
            empty = ops.broadcast(ops.constant(0.0, np.float32), ops.concat([batch, rest], 0))
            node.set_arguments([empty])
    graph.validate_nodes_and_infer_types()


def _rename(port: Any, name: str) -> None:
    port.get_tensor().set_names({name})
    port.get_node().set_friendly_name(name)


def _any() -> Any:
    return torch.export.Dim.DYNAMIC
