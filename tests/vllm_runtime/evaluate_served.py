"""Scores of a folder and of the same model on a server: `python evaluate_served.py FOLDER URL TSV`.

Runs in the environment that has VLMEvalKit. Prints the name, the answers and the metrics of both.
"""

import json
import sys
import tempfile

from hipp_ext.evals.runs import read_runs
from hipp_ext.integrations.vlmevalkit import ServedVLM, evaluate


def main() -> None:
    folder, address, table = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        models = [folder, ServedVLM(address)]
        records = evaluate(models, f"POPE={table}", work_dir=work, device="cpu", progress=False)
        found = [
            (record.model, read_runs(record.predictions)["POPE"].answers, record.metrics)
            for record in records
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
