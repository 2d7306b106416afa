"""Install the peers: ``python -m benchmarks.peers.install DIR``, a venv for each.

Each gets the torch and transformers that run here, so that all run the same forward.  Where PyPI's
torch would bring CUDA along and it is not wanted, set ``PIP_EXTRA_INDEX_URL`` to the index of the
CPU builds first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

PEERS: dict[str, list[list[str]]] = {
    # Its pins (scikit-learn~=0.23, PyYAML~=5.4, transformers~=4.2) no longer build.
    "ecco": [
        ["--no-deps", "ecco==0.1.2"],
        ["captum", "ipython", "matplotlib", "packaging", "PyYAML", "scikit-learn", "seaborn"],
    ],
    "transformerlens": [["transformer-lens==4.3.0"]],
    "nnsight": [["nnsight==0.8.1"]],
    "saelens": [["sae-lens==6.54.12"]],
    "nmf-torch": [["--no-deps", "nmf-torch==0.1.1"], ["scikit-learn", "threadpoolctl"]],
    # Of the package its NMF alone is used; what the rest needs is more than torch itself.
    "overcomplete": [["--no-deps", "overcomplete==0.3.0"], ["pillow", "scikit-learn", "tqdm"]],
}
"""Each peer, and what pip is told to install for it after torch and transformers."""


def python_of(folder: Path, peer: str) -> Path:
    """Return the interpreter of a peer installed below a folder."""
    return folder / peer / "bin" / "python"


def install(folder: Path, peer: str) -> None:
    """Make a venv for a peer and install it there."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
    ours = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    for packages in ([*ours, "numpy", "safetensors"], *PEERS[peer]):
        pip = [str(python_of(folder, peer)), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", *packages], check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Install the peers; say which could not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets one venv a peer")
    parser.add_argument("--only", choices=PEERS, nargs="*", default=list(PEERS))
    options = parser.parse_args(argv)
    failed = []
    for peer in options.only:
        try:
            install(options.folder, peer)
            print(f"{peer}: installed in {options.folder / peer}")
        except subprocess.CalledProcessError as error:
            failed.append(peer)
            print(f"{peer}: not installed; pip ended with {error.returncode}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
