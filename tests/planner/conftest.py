"""The tiny model and its signals."""

import pytest
from fitting import BATCHES
from models import build

from hipp_ext.planner.state import measure_signals


@pytest.fixture(scope="module")
def model():
    return build("llava")


@pytest.fixture(scope="module")
def signals(model):
    return measure_signals(model, BATCHES)
