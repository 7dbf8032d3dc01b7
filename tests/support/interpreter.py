"""New Python processes that need not wait for PEFT and transformers, whose import takes longer than what tests ask."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any


class Interpreter:
    """Runs code in processes that are forked from one which has imported PEFT, torch and transformers.

    That one is forked in turn when this is made: before anything of ours is imported, anything computed and any thread
    of torch's started, so that a process is like an interpreter of its own in which somebody has written
    `import peft, torch, transformers`. What these read from the environment when they were imported is as it was then.
    A test of importing PEFT itself, or of a world where it finds other packages, starts a process of its own instead.
    """

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="interpreter-")
        orders, answers = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns that threads of pytest-xdist are not there after the fork. Nothing waits for them.
            warnings.simplefilter("ignore", DeprecationWarning)
            server = os.fork()
        if server == 0:
            try:
                os.close(orders[1])
                os.close(answers[0])
                _serve(orders[0], answers[1])
            finally:
                os._exit(0)
        os.close(orders[0])
        os.close(answers[1])
        self._server = server
        self._orders, self._answers = os.fdopen(orders[1], "w"), os.fdopen(answers[0])

    def close(self) -> None:
        os.kill(self._server, signal.SIGKILL)
        os.waitpid(self._server, 0)
        self._orders.close()
        self._answers.close()
        self._folder.cleanup()

    def run(
        self, code: str, *arguments: object, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> CompletedProcess[str]:
        """What `python -c code arguments...` prints and returns, under this process's environment or another.

        Raises:
            AssertionError: `check`, and the process failed; its standard error is shown.
        """
        out, err = (Path(self._folder.name, name) for name in ("stdout", "stderr"))
        out.unlink(missing_ok=True)
        err.unlink(missing_ok=True)
        order = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if environment is None else environment),
            "folder": os.getcwd(),
            "stdout": str(out),
            "stderr": str(err),
        }
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        status = int(self._answers.readline())
        done = CompletedProcess(["-c", code], status, out.read_text("utf-8"), err.read_text("utf-8"))
        assert not check or status == 0, done.stderr[-4000:]
        return done


def _serve(orders: int, answers: int) -> None:
    """Carry out orders, each in a process of its own, until there are no more."""
    with os.fdopen(orders) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            child = os.fork()
            if child == 0:
                os._exit(_carry_out(json.loads(line)))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=out, flush=True)


def _carry_out(order: dict[str, Any]) -> int:
    os.chdir(order["folder"])
    for number, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    # pytest has put its own here.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = ["-c", *order["arguments"]]
    try:
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
