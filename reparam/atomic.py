"""Atomic writes: a file, several or a folder, complete or not there at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reparam.errors import ExportError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file completely or not at all.

    The body writes to the path it is given, in the same folder; on success that file takes the place of ``path``, on
    any exception (an interrupt included) it is removed. An older ``path`` stays intact until then.

    Raises:
        ExportError: As :func:`check_destination`, or the system refuses (permissions, a full disk).
    """
    check_destination(path)
    path = Path(os.path.realpath(path))  # a link stays a link; what it points to is replaced
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        temporary.touch(exist_ok=False)
        permissions = temporary.stat().st_mode  # as the user's umask has it; some writers make a private file
        yield temporary
        temporary.chmod(permissions)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut can leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_writes(path: str | Path, *, companions: tuple[str, ...] = ()) -> Iterator[Path]:
    """Write several files, or a folder, completely or not at all.

    The body writes below the path that it is given, which has the final name in a hidden folder beside the final
    place. On success everything takes its place, and older files are gone; on any exception (an interrupt included)
    all is as it was.

    Args:
        path: The file or folder to write.
        companions: Suffixes of the files that belong to it: ``(".bin",)`` is ``model.bin`` for ``model.xml``.

    Raises:
        ExportError: The system refuses (permissions, a full disk).
    """
    path = Path(os.path.realpath(path))
    hidden = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp")
    fresh, old = hidden / "fresh", hidden / "old"
    try:
        for folder in (hidden, fresh, old):
            folder.mkdir()
        yield fresh / path.name
        _settle(fresh)
        names = [path.with_suffix(suffix).name for suffix in companions] + [path.name]
        _exchange(path.parent, names, fresh, old)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give everything in a folder the user's permissions, and make the disk hold it."""
    probe = folder / ".probe"
    probe.touch()
    modes = {True: folder.stat().st_mode, False: probe.stat().st_mode}
    probe.unlink()
    for item in folder.rglob("*"):
        item.chmod(modes[item.is_dir()])  # some writers make private files
        if item.is_file():
            with item.open("rb") as file:
                os.fsync(file.fileno())


def _exchange(place: Path, names: list[str], fresh: Path, old: Path) -> None:
    """Put ``fresh`` files in place and what was there into ``old``; all of them or none."""
    undo: list[tuple[Path, Path]] = []
    try:
        for name in names:
            for source, target in ((place / name, old / name), (fresh / name, place / name)):
                if source.exists():
                    source.rename(target)
                    undo.append((target, source))
    except BaseException:
        for target, source in reversed(undo):
            target.rename(source)
        raise


def check_destination(path: str | Path, *, never: tuple[Path, ...] = (), package: bool = False) -> None:
    """Refuse a path that cannot or must not be written, before any work is done for it.

    Args:
        path: The file to write; an older one may be replaced.
        never: Files that must not be replaced, whatever name or link reaches them.
        package: Whether it is a folder that Apple's tools show as a file, such as an ``.mlpackage``.

    Raises:
        ExportError: Its folder does not exist, or it is no ordinary file, or one of ``never``.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}")
    if package and path.exists() and not (path / "Manifest.json").is_file():
        raise ExportError(f"{path}: is not a package of an earlier export")
    if not package and path.exists() and not path.is_file():
        raise ExportError(f"{path}: is not an ordinary file")
    if any(path.exists() and path.samefile(other) for other in never):
        raise ExportError(f"{path}: is the input, which is never overwritten; choose another output")
