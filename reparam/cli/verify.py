"""``reparam verify``: whether two files compute the same."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reparam.cli.files import Reading, open_both, parse_shape, runnable, shared_call
from reparam.cli.shell import (
    Bar,
    Debug,
    Ema,
    InputSize,
    Json,
    Model,
    Quiet,
    UnsafeLoad,
    print_json,
    shape_text,
)
from reparam.errors import ReparamError, VerificationError

_FLAT = (".onnx", ".xml", ".pte")  # whose runtimes return plain lists, whatever the model returned


def verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="The reference: a checkpoint, deploy or exported file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="What must compute the same.")],
    model: Model = None,
    input_size: InputSize = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Allowed largest error, relative to A's largest output.")
    ] = None,
    unsafe_load: UnsafeLoad = False,
    ema: Ema = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two files on random inputs: a checkpoint and its deploy model, in any of the formats.

    A state dict that was fused elsewhere is compared as well, when its names are those of the other file's deploy form.
    """
    how = Reading(model, parse_shape(input_size), unsafe_load, ema)
    with Bar(quiet) as bar:
        from reparam.compare import compare, run
        from reparam.targets import Flat

        sides = open_both((first, second), how)
        bar(None, None, "comparing")
        call = shared_call((first, second), sides, how)
        reference, other = (runnable(side.model) for side in sides)
        if any(path.suffix in _FLAT for path in (first, second)):
            reference, other, tolerance = Flat(reference), Flat(other), tolerance or 1e-4
        try:
            comparison, agree = compare(run(reference, *call), run(other, *call), tolerance), True
        except VerificationError as error:
            if error.comparison is None:
                raise
            comparison, agree = error.comparison, False
        except (RuntimeError, AssertionError) as error:  # the latter from an exported program
            shapes = " and ".join(shape_text(x.shape) for x in (*call[0], *call[1].values()) if hasattr(x, "shape"))
            raise ReparamError(f"inputs of {shapes} do not fit {first} or {second}: {error}") from error
    if as_json:
        error_or_null = comparison.largest_error if math.isfinite(comparison.largest_error) else None
        measured = {**asdict(comparison), "largest_error": error_or_null}
        print_json({"a": str(first), "b": str(second), "agree": agree, **measured})
    elif agree and not quiet:
        print(f"{first} and {second} agree: {comparison}")
    if not agree:
        raise VerificationError(f"{first} and {second} disagree: {comparison}", comparison)
