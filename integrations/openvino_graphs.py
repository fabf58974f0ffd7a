"""A transformers model as OpenVINO graphs with dynamic batch and length, cache kept as state."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from hipp_ext.integrations.openvino_host import load
from hipp_ext.integrations.openvino_modules import BATCH, DYNAMIC, TOKENS, Decoder, Pictures


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
    graph = _convert(embedding, (ids,), {"input": {0: DYNAMIC, 1: DYNAMIC}})
    _rename(graph.inputs[0], "input")
    _rename(graph.outputs[0], "inputs_embeds")
    return graph


def picture_graph(pictures: Pictures) -> Any:
    """pixel_values (1, 3, height, width) -> features of the picture (1, tokens, hidden)."""
    graph = _convert(pictures, (pictures.example(),), {"pixel_values": None})
    _rename(graph.inputs[0], "pixel_values")
    _rename(graph.outputs[0], "last_hidden_state")
    return graph


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
