"""What a model's own code is about to do with a number: raise an error, or say it in a message.

An ``assert``, or an ``if`` before a ``raise``, is a demand that the model makes by itself, and costs a graph nothing. A
number that goes into the text of a message, a warning or an error decides nothing.
"""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

# How many instructions are followed.
_MOST = 400
_ENDS = ("RAISE_VARARGS", "LOAD_ASSERTION_ERROR", "RERAISE")
# What a text may go through on its way to the end of a statement that is nothing but a call.
_KEEPS = ("STORE", "RETURN", "FOR_ITER", "YIELD", "BINARY_SUBSCR", "CONTAINS", "COMPARE", "DELETE", "BINARY_SLICE")


def is_demanded() -> bool:
    """Whether the innermost frame of a model's own code is at a decision of which one outcome raises an error."""
    return _asked(_raises)


def is_said() -> bool:
    """Whether the innermost frame of a model's own code makes a text of a number that goes into a mere message."""
    return _asked(_is_message)


def is_guarded() -> bool:
    """Whether the innermost frame of a model's own code would catch an error of what it is about to call."""
    return _asked(_catches)


def _asked(question: Callable[[CodeType, int], bool]) -> bool:
    """Whether something holds of where the innermost frame of a model's own code is."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith(("reparam.capture.", "torch.")):
        frame = frame.f_back
    return frame is not None and question(frame.f_code, frame.f_lasti)


@cache
def _catches(code: CodeType, offset: int) -> bool:
    """Whether an instruction lies in a ``try`` with a handler that does more than clean up."""
    if not getattr(code, "co_exceptiontable", b""):
        return False
    steps, places = _steps(code)
    parse: Any = getattr(dis, "_parse_exception_table", lambda code: [])
    for entry in parse(code):
        if entry.start <= offset < entry.end:
            handler = itertools.takewhile(lambda step: step.opname != "RERAISE", steps[places.get(entry.target, 0) :])
            if any(step.opname in ("CHECK_EXC_MATCH", "POP_EXCEPT") for step in handler):
                names = [step.opname for step in steps[places.get(entry.target, 0) :][:3]]
                if "WITH_EXCEPT_START" not in names:
                    return True
    return False


@cache
def _steps(code: CodeType) -> tuple[list[dis.Instruction], dict[int, int]]:
    steps = list(dis.get_instructions(code))
    return steps, {step.offset: index for index, step in enumerate(steps)}


@cache
def _raises(code: CodeType, offset: int) -> bool:
    """Whether the decision after an instruction has a branch that goes straight to an error."""
    steps, places = _steps(code)
    at = next((index for index, step in enumerate(steps) if step.offset >= offset), len(steps))
    jump = next((i for i in range(at, min(at + 6, len(steps))) if _branches(steps[i])), None)
    if jump is None or any(step.opname.startswith("STORE") for step in steps[at:jump]):
        return False  # it is kept for later
    return any(_always_raises(code, start) for start in (jump + 1, places.get(steps[jump].argval, len(steps))))


def _always_raises(code: CodeType, start: int) -> bool:
    """Whether every way on from an instruction ends in an error."""
    steps, places = _steps(code)
    pending, seen = [start], set()
    while pending:
        at = pending.pop()
        while at not in seen:
            seen.add(at)
            if at >= len(steps) or len(seen) > _MOST:
                return False
            step = steps[at]
            if step.opname in _ENDS:
                break
            if step.opname.startswith(("RETURN", "YIELD", "FOR_ITER", "SEND")):
                return False
            if "JUMP" in step.opname:
                target = places.get(step.argval, len(steps))
                if target <= at:
                    return False  # a loop
                pending.append(target)
                if not _branches(step) and "OR_POP" not in step.opname:
                    break
            at += 1
    return True


@cache
def _is_message(code: CodeType, offset: int) -> bool:
    """Whether the text that an instruction makes ends in a call whose result is thrown away, or in an error."""
    steps, places = _steps(code)
    height = place = 1  # of Python's stack, and where on it the text is, or what was made of it
    for step in steps[places.get(offset, len(steps)) + 1 :][:200]:
        if step.opname in _ENDS:
            return True
        if "JUMP" in step.opname:
            return False
        effect = dis.stack_effect(step.opcode, step.arg)
        taken = _TAKEN.get(step.opname, max(0, -effect + 1) if effect < 0 else 0)
        if height - taken < place:
            if step.opname == "POP_TOP":
                return True
            if step.opname.startswith(_KEEPS):
                return False
            place = height + effect
        height += effect
    return False


# How many values an instruction takes off the stack, where its effect does not show that.
_TAKEN = {"POP_TOP": 1, "RETURN_VALUE": 1, "BINARY_SUBSCR": 2, "COMPARE_OP": 2, "CONTAINS_OP": 2, "STORE_SUBSCR": 3}


def _branches(step: dis.Instruction) -> bool:
    return "JUMP" in step.opname and "IF" in step.opname
