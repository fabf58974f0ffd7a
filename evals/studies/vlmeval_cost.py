"""`hipp bench vlmeval`: what importing our VLMEvalKit integration adds to VLMEvalKit's own import, and 200 POPE questions.

Every import has a process of its own, the two sides taking turns; processor time is given beside wall-clock time, since imports
wait for the disk and for whatever else runs.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hipp_ext import testbed
from hipp_ext.evals.studies.measuring import mean_and_se, report

QUESTIONS = 200
_OURS = "import hipp_ext.integrations.vlmevalkit as v; v.register()"
_TIMED = """
import time
wall, own = time.perf_counter(), time.process_time()
{imports}
print(time.perf_counter() - wall, time.process_time() - own)
"""
SIDES = {"vlmeval": "import vlmeval, vlmeval.config, vlmeval.dataset, vlmeval.vlm", "ours": _OURS}


def seconds(side: str, home: Path) -> tuple[float, float]:
    """Wall-clock and processor time [s] of the imports of one side, in a fresh process."""
    code = _TIMED.format(imports=SIDES[side])
    environment = os.environ | {"LMUData": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-2000:]}")
    wall, own = done.stdout.splitlines()[-1].split()
    return float(wall), float(own)


def run(repeats: int = 5, save: bool = False) -> dict[str, Any]:
    """Measure both; returns and prints the result."""
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        seconds("vlmeval", home)  # reads the files into the system's cache; does not count
        for _ in range(repeats):
            for side in SIDES:
                times[side].append(seconds(side, home))
        added = [[b[i] - a[i] for a, b in zip(*times.values(), strict=True)] for i in (0, 1)]
        values = {
            "import": {
                side: {"wall": [t[0] for t in own], "processor": [t[1] for t in own]}
                for side, own in times.items()
            },
            "added by ours [s]": {
                "wall": mean_and_se(added[0]),
                "processor": mean_and_se(added[1]),
            },
            f"{QUESTIONS} POPE questions [s]": _questions(home),
            "target": {"added by ours [s]": 1, f"{QUESTIONS} POPE questions [s]": 60},
        }
    return report("vlmeval_cost", f"hipp bench vlmeval --repeats {repeats}", values, save)


def _questions(folder: Path) -> float:
    """Seconds of `vlmeval` on the testbed after import: table, model, answers, scores."""
    from hipp_ext.integrations.vlmevalkit import evaluate, register

    register()
    testbed.export(folder / "data", splits=("test",))
    start = time.perf_counter()
    evaluate(
        testbed.WEIGHTS,
        "POPE",
        lmu_data=folder / "data/test",
        work_dir=folder / "out",
        limit=QUESTIONS,
        progress=False,
    )
    return time.perf_counter() - start
