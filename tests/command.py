"""`hipp` called in this process: quicker than one of its own, and its errors arrive as they were
raised.
"""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from hipp_ext.cli import app


def hipp(*arguments: str | Path) -> str:
    """What the command prints; it must succeed."""
    return run(*arguments).output


def hipp_json(*arguments: str | Path) -> Any:
    """What the command prints on stdout with --json; it must be JSON, and nothing else."""
    return json.loads(run(*arguments, "--json").stdout)


def run(*arguments: str | Path) -> Result:
    """The result of the command; it must succeed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result
