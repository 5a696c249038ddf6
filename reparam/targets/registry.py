"""The targets that are known, by name and by suffix. A module of a target registers it; nothing here knows any."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from reparam.errors import ExportError
from reparam.targets.target import Target

TARGETS: dict[str, Target] = {}
TargetT = TypeVar("TargetT", bound=type[Target])


def register(target: TargetT) -> TargetT:
    """Decorate a :class:`Target` to make it known by its name and its suffix."""
    TARGETS[target.name] = target()
    return target


def target_of(path: Path, name: str | None = None) -> Target:
    """The target of this name, or the one whose files end as ``path`` does.

    Raises:
        ExportError: There is none, or the named one has files that end in something else.
    """
    if name is None:
        found = [target for target in TARGETS.values() if path.name.endswith(target.suffix)]
        if not found:
            raise ExportError(f"{path}: {path.suffix or 'no suffix'} is the suffix of no target; {_suffixes()}")
        return max(found, key=lambda target: len(target.suffix))
    if name not in TARGETS:
        raise ExportError(f"{name} is no target; there are {', '.join(TARGETS)}")
    target = TARGETS[name]
    if path.suffix != Path(target.suffix).suffix:
        raise ExportError(f"{path}: a file for {target.title} ends in {target.suffix}")
    return target


def is_target(path: Path) -> bool:
    """Whether files that end as ``path`` does are for some target."""
    return any(path.name.endswith(target.suffix) for target in TARGETS.values())


def _suffixes() -> str:
    return "they are " + ", ".join(f"{target.suffix} for {target.title}" for target in TARGETS.values())
