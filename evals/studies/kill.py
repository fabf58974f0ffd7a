"""`hipp bench kill`: commands killed by SIGKILL at random moments and given again, against undisturbed ones, byte for byte.

What is compared is everything that a command leaves in its working directory: a killed run may have left nothing behind.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hipp_ext import testbed
from hipp_ext.cli import main as hipp
from hipp_ext.errors import HippError
from hipp_ext.evals.studies.measuring import report
from hipp_ext.integrations.vlmevalkit import main as vlmeval

COMMANDS = ("prune", "fit", "recover", "finetune", "vlmeval", "pope")
PICTURES = 6  # of the POPE source
CPU = ["--device", "cpu"]


def run(
    kills: int = 50, seed: int = 0, commands: tuple[str, ...] = COMMANDS, save: bool = False
) -> dict[str, Any]:
    """Kill and resume every command `kills` times; returns and prints the result.

    Raises:
        HippError: no such command, or this system cannot fork.
    """
    if unknown := set(commands) - set(COMMANDS):
        raise HippError(
            f"{sorted(unknown)} cannot be killed here; the commands are {', '.join(COMMANDS)}."
        )
    if not hasattr(os, "fork"):
        raise HippError("`hipp bench kill` needs a system that can fork.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked processes cannot share a thread pool
    try:
        with tempfile.TemporaryDirectory() as folder:
            inputs, rng = _Inputs(Path(folder) / "inputs"), random.Random(seed)
            values = {
                name: _study(Path(folder), inputs.arguments(name), kills, rng) for name in commands
            }
    finally:
        torch.set_num_threads(threads)
    return report(
        "kill", f"hipp bench kill --kills {kills} --seed {seed}", {"kills": kills, **values}, save
    )


class _Inputs:
    """What the commands read, each part made when it is first asked for; and the commands, whose output goes where they run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir()
        self.dense = str(testbed.WEIGHTS)
        self.robust = ["--epsilon", "0.1", "--steps", "2", "--batch-size", "256", *CPU]
        self.calibration = ["--calibration-rows", "8", "--cache", str(folder / "cache"), *CPU]
        testbed.load()  # imports what the commands would each import, which is not what is to be killed

    def arguments(self, name: str) -> list[str]:
        """The command line of one of COMMANDS."""
        return (
            ["hipp", *getattr(self, f"_{name}")()]
            if name != "vlmeval"
            else ["vlmeval", *self._vlmeval()]
        )

    def _prune(self) -> list[str]:
        plan = str(self.folder / "plan.json")
        _run(
            ["hipp", "plan", self.dense, "--pruning-ratio", "0.3", "-o", plan, *self.calibration],
            self.folder,
        )
        return ["prune", self.dense, plan, "-o", "pruned", *CPU]

    def _fit(self) -> list[str]:
        return [
            "fit",
            self.dense,
            "-o",
            "planner",
            "--steps",
            "3",
            "--questions",
            "24",
            *self.calibration,
        ]

    def _recover(self) -> list[str]:
        questions = ["--pope", str(self._data / "search" / "POPE.tsv"), "--batch-size", "4"]
        return [
            "recover",
            self.dense,
            "-o",
            "recovered",
            "--steps",
            "6",
            "--save-every",
            "2",
            *questions,
            *CPU,
        ]

    def _finetune(self) -> list[str]:
        train = ["hipp", "robust", "train", "--network", "small-vgg", "--epochs", "1", *self.robust]
        _run([*train, "-o", "classifier"], self.folder)
        return [
            "robust",
            "finetune",
            str(self.folder / "classifier"),
            "--epochs",
            "3",
            *self.robust,
            "-o",
            "tuned",
        ]

    def _vlmeval(self) -> list[str]:
        return [
            "--model",
            self.dense,
            "--data",
            f"POPE={self._data / 'test' / 'POPE.tsv'}",
            "--limit",
            "24",
            *CPU,
        ]

    def _pope(self) -> list[str]:
        annotations, pictures = _coco(self.folder)
        source = [
            "--coco-annotations",
            str(annotations),
            "--images",
            str(pictures),
            "--n",
            str(PICTURES - 1),
        ]
        return ["data", "pope", *source, "-o", "POPE.tsv"]

    @functools.cached_property
    def _data(self) -> Path:
        testbed.export(self.folder / "data")
        return self.folder / "data"


def _coco(folder: Path) -> tuple[Path, Path]:
    """A COCO instance file and the folder of its pictures, small."""
    from PIL import Image

    pictures, file, rng = folder / "pictures", folder / "instances.json", random.Random(0)
    pictures.mkdir()
    images = [
        {"id": i, "file_name": f"{i:012d}.png", "width": 64, "height": 64} for i in range(PICTURES)
    ]
    for image in images:
        Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)).save(
            pictures / str(image["file_name"])
        )
    annotations = [
        {
            "id": 10 * i + j,
            "image_id": i,
            "category_id": category,
            "bbox": [0, 0, 9, 9],
            "area": 81,
            "iscrowd": 0,
        }
        for i in range(PICTURES)
        for j, category in enumerate(rng.sample(range(12), 5))
    ]
    categories = [{"id": i, "name": f"thing{i}"} for i in range(12)]
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return file, pictures


def _start(arguments: list[str], folder: Path) -> int:
    """Begin a command in `folder`, in a forked process, which has imported everything; its id."""
    if child := os.fork():
        return child
    code: Any = 1
    try:
        os.chdir(folder)
        output = (folder.parent / "output.txt").open("w")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            sys.argv = arguments
            code = (vlmeval if arguments[0] == "vlmeval" else hipp)() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(code)


def _run(arguments: list[str], folder: Path) -> None:
    """Run a command in `folder` to its end."""
    folder.mkdir(exist_ok=True)
    ended = os.waitpid(_start(arguments, folder), 0)[1]
    if ended:
        said = (folder.parent / "output.txt").read_text()[-500:]
        raise HippError(
            f"`{' '.join(arguments)}` ended with {os.waitstatus_to_exitcode(ended)}: {said}"
        )


def _study(folder: Path, arguments: list[str], kills: int, rng: random.Random) -> dict[str, Any]:
    whole, cut = folder / "whole", folder / "cut"
    start = time.perf_counter()
    _run(arguments, whole)
    seconds = time.perf_counter() - start
    expected = _files(whole)
    same, others, moments = 0, set(), []
    while len(moments) < kills:
        shutil.rmtree(cut, ignore_errors=True)
        cut.mkdir()
        child, moment = _start(arguments, cut), rng.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            continue  # a command that was faster than its killer says nothing
        moments.append(round(moment, 2))
        if (
            found := _files(cut)
        ) != expected:  # else it was killed on its way out, and would refuse what is there
            _run(arguments, cut)
            found = _files(cut)
        different = {
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        }
        same, others = same + (not different), others | different
    shutil.rmtree(whole)
    return {
        "command": " ".join(a for a in arguments if "/" not in a),
        "same_bytes": same,
        "files": len(expected),
        "differing": sorted(others)[:9],
        "seconds_undisturbed": round(seconds, 2),
        "moments": moments,
    }


def _files(folder: Path) -> dict[str, bytes | None]:
    """Path below `folder` -> contents of a file, None for a folder; without what tells how long it took, and where."""
    return {
        str(p.relative_to(folder)): None if p.is_dir() else _contents(p)
        for p in sorted(folder.rglob("*"))
    }


def _contents(file: Path) -> bytes:
    if file.name != "results.json":
        return file.read_bytes()
    results = json.loads(file.read_text())
    return json.dumps(
        {k: v for k, v in results.items() if k not in ("seconds", "predictions", "command")}
    ).encode()
