"""The command line: one command is one call of the library.

Tables go to a terminal, JSON lines to a pipe, progress to stderr.  Exit 2 for usage, 1 for a known
error in one line; a traceback only with ``--debug``.
"""

# Imported for their commands, in the order of use, which is that of `actstore --help`.
from actstore.cli import stores, questions, decompositions, exports  # noqa: F401, I001
from actstore.cli.group import main

__all__ = ["main"]
