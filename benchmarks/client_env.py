"""The environment of `clients.py`: the packages that it compiles, pinned, apart from what development runs with.

Nothing but the standard library is imported here, for this runs before there is an environment.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = (ROOT / "benchmarks" / "clients.txt", ROOT / "constraints.txt")
# Not in build/, which `make typecheck` empties.
FOLDER = Path(os.environ.get("REPARAM_CLIENTS_ENV", ROOT / ".venv-clients")).resolve()

# Nothing may be fetched, reported or installed while it is measured.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "YOLO_OFFLINE": "1",
    "YOLO_AUTOINSTALL": "0",
    "YOLO_VERBOSE": "0",
    "YOLO_CONFIG_DIR": str(FOLDER),
    "DOCTR_CACHE_DIR": str(FOLDER / "doctr"),
    "USE_TORCH": "1",
    "OMP_NUM_THREADS": "1",  # which is also what Ultralytics would set it to
}


def enter() -> None:
    """Go on in the environment: make it if need be, and run this script again in it, with the same arguments."""
    if Path(sys.prefix).resolve() == FOLDER:
        return
    python = FOLDER / "bin" / "python"
    prepare(python)
    os.execve(python, [str(python), *sys.argv], os.environ | OFFLINE)


def prepare(python: Path) -> None:
    """Install what is pinned, and reparam as it is here, unless that was done before."""
    stamp = FOLDER / ".installed"
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in PINS)).hexdigest() + f" {ROOT}"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing benchmarks/clients.txt into {FOLDER}", file=sys.stderr)
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    requirements, constraints = PINS
    # What they ask for beside is in the list; asked for by themselves, they would bring another PyTorch, and CUDA.
    subprocess.run([*pip, "--constraint", constraints, "--requirement", requirements], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--editable", ROOT], check=True)
    stamp.write_text(wanted)
