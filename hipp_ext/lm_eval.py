"""`python -m hipp_ext.lm_eval`: lm-eval's command line, with the model `hipp` and our tasks known to it."""

from hipp_ext.integrations.lm_eval import main

if __name__ == "__main__":
    raise SystemExit(main())
