"""SLURM's commands on one machine, for submitit: sbatch, srun, squeue, scontrol, scancel.

`install(folder)` makes them. Jobs are processes; their states are files in folder/jobs.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")


def install(folder: Path) -> Path:
    """The folder for PATH."""
    (folder / "jobs").mkdir(parents=True)
    for name in COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} {folder} "$@"\n')
        script.chmod(0o755)
    return folder


def sbatch(folder: Path, file: str) -> None:
    """Start a job, or each of an array; answer with its number."""
    text = Path(file).read_text()
    number = 11 + len(list(folder.glob("*.sh")))
    (folder / f"{number}.sh").write_text(text)
    if "--partition=closed" in text:
        sys.exit("sbatch: error: Batch job submission failed: Invalid partition specified")
    array = re.search(r"--array=0-(\d+)%", text)
    for job in [f"{number}_{i}" for i in range(int(array[1]) + 1)] if array else [str(number)]:
        (folder / "jobs" / job).write_text("RUNNING")
        words = [sys.executable, __file__, "job", str(folder), job, file]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.Popen(words, start_new_session=True, **nowhere)
    print(f"Submitted batch job {number}")


def job(folder: Path, name: str, file: str) -> None:
    """The life of a job, in a process of its own."""
    number, _, index = name.partition("_")
    environment = os.environ | {"SLURM_JOB_ID": number, "SLURM_NTASKS": "1"}
    if index:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
    again = True
    while again:
        process = subprocess.Popen(["bash", file], env=environment, start_new_session=True)
        (folder / "jobs" / f"{name}.pid").write_text(str(process.pid))
        code = process.wait()
        again = (folder / "jobs" / f"{name}.requeue").exists()
        (folder / "jobs" / f"{name}.requeue").unlink(missing_ok=True)
    (folder / "jobs" / name).write_text("FAILED" if code else "COMPLETED")


def srun(folder: Path, *words: str) -> None:
    """Run a command with its output in files."""
    given = dict(zip(words[1:5:2], words[2:5:2], strict=True))
    name = os.environ["SLURM_JOB_ID"]
    array = os.environ.get("SLURM_ARRAY_TASK_ID")
    for number, flag in ((1, "--output"), (2, "--error")):
        path = given[flag].replace("%A", name).replace("%a", array or "").replace("%j", name)
        file = os.open(path.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.execvp(words[5], words[5:])


def squeue(folder: Path, *words: str) -> None:
    """The jobs that have not ended."""
    assert words[:-1] == ("--noheader", "--array", "--format=%i")
    numbers = words[-1].removeprefix("--jobs=").split(",")
    for file in sorted((folder / "jobs").iterdir()):
        if file.name.partition("_")[0] in numbers and not file.suffix:
            if file.read_text() == "RUNNING":
                print(file.name)


def scontrol(folder: Path, verb: str, name: str) -> None:
    """requeue JOB"""
    assert verb == "requeue" and (folder / "jobs" / name).exists(), (verb, name)
    (folder / "jobs" / f"{name}.requeue").touch()


def scancel(folder: Path, *numbers: str) -> None:
    """End jobs."""
    for file in (folder / "jobs").glob("*.pid"):
        if file.stem.partition("_")[0] in numbers:
            os.killpg(int(file.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
