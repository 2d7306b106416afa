"""Notebooks: written, executed by this interpreter, and kept with their outputs."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from actstore import durable
from actstore.errors import ActstoreError, ArgumentError


class _ThisInterpreter(KernelSpecManager):
    """Finds one kernel, the interpreter that is running: actstore is installed there."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )


def to_notebook(
    path: str | Path, cells: Sequence[tuple[str, str]], title: str, *, timeout: int = 600
) -> Path:
    """Write a notebook, executed, with its outputs kept; return its path.

    It runs in the folder it is written to, in a kernel of this interpreter, in the time its cells
    take and about two seconds more; it is written when all of them have run.

    Parameters
    ----------
    path : str or Path
        File to write, ``*.ipynb``; replaced if it exists.
    cells : sequence of (str, str)
        Kind (``"markdown"`` or ``"code"``) and source of each cell.
    title : str
        Heading of the notebook.
    timeout : int, default 600
        Seconds a cell may take.

    Raises
    ------
    ArgumentError
        If the path does not end in .ipynb, its folder does not exist, or a kind is unknown.
    ActstoreError
        If a cell fails; nothing is written then.
    """
    target = Path(path)
    if target.suffix != ".ipynb" or not target.parent.is_dir():
        raise ArgumentError(
            f"path = {str(target)!r} was given; expected a file name that ends in .ipynb, in a "
            "folder that exists."
        )
    new_cell = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    unknown = [kind for kind, _ in cells if kind not in new_cell]
    if unknown:
        raise ArgumentError(f"a cell of kind {unknown[0]!r} was given; expected markdown or code.")
    notebook = nbformat.v4.new_notebook(
        cells=[
            new_cell["markdown"](f"# {title}"),
            *(new_cell[kind](source) for kind, source in cells),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )
    # Ids of cells are random by default; the same notebook should be the same file.
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    with tempfile.TemporaryDirectory() as runtime:
        kernel = AsyncKernelManager(
            kernel_spec_manager=_ThisInterpreter(),
            connection_file=os.path.join(runtime, "kernel.json"),
            transport="ipc",  # sockets in that folder: no other user can reach the kernel
        )
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=timeout,
            record_timing=False,
            resources={"metadata": {"path": str(target.parent.resolve())}},
        )
        try:
            client.execute()
        except CellExecutionError as error:
            raise ActstoreError(
                f"{target} was not written, since a cell of it failed with {error.ename}: "
                f"{error.evalue}. Run its code in Python to see where."
            ) from error
        except (DeadKernelError, TimeoutError) as error:
            raise ActstoreError(
                f"{target} was not written, since its kernel died or a cell took longer than "
                f"timeout = {timeout} seconds: {error}"
            ) from error
        finally:
            # nbclient leaves a kernel that was handed to it running.
            run_sync(kernel.shutdown_kernel)(now=True)
    durable.write_file(target, (nbformat.writes(notebook) + "\n").encode("utf-8"))
    return target


def factors_notebook(
    store_path: str | Path,
    factors_name: str | None,
    path: str | Path,
    *,
    kind: str = "nmf",
    compare: str | None = None,
    model: str | Path | None = None,
) -> Path:
    """Write a notebook that opens a store again and shows its factors; return its path.

    Parameters
    ----------
    store_path : str or Path
        Folder of the store.
    factors_name : str or None
        Name of the decomposition; None takes the newest.
    path : str or Path
        File to write, ``*.ipynb``.  It names the store relative to its own folder where that is
        near, so that the two can move together.
    kind : str, default "nmf"
        Kind of the decomposition.
    compare : str, optional
        Name of another decomposition of the kind that each factor is compared with.
    model : str or Path, optional
        The store's model, for the tokens that each factor promotes and suppresses.

    Raises
    ------
    ArgumentError, ActstoreError
        As `to_notebook`.

    See Also
    --------
    to_notebook : Writes any cells.
    """
    name = "" if factors_name is None else repr(factors_name)
    if kind != "nmf":
        name += f"{', ' if name else ''}kind={kind!r}"
    given = {"compare": compare, "model": None if model is None else str(model)}
    options = ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)
    cells = [
        *_opening(store_path, path),
        ("markdown", "Its factors: their share of the energy, and of how many neurons each is."),
        ("code", f"factors = store.factors({name})\nfactors.table('factors').to_pandas()"),
        (
            "markdown",
            "Point at a factor, or choose it: the text is shaded by its score, on one scale for "
            "all documents.",
        ),
        ("code", f"factors.view({options})"),
        ("markdown", "The rows that drive each factor most, in SQL."),
        (
            "code",
            'store.sql("""\n'
            "    SELECT factor, rank, value, snippet(row_id, 6, 3) AS text\n"
            "    FROM factor_exemplars\n"
            "    WHERE kind = $kind AND result = $result AND side = 'top' AND rank <= 3\n"
            "    ORDER BY factor, rank\n"
            '""", kind=factors.result.kind, result=factors.name).df()',
        ),
    ]
    return to_notebook(path, cells, f"Factors of {Path(store_path).resolve().name}")


def similarity_notebook(
    store_path: str | Path, similarity_name: str | None, path: str | Path
) -> Path:
    """Write a notebook that opens a store again and shows how alike its sites are.

    Parameters and errors are those of `factors_notebook`.
    """
    name = "" if similarity_name is None else repr(similarity_name)
    cells = [
        *_opening(store_path, path),
        ("markdown", "How alike its sites are; point at a cell for its interval."),
        ("code", f"similarity = store.similarity_result({name})\nsimilarity.view()"),
        ("code", "similarity.df()"),
    ]
    return to_notebook(path, cells, f"Similarity of the sites of {Path(store_path).resolve().name}")


def neuron_notebook(
    store_path: str | Path,
    site: str,
    neuron: int,
    path: str | Path,
    *,
    by: str = "source",
    replay: bool = False,
    model: str | Path | None = None,
) -> Path:
    """Write a notebook that opens a store again and shows one of its neurons.

    Parameters
    ----------
    store_path, path
        As `factors_notebook`.
    site : str
        Name of the site.
    neuron : int
        Index of the neuron.
    by : str, default "source"
        What means are grouped by.
    replay : bool
        Whether values that are not stored are computed again.
    model : str or Path, optional
        The store's model, for that and for the tokens that the neuron promotes and suppresses.
    """
    options = ("" if by == "source" else f", by={by!r}") + (", replay=True" if replay else "")
    options += "" if model is None else f", model={str(model)!r}"
    cells = [
        *_opening(store_path, path),
        ("markdown", "Its values over all rows, its exemplars in context, and what goes with it."),
        ("code", f"store.neuron({site!r}, {neuron}{options}).view()"),
        ("markdown", "The rows that drive it most."),
        ("code", f"store.top({site!r}, neuron={neuron}, k=20, distinct='window').df()"),
    ]
    return to_notebook(path, cells, f"{site}, neuron {neuron}")


def overview_notebook(store_path: str | Path, path: str | Path) -> Path:
    """Write a notebook that opens a store again and shows it at a glance.

    Parameters and errors are those of `factors_notebook`.
    """
    cells = [
        *_opening(store_path, path),
        ("code", "store.view()"),
        ("markdown", "What is in it, in SQL."),
        ("code", 'store.sql("SELECT kind, result, created, n_rows FROM results").df()'),
    ]
    return to_notebook(path, cells, Path(store_path).resolve().name)


def _opening(store_path: str | Path, path: str | Path) -> list[tuple[str, str]]:
    store = Path(store_path).resolve()
    place = os.path.relpath(store, Path(path).resolve().parent)
    if place.count("..") > 1:
        place = str(store)
    return [
        ("markdown", "The store: one model, one corpus, every activation."),
        ("code", f"import actstore\n\nstore = actstore.open({place!r})\nstore.info()"),
    ]
