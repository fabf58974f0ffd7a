"""One GGUF file, written tensor by tensor, so that never more than one of them is in memory."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from hipp_ext.errors import DataError, MissingExtraError
from hipp_ext.progress import progress_bar

WeightType = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: tuple[WeightType, ...] = ("f32", "f16", "bf16", "q8_0")
_NUMBERS_AT_ONCE = 1 << 22
BLOCK = 32  # columns that share a scale in q8_0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: its name in GGUF.
        shape: its shape, rows first.
        read: returns it, of any floating-point type.
        exact: whether it stays in f32; vectors always do.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    exact: bool = False

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def load_gguf() -> Any:
    """The package gguf.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "gguf" if error.name == "gguf" else str(error.name), "gguf"
        ) from error
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    return gguf


def stored_type(entry: Entry, wanted: WeightType) -> WeightType:
    """The type that `entry` gets in a file of the type `wanted`."""
    if entry.exact or len(entry.shape) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and entry.shape[-1] % BLOCK else wanted


def write_gguf(
    file: BinaryIO,
    architecture: str,
    fields: Callable[[Any], None],
    entries: Sequence[Entry],
    wanted: WeightType,
    *,
    progress: bool = False,
) -> None:
    """Write a GGUF file, tensor by tensor.

    Args:
        file: open for writing, and empty.
        architecture: what the file calls the kind of its model.
        fields: adds the metadata to a gguf.GGUFWriter.
        entries: the tensors, in the order of the file.
        wanted: type of the weights.
        progress: whether a progress bar is shown.

    Raises:
        DataError: a value is too large for f16.
    """
    gguf = load_gguf()
    kinds = {name: gguf.GGMLQuantizationType[name.upper()] for name in TYPES}
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_file_type(_file_types(gguf)[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    fields(writer)
    for entry in entries:
        kind = kinds[stored_type(entry, wanted)]
        size = _bytes(gguf, entry.shape, kind)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
    # The writer would open a path itself, and until it is whole this file has none.
    writer.fout, writer.state = [file], type(writer.state).EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Not by write_tensor_data: numpy's tofile reports a full disk without its error number.
    _pad(file, writer.data_alignment)
    with progress_bar(progress, "tensors", len(entries)) as advance:
        for done, entry in enumerate(entries, 1):
            kind = stored_type(entry, wanted)
            for part in _packed(gguf, entry, kinds[kind], kind):
                file.write(part)
            _pad(file, writer.data_alignment)
            advance(done, "")


def _packed(gguf: Any, entry: Entry, kind: Any, name: WeightType) -> Iterator[Any]:
    """The bytes of a tensor, some rows at a time: packing takes several times their memory."""
    tensor = entry.read()
    assert tensor.shape == entry.shape, (entry.name, tensor.shape, entry.shape)
    for rows in tensor.split(max(1, _NUMBERS_AT_ONCE // math.prod(entry.shape[1:]))):
        rows = rows.float().contiguous()
        largest = float(rows.abs().max())
        if name == "f16" and not largest <= torch.finfo(torch.float16).max:
            raise DataError(
                f"{entry.name} has a value of {largest:.4g}, and f16 ends at 65504. Choose bf16 or "
                "f32."
            )
        yield gguf.quants.quantize(rows.numpy(), kind).reshape(-1).view("uint8").data


def _bytes(gguf: Any, shape: tuple[int, ...], kind: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return torch.Size(shape).numel() // block * size


def _file_types(gguf: Any) -> Mapping[str, int]:
    types = gguf.LlamaFileType
    return {
        "f32": types.ALL_F32,
        "f16": types.MOSTLY_F16,
        "bf16": types.MOSTLY_BF16,
        "q8_0": types.MOSTLY_Q8_0,
    }


def _pad(file: Any, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
