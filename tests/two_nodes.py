"""Two nodes on one machine: two network namespaces joined by a veth pair, each with a host name,
processes and mounts of its own. As root, or else inside a user namespace.

A node's processes end with it, and both nodes end with the process that made them, however that
ends: nothing is registered with the system that somebody would have to remove.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("node0", "node1")


class Node:
    """A namespace of each kind, held by its first process."""

    def __init__(self, name: str, enter_user: list[str]):
        self.name = name
        self._enter_user = enter_user
        # --kill-child and --pdeathsig: this process ends -> unshare -> the node's first process ->
        # (by the kernel, as that is process 1 of its namespace) every process of the node.
        self._unshare = subprocess.Popen(
            [*enter_user, "setpriv", "--pdeathsig", "KILL"]
            + ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
            + ["--mount-proc", "sh", "-c", "echo up; exec sleep infinity"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout is not None and self._unshare.stderr is not None
        if self._unshare.stdout.readline() != "up\n":
            self._unshare.wait()
            raise OSError(self._unshare.stderr.read().strip() or "unshare has ended")
        pid = self._unshare.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self.first_process = int(children[0])
        # a machine that loses its power leaves the network card of the other as it is
        self._network = os.open(f"/proc/{self.first_process}/ns/net", os.O_RDONLY)

    def enter(self, *kinds: str) -> list[str]:
        return [
            *self._enter_user,
            "nsenter",
            f"--target={self.first_process}",
            *(f"--{kind}" for kind in kinds),
        ]

    def call(self, *command: str) -> None:
        """OSError with what the command says where it fails. Process ids are the machine's."""
        done = subprocess.run(
            [*self.enter("net", "uts", "mount"), *command], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
        """A program of this node; what it prints goes to the file `log`."""
        with open(log, "w") as file:
            return subprocess.Popen(
                [*self.enter("net", "uts", "mount", "pid"), *command],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        """As a machine that loses power: every process of the node is killed at once."""
        self._unshare.kill()
        self._unshare.wait()
        for pipe in (self._unshare.stdout, self._unshare.stderr):
            if pipe is not None:
                pipe.close()

    def close(self) -> None:
        """The end of the node, and of its end of the cable."""
        self.end()
        os.close(self._network)


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[list[Node]]:
    """Nodes `node0` and `node1`, which know each other by name, and themselves as 127.0.1.1, as
    many systems are set up; the test is skipped, with the
    reason, on a machine that lets nobody make namespaces. folder: for their hosts file.
    """
    of_all = ["127.0.0.1 localhost", *map(" ".join, zip(ADDRESSES, NAMES, strict=True))]
    for name in NAMES:
        (folder / f"{name}.hosts").write_text("\n".join([f"127.0.1.1 {name}", *of_all]) + "\n")
    room = None
    nodes: list[Node] = []
    try:
        try:
            enter_user: list[str] = []
            if os.geteuid() != 0:  # both networks must belong to one user namespace
                room = subprocess.Popen(
                    ["unshare", "--user", "--map-root-user"]
                    + [
                        "setpriv",
                        "--pdeathsig",
                        "KILL",
                        "sh",
                        "-c",
                        "echo up; exec sleep infinity",
                    ],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                assert room.stdout is not None and room.stderr is not None
                if room.stdout.readline() != "up\n":
                    raise OSError(room.stderr.read().strip())
                enter_user = ["nsenter", f"--target={room.pid}", "--user", "--preserve-credentials"]
            for name in NAMES:
                nodes.append(Node(name, enter_user))
            peer = ["peer", "name", "eth0", "netns", str(nodes[1].first_process)]
            nodes[0].call("ip", "link", "add", "name", "eth0", "type", "veth", *peer)
        except OSError as error:  # no right to make them, no `ip`, no veth in the kernel
            pytest.skip(f"no namespaces can be made here: {error}")
        for node, address in zip(nodes, ADDRESSES, strict=True):
            node.call("hostname", node.name)
            hosts = str(folder / f"{node.name}.hosts")
            node.call("mount", "--bind", hosts, "/etc/hosts")
            node.call("ip", "address", "add", f"{address}/24", "dev", "eth0")
            node.call("ip", "link", "set", "lo", "up")
            node.call("ip", "link", "set", "eth0", "up")
        yield nodes
    finally:
        for node in nodes:
            node.close()
        if room is not None:
            room.kill()
            room.communicate()


def wait_all(programs: list[subprocess.Popen], seconds: float) -> list[int]:
    """Their exit statuses; TimeoutError names those that go on."""
    until = time.monotonic() + seconds
    for program in programs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(max(0.0, until - time.monotonic()))
    going_on = [index for index, program in enumerate(programs) if program.poll() is None]
    if going_on:
        raise TimeoutError(f"after {seconds:.0f} s the programs {going_on} have not ended")
    return [program.returncode for program in programs]
