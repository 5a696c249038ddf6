"""Checkpoints as people have them: what is found in them, what is refused, and the network they belong to."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reparam import models
from reparam.errors import CheckpointError, ModelError
from reparam.files import checkpoint
from reparam.files.checkpoint import Checkpoint, check_values, load_into, read, resolve
from support import randomise

STATE = {"stem.weight": torch.arange(6.0).view(2, 3), "stem.bias": torch.ones(2)}


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def tiny() -> nn.Module:
    """A module that whole-module pickles can find again."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


# --- Reading ------------------------------------------------------------------------------------------------------

EMA = {name: tensor + 1 for name, tensor in STATE.items()}
NESTED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bare": (STATE, ()),
    **{key: ({key: STATE, "epoch": 3}, (key,)) for key in (*checkpoint.WEIGHTS, *checkpoint.AVERAGED)},
    "twice": ({"state_dict": {"model": STATE}, "lr": 0.1}, ("state_dict", "model")),
    "prefixed in a wrapper": ({"model_ema": prefixed("module.")}, ("model_ema",)),
    "data parallel": (prefixed("module."), ()),
    "compiled": (prefixed("_orig_mod."), ()),
    "compiled in parallel": (prefixed("module._orig_mod."), ()),
    "parallel in compiled": (prefixed("_orig_mod.module."), ()),
    "averaged model": ({**prefixed("module."), "n_averaged": torch.tensor(7)}, ()),
    "beside an optimizer": (
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}, "model": STATE},
        ("model",),
    ),
    "under an unusual key": ({"generator": STATE, "epoch": 1}, ("generator",)),
    "beside its average": ({"model_ema": EMA, "model": STATE}, ("model",)),
    "beside a configuration": ({"model": {"name": "tiny", "depth": 3}, "weights": STATE}, ("weights",)),
    "beside loose tensors": ({"best": torch.tensor(0.7), "model": STATE}, ("model",)),
    "with training arguments": ({"model": STATE, "args": argparse.Namespace(lr=0.1)}, ("model",)),
    "with numpy numbers": ({"model": STATE, "best": numpy.float64(0.7), "step": numpy.int64(3)}, ("model",)),
}


@pytest.mark.parametrize("name", NESTED)
def test_weights_are_found(tmp_path: Path, name: str) -> None:
    payload, origin = NESTED[name]
    torch.save(payload, tmp_path / "a.pth")
    found = read(tmp_path / "a.pth")
    assert found.origin == origin
    assert found.module is None
    assert found.state.keys() == STATE.keys()
    assert all(torch.equal(found.state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin"])
def test_format_is_recognised_by_content(tmp_path: Path, name: str) -> None:
    save_file(prefixed("module."), tmp_path / name)
    assert read(tmp_path / name).state.keys() == STATE.keys()
    torch.save(STATE, tmp_path / name)
    assert read(tmp_path / name).state.keys() == STATE.keys()


def test_files_from_before_pytorch_1_6_are_read(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert read(tmp_path / "a.pth").state.keys() == STATE.keys()


def test_averaged_weights_are_taken_on_request(tmp_path: Path) -> None:
    torch.save({"model": STATE, "model_ema": prefixed("module.", EMA)}, tmp_path / "a.pth")
    assert torch.equal(read(tmp_path / "a.pth", ema=True).state["stem.bias"], EMA["stem.bias"])
    torch.save({"model": {"ema": EMA}}, tmp_path / "b.pth")
    assert read(tmp_path / "b.pth", ema=True).origin == ("model", "ema")
    torch.save({"model": STATE}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"c.pth: holds no averaged \(EMA\) weights; leave out --ema"):
        read(tmp_path / "c.pth", ema=True)


def test_a_prefix_that_not_all_names_have_stays() -> None:
    mixed = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert checkpoint.strip_prefixes(mixed).keys() == mixed.keys()
    assert checkpoint.strip_prefixes({"backbone._orig_mod.weight": torch.ones(1)}).keys() == {"backbone.weight"}


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def truncated(path: Path, keep: Callable[[bytes], bytes] = lambda data: data[: len(data) // 2]) -> None:
    path.write_bytes(keep(path.read_bytes()))


BIG = {"a": torch.ones(1000)}
# Every kind of file that is no readable checkpoint, and what is said about it.
BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.pth": (lambda path: None, "no such file"),
    "folder.pth": (lambda path: path.mkdir(), "is a folder, not a checkpoint file"),
    "empty.pth": (lambda path: path.touch(), "is empty"),
    "text.pth": (lambda path: path.write_text("404: not found\n" * 20), "is not a checkpoint; expected"),
    "zeros.pth": (lambda path: path.write_bytes(bytes(100)), "is not a checkpoint; expected"),
    "text.safetensors": (lambda path: path.write_text("hello world " * 9), "is truncated or no safetensors file"),
    "arrays.pth": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is not a checkpoint; expected"),
    "zip.pth": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "is a zip archive but not a check"),
    "truncated.pth": (lambda path: (torch.save(BIG, path), truncated(path)), "is truncated"),
    "start.pth": (lambda path: (torch.save(BIG, path), truncated(path, lambda d: d[:10])), "is truncated"),
    "legacy.pth": (
        lambda path: (torch.save(BIG, path, _use_new_zipfile_serialization=False), truncated(path)),
        "is truncated",
    ),
    "truncated.safetensors": (
        lambda path: (save_file(BIG, path), truncated(path)),
        "is truncated or no safetensors file",
    ),
    "header.safetensors": (
        lambda path: (save_file(BIG, path), truncated(path, lambda d: d[:20])),
        "is truncated or no safetensors file",
    ),
    "script.pth": (lambda path: torch.jit.script(nn.ReLU()).save(path), "is a TorchScript archive"),
    "evil.pth": (
        lambda path: torch.save({"a": Evil(f"touch {path.parent}/pwned")}, path),
        r"contains pickled Python code \(posix.system\); pass --unsafe-load only if you trust the source",
    ),
    "module.pth": (lambda path: torch.save(tiny(), path), r"contains pickled Python code \(torch.nn.modules"),
    "program.pt2": (
        lambda path: torch.export.save(exported(), path),
        "is an exported program, which torch.export.load may run code of; pass --unsafe-load only if you trust",
    ),
    "truncated.pt2": (lambda path: (torch.export.save(exported(), path), truncated(path)), "is truncated"),
    "archive.pt2": (
        lambda path: zipfile.ZipFile(path, "w").writestr("a/archive_format", "pt2"),
        "is a .pt2 archive, but holds no exported program",
    ),
    "zip.pt2": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "is a zip archive but not a check"),
    "list.pth": (lambda path: torch.save([1, 2], path), "holds a list, not a state dict"),
    "tensor.pth": (lambda path: torch.save(torch.ones(1), path), "holds a Tensor, not a state dict"),
    "nothing.pth": (lambda path: torch.save({}, path), "holds no weights$"),
    "numbers.pth": (lambda path: torch.save({"epoch": 1, "lr": 0.1}, path), "holds no weights, only epoch, lr"),
    "two.pth": (
        lambda path: torch.save({"generator": STATE, "critic": STATE}, path),
        r"holds several networks \(generator, critic\); save the one to fuse on its own",
    ),
}


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(tiny().eval(), (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    make, reason = BAD_FILES[name]
    path = tmp_path / name
    make(path)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(CheckpointError, match=reason) as caught:
        read(path)
    assert not warned
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pth")
    (tmp_path / "a.pth").chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read(tmp_path / "a.pth")


def test_unpickling_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    torch.save({"model": model, "epoch": 3}, tmp_path / "a.pth")
    found = read(tmp_path / "a.pth", unsafe=True)
    assert type(found.module) is nn.Sequential
    assert found.origin == ("model",)
    assert found.state.keys() == model.state_dict().keys()
    network = resolve(found)
    assert network.model is found.module
    assert network.name == "Sequential"
    assert not network.model.training

    (tmp_path / "vanishing.py").write_text("class Settings:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import vanishing  # type: ignore[import-not-found]

    torch.save({"model": STATE, "settings": vanishing.Settings()}, tmp_path / "b.pth")
    assert read(tmp_path / "b.pth", unsafe=True).state.keys() == STATE.keys()
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "vanishing")
    with pytest.raises(CheckpointError, match=r"code that cannot be imported here \(No module named 'vanishing'\)"):
        read(tmp_path / "b.pth", unsafe=True)


def test_an_exported_program_is_read_on_request(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"  # recognised by content
    with path.open("wb") as file:
        torch.export.save(exported(), file)
    found = read(path, unsafe=True)
    assert isinstance(found.module, torch.export.ExportedProgram)
    assert found.state.keys() == tiny().state_dict().keys()
    network = resolve(found)
    assert network.model is found.module
    assert (network.name, network.input_shape) == ("an exported program", (3, 8, 8))


def test_a_damaged_program_is_one_sentence(tmp_path: Path) -> None:
    torch.export.save(exported(), tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive, zipfile.ZipFile(tmp_path / "b.pt2", "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, b"{}" if name.endswith("model.json") else archive.read(name))
    with pytest.raises(
        CheckpointError, match=r"b.pt2: its exported program cannot be read \(.*; it is damaged, or was"
    ):
        read(tmp_path / "b.pt2", unsafe=True)


class Touches:
    """Pickled example inputs that weights_only refuses, upon which torch unpickles them without."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_torch_unpickles_programs_so_they_need_permission(tmp_path: Path) -> None:
    torch.export.save(exported(), tmp_path / "a.pt2")
    torch.save((((torch.randn(2, 3, 8, 8),), {}), Touches(tmp_path / "pwned")), tmp_path / "inputs.pt")
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive, zipfile.ZipFile(tmp_path / "b.pt2", "w") as copy:
        for name in archive.namelist():
            evil = name.endswith("sample_inputs/model.pt")
            copy.writestr(name, (tmp_path / "inputs.pt").read_bytes() if evil else archive.read(name))
    with pytest.raises(CheckpointError, match="pass --unsafe-load only if you trust the source"):
        read(tmp_path / "b.pt2")
    assert not (tmp_path / "pwned").exists()
    with contextlib.suppress(CheckpointError):
        read(tmp_path / "b.pt2", unsafe=True)
    # Where this fails, torch.export.load has become safer, and the flag may be too strict.
    assert (tmp_path / "pwned").exists()


# --- Values -------------------------------------------------------------------------------------------------------

BAD_VALUES = {
    "nan": ({"a.weight": torch.tensor([1.0, float("nan")])}, r"1 tensor \(a.weight\) with NaN or infinite values"),
    "inf": ({"a.bias": torch.tensor([float("inf")])}, r"1 tensor \(a.bias\) with NaN"),
    "minus inf": ({"a.bias": torch.tensor([float("-inf"), 1.0])}, r"1 tensor \(a.bias\) with NaN"),
    "half nan": ({"a": torch.tensor([float("nan")], dtype=torch.float16)}, r"1 tensor \(a\) with NaN"),
    "8-bit nan": ({"a": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, r"1 tensor \(a\) with NaN"),
    "many": ({f"layer{i}": torch.tensor(float("nan")) for i in range(5)}, r"5 tensors \(layer0, layer1, layer2, ...\)"),
    "variance": ({"bn.running_var": torch.tensor([1.0, -1e-3])}, r"1 tensor \(bn.running_var\) with negative running"),
    "quantized": (
        {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        r"1 tensor \(a\) with quantized tensors; fuse the floating-point model",
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_no_network_can_use(name: str) -> None:
    state, reason = BAD_VALUES[name]
    with pytest.raises(CheckpointError, match=f"^a.pth: {reason}"):
        check_values(Checkpoint(Path("a.pth"), {**STATE, **state}))


def test_values_that_are_fine() -> None:
    mask = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    state = {"mask": mask, "bn.running_var": torch.tensor([0.0, 2.0]), "bias": -torch.ones(2), "n": torch.tensor(3)}
    check_values(Checkpoint(Path("a.pth"), {**STATE, **state}))


# --- Loading ------------------------------------------------------------------------------------------------------


def test_load_into_copies_every_key_in_the_models_dtype() -> None:
    source, target = randomise(tiny()).half(), tiny()
    load_into(target, Checkpoint(Path("a.pth"), source.state_dict()))
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}
    assert all(
        torch.equal(target.state_dict()[key].to(value.dtype), value) for key, value in source.state_dict().items()
    )


def test_load_into_looks_through_the_models_own_wrappers() -> None:
    source = randomise(tiny())
    target = nn.DataParallel(tiny())
    load_into(target, Checkpoint(Path("a.pth"), source.state_dict()))
    assert torch.equal(target.module[0].weight, source[0].weight)
    averaged = torch.optim.swa_utils.AveragedModel(tiny())
    load_into(averaged, Checkpoint(Path("a.pth"), source.state_dict()))
    assert torch.equal(averaged.module[0].weight, source[0].weight)


def test_batch_counters_may_be_missing() -> None:
    state = {key: value for key, value in tiny().state_dict().items() if "num_batches" not in key}
    load_into(tiny(), Checkpoint(Path("a.pth"), state))


def test_what_does_not_fit_is_listed() -> None:
    state = dict(tiny().state_dict())
    del state["0.weight"]
    state |= {"1.weight": torch.ones(5), "head.weight": torch.ones(1), "head.bias": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_into(tiny(), Checkpoint(Path("a.pth"), state), name="tiny")
    assert str(caught.value) == (
        "a.pth: does not fit tiny: 1 key missing: 0.weight; 2 keys unexpected: head.weight, head.bias; "
        "1 key of another shape: 1.weight (5 in the file, 4 in the model)"
    )


# --- Resolving ----------------------------------------------------------------------------------------------------


def saved(model: nn.Module) -> Checkpoint:
    return Checkpoint(Path("a.pth"), dict(model.state_dict()))


@pytest.mark.parametrize("options", [{}, {"num_classes": 3, "in_channels": 2, "distillation": True}])
@pytest.mark.parametrize("spec", [None, "repvit_digits"])
def test_known_models_are_recognised(spec: str | None, options: dict[str, Any]) -> None:
    model = randomise(models.create("repvit_digits", **options)).eval()
    network = resolve(saved(model), spec)
    channels = options.get("in_channels", 1)
    assert network.name == "repvit_digits"
    assert network.input_shape == (channels, 8, 8)
    assert not network.model.training
    x = torch.randn(2, channels, 8, 8)
    assert torch.equal(network.model(x), model(x))


def test_several_matches_are_amBIGuous(monkeypatch: pytest.MonkeyPatch) -> None:
    state = saved(models.create("repvit_digits"))
    matches = models.recognise(state.state)
    monkeypatch.setattr(models.registry, "recognise", lambda state: matches * 2)
    with pytest.raises(
        ModelError, match=r"fits several known models \(repvit_digits, repvit_digits\); choose one with"
    ):
        resolve(state)


def test_an_unknown_network_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"^a.pth: its 7 keys \(0.weight, 0.bias, 1.weight, ...\) belong to no known"):
        resolve(saved(tiny()))
    with pytest.raises(
        ModelError, match="it has no batch norms, so it may be fused already; otherwise name the network"
    ):
        resolve(saved(nn.Conv2d(3, 4, 3)))


def test_a_wrong_name_says_the_right_one() -> None:
    with pytest.raises(CheckpointError, match=r"^a.pth: .*; its keys and shapes are those of repvit_digits$"):
        resolve(saved(models.create("repvit_digits")), "repvit_m0_6")
    with pytest.raises(CheckpointError, match=r"^a.pth: ") as caught:
        resolve(saved(tiny()), "repvit_m0_6")
    assert "those of" not in str(caught.value)
    with pytest.raises(ModelError, match="repvit_m0_9"):
        resolve(saved(tiny()), "repvit_m0.9")


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("repvit_m0_9", {"num_classes": 7, "in_chans": 1}, (1, 224, 224)),
        ("mobileone_s0", {"num_classes": 0}, (3, 224, 224)),
        ("fastvit_t8", {}, (3, 256, 256)),
    ],
)
def test_timm_models(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = timm.create_model(name, pretrained=False, **options)
    network = resolve(saved(model), f"timm:{name}")
    assert network.name == f"timm:{name}"
    assert network.input_shape == shape
    assert type(network.model) is type(model)
    state = network.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_timm_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"timm .* has no model 'repvit_m9'; near it are repvit_m0_9, "):
        resolve(saved(tiny()), "timm:repvit_m9")
    with pytest.raises(ModelError, match=r"has no model 'xyzzy'$"):
        resolve(saved(tiny()), "timm:xyzzy")
    with pytest.raises(CheckpointError, match=r"does not fit timm:mobileone_s0: \d+ keys missing"):
        resolve(saved(tiny()), "timm:mobileone_s0")
    for error, reason in (
        (ModuleNotFoundError("No module named 'timm'"), r"needs timm .*: pip install 'reparam\[timm\]'"),
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision was built for another PyTorch than 2"),
    ):
        monkeypatch.setattr(builtins, "__import__", refusing("timm", error))
        with pytest.raises(ModelError, match=reason):
            resolve(saved(tiny()), "timm:mobileone_s0")
        monkeypatch.undo()


def refusing(package: str, error: Exception) -> Callable[..., Any]:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise error
        return original(name, *args, **kwargs)

    return refuse


FACTORIES = """
import torch
from torch import nn

def tiny():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.default_cfg = {"input_size": (3, 32, 32)}
    return model

class Zoo:
    tiny = staticmethod(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))

def needs_arguments(width):
    return nn.Linear(width, width)

def nothing():
    return None

not_callable = 3
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    source = randomise(tiny())
    for name, shape in (("tiny", (3, 32, 32)), ("Zoo.tiny", None)):
        network = resolve(saved(source), f"my_factories:{name}")
        assert torch.equal(network.model[0].weight, source[0].weight)
        assert network.input_shape == shape
    for spec, error, reason in (
        ("my_factories:needs_arguments", ModelError, "failed with TypeError: .*width"),
        ("my_factories:nothing", ModelError, "returned a NoneType, not a torch.nn.Module"),
        ("my_factories:not_callable", ModelError, "failed with TypeError: 'int' object is not callable"),
        ("my_factories:missing", ModelError, "failed with AttributeError: .*missing"),
        ("no_such_package:build", ModelError, "failed with ModuleNotFoundError: No module named 'no_such_package'"),
    ):
        with pytest.raises(error, match=f"--model {spec} {reason}"):
            resolve(saved(source), spec)
    with pytest.raises(CheckpointError, match="does not fit my_factories:tiny: 6 keys missing"):
        resolve(Checkpoint(Path("a.pth"), STATE), "my_factories:tiny")
