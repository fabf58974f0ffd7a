"""The configuration that all layers share, seen by a block that has other sizes."""

from typing import Any


class SizedConfig:
    """A configuration in which some sizes are others than in the one it is a view of."""

    def __init__(self, shared: Any, **sizes: Any):
        self.__dict__.update(_shared=shared, **sizes)

    def __getattr__(self, name: str) -> Any:
        if name == "_shared" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._shared, name, value)
