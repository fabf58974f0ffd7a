"""`python -m hipp_ext.vlmeval`: the command `vlmeval`, should another package take that name."""

from hipp_ext.integrations.vlmevalkit import main

if __name__ == "__main__":
    raise SystemExit(main())
