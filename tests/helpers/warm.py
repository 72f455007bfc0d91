"""Python processes that need not import PyTorch and transformers first, which takes 5 seconds.

This file runs as a program too: it imports those once and forks for each program of a test, which
then runs as `python` runs it, with a folder, an environment and streams of its own. kvbench is not
among what is imported before, so a program imports the kvbench that its PYTHONPATH says. Tests of
what is imported, or of variables that are read at import, need `subprocess`.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTED = ["torch._dynamo", "transformers.models.llama.modeling_llama", "transformers.generation"]
IMPORTED += ["transformers.conversion_mapping", "accelerate", "pandas", "matplotlib.pyplot"]


@cache
def server() -> "subprocess.Popen[str]":
    """The process that forks."""
    pipe = subprocess.PIPE
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, __file__]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    atexit.register(process.communicate)  # it ends with its input
    return process


def ask(**request: Any) -> Any:
    """The reply of the process that forks."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


class Program:
    """A started `python ARGUMENTS`, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.arguments, self.returncode = arguments, None
        self.streams = tempfile.TemporaryDirectory()
        self.pid = ask(
            arguments=arguments,
            folder=str(folder),
            environment=dict(os.environ if environment is None else environment),
            streams=self.streams.name,
        )

    def poll(self, options: int = os.WNOHANG) -> int | None:
        """The exit code, or None if it runs."""
        if self.returncode is None:
            self.returncode = ask(pid=self.pid, options=options)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> "subprocess.CompletedProcess[str]":
        """The exit code and all that was printed."""
        self.poll(0)
        out, errors = ((Path(self.streams.name) / each).read_text() for each in ("1", "2"))
        self.streams.cleanup()
        assert self.returncode is not None
        return subprocess.CompletedProcess(self.arguments, self.returncode, out, errors)


def python(
    *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """`python ARGUMENTS` in a folder; its environment is this process's if none is given."""
    return Program(*arguments, folder=folder, environment=environment).wait()


def serve() -> dict[str, Any]:
    """Fork for each request and say the child's pid, or its exit code; a request, in the child."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], request["options"])
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if not reply:
                return request
        print(json.dumps(reply), flush=True)
    sys.exit()


def become(arguments: list[str], folder: str, environment: dict[str, str], streams: str) -> None:
    """Run a program in this process, which ends with it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)  # the other one has read some requests, perhaps
    for number in (1, 2):
        os.dup2(os.open(f"{streams}/{number}", os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first, *sys.argv = arguments
    sys.path[0] = ""  # it was the folder of this file
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        sys.modules["__main__"] = ModuleType("__main__")
        exec(code, vars(sys.modules["__main__"]))
    else:
        sys.argv[:0] = [first]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        import_module(name)
    become(**serve())
