"""Hooks of mkdocs: where docstrings are read from, and links to files that are not pages.

Setuptools maps hipp_ext.evals and hipp_ext.integrations to folders beside hipp_ext; mkdocstrings
reads files, without an import, and is shown the packages where they are imported from.
"""

import re
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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to other files of the repository become their names."""
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2`)", markdown)
