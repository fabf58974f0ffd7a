"""`hipp bench kill`: commands killed by SIGKILL at random moments and given again, against undisturbed ones, byte for byte.

What is compared is everything that a command leaves in its working directory: a killed run may have left nothing behind.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hipp_ext.evals.bench.measuring import report

from hipp_ext.errors import HippError

COMMANDS = ("prune", "fit", "recover", "finetune", "vlmeval", "pope")
PICTURES = 6  # of the POPE source


def run(kills: int = 50, seed: int = 0, commands: tuple[str, ...] = COMMANDS, save: bool = False) -> dict[str, Any]:
    """Kill and resume every command `kills` times; returns and prints the result.

    Raises:
        HippError: no such command, or this system cannot fork.
    """
    if unknown := set(commands) - set(COMMANDS):
        raise HippError(f"{sorted(unknown)} cannot be killed here; the commands are {', '.join(COMMANDS)}.")
    if not hasattr(os, "fork"):
        raise HippError("`hipp bench kill` needs a system that can fork.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked processes cannot share a thread pool
    try:
        with tempfile.TemporaryDirectory() as folder:
            jobs = _jobs(Path(folder) / "inputs")
            rng = random.Random(seed)
            values = {name: _study(Path(folder), *jobs[name], kills, rng) for name in commands}
    finally:
        torch.set_num_threads(threads)
    return report("kill", f"hipp bench kill --kills {kills} --seed {seed}", {"kills": kills, **values}, save)


def _jobs(inputs: Path) -> dict[str, tuple[Callable[[], Any], list[str]]]:
    """Command -> (entry point, arguments), each short, on inputs made here; the output goes to the working directory."""
    from hipp_ext.integrations.vlmevalkit import main as vlmeval

    from hipp_ext import testbed
    from hipp_ext.cli import main as hipp

    testbed.load()  # imports what the commands would each import, which is not what is to be killed
    dense, data = str(testbed.WEIGHTS), inputs / "data"
    inputs.mkdir()
    testbed.export(data)
    _pope_source(inputs)
    cpu = ["--device", "cpu"]
    quick = ["--cache", str(inputs / "cache"), *cpu]
    plan, classifier = str(inputs / "plan.json"), str(inputs / "classifier")
    _call(hipp, ["hipp", "plan", dense, "--pruning-ratio", "0.3", "--calibration-rows", "8", "-o", plan, *quick])
    robust = ["--epsilon", "0.1", "--steps", "2", "--batch-size", "256", *cpu]
    _call(hipp, ["hipp", "robust", "train", "--network", "small-vgg", "--epochs", "1", *robust, "-o", classifier])
    tables = ["--pope", str(data / "search" / "POPE.tsv")]
    arguments = {
        "prune": [dense, plan, "-o", "pruned", *cpu],
        "fit": [dense, "-o", "planner", "--steps", "3", "--questions", "24", "--calibration-rows", "8", *quick],
        "recover": [dense, "-o", "recovered", "--steps", "6", "--save-every", "2", "--batch-size", "4", *tables, *cpu],
        "finetune": [classifier, "--epochs", "3", *robust, "-o", "tuned"],
        "pope": ["--coco-annotations", str(inputs / "instances.json"), "--images", str(inputs / "pictures"), "--n", "5",
                 "-o", "POPE.tsv"],
    }  # fmt: skip
    before = {"finetune": ["robust", "finetune"], "pope": ["data", "pope"]}
    jobs = {name: (hipp, ["hipp", *before.get(name, [name]), *rest]) for name, rest in arguments.items()}
    asked = ["vlmeval", "--model", dense, "--data", f"POPE={data / 'test' / 'POPE.tsv'}", "--limit", "24", *cpu]
    return jobs | {"vlmeval": (vlmeval, asked)}


def _pope_source(folder: Path) -> None:
    """A COCO instance file and its pictures, small."""
    from PIL import Image

    pictures = folder / "pictures"
    pictures.mkdir()
    rng = random.Random(0)
    names = [f"thing{i}" for i in range(12)]
    images = [{"id": i, "file_name": f"{i:012d}.png", "width": 64, "height": 64} for i in range(PICTURES)]
    for image in images:
        Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)).save(pictures / image["file_name"])
    annotations = [
        {"id": 10 * i + j, "image_id": i, "category_id": category, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
        for i in range(PICTURES)
        for j, category in enumerate(rng.sample(range(12), 5))
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    source = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(source))


def _call(main: Callable[[], Any], arguments: list[str]) -> None:
    """Run a command in a process of its own and wait for it."""
    ended = os.waitpid(_start(main, arguments, Path.cwd()), 0)[1]
    if ended:
        raise HippError(f"`{' '.join(arguments)}` ended with {os.waitstatus_to_exitcode(ended)}.")


def _start(main: Callable[[], Any], arguments: list[str], folder: Path) -> int:
    """Begin a command in `folder`, in a forked process, which has imported everything; its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.chdir(folder)
        output = (folder.parent / "output.txt").open("w")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            sys.argv = arguments
            code = main() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(code)


def _study(folder: Path, main: Callable[[], Any], arguments: list[str], kills: int, rng: random.Random) -> dict[str, Any]:
    whole, cut = folder / "whole", folder / "cut"
    start = time.perf_counter()
    _run(main, arguments, whole)
    seconds = time.perf_counter() - start
    expected = _files(whole)
    same, others, moments = 0, set(), []
    while len(moments) < kills:
        shutil.rmtree(cut, ignore_errors=True)
        cut.mkdir()
        child, moment = _start(main, arguments, cut), rng.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            continue  # a command that was faster than its killer says nothing
        moments.append(round(moment, 2))
        _run(main, arguments, cut)
        found = _files(cut)
        different = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
        same, others = same + (not different), others | different
    shutil.rmtree(whole)
    return {
        "command": " ".join(a for a in arguments if str(folder) not in a), "same_bytes": same, "files": len(expected),
        "differing": sorted(others)[:9], "seconds_undisturbed": round(seconds, 2), "moments": moments,
    }  # fmt: skip


def _run(main: Callable[[], Any], arguments: list[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    ended = os.waitpid(_start(main, arguments, folder), 0)[1]
    if ended:
        said = (folder.parent / "output.txt").read_text()[-500:]
        raise HippError(f"`{' '.join(arguments)}` ended with {os.waitstatus_to_exitcode(ended)}: {said}")


def _files(folder: Path) -> dict[str, bytes | None]:
    """Path below `folder` -> contents of a file, None for a folder; without what tells how long it took, and where."""
    return {str(p.relative_to(folder)): None if p.is_dir() else _contents(p) for p in sorted(folder.rglob("*"))}


def _contents(file: Path) -> bytes:
    if file.name != "results.json":
        return file.read_bytes()
    results = json.loads(file.read_text())
    return json.dumps({k: v for k, v in results.items() if k not in ("seconds", "predictions", "command")}).encode()
