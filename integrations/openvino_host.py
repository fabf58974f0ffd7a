"""OpenVINO's packages, imported when they are needed."""

from importlib import import_module
from typing import Any

from hipp_ext.errors import MissingExtraError


def load(module: str = "openvino") -> Any:
    """A module of OpenVINO.

    Raises:
        MissingExtraError: its package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.partition(".")[0], "openvino") from error
