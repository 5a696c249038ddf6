"""What every operator of the algebra says about itself, so that nobody else needs to ask which one it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from reparam.errors import AlgebraError

if TYPE_CHECKING:
    from typing_extensions import Self

    from reparam.algebra.affine import ChannelAffine
    from reparam.algebra.windows import Pad

Ints: TypeAlias = tuple[int, ...]
Padding: TypeAlias = tuple[tuple[int, int], ...]
ZEROS = "zeros"


def in_double(tensor: Tensor) -> Tensor:
    """The same numbers in float64."""
    return tensor.detach().to(torch.float64)


class Operator:
    """``f(x)``, linear up to a constant. What a kind of operator does not say about itself is what is said here.

    Attributes:
        name: What its nodes in a graph are called.
        passes: Whether it may let a scale and shift of every channel pass, by :meth:`forth` and :meth:`back`.
    """

    name: ClassVar[str]
    passes: ClassVar[bool] = False

    def __call__(self, x: Tensor) -> Tensor:
        """``f(x)``."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Everything about it but its numbers, such as ``conv2d[3 -> 8, 3x3, pad 1]``."""
        raise NotImplementedError

    def double(self) -> Self:
        """The same operator with its numbers in float64."""
        return self

    def scaled(self, factor: float) -> Operator:
        """``factor * f(x)``.

        Raises:
            AlgebraError: It has no numbers to be scaled.
        """
        if factor != 1.0:
            raise AlgebraError("it has no numbers to be scaled")
        return self

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return torch.device("cpu")

    @property
    def is_identity(self) -> bool:
        """Whether it is there only to return its input."""
        return False

    @property
    def kernels(self) -> int:
        """Kernels that it launches once it is a layer."""
        return 1 - self.is_identity + (self.padding_before is not None)

    @property
    def padding_before(self) -> Pad | None:
        """The padding that has to go before its layer, which cannot have it itself."""
        return None

    @property
    def makes(self) -> tuple[int, int] | None:
        """The number of channels of its output and their axis, counted from the end, where it settles them."""
        return None

    @property
    def rank(self) -> int | None:
        """The number of axes of its output, where it settles it."""
        return None

    @property
    def keeps_shape(self) -> bool:
        """Whether its output has the shape of its input, whatever that is."""
        return False

    def axes(self, rank: int) -> tuple[int | None, ...] | None:
        """For every axis of an input, counted from the front, itself where it is left alone; None when none is."""
        return None

    def shapes(self, rank: int | None) -> list[Ints]:
        """Small, odd shapes of inputs that reach every border and every phase of a stride."""
        return [tuple(range(2, 2 + (rank or 4)))]

    def forth(self, affine: ChannelAffine) -> ChannelAffine:
        """The affine ``a'`` for which ``f(a(x)) = a'(f(x))``.

        Raises:
            AlgebraError: There is none; the message goes on where a description of the operator ends.
        """
        raise AlgebraError("mixes the channels")

    def back(self, affine: ChannelAffine) -> ChannelAffine:
        """The affine ``a'`` for which ``f(a'(x)) = a(f(x))``; it raises what :meth:`forth` does."""
        return self.forth(affine)

    def kernel_on(self, channels: int, dimensions: int, device: torch.device | None) -> dict[str, Any]:
        """What a convolution of ``channels`` channels that does the same is made with.

        Raises:
            AlgebraError: None does.
        """
        raise AlgebraError("it is no convolution")
