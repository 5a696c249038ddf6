"""RepViT against the paper's figures, timm's network and the authors' own, weights and outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reparam import models
from reparam.errors import CheckpointError, ModelError
from reparam.models.repvit import ConvNorm, NormLinear, RepViT, TokenMixer, Variant, adapt
from support import count_calls, randomise

TIMM = [
    "repvit_m0_9",
    "repvit_m1_0",
    "repvit_m1_1",
    "repvit_m1_5",
    "repvit_m2_3",
    "repvit_m1",
    "repvit_m2",
    "repvit_m3",
]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "models.md"
PUBLISHED = ["repvit_m0_6", *TIMM]


def image(size: int = 64, channels: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(7))


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model.eval()(x)
    assert y.std() > 0
    assert not torch.allclose(y, model(x.roll(9, -1) * 2)), "an output that ignores the input proves nothing"
    return y


# --- the paper's figures ---------------------------------------------------------------------------------------------


def deployed_parameters(module: nn.Module) -> int:
    """Count by hand what reparameterisation leaves: a norm becomes a bias, a token mixer one depthwise kernel."""
    match module:
        case TokenMixer(conv=conv) | (ConvNorm() as conv):
            return conv.c.weight.numel() + conv.c.out_channels
        case NormLinear(l=linear):
            return linear.weight.numel() + linear.out_features
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return own + sum(deployed_parameters(child) for child in module.children())


def deployed_multiply_adds(model: nn.Module) -> int:
    """Count on the meta device, without the 1x1 branches, which reparameterisation merges into the 3x3 ones."""
    for module in model.modules():
        if isinstance(module, TokenMixer):
            module.conv1 = nn.Identity()
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("repvit_m0_9", 5.1, 0.8),
        ("repvit_m1_0", 6.8, 1.1),
        ("repvit_m1_1", 8.2, 1.3),
        ("repvit_m1_5", 14.0, 2.3),
        ("repvit_m2_3", 22.9, 4.5),
    ],
)
def test_figures_of_the_paper(name, parameters, multiply_adds):
    with torch.device("meta"):
        model = models.create(name, distillation=False)
    assert round(deployed_parameters(model) / 1e6, 1) == pytest.approx(parameters)
    assert round(deployed_multiply_adds(model) / 1e9, 1) == pytest.approx(multiply_adds)


@pytest.mark.parametrize("name", PUBLISHED)
def test_description_and_documentation_state_the_figures(name):
    with torch.device("meta"):
        model, plain = models.create(name), models.create(name, distillation=False)
    trained = sum(parameter.numel() for parameter in model.parameters())
    parameters, multiply_adds = deployed_parameters(plain), deployed_multiply_adds(plain)
    assert models.entry(name).description.endswith(
        f": {parameters / 1e6:.1f} M parameters, {multiply_adds / 1e9:.1f} G multiply-adds"
    )
    variant = Variant.of(model.state_dict())
    widths, depths = (", ".join(map(str, numbers)) for numbers in (variant.widths, variant.depths))
    row = f"| `{name}` | {widths} | {depths} | {trained:,} | {parameters:,} | {multiply_adds / 1e9:.2f} G |"
    assert row in DOCUMENTATION.read_text()


def test_calls_of_the_training_graph():
    calls = count_calls(models.create("repvit_m0_9").eval(), image())
    assert calls["convolution"] + calls["linear"] == 128
    assert (calls["norm"], calls["elementwise"]) == (108, 84)


def test_no_model_fuses_itself():
    for module in models.create("repvit_m0_9").modules():
        assert not [name for name in dir(module) if "fuse" in name or "reparam" in name or "deploy" in name]


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("name", TIMM)
def test_equals_timm(name, distillation):
    theirs = randomise(timm.create_model(name, distillation=distillation))
    with torch.device("meta"):
        ours = models.create(name, distillation=distillation)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert torch.equal(outputs(ours, image()), outputs(theirs, image()))


@pytest.mark.parametrize("name", TIMM)
def test_defaults_are_timms(name):
    with torch.device("meta"):
        ours, theirs = models.create(name).state_dict(), timm.create_model(name).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}


def test_m0_6_equals_timms_network_of_that_configuration():
    theirs = randomise(timm.models.repvit.RepVit(embed_dim=(40, 80, 160, 320), depth=(1, 1, 8, 1)))
    ours = models.create("repvit_m0_6")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(outputs(ours, image()), outputs(theirs, image()))


def test_free_configuration_equals_timms():
    options = {"kernel_size": 5, "distillation": False, "num_classes": 7}
    theirs = randomise(timm.models.repvit.RepVit(embed_dim=(24, 40), depth=(3, 2), in_chans=2, mlp_ratio=3, **options))
    ours = RepViT((24, 40), (3, 2), in_channels=2, expansion=3, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image(33, channels=2)
    assert torch.equal(outputs(ours, x), outputs(theirs, x))


# --- the authors' repository -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_authors(name, distillation, authors_repvit, tmp_path):
    theirs = randomise(authors_repvit(name, 100, distillation)).double()
    torch.save({"model": theirs.state_dict()}, tmp_path / "checkpoint.pth")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    with torch.device("meta"):
        ours = models.create(name, num_classes=100, distillation=distillation)
    ours.load_state_dict(models.entry(name).adapt(state), strict=True, assign=True)
    x = image(32).double()
    torch.testing.assert_close(outputs(ours, x), outputs(theirs, x), rtol=1e-12, atol=1e-12)


def test_the_authors_names_are_the_published_ones(authors_repvit):
    """The names that the published files use, as far as they are documented: the oracle itself is checked."""
    state = authors_repvit("repvit_m0_9").state_dict()
    for key in ("features.0.0.c.weight", "features.1.token_mixer.0.conv.c.weight", "classifier.classifier.bn.weight"):
        assert key in state
    assert state["classifier.classifier_dist.l.weight"].shape == (1000, 384)


def test_adapt_leaves_other_checkpoints_alone():
    state = models.create("repvit_digits").state_dict()
    assert list(adapt(state)) == list(state)
    foreign = {"features.0.0.weight": torch.zeros(1), "features.1.token_mixer.0.conv.c.weight": torch.zeros(1)}
    assert adapt(foreign) == foreign
    assert adapt(foreign) is not foreign


def test_adapt_keeps_names_that_the_authors_do_not_have(authors_repvit):
    state = dict(authors_repvit("repvit_m0_6").state_dict())
    extra = ["features.0.7.c.weight", "features.3.token_mixer.1.fc1.weight", "neck.weight", "features.99999999999.x"]
    adapted = adapt(state | {key: torch.zeros(1) for key in extra})
    assert set(extra) <= set(adapted)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*neck\.weight"):
        models.create("repvit_m0_6").load_state_dict(adapted)


# --- distillation ----------------------------------------------------------------------------------------------------


def test_training_returns_both_heads_and_eval_their_mean():
    model = randomise(models.create("repvit_digits", distillation=True))
    x = image(8, channels=1, batch=4)
    both = model.train()(x)
    assert isinstance(both, tuple)
    assert [logits.shape for logits in both] == [(4, 10), (4, 10)]
    (both[0].sum() + both[1].sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.eval()
    with torch.no_grad():
        features = model.stages(model.stem(x)).mean((2, 3))
        mean = (model.head.head(features) + model.head.head_dist(features)) / 2
        assert torch.equal(model(x), mean)


def test_one_head_returns_logits_in_both_modes():
    model = models.create("repvit_digits")
    x = image(8, channels=1, batch=2)
    assert model.train()(x).shape == model.eval()(x).shape == (2, 10)


def test_no_classes_returns_pooled_features():
    model = randomise(models.create("repvit_digits", num_classes=0))
    assert outputs(model, image(8, channels=1, batch=2)).shape == (2, 64)


# --- free configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 4),
        ({"stem_strides": (1, 1)}, 16),
        ({"stem_strides": (2, 1)}, 8),
        ({"stem_strides": (1, 1), "downsample_stride": 1}, 32),
        ({"downsample_stride": 3}, 3),
    ],
)
def test_strides(options, size):
    model = RepViT((8, 16), (1, 1), **options)
    assert model.stages(model.stem(image(32))).shape == (1, 16, size, size)


@pytest.mark.parametrize("kernel_size", [1, 5, 7])
def test_kernel_sizes_keep_the_shape(kernel_size):
    model = RepViT((8, 16), (1, 1), kernel_size=kernel_size)
    assert model.stages(model.stem(image(32))).shape == (1, 16, 4, 4)


def test_squeeze_ratio():
    assert RepViT((64,), (1,), squeeze_ratio=0.5).stages[0].blocks[0].se.fc1.out_channels == 32
    assert RepViT((64,), (1,), squeeze_ratio=0.01).stages[0].blocks[0].se.fc1.out_channels == 8


def test_squeeze_and_excitation_is_in_every_other_block():
    names = {name for name, _ in RepViT((8, 16), (4, 3)).named_modules() if name.endswith("se.fc1")}
    assert names == {f"stages.{place}.se.fc1" for place in ("0.blocks.0", "0.blocks.2", "1.blocks.0", "1.blocks.2")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (), "depths": ()}, "one of each for every stage"),
        ({"widths": (8, 16), "depths": (1,)}, "one of each for every stage"),
        ({"widths": (8, 16), "depths": (1, 0)}, "at least 1"),
        ({"widths": (7,), "depths": (1,)}, "even first width"),
        ({"kernel_size": 4}, "odd kernel"),
        ({"in_channels": 0}, "in_channels"),
        ({"num_classes": -1}, "num_classes"),
        ({"downsample_stride": 0}, "strides"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        RepViT(**({"widths": (8,), "depths": (1,)} | arguments))


def test_residual_branches_start_at_zero():
    """So that a fresh network's blocks are their token mixers alone."""
    block = models.create("repvit_digits").stages[1].blocks[1].eval()
    x = image(4, channels=32)
    assert torch.equal(block(x), block.token_mixer(x))


# --- options from checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 5, "in_channels": 1, "distillation": True},
        {"num_classes": 10, "in_channels": 4, "distillation": False},
        {"num_classes": 0, "in_channels": 3, "distillation": False},
    ],
)
def test_options_are_read_from_shapes(options):
    entry = models.entry("repvit_m0_6")
    with torch.device("meta"):
        assert entry.options(entry.build(**options).state_dict()) == options


def test_options_of_another_variant_are_refused():
    with torch.device("meta"):
        state = models.create("repvit_m1").state_dict()
    with pytest.raises(CheckpointError, match=r"found Variant\(.*legacy=True\), expected Variant\(.*legacy=False\)"):
        models.entry("repvit_m0_9").options(state)


def test_a_fused_checkpoint_is_refused():
    with torch.device("meta"):
        fused = timm.utils.reparameterize_model(timm.create_model("repvit_m0_9")).state_dict()
    with pytest.raises(CheckpointError, match="already fused"):
        models.entry("repvit_m0_9").options(fused)


def test_options_need_a_stem():
    with torch.device("meta"):
        state = models.create("repvit_digits").state_dict()
    del state["stem.conv1.c.weight"]
    with pytest.raises(CheckpointError, match="stem"):
        models.entry("repvit_digits").options(state)


def test_variant_of_a_checkpoint():
    with torch.device("meta"):
        assert Variant.of(RepViT((8, 24, 40), (1, 3, 2), legacy=True).state_dict()) == Variant(
            (8, 24, 40), (1, 3, 2), legacy=True
        )


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_trains_to_97_percent_in_seconds():
    """1,400 of scikit-learn's digits, the other 397 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, held_out = order[:1400], order[1400:]

    model = models.create("repvit_digits").train()
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
    assert x.shape[1:] == models.entry("repvit_digits").input_shape
    epochs, batch = 5, 70
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(train) // batch)
    for _ in range(epochs):
        for indices in train[torch.randperm(len(train))].split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
            optimizer.step()
            schedule.step()

    with torch.no_grad():
        accuracy = (model.eval()(x[held_out]).argmax(1) == y[held_out]).float().mean()
    assert accuracy >= 0.97
