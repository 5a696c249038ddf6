"""Random modules with Python in them: caches, decorators, branches by size and type, structures of many classes.

A module is drawn as its source, which a failure prints, and which can be pasted into a test.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from support import randomise

# What a forward may say between convolutions: x is an image of four channels before and after. In a first part, what
# its constructor says; # stands for a number of its own.
STATEMENTS: dict[str, tuple[str, str]] = {
    # Layers.
    "conv and norm": (
        "self.conv# = nn.Conv2d(4, 4, 3, padding=1, bias=False)\nself.norm# = nn.BatchNorm2d(4)",
        "x = self.norm#(self.conv#(x))",
    ),
    "branches": (
        "self.a# = nn.Conv2d(4, 4, 3, padding=1)\nself.b# = nn.Conv2d(4, 4, 1)\nself.norm# = nn.BatchNorm2d(4)",
        "x = self.norm#(self.a#(x)) + self.b#(x)",
    ),
    "stride": ("self.conv# = nn.Conv2d(4, 4, 3, 2, 1)", "x = self.conv#(x)"),
    "layers by name": (
        "self.conv#_0, self.conv#_1 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)",
        'for i in range(2):\n    x = x + getattr(self, f"conv#_{i}")(x)',
    ),
    "a list of layers": (
        "self.list# = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3))",
        "ys = [x]\nfor layer in self.list#[1:]:\n    ys.append(layer(ys[-1]))\nx = sum(ys) / len(ys)",
    ),
    "a dict of layers": (
        'self.dict# = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.BatchNorm2d(4)})',
        'x = sum(layer(x) for key, layer in self.dict#.items() if key in ("a", "b"))',
    ),
    "checkpoint": (
        "self.conv# = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))",
        "x = torch.utils.checkpoint.checkpoint(self.conv#, x, use_reentrant=False)",
    ),
    "layer norm": ("self.norm# = nn.LayerNorm(4)", "x = self.norm#(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"),
    # Activations.
    "relu": ("", "x = torch.relu(x)"),
    "relu layer": ("self.act# = nn.ReLU(inplace=True)", "x = self.act#(x)"),
    "where": ("", "x = torch.where(x > 0, x, 0.1 * x)"),
    "where a number": ("", "x = torch.where(x > 0, x, 0.1)"),
    "gate": ("self.fc# = nn.Conv2d(4, 4, 1)", "x = x * self.fc#(x.mean((2, 3), keepdim=True)).sigmoid()"),
    "maximum of a list": ("", "x = functools.reduce(torch.maximum, [x, -x, x * 0.5])"),
    # Parts of values.
    "unpacked chunks": ("", "a, b = x.chunk(2, 1)\nx = torch.cat((b, a), 1)"),
    "starred chunks": ("", "first, *rest = x.chunk(4, 1)\nx = torch.cat([*rest, first], dim=1)"),
    "list of a split": (
        "self.conv# = nn.Conv2d(2, 2, 3, padding=1)",
        "y = list(x.split((2, 2), 1))\ny.append(self.conv#(y[-1]))\nx = torch.cat([y[0], y[-1]], 1)",
    ),
    "chunks of rows": ("", "x = torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(2, 2))], 2)"),
    "rows in four": ("", "x = torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(4, 2))], 2)"),
    "the first rows": ("", "x = torch.cat([x, x.split(2, 2)[0]], 2)"),
    "unbind of images": ("", "x = torch.stack([y * 2 for y in x.unbind()])"),
    "rows by number": ("", "x = torch.stack([x[:, :, i] for i in range(x.shape[2])], 2)"),
    "images by iteration": ("", "x = torch.stack([y + 1 for y in x])"),
    "slices": ("", "x = torch.cat([x[..., ::2, :], x[..., 1::2, :]], -2)"),
    "a column by index": ("", "x = x - x[..., -1:]"),
    "rows by a tensor of indices": ("", "x = x[:, :, torch.arange(x.shape[2] - 1, -1, -1)]"),
    "all but a size": ("", "x = x[:, :, : x.shape[2] - 1]"),
    # Sizes.
    "shuffle": ("", "b, c, h, w = x.shape\nx = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)"),
    "tokens": (
        "self.fc# = nn.Linear(4, 4)",
        "b, c, *size = x.shape\nx = self.fc#(x.flatten(2).mT).mT.reshape(b, c, *size)",
    ),
    "reshape by number of elements": ("", "s = x.shape\nx = x.reshape(len(x), x[0].numel()).tanh().reshape(s)"),
    "the same size again": ("", "y = F.interpolate(x, scale_factor=2)\nx = F.interpolate(y, size=x.shape[-2:])"),
    "positions": ("", "x = x + torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) / x.shape[-1]"),
    "grid": (
        "",
        "ys, xs = torch.meshgrid(torch.linspace(0, 1, x.shape[2]), torch.linspace(0, 1, x.size(3)), indexing='ij')\n"
        "x = x + (ys * xs).to(x)",
    ),
    "a number of a size": ("", "x = x * (x.shape[2] ** -0.5)"),
    "root of an area": ("", "x = x / math.sqrt(x.shape[2] * x.shape[3])"),
    "a tensor of a size": ("", "x = x * torch.tensor(x.shape[2] / 8, dtype=x.dtype)"),
    "pad to even": ("", "x = F.pad(x, (0, x.shape[3] % 2, 0, -x.shape[2] % 2))"),
    "same padding": (
        "self.conv# = nn.Conv2d(4, 4, 3, 2)",
        "p = [max((-(-s // 2) - 1) * 2 + 3 - s, 0) for s in x.shape[-2:]]\n"
        "x = self.conv#(F.pad(x, (p[1] // 2, p[1] - p[1] // 2, p[0] // 2, p[0] - p[0] // 2)))",
    ),
    "pool to a size": ("", "x = F.adaptive_avg_pool2d(x, (x.shape[2] // 2 + 1, x.shape[3]))"),
    "smaller of sizes": ("", "n = min(x.shape[2:])\nx = x[:, :, :n, :n]"),
    "rounded size": ("", "x = x[:, :, : round(x.shape[2] * 0.8)]"),
    "whole part of a size": ("", "x = x[..., : int(x.shape[3] / 1.5) + 1]"),
    "divmod": ("", "n, rest = divmod(x.shape[2], 2)\nx = x * (n + rest)"),
    "sorted sizes": ("", "small, large = sorted(x.shape[2:])\nx = x * (small / large)"),
    "common divisor": ("", "x = x / math.gcd(x.shape[2], x.shape[3])"),
    "bits of a size": ("", "x = x * (1 + (x.shape[2] & 1)) + (x.shape[3] >> 1)"),
    "product of sizes": ("", "x = x / math.prod(x.shape[2:])"),
    # Branches by size.
    "even": ("", "if x.shape[2] % 2 == 0:\n    x = x * 2"),
    "not even": ("", "x = x + 1 if not x.shape[-1] % 2 else x - 1"),
    "at least": ("", "if x.shape[-1] >= 9:\n    x = x.relu()"),
    "between": ("", "if 7 < x.shape[2] < 11:\n    x = -x"),
    "wide": ("", "h, w = x.shape[-2:]\nif w > h:\n    x = x.flip(-1)"),
    "square": ("", "if x.shape[2] == x.shape[3]:\n    x = x.transpose(2, 3)"),
    "area": ("", "if x[0, 0].numel() > 90:\n    x = x * 0.5"),
    "batch": ("", "x = x * (2 if x.shape[0] > 1 else 3)"),
    "one image": ("", "if len(x) == 1:\n    x = x.squeeze(0).unsqueeze(0) + 1"),
    "truth of a size": ("", "x = x * (x.shape[2] // 10 or 7)"),
    "larger of a size": ("", "x = x * max(x.shape[2] - 8, 1)"),
    "same shape": ("", "y = x[:, :, :8]\nif y.shape == x.shape:\n    x = x + y"),
    "sizes in a set": ("", "if len({x.shape[2], x.shape[3]}) == 1:\n    x = x * 3"),
    "size in a tuple": ("", "if x.shape[2] in (8, 12):\n    x = x * 1.5"),
    "size in a text": ("", 'x = x * {"8x8": 2.0, "9x12": 3.0}.get("%dx%d" % tuple(x.shape[2:]), 1.0)'),
    "size in a format": ("", 'x = x * len(f"{x.shape[2]}")'),
    "loop to a size": ("", "n = 1\nwhile n * 4 < x.shape[2]:\n    n += 1\nx = x * n"),
    "view that may fail": (
        "",
        "try:\n    x = x + x.reshape(x.shape[0], 2, -1, 5).sum()\nexcept RuntimeError:\n    x = x * 2",
    ),
    "any of": ("", "if any(s % 2 for s in x.shape[2:]):\n    x = x.relu()"),
    "switch": ("", "match x.shape[2] % 3:\n    case 0:\n        x = x + 1\n    case 1:\n        x = x + 2"),
    # Types.
    "a tensor": ("", "x = x + 1 if isinstance(x, torch.Tensor) else x"),
    "a number": ("", "x = x * (2 if isinstance(x.shape[2], int) else 3)"),
    "type": ("", "x = x * (2 if x.dtype == torch.float64 else 3)"),
    "rank": ("", "x = x if x.ndim == 4 and x.dim() > 2 else x[None]"),
    "of what type": ("", "x = x.float().to(x.dtype) if not x.is_floating_point() else x.to(x)"),
    "contiguous": ("", "x = x.permute(0, 2, 3, 1)\nx = x.permute(0, 3, 1, 2) * (2 if x.is_contiguous() else 3)"),
    "gradients": ("", "x = x * 2 if not x.requires_grad else x"),
    "limits": ("", "x = x.clamp(torch.finfo(x.dtype).min / 2, 5)"),
    # Memory.
    "add in place": ("", "x.add_(1)"),
    "augmented": ("", "x *= 2\nx += x"),
    "item of channels": ("", "x[:, 0] = 1"),
    "item of columns": ("", "x[..., 0] = x[..., 1]"),
    "item of a copy": ("", "y = x.clone()\ny[:, :, 1:] = x[:, :, :-1]\nx = y - x"),
    "slice in place": ("", "x[:, :2].mul_(3)"),
    "view in place": ("", "y = x.view(len(x), -1)\ny += 0.5"),
    "chunk in place": ("", "for i, part in enumerate(x.chunk(2, 1)):\n    part.mul_(i + 1)"),
    "out": ("", "y = torch.empty_like(x)\ntorch.add(x, 1, out=y)\nx = y"),
    "out, twice": ("", "y = torch.zeros_like(x)\ntorch.mul(x, 2, out=y)\nz = y + 0\ntorch.mul(x, 3, out=y)\nx = y + z"),
    "filled buffer": ("", "y = x.new_zeros(x.shape)\ny[:, :2] = x[:, 2:]\ny[:, 2:] = x[:, :2]\nx = y"),
    "copied to": ("", "y = torch.zeros(x.shape, dtype=x.dtype)\ny.copy_(x)\nx = y.relu_()"),
    "old and new": ("", "y = x\nx = x.clone().mul_(2)\nx = x + y"),
    "mask in place": ("", "x[x < 0] *= 0.1"),
    "mask filled": ("", "x = x.masked_fill(x < 0, x.shape[2])"),
    # State.
    "cache by shape": (
        "self.shape#, self.grid# = None, None",
        "if self.shape# != x.shape[2:]:\n"
        "    self.shape#, self.grid# = x.shape[2:], torch.arange(x.shape[3], dtype=x.dtype) / 9\n"
        "x = x + self.grid#",
    ),
    "cache in a dict": (
        "self.cache# = {}",
        "key = (x.shape[2], x.shape[3])\nif key not in self.cache#:\n"
        "    self.cache#[key] = torch.linspace(0, 1, key[1], dtype=x.dtype)\nx = x * self.cache#[key]",
    ),
    "cache that grows": (
        "self.table# = torch.zeros(0)",
        "if len(self.table#) < x.shape[3]:\n    self.table# = torch.arange(x.shape[3] * 1.0)\n"
        "x = x + self.table#[: x.shape[3]].to(x.dtype)",
    ),
    "cache of a buffer": (
        'self.register_buffer("grid#", torch.zeros(0), persistent=False)',
        "if self.grid#.shape[-1:] != x.shape[-1:]:\n    self.grid# = torch.arange(x.shape[-1]).to(x)\n"
        "x = x + self.grid#",
    ),
    "memoised": ("", "x = x + memoised(x.shape[2], x.shape[3]).to(x.dtype)"),
    "made once": (
        "self.once# = None",
        "if self.once# is None:\n    self.once# = torch.full((4, 1, 1), 2.0)\nx = x * self.once#.to(x)",
    ),
    "merged weight": (
        "self.conv# = nn.Conv2d(4, 4, 3, padding=1)\nself.merged# = None",
        "self.merged# = self.conv#.weight * 2\nx = F.conv2d(x, self.merged#, self.conv#.bias, padding=1)",
    ),
    "last size": ("self.last# = None", "self.last# = tuple(x.shape)\nx = x * self.last#[2]"),
    "last value": ("self.last# = None", "self.last# = x.mean()\nx = x - self.last#"),
    "the value before": (
        "self.before# = None",
        "y = x if self.before# is None or self.before#.shape != x.shape else x + self.before#\n"
        "self.before# = x.clone()\nx = y",
    ),
    "counter": ("self.calls# = 0", "self.calls# += 1"),
    "counter that is read": ("self.calls# = 0", "self.calls# += 1\nx = x * (1 + self.calls# % 2)"),
    "counter in a buffer": ('self.register_buffer("calls#", torch.zeros(()))', "self.calls# += 1\nx = x + self.calls#"),
    "a list that grows": ("self.seen# = []", "self.seen#.append(1)\nx = x * len(self.seen#)"),
    "a list of sizes": ("self.seen# = []", "self.seen#[:] = [s for s in x.shape]\nx = x * self.seen#[2]"),
    "parameter": ("self.scale# = nn.Parameter(torch.ones(4, 1, 1))", "x = x * self.scale#.exp() + self.scale#.sum()"),
    # Values.
    "branch by value": ("", "if x.mean() > 0:\n    x = x * 2"),
    "item": ("", "x = x / (1 + x.abs().max().item())"),
    "list of values": ("", "x = x * max(x.mean((0, 2, 3)).tolist())"),
    "number of values": ("", "x = x * (x > 0).sum() + len((x > 0.5).nonzero())"),
    "all equal": ("", "x = x if torch.equal(x, x.relu()) else x.relu()"),
    "numpy": ("", "x = x + torch.from_numpy(x.detach().numpy().max(-1, keepdims=True))"),
    # What torch returns besides tensors.
    "values and indices": ("", "values, indices = x.max(2, keepdim=True)\nx = x - values + indices"),
    "values by name": ("", "x = x - x.sort(dim=3).values + x.min(dim=2, keepdim=True).indices"),
    "indices of pooling": (
        "",
        "y, where = F.max_pool2d(x, 2, return_indices=True)\nx = F.max_unpool2d(y, where, 2, output_size=x.shape)",
    ),
    "standard deviation and mean": ("", "s, m = torch.std_mean(x, dim=(2, 3), keepdim=True)\nx = (x - m) / (s + 1)"),
    "attention": (
        "self.mha# = nn.MultiheadAttention(4, 2, batch_first=True)",
        "y = x.flatten(2).mT\ny, weights = self.mha#(y, y, y)\nx = y.mT.reshape(x.shape)",
    ),
    "scaled dot product": (
        "",
        "y = x.flatten(2).mT\ny = F.scaled_dot_product_attention(y, y, y)\nx = y.mT.unflatten(-1, x.shape[2:])",
    ),
    "recurrent": ("self.gru# = nn.GRU(4, 4, batch_first=True)", "x = x + self.gru#(x.mean(2).mT)[0].mT.unsqueeze(2)"),
    "vmap": ("", "x = torch.vmap(lambda y: y * 2 - y.mean())(x)"),
    "einsum": ("", 'x = torch.einsum("bchw,bdhw->bchw", x, x)'),
    "top": ("", "x = x - x.topk(x.shape[2] // 2, dim=2).values.mean(2, keepdim=True)"),
    # More of sizes.
    "number of a shape": ("", "x = x / x.shape.numel() * x.shape[2:].numel()"),
    "shape and more": ("", "y = torch.ones(x.shape[2:] + (2,), dtype=x.dtype)\nx = x * y.sum(-1)"),
    "tensor of sizes": ("", "x = x * torch.tensor([x.shape[2], x.shape[3]], dtype=x.dtype).prod()"),
    "new tensor of sizes": ("", "x = x + x.new_tensor(x.shape[2:]).sum()"),
    "as tensor": ("", "x = x + torch.as_tensor(x.shape).sum()"),
    "sizes as ints": ("", "h, w = map(int, x.shape[-2:])\nx = x.reshape(-1, 4, h, w) * h"),
    "a float of a size": ("", "x = x * float(x.shape[2])"),
    "numpy of a size": ("", "import numpy\nx = x * float(numpy.sqrt(x.shape[2])) + int(numpy.prod(x.shape[2:]))"),
    "mask of a size": ("", "x = x @ torch.tril(torch.ones(x.shape[3], x.shape[3], dtype=x.dtype))"),
    "split by sizes": (
        "",
        "n = x.shape[2] // 2\na, b = torch.split(x, [n, x.shape[2] - n], 2)\nx = torch.cat([b, a], 2)",
    ),
    "narrow": ("", "x = x.narrow(2, 1, x.shape[2] - 1)"),
    "roll": ("", "x = x.roll((x.shape[2] // 2, 1), (2, 3))"),
    "windows": (
        "",
        "b, c, h, w = x.shape\nx = F.pad(x, (0, -w % 2, 0, -h % 2))\n"
        "y = x.unfold(2, 2, 2).unfold(3, 2, 2)\n"
        "x = x + y.amax((-1, -2)).repeat_interleave(2, 2).repeat_interleave(2, 3)",
    ),
    "fold": ("", "x = F.fold(F.unfold(x, 3, padding=1), x.shape[-2:], 3, padding=1)"),
    "broadcast shapes": ("", "x = x + torch.zeros(torch.broadcast_shapes(x.shape, (1,)), dtype=x.dtype)"),
    "a size by name": ("", "x = x * x.size(dim=2) + torch.numel(x)"),
    "ceil": ("", "x = x[..., : math.ceil(x.shape[3] / 2)]"),
    "floor of a float": ("", "x = F.interpolate(x, size=(math.floor(x.shape[2] * 1.5), x.shape[3]))"),
    "scale by a number": ("", "x = F.interpolate(x, scale_factor=1.5, mode='bilinear')"),
    "clamped size": ("", "x = x[:, :, : max(2, min(x.shape[2] - 1, 9))]"),
    "product of a list": ("", "x = x * functools.reduce(lambda a, b: a * b, x.shape[2:])"),
    "zip of sizes": ("", "x = x * sum(a * b for a, b in zip(x.shape[2:], (2, 3)))"),
    "sizes of a list": ("", "ys = [x, x[:, :, ::2]]\nx = x * max(y.shape[2] for y in ys)"),
    "largest of a list": ("", "ys = [x[:, :, ::2], x]\nx = max(ys, key=lambda y: y.shape[2])"),
    "size as a key": ("", 'x = x * {"even": 2, "odd": 3}["odd" if x.shape[2] & 1 else "even"]'),
    "size in a closure": ("", "n = x.shape[2]\n\ndef scaled(y):\n    return y * n\n\nx = scaled(x)"),
    "a generator": (
        "",
        "def rows():\n    for i in range(2):\n        yield x[:, :, i::2]\n\nx = torch.cat([*rows()], 2)",
    ),
    "size one": ("", "y = x.mean((2, 3))\nx = x + (y if y.shape[0] == 1 else y * 2)[:, :, None, None]"),
    # More of memory.
    "data": ("", "x.data.mul_(2)"),
    "detached": ("", "y = x.detach()\ny.add_(1)"),
    "swapped": ("", "y = x[:, 0].clone()\nx[:, 0] = x[:, 1]\nx[:, 1] = y"),
    "rows in place": ("", "for row in x.unbind(1):\n    row.mul_(2)"),
    "item by indices": ("", "x[:, [0, 2]] = x[:, [1, 3]] * 2"),
    "index fill": ("", "x.index_fill_(1, torch.tensor([0]), 3)"),
    "scatter": ("", "y = torch.zeros_like(x)\nx = y.scatter_(1, x.argmax(1, keepdim=True), 1.0) + x"),
    "item with a size": ("", "x[:, :, x.shape[2] // 2 :] = x.shape[3]"),
    "table filled": ("", "y = torch.zeros(2, 4, 1, 1, dtype=x.dtype)\ny[0] = 1\ny[1] = x.mean()\nx = x + y.sum(0)"),
    "transposed in place": ("", "x.transpose(1, 2)[:, 0] = 0.5"),
    "a copy's copy": ("", "import copy\ny = copy.copy(x)\ny = copy.deepcopy(x).add_(1)\nx = x + y"),
    "identity": ("", "y = x\nx = x.contiguous()\nx = x * 2 if y is x else x * 2"),
    "a dict of values": ("", "d = {x: 2}\nx = x * d[x]"),
    "version": ("", "x = x * (2 if x._version else 2)"),
    # More of state.
    "layer made late": ("", 'if not hasattr(self, "late#"):\n    self.late# = nn.ReLU()\nx = self.late#(x)'),
    "buffer made late": (
        "",
        'if not hasattr(self, "grid#"):\n    self.register_buffer("grid#", torch.ones(4, 1, 1).to(x))\n'
        "x = x + self.grid#",
    ),
    "training": (
        "self.drop# = nn.Dropout(0.5)",
        "x = self.drop#(x) if self.training else F.dropout(x, 0.5, self.training)",
    ),
    "a setting that is changed and put back": (
        "self.flag# = False",
        "self.flag# = True\ntry:\n    x = x * (2 if self.flag# else 3)\nfinally:\n    self.flag# = False",
    ),
    "a toggle": ("self.flag# = False", "self.flag# = not self.flag#\nx = x * (2 if self.flag# else 3)"),
    "a set of sizes": ("self.sizes# = set()", "self.sizes#.add(x.shape[2])\nx = x * len(self.sizes#)"),
    "a list of values": ("self.outputs# = []", "self.outputs#.append(x.mean())\nx = x + sum(self.outputs#[-1:])"),
    "a cleared list": (
        "self.outputs# = []",
        "self.outputs#.clear()\nself.outputs#.append(x)\nx = x + self.outputs#[0]",
    ),
    "a running mean": (
        "self.mean# = torch.zeros(())",
        "self.mean# = 0.9 * self.mean# + 0.1 * x.mean()\nx = x - self.mean#",
    ),
    "counter that begins at none": ("self.calls# = None", "self.calls# = (self.calls# or 0) + 1\nx = x * self.calls#"),
    "counter that is made late": ("", 'self.calls# = getattr(self, "calls#", 0) + 1\nx = x * self.calls#'),
    "counter in an object": (
        "from types import SimpleNamespace\nself.state# = SimpleNamespace(calls=0)",
        "self.state#.calls += 1\nx = x * self.state#.calls",
    ),
    "counter in a module": (
        "self.state# = nn.Module()\nself.state#.calls = 0",
        "self.state#.calls += 1\nx = x * self.state#.calls",
    ),
    "counter in a list in a dict": (
        'self.state# = {"calls": [0]}',
        'self.state#["calls"][0] += 1\nx = x * self.state#["calls"][0]',
    ),
    "a queue": (
        "from collections import deque\nself.queue# = deque(maxlen=2)",
        "self.queue#.append(x.mean())\nx = x * len(self.queue#) + sum(self.queue#)",
    ),
    "the first call": ("self.warm# = None", "x = x * (3 if self.warm# else 2)\nself.warm# = True"),
    "the size before": (
        "self.before# = None",
        "y = x * (2 if self.before# == x.shape[2] else 3)\nself.before# = x.shape[2]\nx = y",
    ),
    "a layer that is set": (
        "self.pool# = nn.AvgPool2d(8)",
        "self.pool#.kernel_size = tuple(x.shape[2:])\nx = x * self.pool#(x)",
    ),
    "a setting for a while": (
        "self.norm# = nn.BatchNorm2d(4)",
        "self.norm#.eps = 0.5\nx = self.norm#(x)\nself.norm#.eps = 1e-5",
    ),
    "weights for a while": (
        "self.conv# = nn.Conv2d(4, 4, 1)",
        "w = self.conv#.weight\nself.conv#.weight = nn.Parameter(w * 2)\nx = self.conv#(x)\nself.conv#.weight = w",
    ),
    "functional call": (
        "self.block# = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))",
        "p = {k: 2 * v for k, v in self.block#.named_parameters()}\n"
        "x = torch.func.functional_call(self.block#, p, x) + self.block#(x)",
    ),
    "a layer's copy": (
        "self.norm# = nn.Sequential(nn.BatchNorm2d(4))",
        "import copy\ny = copy.deepcopy(self.norm#)\ny[0].eps = 0.5\nz = copy.copy(self.norm#[0])\nz.eps = 1.0\n"
        "x = y(x) + z(x) + self.norm#(x)",
    ),
    "a layer that is added": (
        "self.list# = nn.Sequential(nn.ReLU())",
        "if len(self.list#) == 1:\n    self.list#.append(nn.Sigmoid())\nx = self.list#(x)",
    ),
    "settings of a part": (
        "self.part# = Scaled()",
        "self.part#.size = x.shape[2:]\nx = self.part#(x)",
    ),
    "settings of a part that decides": (
        "self.part# = Scaled(True)",
        "self.part#.size = x.shape[2:]\nx = self.part#(x)",
    ),
    "a dict that two hold": (
        "self.held# = {}\nself.part# = Scaled(held=self.held#)",
        'self.held#["size"] = x.shape[2:]\nx = self.part#(x)',
    ),
    "a size that a part keeps": (
        "self.part# = Keeps()",
        "y = self.part#(x)\nx = F.interpolate(y, size=self.part#.size)",
    ),
    "numpy of as many as a size": (
        "",
        "import numpy\nx = x + torch.from_numpy(numpy.linspace(0, 1, x.shape[3])).to(x)",
    ),
    "integers of a size": ("", "i = torch.arange(x.shape[2])\ni = (i + 1) * 2 - i - 2\nx = x + x[:, :, i]"),
    "a dict of layers by size": (
        "self.small#, self.large# = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)",
        "x = (self.large# if x.shape[2] > 8 else self.small#)(x)",
    ),
    "a layer by value": (
        "self.a#, self.b# = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)",
        "x = (self.a# if x.sum() > 0 else self.b#)(x)",
    ),
    "the same layer twice": (
        "self.twice# = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))",
        "x = self.twice#(self.twice#(x)[:, :, 1:])",
    ),
    "weights by index": (
        "self.bank# = nn.Parameter(torch.ones(3, 4, 1, 1))",
        "x = x * self.bank#[x.shape[2] % 3] + sum(p for p in self.bank#)",
    ),
    "state dict": ("", "x = x * len(self.state_dict()) + sum(p.numel() for p in self.parameters())"),
    # More of errors.
    "suppressed": (
        "",
        # At every size: a graph raises what a context manager swallows at some sizes only, see docs/not-fused.md.
        "import contextlib\nwith contextlib.suppress(RuntimeError):\n    x = x + x.view(1, 2, -1, 10007).sum()",
    ),
    "finally": ("", "try:\n    x = x * 2\nfinally:\n    x = x + 1"),
    "asserted": ("", "assert x.shape[2] > 1\nassert x.shape[1] == 4 and x.ndim == 4, x.shape"),
    "no grad": ("", "with torch.no_grad():\n    y = x * 2\nwith torch.enable_grad():\n    x = x + y"),
    "autocast off": ("", 'with torch.autocast("cpu", enabled=False):\n    x = x * 2'),
}  # fmt: skip

# Where rounding decides: nothing to be compared when anything stands in front of it.
ROUGH = {"values and indices", "values by name", "indices of pooling", "scatter", "number of values"}

# What a forward returns, and how its caller gets at the image again.
OUTPUTS: dict[str, tuple[str, str]] = {
    "tensor": ("x", "x = {call}"),
    "tuple": ("(x, None)", "x, extra = {call}\nx = x if extra is None else x + extra"),
    "list": ("[x, x * 2]", "ys = {call}\nx = ys[0] + ys[-1]"),
    "dict": ('{"last": x, "extra": None}', 'o = {call}\nx = o["last"] if o.get("extra") is None else o["extra"]'),
    "size": ("(x, x.shape[2])", "x, n = {call}\nx = x * n"),
    "dataclass": ("Out(x)", "o = {call}\nx = o.last if o.extra is None else o.last + o.extra"),
    "full dataclass": ("Out(x, (x.mean(), None))", "o = {call}\nx = o.last + [e for e in o.extra if e is not None][0]"),
    "ordered": ("ModelOutput(logits=x, hidden=None)", 'o = {call}\nx = o.logits if "hidden" not in o else o["hidden"]'),
    "named tuple": ("Pair(x, x.shape[-1])", "last, n = {call}\nx = last / n"),
    "class": ("Boxed(x)", "x = {call}.value"),
    "subclass of list": ("Images([x, -x])", "x = {call}.first() * 2"),
}

# How a forward takes its image.
FORWARDS: dict[str, str] = {
    "plain": "def forward(self, x):",
    "stars": "def forward(self, x, *args, **kwargs):\n"
    "    if isinstance(x, dict):\n        return self.loss(x, *args, **kwargs)\n"
    "    return self.predict(x, *args, **kwargs)\n"
    "def loss(self, batch):\n    return sum(p.norm() for m in self.modules() for p in m.parameters())\n"
    "def predict(self, x, profile=False, visualize=None):",
    "only stars": "def forward(self, *images, **settings):\n    return self.run(*images, **settings)\n"
    "def run(self, x, scale=None):",
    "decorated": "@as_tuple_on_request\ndef forward(self, x, mask=None, **kwargs):",
    "optional": "def forward(self, x=None, mask=None, return_dict=None):\n"
    "    if x is None:\n        raise ValueError('x is needed')\n    if mask is not None:\n        x = x * mask",
    "defaults": "def forward(self, x, scale=2.0, flip=False, how='sum'):\n"
    "    x = x * scale if not flip and how == 'sum' else x.flip(-1)",
}


@dataclasses.dataclass
class Out:
    last: Any
    extra: Any = None


class Pair(NamedTuple):
    last: Any
    number: Any


class Boxed:
    def __init__(self, value: Any) -> None:
        self.value = value


class Images(list[Any]):
    def first(self) -> Any:
        return self[0]


class Scaled(nn.Module):
    """Makes images of a size that others set."""

    def __init__(self, decides: bool = False, held: Any = None) -> None:
        super().__init__()
        self.size, self.decides, self.held = (9, 12), decides, held
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.interpolate(self.block(x), scale_factor=2)
        if self.decides and y.mean() > 1e9:
            return x
        return nn.functional.interpolate(y, size=self.held["size"] if self.held is not None else self.size)


class Keeps(nn.Module):
    """Makes images smaller, and keeps how large they were."""

    def __init__(self) -> None:
        super().__init__()
        self.size = None
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        self.size = x.shape[2:]  # type: ignore[assignment]
        return self.block(x)  # type: ignore[no-any-return]


def as_tuple_on_request(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("as_tuple", False)
        y = function(self, *args, **kwargs)
        return (y,) if as_tuple else y

    return wrapper


@functools.lru_cache
def memoised(height: int, width: int) -> Tensor:
    return torch.arange(float(height * width)).view(height, width) / 100


_BEGIN = """import functools, math
import torch, torch.utils.checkpoint
import torch.nn.functional as F
from torch import nn
from python_networks import Boxed, Images, Keeps, Out, Pair, Scaled, as_tuple_on_request, memoised
from support import ModelOutput

"""


def _indented(text: str, by: int) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in text.splitlines())


def source_of(name: str, body: list[tuple[str, str]], takes: str, returns: str) -> str:
    """A class whose forward does what some statements say."""
    constructor, forward = [], []
    for number, (made, said) in enumerate(body):
        constructor.append(made.replace("#", str(number)))
        forward.append(said.replace("#", str(number)))
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        + "".join(_indented(text, 8) for text in constructor)
        + _indented(FORWARDS[takes], 4)
        + "".join(_indented(text, 8) for text in forward)
        + f"        return {OUTPUTS[returns][0]}\n\n\n"
    )


@st.composite
def python_networks(draw: st.DrawFn, length: int = 4, depth: int = 2) -> str:
    """The source of a class ``Net``, which may have classes of its own kind inside."""
    classes: list[str] = []

    def module(name: str, depth: int) -> str:
        # A first layer says what the input is like.
        body = [STATEMENTS["conv and norm"]] if name == "Net" or draw(st.booleans()) else []
        for index in range(draw(st.integers(1, length))):
            if depth and draw(st.integers(0, 3)) == 0:
                inner = f"{name}{index}"
                returns = module(inner, depth - 1)
                call = f"self.inner#({draw(st.sampled_from(['x', 'x, **{}', '*[x]']))})"
                body.append((f"self.inner# = {inner}()", OUTPUTS[returns][1].replace("{call}", call)))
            else:
                body.append(STATEMENTS[draw(st.sampled_from([name for name in STATEMENTS if name not in ROUGH]))])
        takes, returns = draw(st.sampled_from(list(FORWARDS))), draw(st.sampled_from(list(OUTPUTS)))
        classes.append(source_of(name, body, takes, returns))
        return returns

    module("Net", depth)
    return _BEGIN + "".join(classes)


def module_of(statement: str = "relu", takes: str = "plain", returns: str = "tensor", *, inside: bool = False) -> str:
    """The source of a module with one statement, in a module of its own or not."""
    body = [STATEMENTS["conv and norm"], STATEMENTS[statement], STATEMENTS["conv and norm"]]
    if not inside:
        return _BEGIN + source_of("Net", body, takes, returns)
    call = ("self.inner# = Inner()", OUTPUTS[returns][1].replace("{call}", "self.inner#(x)"))
    inner = source_of("Inner", body[:2], takes, returns)
    return _BEGIN + inner + source_of("Net", [body[0], call, body[0]], "plain", "tensor")


def made(source: str, seed: int = 0) -> nn.Module:
    """The module of a source, in float64 and eval mode, with lived-in statistics."""
    memoised.cache_clear()
    namespace: dict[str, Any] = {"__name__": "a_random_module"}
    exec(compile(source, "<a random module>", "exec"), namespace)
    return randomise(namespace["Net"]().double(), seed).eval()
