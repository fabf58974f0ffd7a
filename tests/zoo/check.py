"""`python tests/zoo/check.py [FAMILY...]`: every check on every family, as a table.

Results go into a JSON file as they come; families that it has are left out, so a run can be
resumed.
"""

import argparse
import collections
import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

import zoo
from hipp_ext.errors import HippError
from hipp_ext.files import write_atomic
from zoo.checks import CHECKS, Case, NotApplicable, Wrong

TOWERS = ("vision", "projector")  # checks that stand apart
SECONDS = 60  # a check that takes longer is a crash


def run(name: str, check: str, case: Case) -> tuple[str, str]:
    """(status, message): "ok", "refused", "n/a", "WRONG" or "crash"."""
    signal.alarm(SECONDS)
    try:
        CHECKS[check](case)
        return "ok", ""
    except HippError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except NotApplicable as error:
        return "n/a", str(error)
    except Wrong as error:
        return "WRONG", str(error)
    except Exception as error:
        frames = [
            f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno}"
            for f in traceback.extract_tb(error.__traceback__)[-4:]
        ]
        return "crash", f"{type(error).__name__}: {error} [{' < '.join(reversed(frames))}]"
    finally:
        signal.alarm(0)


def checked(name: str, checks: list[str]) -> dict[str, Any]:
    """Check -> [status, message]; where no groups are found the others are not tried."""
    case, results = Case(family=zoo.FAMILIES[name]), {}
    for check in checks:
        results[check] = run(name, check, case)
        if check == "groups" and results[check][0] != "ok":
            for other in TOWERS:
                if other in checks:
                    results[other] = run(name, other, case)
            break
    return results


def report(results: dict[str, Any], checks: list[str]) -> str:
    """A table, what is not ok, and a summary."""
    short = {"ok": ".", "refused": "r", "n/a": "-", "WRONG": "**W**", "crash": "**C**"}
    lines = [f"| family | {' | '.join(checks)} |", "|---" * (len(checks) + 1) + "|"]
    messages, counts = [], collections.Counter()
    for name, own in results.items():
        cells = [short[own[c][0]] if c in own else " " for c in checks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        said: dict[tuple[str, str], list[str]] = {}
        for check, (status, message) in own.items():
            if status not in ("ok", "n/a"):
                said.setdefault((status, message[:400]), []).append(check)
        messages += [f"- {name} {', '.join(c)}: {s}: {m}" for (s, m), c in said.items()]
        statuses = {s for c, (s, _) in own.items() if c not in TOWERS}
        worst = next(s for s in ("WRONG", "crash", "refused", "ok", "n/a") if s in statuses)
        first = (
            "refused when groups are sought" if own.get("groups", [""])[0] == "refused" else worst
        )
        counts[first] += 1
    total = ", ".join(f"{n} {s}" for s, n in counts.most_common())
    return "\n".join(
        [
            f"{len(results)} families (vision tower and projector apart): {total}",
            "",
            ". ok, r refused, - not applicable, W wrong, C crash",
            "",
            *lines,
            "",
            *messages,
            "",
        ]
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="families to check (default: all)")
    parser.add_argument("--out", type=Path, default=Path("outputs/zoo.json"), help="results")
    parser.add_argument("--table", type=Path, help="write the table there instead of printing it")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--again", action="store_true", help="also families that have results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.families or zoo.FAMILIES:
        if name in results and not options.again:
            continue
        begin = time.monotonic()
        results[name] = checked(name, options.checks)
        marks = " ".join(
            f"{c}:{s}" for c, (s, _) in results[name].items() if s not in ("ok", "n/a")
        )
        print(
            f"{name} {time.monotonic() - begin:.1f} s {marks or 'ok'}", file=sys.stderr, flush=True
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, json.dumps(results, indent=1))
    table = report({n: results[n] for n in zoo.FAMILIES if n in results}, options.checks)
    options.table.write_text(table) if options.table else print(table)


if __name__ == "__main__":
    main()
