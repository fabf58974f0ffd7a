"""The language tower in a model folder: its sizes, and what llama.cpp calls its weights."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hipp_ext.errors import CheckpointError, HippError, UnsupportedModelError
from hipp_ext.groups import tower_layers, tower_root
from hipp_ext.integrations.llama_cpp_refusals import ARCHITECTURES, refusals
from hipp_ext.model_folder import ModelFolder, damaged, keys_in, model_class
from hipp_ext.surgery.layer_config import configured_skips, quiet_width_warnings

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_FFN = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Widths of a layer; 0 where a block was dropped."""

    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A language tower.

    Attributes:
        folder: where it lies.
        config: configuration of the language tower.
        whole: configuration of the model that it is a part of; of a language model, the same.
        head_dim: entries of a head.
        layers: widths, layer by layer.
        names: by layer, name in llama.cpp without its number ("attn_q.weight") -> name in the
            weights.
        ends: the same for what stands before and behind the layers.
    """

    folder: ModelFolder
    config: Any
    whole: Any
    head_dim: int
    layers: tuple[Layer, ...]
    names: tuple[Mapping[str, str], ...]
    ends: Mapping[str, str]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.folder.shapes[self.ends["token_embd.weight"]][0]

    @functools.cached_property
    def architecture(self) -> str:
        """llama.cpp's name of the graph: `deci` where layers differ."""
        own = ARCHITECTURES[self.config.model_type]
        first = self.layers[0]
        alike = all(layer == first for layer in self.layers) and first.heads and first.channels
        # The graph qwen2 takes the residual stream to be as wide as the heads together.
        square = first.heads * self.head_dim == self.config.hidden_size
        return own if alike and (square or own == "llama") else "deci"


def read_decoder(folder: ModelFolder) -> Decoder:
    """The language tower in a folder.

    Raises:
        UnsupportedModelError: llama.cpp cannot run it.
        CheckpointError: weights are missing, or do not fit each other.
    """
    whole, model = build(folder)
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{folder.path} holds a {type(model).__name__}, which predicts no tokens."
        )
    keys = keys_in(model, folder)
    modules = {module: name for name, module in model.named_modules()}
    layers = tower_layers(model, "language")
    text: Any = whole.get_text_config(decoder=True)
    first: Any = layers[0]
    head_dim: int = first.self_attn.head_dim
    dropped = _dropped(folder, whole)
    names = tuple(
        _layer_names(folder, keys, modules[layer], {k for i, k in dropped if i == number})
        for number, layer in enumerate(layers)
    )
    return Decoder(
        folder=folder,
        config=text,
        whole=whole,
        head_dim=head_dim,
        layers=tuple(
            _widths(folder, found, modules[layer], head_dim, text.hidden_size)
            for found, layer in zip(names, layers, strict=True)
        ),
        names=names,
        ends=_ends(folder, keys, model),
    )


def build(folder: ModelFolder) -> tuple[Any, Any]:
    """(configuration, model without memory) of a folder.

    Raises:
        UnsupportedModelError: llama.cpp cannot run it.
        CheckpointError: no model can be built of config.json.
    """
    quiet_width_warnings()
    stored = model_class(folder)
    try:
        config = stored.config_class.from_pretrained(folder.path, local_files_only=True)
        if reasons := refusals(config):
            raise UnsupportedModelError(
                f"llama.cpp cannot run {folder.path}: {'; '.join(reasons)}."
            )
        with torch.device("meta"):
            return config, stored._from_config(config)
    except HippError:
        raise
    except Exception as error:  # transformers and its models raise many kinds
        raise damaged(folder.path, error) from error


def _ends(folder: ModelFolder, keys: Mapping[str, str], model: Any) -> dict[str, str]:
    """Name in llama.cpp -> name in the weights, for what stands before and behind the layers."""
    modules = {module: name for name, module in model.named_modules()}
    embedding = f"{modules[model.get_input_embeddings()]}.weight"
    head = f"{modules[model.get_output_embeddings()]}.weight"
    tied = model.config.tie_word_embeddings
    found = {
        # Of tied weights either may be stored; if both are, transformers uses both.
        "token_embd.weight": head if tied and embedding not in keys else embedding,
        "output_norm.weight": f"{modules[tower_root(model, 'language')]}.norm.weight",
    }
    if not tied or {head, embedding} <= keys.keys():
        found["output.weight"] = head
    if missing := sorted(name for name in found.values() if name not in keys):
        raise CheckpointError(f"{folder.path} is incomplete: no weights for {missing}.")
    return {name: keys[stored] for name, stored in found.items()}


def _dropped(folder: ModelFolder, config: Any) -> set[tuple[int, str]]:
    """(layer, kind) of the blocks that config.json or hipp_ext.json say were dropped."""
    found: set[tuple[int, str]] = set(configured_skips(config))
    if folder.manifest is not None:
        found |= {
            (g.layer, g.kind)
            for g in folder.manifest.groups
            if not g.width and g.tower == "language"
        }
    return found


def _layer_names(
    folder: ModelFolder, keys: Mapping[str, str], layer: str, dropped: set[str]
) -> dict[str, str]:
    """Name in llama.cpp -> name in the weights, for what a layer has."""
    found, missing = {}, []
    for kind, parts, norm in (
        ("attention", _ATTENTION, "input_layernorm"),
        ("ffn", _FFN, "post_attention_layernorm"),
    ):
        if kind in dropped:
            continue
        for name, ours in ({norm: _NORMS[norm]} | parts).items():
            for part in ("weight", "bias"):
                if (key := keys.get(f"{layer}.{name}.{part}")) is not None:
                    found[f"{ours}.{part}"] = key
                elif part == "weight":
                    missing.append(f"{layer}.{name}.weight")
    if missing:
        raise CheckpointError(f"{folder.path} is incomplete: no weights for {missing[:4]}.")
    return found


def _widths(
    folder: ModelFolder, names: Mapping[str, str], layer: str, head_dim: int, hidden: int
) -> Layer:
    """The widths of a layer by its weights, which must fit each other."""
    shapes = {name: folder.shapes[key] for name, key in names.items()}
    rows = {name: shapes.get(f"{name}.weight", (0,))[0] for name in ("attn_q", "attn_k", "ffn_up")}
    query, key, channels = rows.values()
    fits = {
        "attn_norm": (hidden,),
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_norm": (hidden,),
        "ffn_gate": (channels, hidden),
        "ffn_up": (channels, hidden),
        "ffn_down": (hidden, channels),
    }
    for name, shape in shapes.items():
        part, _, kind = name.partition(".")
        expected = fits[part] if kind == "weight" else fits[part][:1]
        if shape != expected:
            raise damaged(
                folder.path, f"{names[name]} has the shape {shape}, and {expected} is needed."
            )
    if query % head_dim or key % head_dim or (key and query % key) or (query and not key):
        raise damaged(
            folder.path,
            f"{layer} has {query} rows of queries and {key} of keys, with heads of {head_dim}.",
        )
    return Layer(heads=query // head_dim, kv_heads=key // head_dim, channels=channels)
