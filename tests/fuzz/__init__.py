"""Fuzzing of every reader of files that come from users: `make fuzz`, or `PYTHONPATH=tests python
-m fuzz --help`.

A reader (readers.py) writes a valid folder with the product's own writers, and reads it. A case is
a copy of that folder with
damage in it: known hostile files first (corpus.py), then random mutations by seed (mutations.py). A
    worker process (worker.py)
reads it under audit; what is neither a valid result nor an error of hipp_ext/errors.py is a fault,
and its folder is kept.
"""
