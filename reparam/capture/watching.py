"""What is noticed while a model runs: operators below the recorder, looks into modules, pieces of unknown number."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.capture.sizes import Number
from reparam.capture.state import may_write, written_by
from reparam.capture.structures import leaves

if TYPE_CHECKING:
    from reparam.capture.calls import Calls


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


class Pieces(tuple[Any, ...]):
    """Several parts of a value. How many there are depends on its size, and is decided by when Python asks."""

    number: Any
    session: Calls

    def __new__(cls, parts: Iterable[Any], session: Calls, number: Any) -> Pieces:
        """The parts, and their number."""
        made = super().__new__(cls, parts)
        made.session, made.number = session, number
        return made

    def __len__(self) -> int:
        return int(self.number)

    def __iter__(self) -> Iterator[Any]:
        int(self.number)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int and index >= 0:
            at_least = Number(self.session, operator.gt, (self.number.node, index), True)
            self.session.decide(at_least, True, small=True)
        else:
            int(self.number)
        return super().__getitem__(index)


class Seen:
    """What a module is called by while it is recorded; a copy of the module that Python makes is called as ever."""

    def __init__(self, module: Any, called: Callable[..., Any]) -> None:
        self.module, self.called = module, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the recorder makes of the call."""
        caller = sys._getframe(1).f_locals.get("self", self.module)
        return (
            self.called(self.module, *args, **kwargs) if caller is self.module else caller._call_impl(*args, **kwargs)
        )

    def __reduce__(self) -> Any:
        return type(None), ()


class Watched(dict[str, Any]):
    """The children or the tensors of a module, and who is to be told when one is taken out by name.

    What is done with those that are only gone through is seen where it is done.
    """

    def __init__(self, values: dict[str, Any], tell: Callable[[], None]) -> None:
        super().__init__(values)
        self.tell = tell

    def __getitem__(self, key: str) -> Any:
        self.tell()
        return super().__getitem__(key)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)


class Net(TorchDispatchMode):
    """Below the recorder: what reads an activation unseen, writes to the model, or has to run at every call."""

    def __init__(self, session: Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.session = session

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        session, kwargs = self.session, kwargs or {}
        tape = session.tape
        if tape is None or session.paused:
            session.note_write(func, args, kwargs)
            return session.note_made(self._run(func, args, kwargs), None)
        if not session.inside and any(tape.is_activation(value) for value in leaves((args, kwargs))):
            session.refuse(f"{func} reads an activation unseen")
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor or any(_is_mask(item) for item in leaves(args[1]))
        ):
            session.shapes_by_value = True
        if func.namespace != "aten" or torch.Tag.data_dependent_output in func.tags:
            session.foreign = True
        if may_write(func):
            for tensor in written_by(func, args, kwargs):
                session.writes(tensor, func)
        drew = session.draws
        result = self._run(func, args, kwargs)
        if session.draws > drew and not session.inside:
            session.refuse(f"it draws random numbers ({func})")
        return session.note_made(result, tape)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What an operator returns. One that may draw random numbers, as attention may drop out, need not."""
        before = _random_states(kwargs) if torch.Tag.nondeterministic_seeded in func.tags else []
        result = func(*args, **kwargs)
        self.session.draws += any(map(operator.ne, before, _random_states(kwargs) if before else []))
        return result


def _random_states(kwargs: Mapping[str, Any]) -> list[bytes]:
    """The states of all generators that an operator may draw from."""
    given = kwargs.get("generator")
    with torch._C.DisableTorchFunction():
        states = [torch.get_rng_state(), *(() if given is None else [given.get_state()])]
        if torch.cuda.is_initialized():
            states += torch.cuda.get_rng_state_all()
        return [state.numpy().tobytes() for state in states]
