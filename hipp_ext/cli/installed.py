"""Which of the library's hosts are installed, by what the package says of itself."""

from collections.abc import Iterator
from importlib import metadata
from typing import Any

PACKAGE = "hipp-ext"
_CORE = ("torch", "transformers")  # of the packages without an extra, those that results depend on
_NOT_OF_USERS = ("all", "dev", "studies")


def installed() -> dict[str, str]:
    """Name -> version of hipp-ext, torch, transformers and what the extras consist of."""
    names = [*_CORE, *(r.name for needed in _extras().values() for r in needed)]
    versions = {name: _version(name) for name in dict.fromkeys((PACKAGE, *names))}
    return {name: version for name, version in versions.items() if version}


def missing_extras() -> dict[str, str]:
    """Extra -> the line that installs it, where a package of it is missing, or has a version that
    hipp-ext does not know.
    """
    return {
        extra: f'pip install "{PACKAGE}[{extra}]"'
        for extra, needed in _extras().items()
        if any(not (v := _version(r.name)) or v not in r.specifier for r in needed)
    }


def _extras() -> dict[str, list[Any]]:
    """Extra -> its requirements."""
    names = metadata.metadata(PACKAGE).get_all("Provides-Extra") or ()
    wanted = [name for name in names if name not in _NOT_OF_USERS]
    return {extra: list(_requirements(extra)) for extra in wanted}


def _requirements(extra: str) -> Iterator[Any]:
    from packaging.requirements import Requirement

    for line in metadata.requires(PACKAGE) or ():
        requirement = Requirement(line)
        if requirement.marker and requirement.marker.evaluate({"extra": extra}):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
