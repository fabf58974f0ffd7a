"""Memory in huge pages is memory like any other; what it is worth: `hipp bench hosts`."""

import pytest
import torch

from hipp_ext import memory


@pytest.mark.parametrize("shape", [(3, 5), (0,), (1031, 2053)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_like_any_other(shape, dtype):
    made = memory.empty(torch.Size(shape), like=torch.zeros(1, dtype=dtype))
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    made.fill_(2)
    assert bool((made == 2).all())
