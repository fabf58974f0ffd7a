"""The decoder's part of a GGUF file: sizes, and tensors in llama.cpp's layout."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hipp_ext.integrations.llama_cpp_decoder import Decoder, Layer
from hipp_ext.integrations.llama_cpp_file import BLOCK, Entry

Read = Callable[[str], Tensor]

_ROTATED = ("attn_q", "attn_k")


def written_layers(decoder: Decoder) -> list[Layer]:
    """The widths that the file names. Where a block was dropped, llama.cpp (75dc8f6) needs more
    than a 0 in two cases, and gets a block of zeros, which adds nothing: without channels it would
    leave out the whole layer, and the first layer's heads say whether the model attends at all.
    """
    return [
        Layer(
            heads=layer.heads or int(number == 0),
            kv_heads=layer.kv_heads or int(number == 0),
            channels=layer.channels or BLOCK,
        )
        for number, layer in enumerate(decoder.layers)
    ]


def entries(decoder: Decoder, read: Read) -> list[Entry]:
    """The tensors of the GGUF file, in llama.cpp's order."""
    shapes = decoder.folder.shapes
    found = [
        Entry(name=name, shape=shapes[key], read=functools.partial(read, key))
        for name, key in decoder.ends.items()
    ]
    if (factors := rope_factors(decoder.config)) is not None:
        shape = tuple(factors.shape)
        found.append(Entry(name="rope_freqs.weight", shape=shape, read=lambda: factors, exact=True))
    for number in range(len(decoder.layers)):
        found += _layer_entries(decoder, number, read)
    return found


def _layer_entries(decoder: Decoder, number: int, read: Read) -> Iterator[Entry]:
    turn = decoder.architecture != "qwen2"
    for name, key in decoder.names[number].items():
        load: Callable[[], Tensor] = functools.partial(read, key)
        if turn and name.partition(".")[0] in _ROTATED:
            load = functools.partial(_turned, load, decoder.head_dim)
        yield Entry(name=f"blk.{number}.{name}", shape=decoder.folder.shapes[key], read=load)
    for name, shape in _blocks_of_zeros(decoder, number).items():
        make = torch.ones if name.endswith("norm") else torch.zeros
        load = functools.partial(make, shape)
        yield Entry(name=f"blk.{number}.{name}.weight", shape=shape, read=load)


def _blocks_of_zeros(decoder: Decoder, number: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of blocks that were dropped and have to be there."""
    layer, hidden, head = decoder.layers[number], decoder.config.hidden_size, decoder.head_dim
    found: dict[str, tuple[int, ...]] = {}
    if not layer.heads and number == 0:
        found["attn_norm"] = (hidden,)
        found |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head, hidden))
        found["attn_output"] = (hidden, head)
    if not layer.channels:
        found["ffn_norm"] = (hidden,)
        found |= dict.fromkeys(("ffn_gate", "ffn_up"), (BLOCK, hidden))
        found["ffn_down"] = (hidden, BLOCK)
    return found


def _turned(load: Callable[[], Tensor], head_dim: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: it rotates neighbours, transformers halves."""
    tensor = load()
    heads = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by under Llama 3's scaling, else None."""
    if (config.rope_parameters or {}).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    return plain / scaled


def add_sizes(writer: Any, decoder: Decoder) -> None:
    """Add what llama.cpp must know of the decoder to a gguf.GGUFWriter."""
    config, layers = decoder.config, written_layers(decoder)
    several = decoder.architecture == "deci"

    def widths(values: Sequence[int]) -> int | list[int]:
        return list(values) if several else values[0]

    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(decoder.vocabulary)
    writer.add_head_count(widths([layer.heads for layer in layers]))
    writer.add_head_count_kv(widths([layer.kv_heads for layer in layers]))
    writer.add_feed_forward_length(widths([layer.channels for layer in layers]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_rope_dimension_count(decoder.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
