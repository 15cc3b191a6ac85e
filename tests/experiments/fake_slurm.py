"""SLURM's commands without SLURM, as far as submitit asks for them; jobs are processes of this machine.

Called by a command's name, it does what that command does; two more commands play what happens to jobs: ``preempt ID``
sends the signal that SLURM sends before it ends a job, ``fail ID`` loses the job's node. State lies in $FAKE_SLURM.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol", "preempt", "fail")


def install(folder: Path) -> None:
    """Puts the commands into ``folder/bin``; PATH and FAKE_SLURM are the caller's to set."""
    (folder / "bin").mkdir(parents=True)
    (folder / "state").mkdir()
    for name in COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n', encoding="utf-8")
        script.chmod(0o755)


def sbatch(script: str) -> None:
    job = str(1 + len(list(state().glob("*.sh"))))
    text = Path(script).read_text(encoding="utf-8")
    (state() / f"{job}.sh").write_text(text, encoding="utf-8")
    say(job, "PENDING")
    # Whoever called waits for the end of what it reads: a job keeps none of it open.
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, __file__, "run", job], start_new_session=True, **quiet)
    print(f"Submitted batch job {job}")


def run(job: str) -> None:
    """The life of a job: again and again as long as it is put back into the queue."""
    while status(job) in ("PENDING", "REQUEUED"):
        say(job, "RUNNING")
        ended = subprocess.run(["bash", str(state() / f"{job}.sh")], env={**os.environ, "SLURM_JOB_ID": job})
        if status(job) == "RUNNING":
            say(job, "COMPLETED" if ended.returncode == 0 else "FAILED")


def srun(*args: str) -> None:
    at = args.index("--output")
    job = os.environ["SLURM_JOB_ID"]
    output = Path(args[at + 1].replace("%j", job).replace("%t", "0"))
    os.environ |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    (state() / f"{job}.pid").write_text(str(os.getpid()), encoding="ascii")
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execv(args[at + 2], args[at + 2 :])


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for path in state().glob("*.state"):
        print(f"{path.stem}|{status(path.stem)}|here")


def scancel(job: str) -> None:
    say(job, "CANCELLED by 0")
    for pid in tree(job):
        kill(pid, signal.SIGTERM)


def scontrol(_requeue: str, job: str) -> None:
    say(job, "REQUEUED")


def preempt(job: str) -> None:
    for pid in tree(job):
        kill(pid, signal.SIGUSR2)


def fail(job: str) -> None:
    say(job, "NODE_FAIL")
    for pid in tree(job):
        kill(pid, signal.SIGKILL)


def state() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def say(job: str, text: str) -> None:
    (state() / f"{job}.state").write_text(text, encoding="ascii")


def status(job: str) -> str:
    return (state() / f"{job}.state").read_text(encoding="ascii")


def tree(job: str) -> list[int]:
    """The job's process and all below it, parents first."""
    found = [int((state() / f"{job}.pid").read_text(encoding="ascii"))]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        found += [int(child) for child in children.read_text(encoding="ascii").split()] if children.exists() else []
    return found


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def options(job: str) -> dict[str, str]:
    """What the job was submitted with."""
    text = (state() / f"{job}.sh").read_text(encoding="utf-8")
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.MULTILINE))


if __name__ == "__main__":
    named: dict[str, Callable[..., None]] = {name: globals()[name] for name in (*COMMANDS, "run")}
    named[sys.argv[1]](*sys.argv[2:])
