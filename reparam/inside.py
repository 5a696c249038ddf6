"""Inside of modules that run as Python: every part that can be traced is compiled on its own and put in its place.

Parents keep their Python. A child is replaced as a whole where the parents could not tell (:mod:`reparam.mentions`);
otherwise its own Python stays, too, and its children are next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from reparam.capture import carries_hooks, unchanged
from reparam.lift import is_leaf
from reparam.mentions import Mentions
from reparam.report import Remark
from reparam.verify import run

if TYPE_CHECKING:
    from reparam.compiler import Call, CompiledModel


# Reasons that are nobody's loss.
NOTHING_TO_DO, NO_FORWARD = "nothing in it can be fused", "it has no forward"
UNREMARKABLE = frozenset([NOTHING_TO_DO, NO_FORWARD])

# Compiles a child, or says why it cannot be.
CompileChild = Callable[[nn.Module, "Call | None", str], "CompiledModel | str"]


def compile_children(
    opaque: Mapping[str, nn.Module],
    compile_child: CompileChild,
    calls_of: Callable[[Iterable[nn.Module]], Mapping[nn.Module, Recorded]],
) -> tuple[list[CompiledModel], list[Remark]]:
    """Compile what lies inside of modules that run as Python, and put it in its place.

    Args:
        opaque: These modules, by path. Their children are replaced in them.
        compile_child: Compiles one child, given a call of it where one was seen, or returns the reason why not.
        calls_of: How the model calls some modules on the example inputs.

    Returns:
        What took the place of children, and remarks that say which were compiled, which were not, and why.
    """
    kept = dict(opaque)
    reasons: dict[nn.Module, str] = {}
    made: dict[nn.Module, CompiledModel | str] = {}
    recorded: dict[nn.Module, Recorded] = {}
    # What is kept can only grow, and with it what the kept Python mentions.
    while True:
        mentions = Mentions(module for module in kept.values() if not isinstance(module, torch.jit.ScriptModule))
        children = list(_children(kept))
        new = [child for _, _, _, child in children if child not in recorded]
        recorded |= {child: Recorded() for child in new} | dict(calls_of(new))
        refused: dict[str, nn.Module] = {}
        for _, name, path, child in children:
            reason = _own_obstacle(child) or mentions.obstacle(name, child) or recorded[child].obstacle()
            if reason is None:
                if child not in made:
                    made[child] = compile_child(child, recorded[child].call, path)
                outcome = made[child]
                reason = outcome if isinstance(outcome, str) else None
            if reason is not None and child not in refused.values():
                refused[path] = child
                reasons[child] = reason
        if not refused:
            break
        kept |= refused
    paths: dict[CompiledModel, str] = {}
    for parent, name, path, child in children:
        compiled = made[child]
        assert not isinstance(compiled, str)
        parent._modules[name] = compiled
        paths.setdefault(compiled, path)
    said = "compiled on its own: it is called by Python that was not traced"
    remarks = [Remark("capture", "Inside", path, said) for path in paths.values()]
    for path, child in kept.items():
        if child in reasons and reasons[child] not in UNREMARKABLE:
            message = f"{type(child).__name__} is kept as Python: {reasons[child]}"
            remarks.append(Remark("capture", "Inside", path, message))
    return list(paths), remarks


def _children(kept: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Parent, name, path and module of every child that may still be replaced."""
    known = set(kept.values())
    for path, parent in kept.items():
        # What is scripted reads nothing of Python, and takes none of it in.
        for name, child in () if isinstance(parent, torch.jit.ScriptModule) else parent._modules.items():
            if child is not None and child not in known and not is_leaf(child):
                yield parent, name, f"{path}.{name}" if path else name, child


def _own_obstacle(child: nn.Module) -> str | None:
    """Why a child cannot be taken for its forward alone."""
    if isinstance(child, torch.jit.ScriptModule):
        return "it is scripted"
    if type(child).forward is nn.Module.forward:
        return NO_FORWARD
    return "it carries hooks" if carries_hooks(child) else None


@dataclass
class Recorded:
    """How a module was called in one run of the model.

    Attributes:
        call: Its first call, on copies of the tensors; None when there was none.
        alike: Whether all calls agree in structure, types and ranks, and in what is no tensor.
    """

    call: Call | None = None
    alike: bool = True
    signature: Any = None

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note one call."""
        signature = torch.utils._pytree.tree_map(_kind, (args, kwargs))
        if self.call is None:
            self.call = torch.utils._pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            self.signature = signature
        self.alike = self.alike and bool(signature == self.signature)

    def obstacle(self) -> str | None:
        """Why one trace cannot stand for all calls."""
        return None if self.alike else "it is called in several ways"


def _kind(value: Any) -> Any:
    return (Tensor, value.dtype, value.dim()) if isinstance(value, Tensor) else value


def record(root: nn.Module, call: Call, modules: Iterable[nn.Module]) -> dict[nn.Module, Recorded]:
    """Run a model, and note how it calls some of its modules."""
    recorded = {module: Recorded() for module in modules}
    if not recorded:
        return {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded[module].add(args, kwargs)

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in recorded
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        with unchanged(root):
            run(root, *call)
    finally:
        for handle in handles:
            handle.remove()
    return recorded
