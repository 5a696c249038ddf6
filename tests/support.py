"""What several test modules need: timm beside a CPU build of PyTorch, and models with lived-in statistics."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARIES: list[torch.library.Library] = []


def declare_torchvision_ops() -> None:
    """Declare the operators that a CUDA torchvision registers, so that ``import timm`` works on a CPU torch.

    PyPI's torchvision loads its C++ operators only beside the CUDA build it was made for, and its
    ``_meta_registrations`` then fails on names that do not exist. Their schemas are enough to import it.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _LIBRARIES:
        return
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    _LIBRARIES.append(library)
    names = set(re.findall(r'register_meta\("(\w+)"', source)) | set(re.findall(r"torchvision::(\w+)", source))
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")


class Net(nn.Module):
    """A forward, and the layers that it calls."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


class BlockNet(Net):
    """A convolution, its norm and a linear layer, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        super().__init__(forward, block=block, head=nn.Linear(4, 5), scale=nn.Parameter(torch.ones(5)))


def asserts(net: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 3
    return net.block(x)


def pads(net: Any, x: Tensor) -> Tensor:
    bottom = -x.shape[2] % 4
    return net.block(F.pad(x, (0, 0, 0, bottom)))[:, :, : x.shape[2]] if len(x.shape) == 4 else x


def assigns(net: Any, x: Tensor) -> Tensor:
    assert x.ndim == 4
    y = net.block(x).relu()
    y[:, :1] = 0
    y[:, 1:2] += 1
    return y.relu_()


class ModelOutput(OrderedDict[str, Any]):
    """An output as those of transformers: a dict with attributes, which leaves out what is None."""

    def __init__(self, logits: Any = None, hidden: Any = None) -> None:
        super().__init__((k, v) for k, v in {"logits": logits, "hidden": hidden}.items() if v is not None)
        self.logits, self.hidden = logits, hidden

    def __reduce__(self) -> Any:
        return type(self), (self.logits, self.hidden)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm statistics and every parameter a value that a fusion error would show up in."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.modules.batchnorm._NormBase) and name == "weight":
                    uniform(parameter, 0.5, 1.5)
                elif parameter.dim() < 2:
                    uniform(parameter, -0.5, 0.5)
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 1.5)
    return model


_KINDS = {
    "convolution": "convolution",
    "linear": "linear",
    "addmm": "linear",
    "mm": "linear",
    "bmm": "linear",
    "native_batch_norm": "norm",
    "_native_batch_norm_legit_no_training": "norm",
    "native_layer_norm": "norm",
    "native_group_norm": "norm",
    "add": "elementwise",
    "sub": "elementwise",
    "mul": "elementwise",
    "div": "elementwise",
    "neg": "elementwise",
}


class _CallCounter(TorchDispatchMode):
    """Counts ATen calls by kind, whatever module, function or traced graph they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith("empty"):
            self.calls["kernels"] += 1
            self.calls[_KINDS.get(name.removesuffix("_"), "other")] += 1
        return function(*args, **(kwargs or {}))


def count_calls(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """Count the kernels that ``model(x)`` launches, as "convolution", "linear", "norm", "elementwise", "other".

    Element-wise means arithmetic; activations are "other". "kernels" is the total: views and allocations are free.
    """
    with torch.no_grad(), _CallCounter() as counter:
        model(x)
    return counter.calls
