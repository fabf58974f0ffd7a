"""Slow links between two processes on one machine: network namespaces, shaped by tc.

The links are virtual cables to a bridge, shaped by a token bucket in both directions, without delay
or loss. They need root and iproute2. The namespaces' names contain this process's id, and no others
are touched.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ADDRESS = "10.77.0.{}"  # inside the namespaces


def missing() -> str | None:
    """Why links cannot be emulated here; None: they can."""
    if os.name != "posix" or not shutil.which("ip") or not shutil.which("tc"):
        return "emulated links need Linux with iproute2 (the commands ip and tc)."
    if os.geteuid() != 0:
        return "emulated links need root, because they use network namespaces."
    probe = f"hipp{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"this system does not permit network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return None


@contextlib.contextmanager
def network(workers: int, rate: int) -> Iterator[list[str]]:
    """Yield names of namespaces, each linked at `rate` Mbit/s to a bridge in one more namespace."""
    with contextlib.ExitStack() as stack:

        def namespace(name: str) -> str:
            full = f"hipp{os.getpid()}n{name}"
            _ip(f"netns add {full}")
            stack.callback(subprocess.run, ["ip", "netns", "del", full], check=False)
            return full

        hub = namespace("hub")
        _ip(f"-n {hub} link add br0 type bridge")
        _ip(f"-n {hub} link set br0 up")
        spaces = [namespace(str(i)) for i in range(workers)]
        for i, own in enumerate(spaces):
            _ip(f"-n {own} link set lo up")
            _ip(f"-n {own} link add e0 type veth peer name p{i} netns {hub}")
            _ip(f"-n {own} addr add {ADDRESS.format(i + 1)}/24 dev e0")
            _ip(f"-n {own} link set e0 up")
            _ip(f"-n {hub} link set p{i} master br0 up")
            for space, device in ((own, "e0"), (hub, f"p{i}")):
                shape = f"tbf rate {rate}mbit burst 32kb latency 100ms"
                _ip(f"netns exec {space} tc qdisc add dev {device} root {shape}")
        yield spaces


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


def run_workers(
    module: str, arguments: Sequence[str], spaces: Sequence[str | None], seconds: float
) -> str:
    """What rank 0 of a module's worker processes printed; each runs in a namespace.

    Args:
        module: module that is run with `-m`; it joins the others by the variables of torchrun.
        arguments: its command line.
        spaces: namespace of each process; None: that of this process, and all others as well.
        seconds: time within which they have to end.

    Raises:
        RuntimeError: one of them failed.
    """
    processes, port = [], str(_free_port())
    for rank, space in enumerate(spaces):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "e0" if space else "lo",
            "MASTER_ADDR": ADDRESS.format(1) if space else "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": str(rank),
            "WORLD_SIZE": str(len(spaces)),
        }
        command = ["ip", "netns", "exec", space] if space else []
        command += [sys.executable, "-W", "ignore", "-m", module, *arguments]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    try:
        outputs = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    if any(p.returncode for p in processes):
        raise RuntimeError(f"{arguments}: workers ended with {[p.returncode for p in processes]}.")
    return outputs[0]


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return bound.getsockname()[1]


def bytes_out() -> int:
    """Bytes that this process's end of the link has sent, with all headers."""
    return int(Path("/sys/class/net/e0/statistics/tx_bytes").read_text())
