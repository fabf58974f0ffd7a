"""OpenVINO: model folders for Intel's CPUs, GPUs and NPUs, as openvino_genai reads them.

    hipp export openvino ./pruned -o ./pruned-openvino

Each layer of a graph has the width that it has in the model, so pruned models need nothing special
where they run: `openvino_genai.LLMPipeline` (language models), `openvino_genai.VLMPipeline`
(LLaVA), and OpenVINO Model Server take the folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from hipp_ext.calibration import find_processor
from hipp_ext.errors import CheckpointError, HippError, OutputExistsError, UnsupportedModelError
from hipp_ext.files import new_folder, require_new
from hipp_ext.integrations.openvino_check import check_decoder, check_module
from hipp_ext.integrations.openvino_graphs import decoder_graph, embedding_graph, picture_graph
from hipp_ext.integrations.openvino_host import load
from hipp_ext.integrations.openvino_modules import Pictures
from hipp_ext.integrations.openvino_refusals import refusals
from hipp_ext.integrations.openvino_tokenizer import write_tokenizer
from hipp_ext.model_folder import damaged, model_class, read_folder
from hipp_ext.surgery.checkpoint import load_pruned, settings_as_they_are

__all__ = ["WeightType", "export_openvino", "refusals"]

WeightType = Literal["f32", "f16"]


def export_openvino(
    folder: str | Path, output: str | Path, *, type: WeightType = "f16", overwrite: bool = False
) -> Path:
    """Write the model in `folder` as OpenVINO graphs to the folder `output`, whole or not at all.

    A language model becomes openvino_model.xml; a LLaVA becomes openvino_language_model.xml,
    openvino_text_embeddings_model.xml and openvino_vision_embeddings_model.xml. Batch and length
    are dynamic, and the cache is state. The tokenizer and the configurations lie beside them.
    Graphs and tokenizer are compared with transformers before the folder appears.

    The model is loaded in float32, and its graphs, which share that memory, are compiled once:
    about twice its size in float32 is needed.

    Args:
        folder: from `save_pruned`, or any transformers folder of a model that `refusals` allows.
        output: a folder that does not exist or is empty.
        type: type of the weights in the files, "f32" or "f16". What they are computed with is
            decided where they run (INFERENCE_PRECISION_HINT, KV_CACHE_PRECISION).
        overwrite: replace what is at `output`.

    Returns:
        `output`.

    Raises:
        UnsupportedModelError: the model cannot be exported (see `refusals`), nor its tokenizer; or
            a graph computes something else than the model.
        CheckpointError: the folder is incomplete or damaged, or has no tokenizer.
        OutputExistsError: `output` exists, and `overwrite` is False; or it holds `folder`.
        WriteError: the disk is full, or `output` cannot be written.
        MissingExtraError: openvino is not installed.
    """
    if type not in get_args(WeightType):
        raise HippError(f"type {type!r}: expected {' or '.join(get_args(WeightType))}.")
    require_new(output, overwrite)
    if Path(folder).resolve().is_relative_to(Path(output).resolve()):
        raise OutputExistsError(f"{output} is, or holds, the model to export: choose another name.")
    openvino = load()
    if reasons := refusals(_read_config(folder)):
        raise UnsupportedModelError(
            f"{folder} cannot be exported to OpenVINO: {'; '.join(reasons)}."
        )
    model = load_pruned(folder, dtype=torch.float32)
    if (processor := find_processor(model)) is None:
        raise CheckpointError(f"{folder} holds no tokenizer. Save it there, and export again.")
    with new_folder(output, overwrite) as new:
        write_tokenizer(getattr(processor, "tokenizer", processor), new)
        for name, graph in _graphs(model):
            openvino.save_model(graph, new / f"{name}.xml", compress_to_fp16=type == "f16")
        _write_settings(model, processor, new)
    return Path(output)


def _read_config(folder: str | Path) -> Any:
    """The configuration, before memory is taken for the weights."""
    read = read_folder(folder)
    try:
        return model_class(read).config_class.from_pretrained(folder, local_files_only=True)
    except (TypeError, ValueError, KeyError) as error:
        raise damaged(read.path, error) from error


def _graphs(model: Any) -> Iterator[tuple[str, Any]]:
    """File name and graph of every part; each was compared with the model."""
    sees = getattr(model.config, "vision_config", None) is not None
    if sees:
        embedding = model.get_input_embeddings()
        graph = embedding_graph(embedding)
        check_module(graph, embedding, torch.tensor([[1, 0, 2]]), "embeddings")
        yield "openvino_text_embeddings_model", graph
        pictures = Pictures(model)
        graph = picture_graph(pictures)
        check_module(graph, pictures, torch.rand_like(pictures.example()) - 0.5, "vision tower")
        yield "openvino_vision_embeddings_model", graph
    graph = decoder_graph(model, embeds=sees)
    check_decoder(graph, model)
    yield "openvino_language_model" if sees else "openvino_model", graph


def _write_settings(model: Any, processor: Any, folder: Path) -> None:
    """What openvino_genai reads beside the graphs."""
    with settings_as_they_are(model):
        model.generation_config.save_pretrained(folder)
    model.config.to_json_file(folder / "config.json", use_diff=False)
    processor.save_pretrained(folder)
    if hasattr(processor, "image_processor"):
        # openvino_genai reads the settings of pictures from a file of their own.
        processor.image_processor.save_pretrained(folder)
