"""`python -m hipp_ext`: the command `hipp`."""

from hipp_ext.cli import main

main()
