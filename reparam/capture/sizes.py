"""Numbers that Python reads off an activation while it is recorded, and that remember how they were computed.

``x.shape[2]`` is a number in Python and a value of the graph. Here it is both: a ``torch.SymInt``, which torch takes
wherever it takes an int, whose arithmetic is written down as it happens. Python that *decides* by such a number (a
branch, a loop, an index, a key of a dict) gets the number of the example, and the recorder is told, so that the
decision becomes a condition of the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from reparam.capture.demands import is_said
from reparam.graph import facts

if TYPE_CHECKING:
    from torch.fx import Node

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

_SIGNS = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/",
    operator.mod: "%", operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|", operator.xor: "^",
    operator.lshift: "<<", operator.rshift: ">>",
}  # fmt: skip
NEGATED = {operator.eq: operator.ne, operator.lt: operator.ge, operator.gt: operator.le}
NEGATED |= {value: key for key, value in NEGATED.items()}
_AXES = {3: ("batch size", "", "length"), 4: ("batch size", "", "height", "width")}


class Number:
    """How a number is computed: a size of a value of the graph, an argument, or a function of such numbers.

    It also is what torch calls the ``node`` of a symbolic number, as far as torch asks anything of it.

    Attributes:
        function: What computes it; ``size`` of a value, or None for a value of the graph that is a number itself.
        operands: Numbers, constants, and for a size the value and the axis.
        hint: What it is in the example.
        recorder: Is told of decisions.
        node: Where the graph computes it, once something needs it there.
    """

    __slots__ = ("function", "hint", "key", "node", "operands", "recorder")

    def __init__(self, recorder: Any, function: Any, operands: tuple[Any, ...], hint: Any) -> None:
        self.recorder, self.function, self.operands, self.hint = recorder, function, operands, hint
        self.key: Any = (function, *(item.key if isinstance(item, Number) else (type(item), item) for item in operands))
        self.node: Node | None = None

    def sources(self) -> Iterator[Number]:
        """The sizes, and other values of the graph, that it is computed from."""
        if self.function is None or self.function == "size":
            yield self
            return
        for item in self.operands:
            if isinstance(item, Number):
                yield from item.sources()

    def __str__(self) -> str:
        match self.function, self.operands:
            case "size", (value, axis):
                return f"{_name(value)}.shape[{axis}]"
            case None, (value, *_):
                return _name(value)
            case function, (a, b) if function in _SIGNS:
                return f"{_bracketed(a)} {_SIGNS[function]} {_bracketed(b)}"
            case function, (a,) if function is operator.neg:
                return f"-{_bracketed(a)}"
        return f"{getattr(self.function, '__name__', self.function)}({', '.join(map(str, self.operands))})"

    # What torch asks.

    is_int = lambda self: type(self.hint) is int  # noqa: E731
    is_float = lambda self: type(self.hint) is float  # noqa: E731
    is_bool = lambda self: type(self.hint) is bool  # noqa: E731

    def is_symbolic(self) -> bool:
        """Whether it is more than a number: yes."""
        return True

    def is_nested_int(self) -> bool:
        """Whether it is a plain number, or may be taken for one: no."""
        return False

    is_constant = is_nested_int

    def maybe_as_int(self) -> None:
        """None: it is not settled."""

    def guard_int(self, *_: Any) -> Any:
        """The number; it is decided by from here on."""
        return pinned(self)

    guard_float = guard_bool = int_ = bool_ = guard_int

    def expect_true(self, file: str, line: int) -> bool:
        """The bool, which the model itself demands to be true."""
        self.recorder.decide(self, bool(self.hint), demanded=True)
        return bool(self.hint)


def is_about_nothing(number: Number, outcome: bool) -> bool:
    """Whether a decision is one between something and nothing: a size, or a product of sizes, is not 0."""
    match number.function, number.operands:
        case ((operator.gt | operator.ne), (Number() as size, 0)) | (operator.ge, (Number() as size, 1)):
            return outcome and _is_product(size)
        case ((operator.eq | operator.le), (Number() as size, 0)) | (operator.lt, (Number() as size, 1)):
            return not outcome and _is_product(size)
    return False


def _is_product(number: Any) -> bool:
    if not isinstance(number, Number):
        return type(number) is int and number > 0
    return number.function == "size" or (number.function is operator.mul and all(map(_is_product, number.operands)))


_MOST = 5000


def evaluate(number: Any, values: Mapping[Any, Any]) -> Any:
    """What a number is where its sources have some values."""
    if not isinstance(number, Number):
        return number
    if number.key in values:
        return values[number.key]
    return number.function(*(evaluate(item, values) for item in number.operands))


def period(number: Any) -> int | None:
    """P, where a number f of one size s is linear but for a part of period P: f(s + P) = f(s) + c; None otherwise."""
    if not isinstance(number, Number) or number.function is None or number.function == "size":
        return 1
    periods = [period(item) for item in number.operands]
    if None in periods:
        return None
    shared = math.lcm(*periods)  # type: ignore[arg-type]
    match number.function, number.operands:
        case ((operator.add | operator.sub | operator.neg | operator.pos), _):
            return shared
        case operator.mul, (a, b) if not (isinstance(a, Number) and isinstance(b, Number)):
            return shared
        case ((operator.floordiv | operator.mod | operator.truediv), (Number(), int(divisor))) if divisor > 0:
            return shared * divisor
        case ((math.ceil | math.floor), (Number(),)):
            return shared
    return None


def is_always(number: Number, outcome: bool, first: int) -> bool:
    """Whether a comparison of one size comes out alike for every size of at least ``first``.

    Both sides are linear but for parts of a period P, so their difference grows by the same over every period: sizes of
    one period, and the sign of that growth, say it for all.
    """
    sources = {source.key for source in number.sources()}
    if number.function not in NEGATED or len(number.operands) != 2 or len(sources) != 1:
        return False
    if any(source.function != "size" for source in number.sources()):
        return False
    periods = [period(item) for item in number.operands]
    length = None if None in periods else math.lcm(*periods)  # type: ignore[arg-type]
    if length is None or length > _MOST:
        return False
    (key,), (a, b) = sources, number.operands
    differences = [evaluate(a, {key: s}) - evaluate(b, {key: s}) for s in range(first, first + length + 1)]
    if any(bool(number.function(d, 0)) is not outcome for d in differences):
        return False
    growth = differences[-1] - differences[0]
    if growth == 0:
        return True
    if number.function in (operator.eq, operator.ne):  # it must not come to 0 on its way
        return all(d * growth > 0 for d in differences)
    return bool(number.function(math.copysign(math.inf, growth), 0)) is outcome


def _name(value: Any) -> str:
    if value.op == "call_module":
        return f"what {value.target} returns"
    if value.target is operator.getitem and isinstance(value.args[1], (int, str)):
        return f"{_name(value.args[0])}[{value.args[1]!r}]"
    return str(value.target) if value.op == "placeholder" else value.name


def _bracketed(item: Any) -> str:
    simple = not isinstance(item, Number) or item.function not in _SIGNS
    return str(item) if simple else f"({item})"


def words(number: Number, outcome: bool) -> str:
    """What it says of the inputs that a comparison came out as it did, in the user's terms."""
    match number.function, number.operands:
        case operator.eq | operator.ne as sign, (Number(function=operator.mod, operands=(Number() as size, int(n))), 0):
            negated = (sign is operator.eq) != outcome
            return f"{described(size)} is {'not ' * negated}a multiple of {n}"
        case operator.eq | operator.ne as sign, (Number() as size, other):
            return f"{described(size)} is {'not ' * ((sign is operator.eq) != outcome)}{described(other)}"
        case function, (a, b) if function in NEGATED:
            return f"{_bracketed(a)} {_SIGNS[function if outcome else NEGATED[function]]} {_bracketed(b)}"
    return f"{number} is {outcome}"


def described(item: Any) -> str:
    """A size in words, where it is one of an input's."""
    if isinstance(item, Number) and item.function == "size":
        value, axis = item.operands
        names = _AXES.get(facts.of(value).rank or 0, ())
        if axis < len(names) and names[axis]:
            return f"the {names[axis]} of {_name(value)}"
    return str(item)


def pinned(number: Number) -> Any:
    """The number of the example, now that Python has made use of it as a plain number."""
    if type(number.hint) is bool:
        number.recorder.decide(number, number.hint)
    else:
        number.recorder.decide(Number(number.recorder, operator.eq, (number, number.hint), True), True, pins=True)
    return number.hint


def _as_text(number: Number) -> Any:
    """The number of the example, for a text: one that may be a key of something decides, a message does not."""
    return number.hint if is_said() else pinned(number)


def symbolic(number: Number) -> Any:
    """A number as Python sees it: of the type that it has in the example."""
    match number.hint:
        case bool():
            return Decision(number)
        case int():
            return Size(number)
        case float():
            return Ratio(number)
    return pinned(number)


def hinted(value: Any) -> Any:
    """The number of the example in the place of a symbolic one."""
    return value.node.hint if isinstance(value, SYMBOLIC) else value


def computed(function: Callable[..., Any], *operands: Any) -> Any:
    """A function of numbers, at least one of them symbolic."""
    hint = function(*map(hinted, operands))
    numbers = tuple(item.node if isinstance(item, SYMBOLIC) else item for item in operands)
    if (known := _known(function, numbers)) is not None:
        return known
    recorder = next(item.node.recorder for item in operands if isinstance(item, SYMBOLIC))
    return symbolic(Number(recorder, function, numbers, hint))


def _known(function: Any, operands: tuple[Any, ...]) -> Any:
    """What a function of numbers is, whatever they are; None when that is not known."""
    if len(operands) != 2:
        return None
    a, b = operands
    if isinstance(a, Number) and isinstance(b, Number) and a.key == b.key and function in (*NEGATED, operator.sub):
        return function(1, 1)
    if isinstance(a, Number) and type(b) is int:
        neutral = {operator.add: 0, operator.sub: 0, operator.mul: 1, operator.floordiv: 1, operator.pow: 1}
        if neutral.get(function) == b:
            return symbolic(a)
    if isinstance(b, Number) and type(a) is int and {operator.add: 0, operator.mul: 1}.get(function) == a:
        return symbolic(b)
    return None


def _binary(function: Callable[..., Any], reflected: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float, *SYMBOLIC)):
            return NotImplemented
        return computed(function, other, self) if reflected else computed(function, self, other)

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: computed(function, self, *args)


class _Arithmetic:
    """What Python does with numbers: written down. What needs a plain number: decided by."""

    def __init__(self, number: Number) -> None:
        self.node = number

    def __bool__(self) -> bool:
        if type(self.node.hint) is bool:
            return bool(pinned(self.node))
        return bool(computed(operator.ne, self, 0))

    def __hash__(self) -> int:
        return hash(pinned(self.node))

    def __repr__(self) -> str:
        return repr(_as_text(self.node))

    def __str__(self) -> str:
        return str(_as_text(self.node))

    def __format__(self, spec: str) -> str:
        return format(_as_text(self.node), spec)

    def __int__(self) -> int:
        if type(self.node.hint) is float:
            return int(computed(math.trunc, self))
        return int(pinned(self.node))

    def __float__(self) -> float:
        return float(pinned(self.node))

    def __index__(self) -> int:
        return operator.index(pinned(self.node))

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self.node.hint), (pinned(self.node),)

    def __getattr__(self, name: str) -> Any:
        if name == "node" or name.startswith("__"):  # not made yet; or torch asks what it is
            raise AttributeError(name)
        return getattr(pinned(self.node), name)


for _name_, _function in (
    ("add", operator.add), ("sub", operator.sub), ("mul", operator.mul), ("truediv", operator.truediv),
    ("floordiv", operator.floordiv), ("mod", operator.mod), ("pow", operator.pow), ("and", operator.and_),
    ("or", operator.or_), ("xor", operator.xor), ("lshift", operator.lshift), ("rshift", operator.rshift),
):  # fmt: skip
    setattr(_Arithmetic, f"__{_name_}__", _binary(_function))
    setattr(_Arithmetic, f"__r{_name_}__", _binary(_function, reflected=True))
for _function in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
    setattr(_Arithmetic, f"__{_function.__name__}__", _binary(_function))
_UNARY: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (operator.neg, operator.pos, operator.abs, operator.invert)},
    **{f.__name__: f for f in (math.floor, math.ceil, math.trunc, round)},
}
_SPECIAL: dict[str, Callable[..., Any]] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    # torch's own, for those who want no decision.
    "sym_max": _binary(max),
    "sym_min": _binary(min),
    "sym_float": _unary(torch.sym_float),
    "sym_int": _unary(math.trunc),
    "sym_not": _unary(operator.not_),
    "divmod": lambda self, other: (self // other, self % other),
    "rdivmod": lambda self, other: (other // self, other % self),
}
for _name_, _function in _SPECIAL.items():
    setattr(_Arithmetic, f"__{_name_}__", _function)


class Size(_Arithmetic, torch.SymInt):
    """An int."""

    __class__ = property(lambda self: int)  # as Python that asks would have it


class Ratio(_Arithmetic, torch.SymFloat):
    """A float."""

    __class__ = property(lambda self: float)


class Decision(_Arithmetic, torch.SymBool):
    """A bool, which is a decision once Python asks for it."""

    __class__ = property(lambda self: bool)


OURS = (Size, Ratio, Decision)
