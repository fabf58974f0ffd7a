"""llama.cpp, and what else reads GGUF (Ollama, LM Studio): model folders as GGUF files.

    hipp export gguf ./pruned -o pruned.gguf --type q8_0

Stock llama.cpp runs the file. Where layers differ in width, or blocks were dropped, its
architecture is `deci`, which has numbers of heads and channels for every layer; otherwise it is the
model's own. Of a vision-language model the file holds the language tower; llama.cpp reads the rest
from a second file, the mmproj.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import CheckpointError, HippError, OutputExistsError, UnsupportedModelError
from hipp_ext.files import new_file, require_new_file
from hipp_ext.integrations.llama_cpp_decoder import Decoder, read_decoder
from hipp_ext.integrations.llama_cpp_file import (
    TYPES,
    Entry,
    WeightType,
    load_gguf,
    stored_type,
    write_gguf,
)
from hipp_ext.integrations.llama_cpp_ids import compare_ids, compare_words
from hipp_ext.integrations.llama_cpp_mmproj import write_mmproj
from hipp_ext.integrations.llama_cpp_refusals import refusals
from hipp_ext.integrations.llama_cpp_source import copied_tokenizer
from hipp_ext.integrations.llama_cpp_tensors import add_sizes, entries
from hipp_ext.integrations.llama_cpp_tokenizer import load_tokenizer, make_vocabulary
from hipp_ext.integrations.vllm import pruned_parts
from hipp_ext.model_folder import read_folder, read_json, stored_tensors
from hipp_ext.surgery.checkpoint import read_plan

__all__ = ["GGUFExport", "WeightType", "export_gguf", "refusals"]


@dataclass(frozen=True, kw_only=True)
class GGUFExport:
    """What `export_gguf` wrote.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of its graph: "deci" where layers differ.
        parameters: numbers in its tensors.
        bytes: its size.
        notes: what a user must know of it, one sentence or more each.
    """

    path: Path
    architecture: str
    parameters: int
    bytes: int
    notes: tuple[str, ...]


def export_gguf(
    folder: str | Path,
    output: str | Path,
    *,
    type: WeightType = "f16",
    tokenizer_from: str | Path | None = None,
    mmproj: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> GGUFExport:
    """Write the language tower of a model folder as one GGUF file, whole or not at all.

    Weights are read, converted and written tensor by tensor. The tokenizer is made from that of the
    folder; where xllamacpp is installed, llama.cpp's token ids are compared with transformers' on
    mixed text before anything is written.

    Args:
        folder: from `save_pruned`, or any transformers folder of a Llama, Mistral or Qwen2 language
            model, or of a vision-language model around one.
        output: the file to write.
        type: type of the matrices: "f32", "f16", "bf16" or "q8_0" (blocks of 32 columns; matrices
            whose rows are no multiple of 32 stay in f16). Vectors are f32.
        tokenizer_from: a GGUF file whose tokenizer is taken, such as one of the unpruned model.
            None: the tokenizer in the folder.
        mmproj: also write the vision tower and projector of LLaVA-1.5 to this file, in f16, or f32
            if `type` is. None: do not.
        overwrite: replace existing files.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: llama.cpp cannot run the model, or its tokenizer; see `refusals`.
        CheckpointError: the folder is incomplete or damaged, or has no tokenizer.
        DataError: `tokenizer_from` is no file, or a weight is too large for f16.
        OutputExistsError: a file exists, and `overwrite` is False.
        WriteError: the disk is full, or a file cannot be written.
        MissingExtraError: gguf is not installed.
    """
    if type not in TYPES:
        raise HippError(f"type {type!r}: expected {', '.join(TYPES)}.")
    outputs = _outputs(output, mmproj, overwrite)
    load_gguf()
    source = read_folder(folder)
    decoder = read_decoder(source)
    add_tokenizer, notes = _tokenizer(decoder, tokenizer_from)

    def fields(writer: Any) -> None:
        writer.add_name(source.path.resolve().name)
        add_sizes(writer, decoder)
        add_tokenizer(writer)

    # Both files appear at the end, and neither without the other.
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(new_file(path)) for path in outputs]
        if mmproj is not None:
            write_mmproj(source, files[1], "f32" if type == "f32" else "f16", progress=progress)
        made = entries(decoder, stack.enter_context(stored_tensors(source)))
        write_gguf(files[0], decoder.architecture, fields, made, type, progress=progress)
    return GGUFExport(
        path=Path(output),
        architecture=decoder.architecture,
        parameters=sum(entry.parameters for entry in made),
        bytes=Path(output).stat().st_size,
        notes=(*notes, *_on_types(made, type), *_on_pictures(decoder, mmproj)),
    )


def _outputs(output: str | Path, mmproj: str | Path | None, overwrite: bool) -> list[Path]:
    """The files to write, which may be written."""
    paths = [Path(path) for path in (output, mmproj) if path is not None]
    for path in paths:
        require_new_file(path, overwrite)
    if len({path.resolve() for path in paths}) < len(paths):
        raise OutputExistsError(f"{output} is to be the model and the mmproj: give two names.")
    return paths


def _tokenizer(
    decoder: Decoder, tokenizer_from: str | Path | None
) -> tuple[Callable[[Any], None], list[str]]:
    """(what adds the tokenizer to a writer, notes)."""
    rows = decoder.vocabulary
    own = load_tokenizer(decoder.folder.path)
    if tokenizer_from is not None:
        copied = copied_tokenizer(tokenizer_from, rows)
        try:
            return copied, [] if own is None else compare_ids(own, rows, copied)
        except UnsupportedModelError as error:
            return copied, [f"{tokenizer_from} has another tokenizer than the folder: {error}"]
    if own is None:
        raise CheckpointError(
            f"{decoder.folder.path} has no tokenizer (tokenizer.json or tokenizer.model). Save one "
            "into it, or take that of a GGUF file of the unpruned model: --tokenizer-from FILE."
        )
    vocabulary = make_vocabulary(own, rows, _ends(decoder))
    if vocabulary.kind.words:
        return vocabulary.add, compare_words(own, rows, vocabulary.add)
    return vocabulary.add, compare_ids(own, rows, vocabulary.add)


def _ends(decoder: Decoder) -> list[int]:
    """Ids that end a generation, by generation_config.json or else config.json."""
    file = decoder.folder.path / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    for value in (
        settings.get("eos_token_id") if isinstance(settings, dict) else None,
        getattr(decoder.config, "eos_token_id", None),
        getattr(decoder.whole, "eos_token_id", None),
    ):
        found = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
        if found:
            return found
    return []


def _on_types(made: list[Entry], wanted: WeightType) -> list[str]:
    kept = [
        e for e in made if len(e.shape) > 1 and stored_type(e, wanted) != wanted and not e.exact
    ]
    if not kept:
        return []
    share = sum(e.parameters for e in kept) / sum(e.parameters for e in made)
    return [
        f"{len(kept)} matrices ({share:.0%} of the parameters) stay in f16, because their rows are "
        "no multiple of 32 long; plans with round_to=32 (--round-to 32) have none."
    ]


def _on_pictures(decoder: Decoder, mmproj: str | Path | None) -> list[str]:
    vision = getattr(decoder.whole, "vision_config", None)
    if vision is None:
        return []
    notes = [] if mmproj is not None else _on_mmproj(decoder)
    if getattr(vision, "model_type", None) == "clip_vision_model":
        notes.append(
            "llama.cpp (seen in b11549, its issue 25814) puts CLIP's class token behind the "
            "patches and loses the first patch: answers about pictures differ a little from those "
            "of transformers, with every mmproj."
        )
    return notes


def _on_mmproj(decoder: Decoder) -> list[str]:
    plan = read_plan(decoder.folder.path)
    groups = plan.groups if plan is not None else ()
    if pruned := [g.name for g in groups if g.tower != "language" and g.keep < g.width]:
        return [
            f"The file holds the language tower. The {pruned_parts(pruned)} was pruned too: the "
            "mmproj of the unpruned model has all of it, and --mmproj FILE writes the pruned one."
        ]
    return [
        "The file holds the language tower. The mmproj of the unpruned model goes on working with "
        "it."
    ]
