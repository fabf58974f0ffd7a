"""Large tensors in huge pages: with pages of 4 KiB, the first touch of new memory takes longer than what is written there."""

import ctypes
import functools
import mmap
import sys

import torch
from torch import Tensor

SMALLEST = 1 << 22  # bytes; two huge pages, below which nothing is gained


def empty(shape: torch.Size, like: Tensor) -> Tensor:
    """A contiguous tensor with the dtype and device of `like`, nothing written; on Linux its memory prefers huge pages.

    The advice is the kernel's to follow: where it does not, or elsewhere, this is `torch.empty`.
    """
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and size >= SMALLEST and (advise := _madvise()):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, tensor.data_ptr() + size - start, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise():  # noqa: ANN202 (a C function)
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function
