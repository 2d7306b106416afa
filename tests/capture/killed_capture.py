"""Captures that are killed: a server that forks one process for each capture asked of it.

Reads requests from standard input, one JSON object a line, and answers each with how its process
ended.  ``kill`` is the number of the durable step (a call of sync_file, publish, create or replace)
at which SIGKILL comes, ``when`` says before or after it; ``seconds`` kills from outside instead.
``documents`` and ``options`` are those of the capture.
The server loads and compiles everything once; nothing of that starts threads a fork would lose.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from actstore import durable
from actstore.capturing import parts, run
from actstore.models import LanguageModel, load
from tests.captured import DOCUMENTS, capture
from tests.toys import toy_model

STEPS = ("sync_file", "publish", "create", "replace")


def main() -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    parts.PART_ROWS = 150
    run.COMPACT_EVERY = 3
    model = load(*toy_model("bert", n_layers=1, hidden=16, ffn=16))
    with tempfile.TemporaryDirectory() as folder:
        _capture(model, f"{folder}/warm")
    _answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _capture(model, **request)
            os._exit(0)
        if request.get("seconds") is not None:
            time.sleep(request["seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        _answer("killed" if killed else os.WEXITSTATUS(status))


def _answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _capture(
    model: LanguageModel,
    path: str,
    kill: int | None = None,
    when: str = "after",
    log: str | None = None,
    documents: list[str] = DOCUMENTS,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> None:
    steps: list[str] = []
    counting = threading.Lock()  # the plan is made in a thread of its own

    def watch(name: str) -> None:
        step = getattr(durable, name)

        def watched(*args: Any) -> None:
            with counting:
                number = len(steps)
                steps.append(f"{name} {Path(args[-1] if name == 'publish' else args[0]).name}")
            if number == kill and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            step(*args)
            if number == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(durable, name, watched)

    if kill is not None or log:
        for name in STEPS:
            watch(name)
    capture(model, documents, Path(path), context=24, **options or {})
    if log:
        Path(log).write_text("\n".join(steps))


if __name__ == "__main__":
    main()
