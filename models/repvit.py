"""RepViT, the training-time network.

Ao Wang, Hui Chen, Zijia Lin, Jungong Han, Guiguang Ding. *RepViT: Revisiting Mobile CNN From ViT Perspective.*
CVPR 2024, arXiv:2307.09283.

The paper walks from MobileNetV3 to a pure convolutional network with the structure of a vision transformer. Each of
its steps is one class here: a token mixer that is a sum of depthwise branches, a channel mixer that is a residual
pair of pointwise convolutions, squeeze-and-excitation in every other block, a stem of two strided convolutions, deep
downsampling, and a classifier that is one norm and one linear layer.

There is no method that fuses anything: that is what ``reparam.compile`` is for. The names of parameters and buffers
are those of the checkpoints in timm; :func:`adapt` renames the authors' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from reparam.errors import CheckpointError, ModelError
from reparam.models.registry import register

PAPER = "Wang et al., RepViT: Revisiting Mobile CNN From ViT Perspective, CVPR 2024, arXiv:2307.09283"


class ConvNorm(nn.Sequential):
    """A convolution without bias, "same" padded, and the batch norm after it.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel, odd.
        stride: Stride on both axes; the output is ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.
        groups: Groups of the convolution.
        zero: Start the norm's weight at 0, so that a residual branch ending here starts as the identity
            (Goyal et al., arXiv:1706.02677, section 5.1).
    """

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        zero: bool = False,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        if zero:
            nn.init.zeros_(self.bn.weight)


class NormLinear(nn.Sequential):
    """Batch norm on a feature vector ``(N, in_features)``, then a linear layer to ``(N, out_features)``."""

    bn: nn.BatchNorm1d
    l: nn.Linear  # noqa: E741 - the checkpoints' name

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.l = nn.Linear(in_features, out_features)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)


class TokenMixer(nn.Module):
    """Depthwise branches in parallel, which mix positions and keep shape and channels ("Block design", figure 3).

    The sum of a ``k x k`` depthwise convolution with its norm, a 1x1 depthwise convolution with its bias, and the
    input itself; one norm follows the sum. In the first release (``legacy``) the 1x1 branch has a norm of its own
    in place of the bias, and nothing follows the sum.
    """

    def __init__(self, channels: int, kernel_size: int, legacy: bool) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, channels, kernel_size, groups=channels)
        self.conv1: nn.Module
        self.bn: nn.Module
        if legacy:
            self.conv1, self.bn = ConvNorm(channels, channels, groups=channels), nn.Identity()
        else:
            self.conv1, self.bn = nn.Conv2d(channels, channels, 1, groups=channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same."""
        mixed: Tensor = self.bn(self.conv(x) + self.conv1(x) + x)
        return mixed


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the mean of all channels (Hu et al., arXiv:1709.01507).

    The bottleneck has ``channels * ratio`` channels, rounded to the nearest multiple of 8 and at least 8.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        squeezed = max(8, int(channels * ratio + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same."""
        squeezed = x.mean((2, 3), keepdim=True)
        gated: Tensor = x * self.gate(self.fc2(self.act(self.fc1(squeezed))))
        return gated


class ChannelMixer(nn.Module):
    """Two pointwise convolutions with GELU between: the feed-forward network of a transformer ("Block design")."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels * expansion)
        self.act = nn.GELU()
        self.conv2 = ConvNorm(channels * expansion, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same, without the shortcut."""
        mixed: Tensor = self.conv2(self.act(self.conv1(x)))
        return mixed


class Block(nn.Module):
    """Token mixer, squeeze-and-excitation where asked for, and channel mixer with a shortcut (figure 3b)."""

    def __init__(
        self, channels: int, kernel_size: int, expansion: int, squeeze_ratio: float | None, legacy: bool
    ) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(channels, kernel_size, legacy)
        self.se = nn.Identity() if squeeze_ratio is None else SqueezeExcite(channels, squeeze_ratio)
        self.channel_mixer = ChannelMixer(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to the same."""
        x = self.se(self.token_mixer(x))
        residual: Tensor = self.channel_mixer(x)
        return x + residual


class Stem(nn.Module):
    """Two 3x3 convolutions in place of patches ("Macro design": early convolutions, Xiao et al. 2106.14881)."""

    def __init__(self, in_channels: int, out_channels: int, strides: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels // 2, 3, strides[0])
        self.act1 = nn.GELU()
        self.conv2 = ConvNorm(out_channels // 2, out_channels, 3, strides[1])

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``, both axes divided by both strides."""
        features: Tensor = self.conv2(self.act1(self.conv1(x)))
        return features


class Downsample(nn.Module):
    """The way into the next stage ("Macro design": deeper downsampling layers).

    A block without squeeze-and-excitation, a strided depthwise convolution, a pointwise convolution to the new
    width, and a channel mixer with a shortcut.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int, legacy: bool
    ) -> None:
        super().__init__()
        self.pre_block = Block(in_channels, kernel_size, expansion, None, legacy)
        self.spatial_downsample = ConvNorm(in_channels, in_channels, kernel_size, stride, groups=in_channels)
        self.channel_downsample = ConvNorm(in_channels, out_channels)
        self.ffn = ChannelMixer(out_channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
        x = self.channel_downsample(self.spatial_downsample(self.pre_block(x)))
        residual: Tensor = self.ffn(x)
        return x + residual


class Stage(nn.Module):
    """A downsampling layer (an identity in the first stage), then blocks of one width."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, previous width, H, W)`` to ``(N, width, H', W')``."""
        features: Tensor = self.blocks(self.downsample(x))
        return features


class Classifier(nn.Module):
    """One norm and one linear layer, and a second such head that learns from a teacher (DeiT, arXiv:2012.12877).

    With both, training mode returns ``(logits, distilled logits)`` for the two losses, and eval mode their mean.
    """

    def __init__(self, features: int, num_classes: int, distillation: bool) -> None:
        super().__init__()
        self.head = NormLinear(features, num_classes)
        self.head_dist = NormLinear(features, num_classes) if distillation else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``(N, features)`` to ``(N, num_classes)``, or to two of them."""
        logits: Tensor = self.head(x)
        if self.head_dist is None:
            return logits
        distilled: Tensor = self.head_dist(x)
        return (logits, distilled) if self.training else (logits + distilled) / 2


class RepViT(nn.Module):
    """RepViT in any configuration; the published ones are ``repvit_m0_6`` to ``repvit_m2_3``.

    The defaults are the published networks'. Their input is divided by 32 on both axes; for small images lower
    ``stem_strides`` and ``downsample_stride``, or give fewer stages.

    Args:
        widths: Channels of each stage; the first is also the stem's, and even.
        depths: Blocks of each stage, at least 1, not counting the downsampling layer that opens every stage but the
            first. Every other block has squeeze-and-excitation, the first included.
        num_classes: Logits; 0 leaves the classifier out and returns the pooled features ``(N, widths[-1])``.
        in_channels: Channels of the input image.
        distillation: Add the second head. Training mode then returns ``(logits, distilled logits)`` and eval mode
            their mean.
        legacy: Build the token mixers of the first release (M1, M2, M3).
        kernel_size: Side of the depthwise kernels, odd.
        expansion: Hidden channels of the channel mixers, as a multiple of their width.
        squeeze_ratio: Bottleneck of squeeze-and-excitation, as a share of its width.
        stem_strides: Strides of the stem's two convolutions.
        downsample_stride: Stride of each downsampling layer.

    Shape:
        ``(N, in_channels, H, W)`` floating point to ``(N, num_classes)``.

    Raises:
        ModelError: If the configuration describes no network.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        distillation: bool = True,
        *,
        legacy: bool = False,
        kernel_size: int = 3,
        expansion: int = 2,
        squeeze_ratio: float = 0.25,
        stem_strides: tuple[int, int] = (2, 2),
        downsample_stride: int = 2,
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(depths) or min(*widths, *depths) < 1 or widths[0] % 2:
            raise ModelError(
                f"widths {tuple(widths)} and depths {tuple(depths)} describe no RepViT: give one of each for every "
                "stage, all at least 1, and an even first width (the stem's first convolution has half of it)"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ModelError(f"kernel_size is {kernel_size}, but the identity branch needs an odd kernel's centre")
        if min(in_channels, expansion, *stem_strides, downsample_stride) < 1 or num_classes < 0:
            raise ModelError("in_channels, expansion and strides must be at least 1, and num_classes at least 0")

        self.stem = Stem(in_channels, widths[0], stem_strides)
        self.stages = nn.Sequential()
        previous = None
        for width, depth in zip(widths, depths, strict=True):
            downsample: nn.Module = nn.Identity()
            if previous is not None:
                downsample = Downsample(previous, width, kernel_size, downsample_stride, expansion, legacy)
            ratios = [squeeze_ratio if block % 2 == 0 else None for block in range(depth)]
            blocks = [Block(width, kernel_size, expansion, ratio, legacy) for ratio in ratios]
            self.stages.append(Stage(downsample, blocks))
            previous = width
        self.head = Classifier(widths[-1], num_classes, distillation) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``(N, in_channels, H, W)`` to logits ``(N, num_classes)``; see the class for the other cases."""
        features = self.stages(self.stem(x)).mean((2, 3))
        logits: Tensor | tuple[Tensor, Tensor] = self.head(features)
        return logits


# The authors' modules, and what those of a block and of a downsampling block are called here.
_AUTHORS_MODULE = r"(features\.\d{1,4}\.((token_mixer|channel_mixer\.m)\.)?\d|classifier\.classifier(_dist)?)(?=\.)"
_AUTHORS_BLOCK = {
    "token_mixer.0": "token_mixer",
    "token_mixer.1": "se",
    "channel_mixer.m.0": "channel_mixer.conv1",
    "channel_mixer.m.2": "channel_mixer.conv2",
}
_AUTHORS_DOWNSAMPLE = {
    "token_mixer.0": "spatial_downsample",
    "token_mixer.2": "channel_downsample",
    "channel_mixer.m.0": "ffn.conv1",
    "channel_mixer.m.2": "ffn.conv2",
}


def adapt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a checkpoint from the authors' repository; any other comes back as it is.

    The authors number stem and blocks in one list, ``features``, in which a stage is opened by a block of stride 2
    (the only ones with a ``token_mixer.2``) and the block before that one, which here is its ``pre_block``.

    Args:
        state: A state dict, such as ``torch.load(path, weights_only=True)["model"]`` of a published file.

    Returns:
        The same tensors under this module's names. Names that the authors' network does not have are kept, so that
        ``load_state_dict`` can report them.
    """
    if "features.0.0.c.weight" not in state:
        return dict(state)
    paths = _paths(state)
    renamed = {}
    for key, tensor in state.items():
        found = re.match(_AUTHORS_MODULE, key)
        renamed[key if found is None else paths.get(found[0], found[0]) + key[found.end() :]] = tensor
    return renamed


def _paths(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Our path of every module in the authors' network whose state dict this is."""
    paths = {
        "features.0.0": "stem.conv1",
        "features.0.2": "stem.conv2",
        "classifier.classifier": "head.head",
        "classifier.classifier_dist": "head.head_dist",
    }
    blocks = {int(found[1]) for key in state if (found := re.match(r"features\.(\d{1,4})\.token_mixer\.", key))}
    downsamples = {index for index in blocks if f"features.{index}.token_mixer.2.c.weight" in state}
    stage = block = 0
    for index in sorted(blocks):
        modules = _AUTHORS_BLOCK
        if index in downsamples:
            modules, ours, block = _AUTHORS_DOWNSAMPLE, f"stages.{stage}.downsample", 0
        elif index + 1 in downsamples:
            stage += 1
            ours = f"stages.{stage}.downsample.pre_block"
        else:
            ours = f"stages.{stage}.blocks.{block}"
            block += 1
        paths |= {f"features.{index}.{theirs}": f"{ours}.{name}" for theirs, name in modules.items()}
    return paths


@dataclass(frozen=True)
class Variant:
    """What tells the registered networks apart, and can be read off a checkpoint."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    legacy: bool = False

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Variant:
        """Read the variant from the names and shapes of a state dict with our keys.

        Raises:
            CheckpointError: If the state dict is not a RepViT's in training form.
        """
        stages: dict[int, list[int]] = {}
        for key, weight in state.items():
            found = re.fullmatch(r"stages\.(\d{1,4})\.blocks\.\d+\.token_mixer\.conv\.c\.weight", key)
            if found and weight.dim() == 4:
                stages.setdefault(int(found[1]), []).append(weight.shape[0])
        if not stages:
            raise CheckpointError(
                "this is not the checkpoint of a RepViT in training form: it has neither timm's "
                "'stages.0.blocks.0.token_mixer.conv.c.weight' nor the authors' "
                "'features.1.token_mixer.0.conv.c.weight' (a network that is already fused has none of them)"
            )
        widths, depths = zip(*((blocks[0], len(blocks)) for _, blocks in sorted(stages.items())), strict=True)
        return cls(widths, depths, any(key.endswith("token_mixer.conv1.c.weight") for key in state))

    def options(self, state: Mapping[str, Tensor]) -> dict[str, object]:
        """Read the builder's options from a checkpoint of this variant, with our names or the authors'.

        Raises:
            CheckpointError: If the checkpoint is not of this variant.
        """
        state = adapt(state)
        if (found := Variant.of(state)) != self:
            raise CheckpointError(f"this is the checkpoint of another RepViT: found {found}, expected {self}")
        stem, head = state.get("stem.conv1.c.weight"), state.get("head.head.l.weight")
        if stem is None or stem.dim() != 4 or (head is not None and head.dim() != 2):
            raise CheckpointError("this RepViT checkpoint lacks a stem or a classifier of the right rank")
        return {
            "num_classes": 0 if head is None else head.shape[0],
            "in_channels": stem.shape[1],
            "distillation": "head.head_dist.l.weight" in state,
        }


class Builder(Protocol):
    """Build a published RepViT for ImageNet, in training form, with random weights."""

    def __call__(self, num_classes: int = 1000, in_channels: int = 3, distillation: bool = True) -> RepViT:
        """See :class:`RepViT` for the options."""


def _published(name: str, variant: Variant, description: str) -> Builder:
    """Register a network of the paper, and return its builder."""

    def build(num_classes: int = 1000, in_channels: int = 3, distillation: bool = True) -> RepViT:
        widths, depths = variant.widths, variant.depths
        return RepViT(widths, depths, num_classes, in_channels, distillation, legacy=variant.legacy)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{description}.\n\n{Builder.__doc__} See :class:`RepViT` for the options."
    known = register(
        name, input_shape=(3, 224, 224), description=description, paper=PAPER, options=variant.options, adapt=adapt
    )
    return known(build)


# Parameters and multiply-adds are those of the compiled network: one head, 1000 classes, 224x224 pixels.
repvit_m0_6 = _published(
    "repvit_m0_6", Variant((40, 80, 160, 320), (1, 1, 8, 1)), "RepViT-M0.6: 2.5 M parameters, 0.4 G multiply-adds"
)
repvit_m0_9 = _published(
    "repvit_m0_9", Variant((48, 96, 192, 384), (2, 2, 14, 2)), "RepViT-M0.9: 5.1 M parameters, 0.8 G multiply-adds"
)
repvit_m1_0 = _published(
    "repvit_m1_0", Variant((56, 112, 224, 448), (2, 2, 14, 2)), "RepViT-M1.0: 6.8 M parameters, 1.1 G multiply-adds"
)
repvit_m1_1 = _published(
    "repvit_m1_1", Variant((64, 128, 256, 512), (2, 2, 12, 2)), "RepViT-M1.1: 8.2 M parameters, 1.3 G multiply-adds"
)
repvit_m1_5 = _published(
    "repvit_m1_5", Variant((64, 128, 256, 512), (4, 4, 24, 4)), "RepViT-M1.5: 14.0 M parameters, 2.3 G multiply-adds"
)
repvit_m2_3 = _published(
    "repvit_m2_3", Variant((80, 160, 320, 640), (6, 6, 34, 2)), "RepViT-M2.3: 22.9 M parameters, 4.5 G multiply-adds"
)
repvit_m1 = _published(
    "repvit_m1",
    Variant((48, 96, 192, 384), (2, 2, 14, 2), legacy=True),
    "RepViT-M1 of the first release: 5.1 M parameters, 0.8 G multiply-adds",
)
repvit_m2 = _published(
    "repvit_m2",
    Variant((64, 128, 256, 512), (2, 2, 12, 2), legacy=True),
    "RepViT-M2 of the first release: 8.2 M parameters, 1.3 G multiply-adds",
)
repvit_m3 = _published(
    "repvit_m3",
    Variant((64, 128, 256, 512), (4, 4, 18, 2), legacy=True),
    "RepViT-M3 of the first release: 10.1 M parameters, 1.9 G multiply-adds",
)

_DIGITS = Variant((16, 32, 64), (2, 2, 2))


@register(
    "repvit_digits",
    input_shape=(1, 8, 8),
    description="RepViT for 8x8 pixels, such as scikit-learn's digits: 0.1 M parameters",
    paper=PAPER,
    options=_DIGITS.options,
    adapt=adapt,
)
def repvit_digits(num_classes: int = 10, in_channels: int = 1, distillation: bool = False) -> RepViT:
    """Build a RepViT for images of 8x8 pixels: three stages at 8x8, 4x4 and 2x2, and a stem that keeps the size.

    It trains to 98 % on scikit-learn's digits in seconds on one CPU core. See :class:`RepViT` for the options.
    """
    widths, depths = _DIGITS.widths, _DIGITS.depths
    return RepViT(widths, depths, num_classes, in_channels, distillation, stem_strides=(1, 1))
