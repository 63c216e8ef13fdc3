"""Two machines: network namespaces joined by a pair of virtual interfaces, a launcher in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from tiny_runs import flags, records, run

ADDRESSES = ("10.77.0.1", "10.77.0.2")
MEETING = Path(__file__).parent / "cases" / "meeting.py"
SECONDS = 240


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Machines:
    """Two namespaces, each with the loopback and one interface towards the other."""

    def __init__(self) -> None:
        self.names = [f"fusedacl{os.getpid()}{letter}" for letter in "ab"]
        self.interfaces = [f"veth{os.getpid() % 100000}{letter}" for letter in "ab"]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.interfaces[0], "type", "veth", "peer", "name", self.interfaces[1])
        for name, interface, address in zip(self.names, self.interfaces, ADDRESSES, strict=True):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def start(self, machine: int, command: list[str], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[machine], *command],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "GLOO_SOCKET_IFNAME": self.interfaces[machine],
                # The namespaces share this machine's name, which is not an address in them.
                "TP_SOCKET_IFNAME": self.interfaces[machine],
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def machines() -> Iterator[Machines]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and iproute2's ip")
    try:
        made = Machines()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield made
    made.close()


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """The output of the processes, which must end in time."""
    try:
        return [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.communicate()


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny_options,
        "learning_rate": 1e-3, "dropout": 0.0, "max_steps": 4,
        "per_device_train_batch_size": 8, "negatives": "global", "logging_steps": 1,
        "max_angle": 180,
        "save_steps": 0, "device": "cpu",
    }  # fmt: skip


def test_two_machines_train_as_one(
    machines: Machines, options: dict[str, Any], tmp_path: Path
) -> None:
    """Under torchrun."""
    launcher = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += ["--master_addr", ADDRESSES[0], "--master_port", "29511", "--node_rank"]
    train = ["-m", "fusedacl.engine", "train", *flags(options)]
    processes = [
        machines.start(node, [sys.executable, "-m", *launcher, str(node), *train])
        for node in (0, 1)
    ]
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    run(options, per_device_train_batch_size=16, output_dir=str(tmp_path / "alone"))
    found, expected = (
        [line["loss"] for line in records(tmp_path / name, "train")] for name in ("run", "alone")
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_deepspeeds_launcher_lets_two_machines_meet(machines: Machines, tmp_path: Path) -> None:
    """DeepSpeed's launcher starts a process per machine, and both join one group."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    launcher = ["deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    launcher += ["--master_addr", ADDRESSES[0], "--master_port", "29512", "--node_rank"]
    processes = [
        machines.start(node, [sys.executable, "-m", *launcher, str(node), str(MEETING)])
        for node in (0, 1)
    ]
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("2 processes, sum 3" in words for words in outputs), "\n".join(outputs)


def test_what_goes_wrong_is_said_in_time(machines: Machines) -> None:
    """A process that never comes; an interface that is not there. The rest ends by itself."""
    environment = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29513", "MEETING_SECONDS": "4",
    }  # fmt: skip
    command = [sys.executable, str(MEETING)]
    processes = [
        machines.start(0, command, **environment),
        machines.start(0, command, **environment, GLOO_SOCKET_IFNAME="eth9"),
    ]
    alone, wrong = ended(processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert "OSError: process 0 of 2 on" in alone and "process(es) 1 did not connect" in alone, alone
    assert "ValueError: GLOO_SOCKET_IFNAME=eth9" in wrong and machines.interfaces[0] in wrong
