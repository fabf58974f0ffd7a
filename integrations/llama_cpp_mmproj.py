"""The vision tower and projector of LLaVA-1.5 as llama.cpp's second file, the mmproj."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from hipp_ext.errors import CheckpointError, UnsupportedModelError
from hipp_ext.groups import tower_layers
from hipp_ext.integrations.llama_cpp_decoder import build
from hipp_ext.integrations.llama_cpp_file import BLOCK, Entry, WeightType, write_gguf
from hipp_ext.model_folder import ModelFolder, keys_in, stored_tensors

_ENDS = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_EXACT = ("v.class_embd", "v.position_embd.weight")  # they are added to what is computed
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}
# The first files of this kind called fc1 ffn_down. llama.cpp swaps the two where ffn_down reads the
# residual stream; by their right names, an FFN pruned to its width would be swapped as well.
_PARTS = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}
_ACTIVATIONS = {"quick_gelu": None, "gelu": "use_gelu"}


def vision_refusals(config: Any) -> tuple[str, ...]:
    """Why no mmproj can be written for a model; empty if one can.

    Args:
        config: the transformers configuration of the model.
    """
    vision = getattr(config, "vision_config", None)
    kind = getattr(vision, "model_type", None)
    if config.model_type != "llava" or kind != "clip_vision_model":
        tower = f" with a {kind} tower" if kind else ""
        return (
            f"an mmproj is written for LLaVA-1.5 with a CLIP tower, and the model is "
            f"{config.model_type}{tower}",
        )
    reasons = []
    if vision.hidden_act not in _ACTIVATIONS:  # type: ignore[union-attr]
        reasons.append(f"its vision tower has the activation {vision.hidden_act}")  # type: ignore[union-attr]
    if config.projector_hidden_act != "gelu":
        reasons.append(f"its projector has the activation {config.projector_hidden_act}")
    if config.vision_feature_select_strategy != "default":
        reasons.append(
            f"its features are selected by {config.vision_feature_select_strategy!r}, and the "
            "class token is always left out"
        )
    if not isinstance(config.vision_feature_layer, int):
        reasons.append(f"its features are those of several layers, {config.vision_feature_layer}")
    return tuple(reasons)


def write_mmproj(
    folder: ModelFolder, file: BinaryIO, wanted: WeightType, *, progress: bool = False
) -> None:
    """Write the mmproj of a model folder.

    Layers behind the one that the projector reads are left out. FFNs are as wide as they are; heads
    that were pruned become zeros, since all layers have one number of them.

    Args:
        folder: a model folder.
        file: open for writing, and empty.
        wanted: type of the weights, "f32" or "f16".
        progress: whether a progress bar is shown.

    Raises:
        UnsupportedModelError: the format has no such tower.
        CheckpointError: weights or the picture processor are missing.
    """
    config, model = build(folder)
    if reasons := vision_refusals(config):
        raise UnsupportedModelError(f"{folder.path}: {'; '.join(reasons)}.")
    vision, depth = config.vision_config, _depth(config)
    mean, std = _pixels(folder.path)

    def fields(writer: Any) -> None:
        writer.add_clip_has_vision_encoder(True)
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_image_size(vision.image_size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(vision.intermediate_size)
        writer.add_vision_projection_dim(config.get_text_config().hidden_size)
        writer.add_vision_block_count(depth)
        writer.add_vision_head_count(vision.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        writer.add_array("clip.vision.feature_layer", [depth])
        writer.add_vision_image_mean(mean)
        writer.add_vision_image_std(std)
        writer.add_string("clip.vision.mm_patch_merge_type", "flat")
        writer.add_vision_use_gelu(vision.hidden_act == "gelu")

    with stored_tensors(folder) as read:
        made = [*_entries(folder, model, depth, read)]
        write_gguf(file, "clip", fields, made, wanted, progress=progress)


def _depth(config: Any) -> int:
    """Number of layers that are run: transformers counts from the last hidden state, the first is
    the embedding.
    """
    layer, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    depth = layer if layer >= 0 else count + 1 + layer
    if not 0 < depth <= count:
        raise UnsupportedModelError(
            f"vision_feature_layer is {layer}, and the vision tower has {count} layers."
        )
    return depth


def _pixels(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixel values that pictures are normalised by."""
    from transformers import AutoImageProcessor

    try:
        found: Any = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return [float(x) for x in found.image_mean], [float(x) for x in found.image_std]
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no usable picture processor (preprocessor_config.json), whose means of "
            f"pixel values an mmproj needs: {error}"
        ) from error


def _entries(
    folder: ModelFolder, model: nn.Module, depth: int, read: Callable[[str], Tensor]
) -> Iterator[Entry]:
    keys, shapes = keys_in(model, folder), folder.shapes
    names = {module: name for name, module in model.named_modules()}
    layers = tower_layers(model, "vision")
    above = names[layers].removesuffix(".encoder.layers")
    projector = next(name for name in names.values() if name.endswith("multi_modal_projector"))
    wanted = {f"{above}.{name}": ours for name, ours in _ENDS.items()}
    wanted |= {f"{projector}.{name}.weight": f"{ours}.weight" for name, ours in _PROJECTOR.items()}
    if missing := [name for name in wanted if name not in keys]:
        raise CheckpointError(f"{folder.path} is incomplete: no weights for {missing[:4]}.")
    for name, ours in wanted.items():
        shape, load = shapes[keys[name]], functools.partial(read, keys[name])
        yield Entry(name=ours, shape=shape, read=load, exact=ours in _EXACT)
    for name, ours in _PROJECTOR.items():
        shape = shapes[keys[f"{projector}.{name}.weight"]][:1]
        load = _filled(read, keys.get(f"{projector}.{name}.bias"), shape)
        yield Entry(name=f"{ours}.bias", shape=shape, read=load)
    hidden = shapes[keys[f"{above}.embeddings.class_embedding"]][0]
    for number in range(depth):
        prefix = f"{names[layers[number]]}."
        own = {name.removeprefix(prefix): key for name, key in keys.items() if prefix in name}
        yield from _layer(number, own, shapes, hidden, read)


def _layer(
    number: int,
    own: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    hidden: int,
    read: Callable[[str], Tensor],
) -> Iterator[Entry]:
    """The tensors of a layer; what was pruned of its heads, or dropped, is zero."""
    channels = shapes[own["mlp.fc1.weight"]][0] if "mlp.fc1.weight" in own else BLOCK
    full = {"self_attn": (hidden, hidden), "mlp.fc1": (channels, hidden)}
    full |= {"mlp.fc2": (hidden, channels)}
    for part, ours in _PARTS.items():
        whole = full.get(part) or full.get(part.partition(".")[0]) or (hidden,)
        for kind in ("weight", "bias"):
            shape = whole if kind == "weight" else whole[:1]
            load = _filled(read, own.get(f"{part}.{kind}"), shape)
            yield Entry(name=f"v.blk.{number}.{ours}.{kind}", shape=shape, read=load)


def _filled(
    read: Callable[[str], Tensor], key: str | None, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    """What reads a tensor and puts zeros behind its rows and columns, or all zeros without one."""

    def load() -> Tensor:
        found = torch.zeros(shape)
        if key is not None:
            tensor = read(key)
            found[tuple(slice(size) for size in tensor.shape)] = tensor
        return found

    return load
