"""These tests run in an environment with vLLM: `make test-vllm`. Elsewhere they are skipped."""

import os
import warnings
from importlib.util import find_spec

import pytest

# One process, on the CPU, and nothing leaves the machine. vLLM reads these when it is imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def pytest_collection_modifyitems(items):
    if find_spec("vllm") is None:
        for item in items:
            if item.path.parent.name == "vllm_runtime":
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _processors_are_written_by_the_tests():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no processor was given")
        yield
