"""Starts `genrec train` as one or several processes on a CPU that plays a number of devices for each."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start(
    data: Path, out: Path, model: str, settings: Mapping[str, Any], *, mesh: str, processes: int, devices: int
) -> list[subprocess.Popen]:
    """The processes; the first one's lines can be read from its ``stdout``, what any complains of from ``stderr``.

    devices: of each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.cli", "train", f"--data={data}", f"--model={model}", f"--out={out}"]
    command += ["--quiet", f"--mesh={mesh}", *(f"--set={key}={value}" for key, value in settings.items())]
    forced = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [*command, *([f"--distributed=localhost:{port},{process}/{processes}"] if processes > 1 else [])],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": forced, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE if process == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
