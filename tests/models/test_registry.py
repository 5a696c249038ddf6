"""The registry: names, building, and which model a checkpoint belongs to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from reparam import models
from reparam.errors import CheckpointError, ModelError
from reparam.models import registry

PUBLISHED = [name for name in models.names() if name != "repvit_digits"]


@pytest.fixture
def scratch(monkeypatch):
    """A registry of its own, so that a test leaves no model behind."""
    monkeypatch.setattr(registry, "_ENTRIES", registry.Known("model"))


def meta_state(name, **options):
    with torch.device("meta"):
        return models.create(name, **options).state_dict()


def recognised(state):
    return [(entry.name, options) for entry, options in models.recognise(state)]


def test_names():
    assert models.names() == [
        "repvit_m0_6",
        "repvit_m0_9",
        "repvit_m1_0",
        "repvit_m1_1",
        "repvit_m1_5",
        "repvit_m2_3",
        "repvit_m1",
        "repvit_m2",
        "repvit_m3",
        "repvit_digits",
    ]


@pytest.mark.parametrize("name", models.names())
def test_every_entry_is_whole(name):
    entry = models.entry(name)
    assert entry.name == name
    assert getattr(models, name) is entry.build
    assert entry.build.__doc__
    assert "\n" not in entry.description
    assert "arXiv:2307.09283" in entry.paper
    with torch.device("meta"):
        model = entry.build().eval()
        assert model(torch.empty(1, *entry.input_shape)).dim() == 2


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("repvit_m09", "did you mean .*repvit_m0_9"),
        ("RepViT-M1.5", "did you mean .*repvit_m1_5"),
        ("xyz", "known are repvit_m0_6, .*repvit_digits"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name, advice):
    with pytest.raises(ModelError, match=f"no model named '{name}': {advice}"):
        models.create(name)


def test_create_passes_options_on():
    model = models.create("repvit_digits", num_classes=3, in_channels=2)
    assert model.eval()(torch.randn(1, 2, 8, 8)).shape == (1, 3)


def test_create_names_the_options_there_are():
    with pytest.raises(ModelError, match=r"'repvit_m0_9'.*'classes'.*num_classes, in_channels, distillation"):
        models.create("repvit_m0_9", classes=3)


def test_an_error_inside_a_builder_is_its_own(scratch):
    @registry.register("broken", input_shape=(1,), description="", paper="")
    def broken():
        return len(3)

    with pytest.raises(TypeError, match="has no len"):
        registry.create("broken")


def test_register_refuses_a_taken_name(scratch):
    decorate = registry.register("linear", input_shape=(4,), description="a line", paper="none")

    def build(width=4):
        return nn.Linear(width, 1)

    assert decorate(build) is build
    with pytest.raises(ModelError, match="registered already"):
        decorate(build)


def test_recognise_knows_nothing_of_the_models(scratch):
    """A model of any kind is found by names and shapes, and the most general reader of options is none at all."""

    @registry.register("line", input_shape=(4,), description="", paper="")
    def line():
        return nn.Linear(4, 1)

    @registry.register(
        "wide",
        input_shape=(4,),
        description="",
        paper="",
        options=lambda state: {"width": state["w"].shape[1]},
        adapt=lambda state: {{"w": "weight", "b": "bias"}.get(key, key): tensor for key, tensor in state.items()},
    )
    def wide(width):
        return nn.Linear(width, 1)

    published = {"w": torch.zeros(1, 9), "b": torch.zeros(1)}
    assert [(entry.name, options) for entry, options in registry.recognise(published)] == [("wide", {"width": 9})]


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("name", models.names())
def test_recognises_our_own_and_timms_layout(name, distillation):
    options = {"num_classes": 21, "in_channels": 3, "distillation": distillation}
    assert recognised(meta_state(name, **options)) == [(name, options)]


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_recognises_the_authors_layout(name, distillation, authors_repvit):
    with torch.device("meta"):
        state = authors_repvit(name, 21, distillation).state_dict()
    found = models.recognise(state)
    options = {"num_classes": 21, "in_channels": 3, "distillation": distillation}
    assert [(entry.name, options) for entry, options in found] == [(name, options)]
    [(entry, options)] = found
    with torch.device("meta"):
        entry.build(**options).load_state_dict(entry.adapt(state), strict=True)


def edit(change):
    state = dict(meta_state("repvit_m0_9"))
    change(state)
    return state


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"weight": torch.zeros(1)},
        nn.Conv2d(3, 4, 3).state_dict(),
        {"features.0.0.c.weight": torch.zeros(1), "features.1.token_mixer.0.conv.c.weight": torch.zeros(1)},
        {"stages.0.blocks.0.token_mixer.conv.c.weight": torch.zeros(())},
        edit(lambda state: state.pop("stem.conv1.bn.running_var")),
        edit(lambda state: state.pop("stem.conv1.c.weight")),
        edit(lambda state: state.update({"extra.weight": torch.zeros(1)})),
        edit(lambda state: state.update({"stem.conv1.bn.weight": torch.zeros(25)})),
        edit(lambda state: state.update({"stem.conv1.c.weight": torch.zeros(24, 0, 3, 3)})),
        edit(lambda state: state.update({"head.head.l.weight": torch.zeros(())})),
        edit(lambda state: state.update({"head.head_dist.l.weight": torch.zeros(1001, 384)})),
        edit(lambda state: state.update({"stages.0.blocks.1.token_mixer.conv.c.weight": torch.zeros(48, 1, 5, 5)})),
    ],
)
def test_other_checkpoints_are_not_recognised(state):
    assert models.recognise(state) == []


def test_counters_of_batches_may_be_missing(authors_repvit):
    with torch.device("meta"):
        state = authors_repvit("repvit_m0_6").state_dict()
    stripped = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert len(stripped) < len(state)
    assert recognised(stripped) == recognised(state) != []


def test_a_free_configuration_is_not_taken_for_a_published_one():
    with torch.device("meta"):
        state = models.RepViT((48, 96, 192, 384), (2, 2, 13, 2)).state_dict()
    assert models.recognise(state) == []


@pytest.mark.parametrize("state", [{"model": {"weight": torch.zeros(1)}}, {"epoch": 3}, {0: torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(state):
    with pytest.raises(CheckpointError, match="'model' or 'state_dict'"):
        models.recognise(state)


def test_recognise_builds_only_what_can_match(monkeypatch):
    """One network for one checkpoint: building all of them takes seconds on a slow machine."""
    built = []

    def recording(entry):
        def build(**options):
            built.append(entry.name)
            return entry.build(**options)

        return dataclasses.replace(entry, build=build)

    entries = registry.Known("model")
    entries.update({name: recording(entry) for name, entry in registry._ENTRIES.items()})
    state = meta_state("repvit_m2_3")
    monkeypatch.setattr(registry, "_ENTRIES", entries)
    assert [entry.name for entry, _ in models.recognise(state)] == built == ["repvit_m2_3"]


def test_recognise_allocates_nothing():
    """A checkpoint that claims an enormous classifier costs nothing to look at."""
    state = dict(meta_state("repvit_digits"))
    classes = 10**12
    state["head.head.l.weight"] = torch.empty(classes, 64, device="meta")
    state["head.head.l.bias"] = torch.empty(classes, device="meta")
    [(entry, options)] = models.recognise(state)
    assert (entry.name, options["num_classes"]) == ("repvit_digits", classes)
