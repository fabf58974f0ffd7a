"""Memory in huge pages is memory like any other, and where the kernel allows them it is made of them."""

import sys
from pathlib import Path

import pytest
import torch

from hipp_ext import memory

MADVISE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("shape", [(3, 5), (0,), (1031, 2053)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_like_any_other(shape, dtype):
    made = memory.empty(torch.Size(shape), like=torch.zeros(1, dtype=dtype))
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    made.fill_(2)
    assert float(made.sum()) == 2 * made.numel()


@pytest.mark.skipif(not MADVISE.exists() or "[never]" in MADVISE.read_text(), reason="the kernel gives no huge pages here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_large_tensors_lie_in_huge_pages():
    def huge() -> int:
        rows = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("AnonHugePages")]
        return int(rows[0].split()[1])

    before = huge()
    kept = memory.empty(torch.Size((4096, 4096)), like=torch.zeros(1)).fill_(1)
    assert huge() - before > 0.5 * kept.numel() * 4 / 1024
