"""Takes a node from a Ray cluster in the middle of a real sweep and holds its table against that of local processes.

    python -m tests.soak.kill_node

Runs the quickstart study (18 trials) on the tiny synthetic world twice: with two local processes at a time, and on a
Ray cluster of three nodes of a CPU each, all on this machine, one of which is killed while all three train.
Prints what the second launcher says, how often each trial was started, and whether the tables agree in every column
that is neither a time nor the device, whose cores the local processes share.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from experiments.folder import read_record
from tests.soak.kill_sweep import compare, make_world, sweep, table

NODES = Path(__file__).parents[1] / "experiments" / "ray_nodes.py"


def training(out: Path) -> int:
    """Trials at work that have reported a step."""
    attempts = [path for path in out.glob("trials/*/attempt.json") if not (path.parent / "result.json").exists()]
    return sum((read_record(path) or {"progress": None})["progress"] is not None for path in attempts)


def on_ray(data: Path, out: Path) -> None:
    """Runs the sweep on three nodes, of which one is lost."""
    with subprocess.Popen([sys.executable, str(NODES), "3"], stdin=-1, stdout=-1, stderr=-3, text=True) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        command = [sys.executable, "-m", "experiments.cli", "sweep", "quickstart", "--data", str(data), "--quiet"]
        command += ["--out", str(out), "--executor", "ray", "--address", address]
        print(" ".join(command[2:]), flush=True)
        launcher = subprocess.Popen(command)

        def lose_a_node() -> None:
            while training(out) < 3 and launcher.poll() is None:
                time.sleep(0.1)
            print("killing a node", flush=True)
            cluster.stdin.write("remove\n")
            cluster.stdin.flush()

        threading.Thread(target=lose_a_node, daemon=True).start()
        launcher.wait()


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        data, local, ray = (Path(scratch) / name for name in ("world", "local", "ray"))
        make_world(data)
        sweep(data, local).wait()
        on_ray(data, ray)
        starts = json.loads((ray / "launch.json").read_text(encoding="utf-8"))["attempts"]
        print("started more than once:", {trial: count for trial, count in starts.items() if count > 1} or "none")
        before, after = table(local), table(ray)
    for row in (*before.values(), *after.values()):
        del row["device"]
    return compare(before, after)


if __name__ == "__main__":
    sys.exit(main())
