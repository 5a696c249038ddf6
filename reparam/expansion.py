"""``expand``: the way back. Plain convolutions become over-parameterised blocks that compute the same.

A network with plain convolutions trains better, or not, when each is a sum of branches in training; ``compile`` turns
the trained network into the plain one again.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from reparam import compare
from reparam.algebra import Conv
from reparam.compiler import CompiledModel, compile
from reparam.errors import ReparamError, VerificationError
from reparam.graph.graph import Graph
from reparam.graph.leaves import carries_hooks
from reparam.graph.text import operator_text
from reparam.models import blocks
from reparam.models.blocks import Builder

Where: TypeAlias = "Callable[[str, nn.Conv2d], bool] | str | Sequence[str] | None"
_TOLERANCE = 1e-9


def expand(
    model: nn.Module,
    block: str | Builder = "mobileone",
    where: Where = None,
    *,
    example_inputs: Any = None,
) -> nn.Module:
    """Return a copy of a model in which convolutions are over-parameterised blocks, and which computes the same.

    A block starts from its own random initialisation. Its norms are made the identity, and one parameter, the kernel
    of its plain branch, is given what all others leave missing of the convolution's kernel. So in eval mode the copy
    computes what the model computes; each block is verified in float64. In training mode norms use the statistics of
    the batch: with ``example_inputs`` they start as the identity on that batch in training mode too, and without them
    a block's branches start out normalised, so that the copy's training-mode output is another one.

    Args:
        model: Any module, in any mode. It is not changed.
        block: The name of a block in ``reparam.models.blocks``, or whatever makes a module from ``(in_channels,
            out_channels, kernel_size, stride=, padding=, dilation=, groups=)``, such as
            ``functools.partial(MobileOneBlock, branches=6)``; the spatial arguments are pairs (height, width). The
            module must compile to the one convolution of this geometry.
        where: Which convolutions: a predicate of path and ``nn.Conv2d``, or one or more patterns of paths, such as
            ``"stages.*.conv1"``. Every one that can be expanded when left out. A convolution that is called at
            several places, or whose weights are tied to another's of the same geometry, becomes one block there.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments: a batch to train on, as large
            as training will see. The norms take their first statistics from it, and the whole copy is compared with
            the model on it.

    Returns:
        The copy, in the mode and precision, and on the device of the model.

    Raises:
        ReparamError: Nothing was selected, a selected convolution cannot be expanded, or ``block`` is not a linear
            block in which the kernel can be solved for.
        ModelError: There is no block of this name.
        VerificationError: A block, or the whole copy, would not compute what the model computes.
    """
    if not isinstance(model, nn.Module):
        raise ReparamError(f"expand takes an nn.Module, not {type(model).__name__}")
    build = _builder(block)
    try:
        expanded = copy.deepcopy(model)
    except Exception as error:
        raise ReparamError(f"the model cannot be copied: {error}") from error
    blocks = []
    for site, made in _made(build, _selected(expanded, where), explicit=where is not None):
        blocks.append(_equal(made, site))
        for path in site.paths:
            expanded = _put(expanded, path, blocks[-1])
    if example_inputs is not None:
        _start_from(expanded, blocks, example_inputs)
        _compare(model, expanded, example_inputs)
    return expanded


def _builder(block: str | Builder) -> Builder:
    if isinstance(block, str):
        return blocks.builder(block)
    if not callable(block):
        raise ReparamError(f"block must be a block's name or a function that makes one, not {block!r}")
    return block


# Which convolutions.


@dataclass
class _Site:
    """One convolution, with every path at which the model has it."""

    conv: nn.Conv2d
    paths: list[str]
    obstacle: str | None = field(default=None)

    def __str__(self) -> str:
        return f"'{self.paths[0]}'" if self.paths[0] else "the model itself"


def _selected(model: nn.Module, where: Where) -> list[_Site]:
    """The sites that ``where`` selects, with what stands in their way.

    Raises:
        ReparamError: It selects none, or one of its patterns does.
    """
    sites = _sites(model)
    if where is None:
        return sites
    if callable(where):
        chosen = [site for site in sites if any(where(path, site.conv) for path in site.paths)]
        if not chosen:
            raise ReparamError(f"where is true of none of the {len(sites)} convolutions: nothing to expand")
        return chosen
    patterns = [where] if isinstance(where, str) else list(where)
    paths = [path for site in sites for path in site.paths]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            like = difflib.get_close_matches(pattern, paths) or paths[:5]
            raise ReparamError(
                f"where={pattern!r} matches none of the {len(paths)} convolutions: "
                f"{'their paths are such as ' + ', '.join(like) if like else 'the model has no nn.Conv2d'}"
            )
    return [site for site in sites if any(fnmatchcase(path, pattern) for path in site.paths for pattern in patterns)]


def _sites(model: nn.Module) -> list[_Site]:
    """Every convolution; those with all their tensors and arguments in common are one."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    sites: dict[Any, _Site] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            obstacle = _obstacle(module)
            # What is no plain convolution may compute anything, and is equal to itself only.
            key = _key(module) if obstacle is None else id(module)
            sites.setdefault(key, _Site(module, [], obstacle)).paths.append(path)
    keys = {id(model.get_submodule(path)): key for key, site in sites.items() for path in site.paths}
    for key, site in sites.items():
        others = [
            o for p in (site.conv.weight, site.conv.bias) for o in owners.get(id(p), []) if keys.get(id(o)) != key
        ]
        if others and site.obstacle is None:
            site.obstacle = f"its weights are tied to a {type(others[0]).__name__} that computes something else"
    return list(sites.values())


def _key(conv: nn.Conv2d) -> Any:
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.training)
    return id(conv.weight), id(conv.bias), *geometry


def _obstacle(conv: nn.Conv2d) -> str | None:
    """Why this is not a plain convolution with zero padding, if it is not."""
    cls = type(conv)
    if cls.forward is not nn.Conv2d.forward or cls._conv_forward is not nn.Conv2d._conv_forward:
        return f"its class, {cls.__name__}, has a forward of its own"
    if "forward" in conv.__dict__ or carries_hooks(conv):
        return "it has hooks, or a forward of its own"
    if "weight" not in conv._parameters or nn.parameter.is_lazy(conv.weight):
        return "its weight is computed, or not there yet"
    if conv.weight.is_meta:
        return "its weight has no values"
    if conv.padding_mode != "zeros":
        return f"it pads by {conv.padding_mode}, and blocks pad zeros"
    if _padding(conv) is None:
        return "it pads one side more than the other"
    return None


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """(height, width), None when the two sides of an axis differ."""
    if isinstance(conv.padding, tuple):
        return conv.padding[0], conv.padding[1]
    if conv.padding == "valid":
        return 0, 0
    height, width = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return None if height % 2 or width % 2 else (height // 2, width // 2)


# The blocks.


def _made(build: Builder, sites: Sequence[_Site], *, explicit: bool) -> Iterator[tuple[_Site, nn.Module]]:
    """Every site with a block of its geometry.

    Sites that cannot have one are passed over, or, when they were selected explicitly, refused.

    Raises:
        ReparamError: A site is refused, or there is none left.
    """
    reasons = []
    for site in sites:
        if site.obstacle is None:
            try:
                yield site, _build(build, site.conv)
                continue
            except ReparamError as error:
                site.obstacle = str(error)
        if explicit:
            raise ReparamError(f"{site} cannot be expanded: {site.obstacle}; leave it out with where=")
        reasons.append(f"{site}: {site.obstacle}")
    if len(reasons) == len(sites):
        why = f", such as {reasons[0]}" if reasons else ""
        raise ReparamError(f"none of the model's {len(sites)} convolutions can be expanded{why}")


def _build(build: Builder, conv: nn.Conv2d) -> nn.Module:
    padding = _padding(conv)
    assert padding is not None
    made = build(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        stride=(conv.stride[0], conv.stride[1]),
        padding=padding,
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
    )
    if not isinstance(made, nn.Module):
        raise ReparamError(f"the block is a {type(made).__name__}, not an nn.Module")
    return made


@torch.no_grad()
def _equal(block: nn.Module, site: _Site) -> nn.Module:
    """The block, computing what the convolution computes, in its precision and mode and on its device.

    Raises:
        ReparamError: It cannot: it is not one convolution, or no parameter enters its kernel as a plain kernel does.
    """
    plain = copy.deepcopy(site.conv).to("cpu", torch.float64).eval()
    plain.weight.requires_grad_(False)
    block = block.to("cpu", torch.float64)
    for norm in _norms(block):
        norm.reset_running_stats()
        norm.weight.fill_((1 + norm.eps) ** 0.5)
        norm.bias.zero_()
    scale = _convolution(block, plain, site).kernel.abs().max().item()
    _solve(block, plain, "weight", site)
    if plain.bias is not None or _convolution(block, plain, site).bias is not None:
        _solve(block, plain, "bias", site)
    error = _difference(block, plain, scale)
    if not error <= _TOLERANCE:
        raise VerificationError(
            f"the block for {site} differs from the convolution by {error:.1e} of the largest output: it is not linear "
            "in eval mode, or does not pad like the convolution"
        )
    weight = site.conv.weight
    return block.to(weight.device, weight.dtype).train(site.conv.training).requires_grad_(weight.requires_grad)


def _solve(block: nn.Module, plain: nn.Conv2d, name: str, site: _Site) -> None:
    """Change one parameter so that the block's kernel (or bias) is the convolution's.

    A kernel in a sum of branches enters the total as ``T(w) = g·w + rest``, with a factor g for each number: what the
    norm and the scale behind it make of it. Two compilations show g, and ``w + (target - T(w)) / g`` is solved for.
    That T is of this form is not assumed: a parameter is taken only if the result is the target.
    """
    now = _convolution(block, plain, site)
    before = _value(now, name)
    given: Tensor | None = getattr(plain, name)
    target = torch.zeros_like(before) if given is None else given
    if torch.equal(before, target):
        return
    other = "bias" if name == "weight" else "weight"
    scale = before.abs().max().item()  # of what is to cancel, where the target is zero
    for parameter in block.parameters():
        if parameter.squeeze().shape != target.squeeze().shape or not parameter.is_floating_point():
            continue
        start = parameter.clone()
        parameter.add_(1)
        gain = _value(_convolution(block, plain, site), name) - before
        parameter.copy_(start)
        if not gain.abs().min() > 0:
            continue
        parameter.add_(((target - before) / gain).view_as(parameter))
        after = _convolution(block, plain, site)
        rest = _value(after, other), _value(now, other)
        if _close(_value(after, name), target, scale) and _close(*rest, scale):
            return
        parameter.copy_(start)
    raise ReparamError(
        f"the block for {site} cannot be given the convolution's {name}: no parameter of shape {tuple(target.shape)} "
        f"enters it directly; a block needs {'a plain kernel' if name == 'weight' else 'a norm or a bias'} in its sum"
    )


def _value(conv: Conv, name: str) -> Tensor:
    if name == "weight":
        return conv.kernel
    return conv.kernel.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _close(actual: Tensor, expected: Tensor, scale: float) -> bool:
    return bool((actual - expected).abs().max() <= _TOLERANCE * max(scale, expected.abs().max().item()))


def _convolution(block: nn.Module, plain: nn.Conv2d, site: _Site) -> Conv:
    """The one convolution that the block compiles to, with the taps of the plain one."""
    compiled = compile(nn.Sequential(block), verify=False)
    found: list[object] = []
    if isinstance(compiled, CompiledModel):
        graph = Graph(compiled.graph, dict(compiled.named_modules()))
        found = [graph.op(node) for node in compiled.graph.nodes if node.op.startswith("call_")]
    match found:
        case [Conv() as conv]:
            pass
        case _:
            raise ReparamError(
                f"the block for {site} is not one convolution; reparam.explain(block) says what keeps it from being one"
            )
    if conv.weight.shape != plain.weight.shape or (conv.groups, conv.stride) != (plain.groups, plain.stride):
        raise ReparamError(f"the block for {site} compiles to {operator_text(conv)}, and not to {plain}")
    return conv


def _difference(block: nn.Module, plain: nn.Conv2d, scale: float) -> float:
    """Largest difference on random images that reach every border and every phase of the stride.

    Relative to the largest output, or to ``scale``, which is that of a kernel's numbers, where that is larger.
    """
    generator = torch.Generator().manual_seed(0)
    block = copy.deepcopy(block).eval()
    reach = [d * (k - 1) + 2 * s for k, s, d in zip(plain.kernel_size, plain.stride, plain.dilation, strict=True)]
    largest = 0.0
    for more in range(max(plain.stride)):
        size = [extent + 2 + more for extent in reach]
        x = torch.randn(2, plain.in_channels, *size, generator=generator, dtype=torch.float64)
        expected, actual = plain(x), block(x)
        if actual.shape != expected.shape:
            return float("inf")
        largest = max(largest, (actual - expected).abs().max().item() / max(scale, expected.abs().max().item()))
    return largest


def _put(model: nn.Module, path: str, block: nn.Module) -> nn.Module:
    """The model with the block at a path."""
    if not path:
        return block
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, block)
    return model


# Norms.


def _norms(block: nn.Module) -> Iterator[Any]:
    """The norms whose eval mode is an affine of its own."""
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.running_mean is not None:
            yield module


def _set_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """New running statistics, and the weight and bias with which the norm computes what it did: ``s·x + t``."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - scale * norm.running_mean.double()
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(scale * (norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(shift + scale * norm.running_mean.double())


@torch.no_grad()
def _start_from(model: nn.Module, blocks: Iterable[nn.Module], inputs: Any) -> None:
    """Give the blocks' norms the statistics of what they will see in training; in eval mode they compute the same."""
    norms = list(dict.fromkeys(norm for block in blocks for norm in _norms(block)))
    # The same objects in the copy: what else the model does in training mode must not be seen in it.
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(model, memo)
    args, kwargs = compare.as_call(inputs)
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with _observing([memo[id(norm)] for norm in norms]) as seen, torch.random.fork_rng(gpus):
        twin.train()
        for norm in norms:
            memo[id(norm)].eval()
        try:
            twin(*args, **kwargs)
        except Exception as error:
            raise ReparamError(f"the model does not run on the example inputs in training mode: {error}") from error
    for norm in norms:
        moments = seen.get(memo[id(norm)])
        if moments is not None:
            _set_statistics(norm, *moments.result())


@dataclass
class _Moments:
    """Count, sum and sum of squares of every channel, over all calls."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in ``(N, C, ...)``."""
        rows = x.detach().double().movedim(1, 0).flatten(1)
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, as a norm in training mode has them."""
        mean = torch.as_tensor(self.total) / self.count
        return mean, (torch.as_tensor(self.squares) / self.count - mean.square()).clamp_min(0)


@contextmanager
def _observing(norms: Iterable[nn.Module]) -> Iterator[dict[nn.Module, _Moments]]:
    """The moments of what each norm reads meanwhile."""
    seen: dict[nn.Module, _Moments] = {}

    def observe(norm: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(norm, _Moments()).add(args[0])

    handles = [norm.register_forward_pre_hook(observe) for norm in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _compare(model: nn.Module, expanded: nn.Module, inputs: Any) -> None:
    """Compare the whole copy with the model in eval mode."""
    try:
        compare.verify(model, expanded, inputs)
    except VerificationError as error:
        raise VerificationError(f"the expanded model does not compute what the model computes: {error}") from error
