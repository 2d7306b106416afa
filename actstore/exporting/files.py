"""New files for users: refused where there is something, and there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from actstore import durable
from actstore.errors import ArgumentError, ResultExists


def new_file(to: str | Path, suffixes: Collection[str]) -> Path:
    """Return the path of a file to be made.

    Raises
    ------
    ArgumentError
        If its name does not end in one of the suffixes, or its folder does not exist.
    ResultExists
        If there is something.
    """
    path = Path(to).absolute()
    if path.suffix not in suffixes:
        raise ArgumentError(
            f"to = {str(to)!r} does not name a file that can be written; expected a name that ends "
            f"in {' or '.join(suffixes)}."
        )
    if not path.parent.is_dir():
        raise ArgumentError(
            f"to = {str(to)!r} needs the folder {path.parent}, which does not exist; expected the "
            "name of a file in a folder that does. Make the folder first."
        )
    _refuse_taken(path)
    return path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give the name of a file to write; afterwards it is made durable and named `path`.

    Raises
    ------
    ResultExists
        If somebody made a file of that name meanwhile; it is untouched.
    """
    with durable.aside(path) as partial:
        yield partial
        durable.sync_file(partial)
        try:
            os.link(partial, path)  # unlike rename, link never overwrites
        except FileExistsError:
            _refuse_taken(path)
            raise
    durable.sync_folder(path.parent)


def _refuse_taken(path: Path) -> None:
    if os.path.lexists(path):
        raise ResultExists(
            f"{path} exists, and an export is never written over. Name a new file, or delete it."
        )
