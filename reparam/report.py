"""What a compilation did: counts before and after, and a remark for every rewrite and every refusal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Counts:
    """How much work one forward pass launches.

    Attributes:
        convolutions: Calls of a convolution, of any dimension, transposed ones included.
        linears: Calls of a matrix product with constant weights.
        norms: Calls of a normalisation layer, of any kind.
        elementwise: Additions, products and other element-wise calls, activations not included.
        kernels: Every call that launches work: the four above, activations, poolings, paddings and the rest. Views
            and look-ups of a shape launch none. What an opaque leaf launches inside is counted as far as its own
            torch.nn layers show it.
        parameters: Numbers in parameters, each tied one once.
        multiply_adds: Multiply-adds of convolutions and matrix products for one pass over the example inputs, or
            None where none were given.
    """

    convolutions: int
    linears: int
    norms: int
    elementwise: int
    kernels: int
    parameters: int
    multiply_adds: int | None = None


@dataclass(frozen=True)
class Remark:
    """One line of what the compiler did, or did not do and why.

    Attributes:
        kind: ``fused`` for a rewrite, ``missed`` for one that was refused, ``capture`` for how the model was read,
            ``timed`` for what ``optimize="latency"`` decided by the clock.
        rule: The rule's name, such as ``NormAfterLinear``.
        where: Module path that the remark is about; the empty string is the model itself.
        message: What happened, or the reason why it could not.
    """

    kind: Literal["fused", "missed", "capture", "timed"]
    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind:8}{self.where or '(model)'}: {self.message} [{self.rule}]"


@dataclass(frozen=True)
class Comparison:
    """Two models run on the same inputs.

    Attributes:
        largest_error: Largest absolute difference, relative to the largest magnitude in the reference output.
        tolerance: What ``largest_error`` may be at most.
        outputs: How many output tensors were compared.
    """

    largest_error: float
    tolerance: float
    outputs: int

    def __str__(self) -> str:
        return (
            f"largest relative error {self.largest_error:.1e} in {self.outputs} outputs ({self.tolerance:.0e} allowed)"
        )


@dataclass(frozen=True)
class Report:
    """What :func:`reparam.compile` did; its ``str`` is a summary for people, :meth:`to_dict` one for programs.

    Attributes:
        before: Counts of the training-time graph in eval mode.
        after: Counts of the compiled graph.
        remarks: Every rewrite, refusal and capture fallback, in graph order.
        certificates: Rewrites that were checked in float64 as they happened; 0 with ``verify=False``.
        largest_certificate_error: Largest relative error among those certificates.
        comparison: The whole model before and after on the example inputs, or None when it was not run.
    """

    before: Counts
    after: Counts
    remarks: tuple[Remark, ...]
    certificates: int = 0
    largest_certificate_error: float = 0.0
    comparison: Comparison | None = None

    @property
    def fused(self) -> list[Remark]:
        """The rewrites that were applied."""
        return [remark for remark in self.remarks if remark.kind == "fused"]

    @property
    def missed(self) -> list[Remark]:
        """What was left, with the reasons."""
        return [remark for remark in self.remarks if remark.kind == "missed"]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings, ready for ``json.dumps``."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            f"{name.replace('_', ' '):15}{_number(old):>14} -> {_number(new):>14}"
            for (name, old), new in zip(asdict(self.before).items(), asdict(self.after).values(), strict=True)
            if old is not None
        ]
        rows.append(
            f"{len(self.fused)} rewrites, {self.certificates} certified",
        )
        if self.certificates:
            rows[-1] += f" in float64 to {self.largest_certificate_error:.1e}"
        if self.comparison is not None:
            rows.append(f"whole model: {self.comparison}")
        rows += [str(remark) for remark in self.remarks if remark.kind != "fused"]
        return "\n".join(rows)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
