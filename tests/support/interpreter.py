"""New Python processes that need not wait for PEFT and transformers, whose import takes longer than what tests ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

# Nothing of ours is imported, nothing computed and no thread started before the fork, so that a child is like an
# interpreter of its own in which somebody has written `import peft, torch, transformers`.
_SERVER = """
import json, os, sys, traceback
import peft, torch, transformers

def work(task):
    os.chdir(task["folder"])
    for number, name in ((0, os.devnull), (1, task["stdout"]), (2, task["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(task["environment"])
    sys.argv = ["-c", *task["arguments"]]
    try:
        exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = work(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


class Interpreter:
    """Runs code in processes that are forked from one which has imported PEFT, torch and transformers.

    For what is read when these are imported, give the environment here; otherwise a process gets that of the caller.
    A test of importing PEFT itself, or of a world where it finds other packages, starts a process of its own instead.
    """

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = environment
        self._folder = TemporaryDirectory(prefix="interpreter-")
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._server is not None:
            self._server.communicate()
        self._folder.cleanup()

    def run(self, code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """What `python -c code arguments...` prints and returns.

        Raises:
            AssertionError: `check`, and the process failed; its standard error is shown.
        """
        if self._server is None:
            command = [sys.executable, "-c", _SERVER]
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self._environment)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        out, err = (Path(self._folder.name, name) for name in ("stdout", "stderr"))
        out.unlink(missing_ok=True)
        err.unlink(missing_ok=True)
        task = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if self._environment is None else self._environment),
            "folder": os.getcwd(),
            "stdout": str(out),
            "stderr": str(err),
        }
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        done = subprocess.CompletedProcess(["-c", code], status, out.read_text("utf-8"), err.read_text("utf-8"))
        assert not check or status == 0, done.stderr[-4000:]
        return done
