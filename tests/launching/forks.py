"""Commands as forks of a process that has imported everything, and compiles quickly.

The process answers each line on its standard input with one: [command, arguments, log] in JSON with
the number of the new process, and that number with its exit code (negative for a signal), or "-"
while it runs.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lorax.launching import state

DEVICES = 2  # of each process


class Server:
    """The process, and the workers that it has started, [(part, process)]."""

    def __init__(self):
        import quick

        flags = " ".join(f"--{name}={value}" for name, value in quick.OPTIONS.items())
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} {flags}"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            env=os.environ | flags | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.workers = []

    def ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def fork(self, command: str, arguments: list[str], log: Path):
        return Process(self, int(self.ask(json.dumps([command, arguments, str(log)]))))

    def start(self, part: Path, platform: str, slot: int):
        """In place of `lorax.launching.local.start`."""
        worker = self.fork("worker", [str(part.absolute())], part / state.LOG)
        self.workers.append((part, worker))
        return worker

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Process:
    """As much of `subprocess.Popen` as the engine uses."""

    def __init__(self, server: Server, pid: int):
        self.server, self.pid, self.code, self.stdin = server, pid, None, self

    def poll(self) -> int | None:
        if self.code is None:
            said = self.server.ask(str(self.pid))
            self.code = None if said == "-" else int(said)
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        return self.code

    def close(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 9)


def serve() -> None:
    from lorax import launch, rounds, run  # noqa: F401  all that takes long to import
    from lorax.launching import training, worker  # noqa: F401

    commands = {"run": run.main, "worker": worker.main, "launch": launch.main}
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            pid, status = os.waitpid(asked, os.WNOHANG)
            print(os.waitstatus_to_exitcode(status) if pid else "-", flush=True)
            continue
        command, arguments, log = asked
        pid = os.fork()
        if not pid:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = 1
            try:
                code = commands[command]([f"lorax.{command}", *arguments])
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
