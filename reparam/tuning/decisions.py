"""What timing decided, kept: choices by what they were between, to be replayed without timing anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam.atomic import atomic_write
from reparam.errors import ReparamError

_FORMAT = "reparam decisions"
_VERSION = 1


@dataclass(frozen=True)
class Decision:
    """The outcome of one choice.

    Attributes:
        pick: The option that was taken.
        seconds: Median time of each option, by its name; empty where it was decided by hand.
    """

    pick: str
    seconds: Mapping[str, float]


class Decisions(Mapping[str, Decision]):
    """Decisions by a description of the choice: operators, the shape of the input, precision, device, threads.

    Equal blocks have equal descriptions, so each is timed once. What a description does not tell is the machine: a file
    that was made on one and is replayed on another gives the graph that is best on the first.

    Args:
        choices: Decisions to start with.
    """

    def __init__(self, choices: Mapping[str, Decision] | None = None) -> None:
        self._choices = dict(choices or {})

    def __getitem__(self, key: str) -> Decision:
        return self._choices[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def add(self, key: str, decision: Decision) -> None:
        """Keep a decision."""
        self._choices[key] = decision

    @staticmethod
    def read(path: str | Path) -> Decisions:
        """The decisions in a file that :meth:`write` wrote.

        Raises:
            ReparamError: The file cannot be read, or holds something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ReparamError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ReparamError(f"{path}: holds no decisions: it is no JSON ({error})") from error
        try:
            return Decisions.from_dict(data)
        except ReparamError as error:
            raise ReparamError(f"{path}: {error}") from error

    @staticmethod
    def from_dict(data: Any) -> Decisions:
        """The decisions in what :meth:`to_dict` returned.

        Raises:
            ReparamError: It is something else; the message says where.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ReparamError(f'holds no decisions: the entry "format" is not "{_FORMAT}"')
        if data.get("version") != _VERSION:
            raise ReparamError(f"holds decisions of version {data.get('version')}, and this reparam reads {_VERSION}")
        choices = data.get("choices")
        if not isinstance(choices, Mapping):
            raise ReparamError('its decisions are damaged: "choices" is not an object')
        return Decisions({str(key): _decision(key, value) for key, value in choices.items()})

    def to_dict(self) -> dict[str, Any]:
        """The decisions as JSON's types, in the order of their descriptions."""
        choices = {key: {"pick": self[key].pick, "seconds": dict(self[key].seconds)} for key in sorted(self)}
        return {"format": _FORMAT, "version": _VERSION, "choices": choices}

    def write(self, path: str | Path) -> None:
        """Write the decisions to a file, completely or not at all.

        Raises:
            ExportError: The file cannot be written.
        """

        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _decision(key: object, value: Any) -> Decision:
    seconds = value.get("seconds", {}) if isinstance(value, Mapping) else None
    if not isinstance(seconds, Mapping) or not isinstance(value.get("pick"), str):
        raise ReparamError(f'its decisions are damaged: "{key}" has no "pick"')
    if not all(type(time) in (int, float) and time >= 0 for time in seconds.values()):
        raise ReparamError(f'its decisions are damaged: the "seconds" of "{key}" are no times')
    return Decision(value["pick"], {str(name): float(time) for name, time in seconds.items()})
