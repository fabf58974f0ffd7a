"""Readers that do what a reader must not do: they show that the fuzzer sees it."""

import ctypes
import os
import pickle
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from fuzz.table import Reader

ACTS: dict[str, Callable[[Path], object]] = {
    "subprocess.Popen": lambda _: subprocess.run(["true"]),
    "os.system": lambda _: os.system("true"),
    "socket.getaddrinfo": lambda _: socket.getaddrinfo("example.org", 80),
    "builtins.input": lambda _: input(),
    "pickle.find_class": lambda _: pickle.loads(b"cos\nsystem\n."),
    "code of the folder runs": lambda folder: exec(compile("1", str(folder / "evil.py"), "exec")),
    "reads": lambda folder: (folder.parent / "secret.png").read_bytes(),
    "writes": lambda folder: (folder.parents[1] / "elsewhere").write_text("x"),
    "os.remove": lambda folder: (folder.parents[1] / "secret.png").unlink(),
    "ZeroDivisionError": lambda _: 1 / 0,
    "killed: SIGSEGV": lambda _: ctypes.string_at(0),
    "killed: more than": lambda _: [bytearray(b"x" * 10**8) for _ in range(30)],
    "killed: it waits": lambda folder: (folder / "fifo").read_bytes(),
    "killed: it takes": lambda _: max(iter(int, 1)),
}


def _probe(act: Callable[[Path], object]) -> Reader:
    def read(folder: Path) -> None:
        if folder.parent.name == "case":  # and not while the worker warms up
            act(folder)

    return Reader(make=lambda folder: (folder / "file").touch(), read=read)


PROBES = {name: _probe(act) for name, act in ACTS.items()}
