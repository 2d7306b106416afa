"""Captures that are killed: a server that forks one process for each capture asked of it.

Reads requests from standard input, one JSON object a line, and answers each with how its process
ended.  ``kill`` is the number of the durable step (a call of sync_file, publish, create or replace)
at which SIGKILL comes, ``when`` says before or after it; ``seconds`` kills from outside instead.
The server itself computes nothing, so that a fork finds no thread pools.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from actstore import durable
from actstore.capture import plan, run
from actstore.models import load
from tests.captured import DOCUMENTS, capture
from tests.toys import toy_model

STEPS = ("sync_file", "publish", "create", "replace")


def main() -> None:
    """Answer requests until standard input ends."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_capture(**request))
        if request.get("seconds") is not None:
            time.sleep(request["seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps("killed" if killed else os.WEXITSTATUS(status)), flush=True)


def _capture(
    path: str, kill: int | None = None, when: str = "after", log: str | None = None, **_: Any
) -> int:
    steps: list[str] = []

    def watch(name: str) -> None:
        step = getattr(durable, name)

        def watched(*args: Any) -> None:
            number = len(steps)
            steps.append(f"{name} {Path(args[-1] if name == 'publish' else args[0]).name}")
            if number == kill and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            step(*args)
            if number == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(durable, name, watched)

    for name in STEPS:
        watch(name)
    torch.set_num_threads(1)
    plan.PART_ROWS = 150
    run._COMPACT_EVERY = 3
    capture(load(*toy_model("bert", n_layers=1)), DOCUMENTS, Path(path), context=24)
    if log:
        Path(log).write_text("\n".join(steps))
    return 0


if __name__ == "__main__":
    main()
