"""Hook of mkdocs: shows mkdocstrings the packages where they are imported from.

Setuptools maps hipp_ext.evals and hipp_ext.integrations to folders beside hipp_ext; the docstrings
are read from files, without an import.
"""

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_links = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: Any) -> Any:
    """Read the sources through a folder of links."""
    root, package = Path(config.config_file_path).parent, Path(_links.name) / "hipp_ext"
    package.mkdir(exist_ok=True)
    for source in [*(root / "hipp_ext").iterdir(), root / "integrations", root / "evals"]:
        link = package / source.name
        if not link.exists():
            link.symlink_to(source)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_links.name]
    return config
