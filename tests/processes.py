"""Starts a script in several processes, as torchrun would, without torchrun's own process and its seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds after which a test gives up. Nothing is asserted of times.
GIVEN_UP = 900


@dataclass
class Ended:
    """How a process ended."""

    status: int
    output: str


def start(
    command: Sequence[str], size: int, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> list[subprocess.Popen[str]]:
    """Start ``command`` (without Python) in ``size`` processes of one thread, in a working directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "PYTHONPATH": path, "COLUMNS": "200",
              **(env or {})}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        for rank in range(size)
    ]


def wait(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for all of them; none outlives this."""
    try:
        outputs = [one.communicate(timeout=GIVEN_UP)[0] for one in processes]
    finally:
        for one in processes:
            one.kill()
    return [Ended(one.returncode, output) for one, output in zip(processes, outputs, strict=True)]


def run(
    command: Sequence[str], size: int, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> list[Ended]:
    """Start ``command`` in ``size`` processes, and wait for all of them."""
    return wait(start(command, size, env, folder))
