"""`hipp` called in this process: quicker than one of its own, and its errors arrive as they were
raised.
"""

from pathlib import Path

from typer.testing import CliRunner

from hipp_ext.cli import app


def hipp(*arguments: str | Path) -> str:
    """What the command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
