"""The networks that `clients.py` compiles, as their packages build them, and what their packages do with a network.

No weights can be had here: all are built from configurations, those that a package ships where it ships any. Packages
are imported when one of their networks is built, for each takes its seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import client_ops  # noqa: F401  (before anybody imports torchvision)
from common import reparameterize_model, timm

Pipeline = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Client:
    """A network of a package.

    Attributes:
        package: Whose it is, as it is installed.
        name: What the package calls it.
        build: Returns it.
        size: Side of the image that it is compiled with.
        second: Side of another image, which it is run with afterwards.
        inputs: Returns example inputs as :func:`reparam.compile` takes them, of some images with such a side.
        own: The package's own conversion for deployment; may change what it is given.
        pipelines: What the package does with a network of its class: takes one, and may change it; returns outputs.
    """

    package: str
    name: str
    build: Callable[[], nn.Module]
    size: int
    second: int
    inputs: Callable[[int, int], Any]
    own: Callable[[nn.Module], nn.Module] | None = None
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)


# Inputs: always the same images of a size.


def images(batch: int, size: int) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch * size))


def pixel_values(batch: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": images(batch, size)}


def list_of_images(batch: int, size: int) -> tuple[list[Tensor]]:
    return (list(images(batch, size)),)


def photograph(size: int) -> Any:
    """An image as a file has it: height, width, three bytes each."""
    return (images(1, size)[0].permute(1, 2, 0) * 255).byte().numpy()


# Ultralytics.


def ultralytics(name: str, size: int = 160, second: int = 192) -> Client:
    def wrapped() -> Any:
        from ultralytics import RTDETR, YOLO

        return (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml")

    def predict(model: nn.Module) -> Any:
        yolo = wrapped()
        yolo.model = model
        results = yolo.predict(photograph(size), imgsz=size, conf=1e-4, max_det=20, device="cpu", verbose=False)
        # Of masks, whose pixels are in or out, how much they cover: a pixel at the threshold may be either.
        return [
            part.data.float().mean((1, 2)) if part is result.masks else part.data
            for result in results
            for part in (result.boxes, result.masks, result.keypoints)
            if part is not None
        ]

    def export(model: nn.Module) -> Any:
        import onnxruntime

        yolo = wrapped()
        yolo.model = model
        path = yolo.export(format="onnx", imgsz=size, device="cpu", simplify=False, verbose=False)
        session = onnxruntime.InferenceSession(path)
        outputs = session.run(None, {session.get_inputs()[0].name: images(1, size).numpy()})
        return [x[:, :20] if x.shape[-1] == 6 else x for x in outputs]  # the best boxes, where they are sorted

    return Client(
        "ultralytics",
        name,
        lambda: wrapped().model,
        size,
        second,
        images,
        own=lambda model: model.fuse(verbose=False),
        pipelines={"predict": predict, "export to ONNX": export},
    )


ULTRALYTICS = [
    ultralytics(name)
    for name in (
        "yolov5n",  # with the head of YOLOv8, which is what its published weights are called yolov5nu for
        "yolov8n",
        "yolov8n-seg",
        "yolov9t",
        "yolov10n",
        "yolo11n",
        "yolo11n-pose",
        "yolo12n",
        "rtdetr-l",
        "rtdetr-resnet50",
    )
]


# transformers.


def transformers(
    name: str,
    of: str,
    /,
    size: int = 96,
    second: int = 128,
    task: str = "",
    processor: str = "",
    **config: Any,
) -> Client:
    """A network by the name of its class, of its default configuration with some changes."""

    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, of)
        return cls(cls.config_class(**config))

    def run(model: nn.Module) -> Any:
        import transformers
        from PIL import Image

        processing = getattr(transformers, processor)(size={"height": size, "width": size}, do_center_crop=False)
        run = transformers.pipeline(task, model=model, image_processor=processing, device="cpu")
        image = Image.fromarray(photograph(size))
        if task != "object-detection":
            return run(image)
        # The best; and large, since corners are rounded to pixels.
        found = run(image.resize((4000, 4000)), threshold=0.0)[:20]
        return torch.tensor([box["score"] for box in found]), torch.tensor([[*box["box"].values()] for box in found])

    pipelines = {task: run} if task else {}
    return Client("transformers", name, build, size, second, pixel_values, pipelines=pipelines)


def hub_backbone(name: str, **config: Any) -> Client:
    """A network of timm under transformers."""

    def build() -> nn.Module:
        import transformers

        settings = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, **config)
        return transformers.TimmBackbone(settings)

    return Client("transformers", f"TimmBackbone of {name}", build, 96, 128, pixel_values)


classifier = partial(transformers, task="image-classification", processor="ViTImageProcessor")
detector = partial(transformers, task="object-detection", size=160, second=192)
# The smallest of the families whose default is large, so that a row takes seconds.
TRANSFORMERS = [
    detector("RT-DETR", "RTDetrForObjectDetection", processor="RTDetrImageProcessor"),
    detector("RT-DETRv2", "RTDetrV2ForObjectDetection", processor="RTDetrImageProcessor"),
    detector("D-FINE", "DFineForObjectDetection", processor="RTDetrImageProcessor"),
    detector("DETR", "DetrForObjectDetection", processor="DetrImageProcessor", use_pretrained_backbone=False),
    classifier("MobileNetV1", "MobileNetV1ForImageClassification"),
    classifier("MobileNetV2", "MobileNetV2ForImageClassification"),
    classifier("ResNet-50", "ResNetForImageClassification"),
    classifier("RegNet", "RegNetForImageClassification"),
    classifier("LeViT", "LevitForImageClassification", size=224, second=224),
    classifier("MobileViT", "MobileViTForImageClassification"),
    classifier("MobileViTV2", "MobileViTV2ForImageClassification"),
    classifier("EfficientNet-B0", "EfficientNetForImageClassification", width_coefficient=1.0, depth_coefficient=1.0,
               hidden_dim=1280),
    transformers("SegFormer-B0", "SegformerForSemanticSegmentation", task="image-segmentation",
                 processor="SegformerImageProcessor"),
    classifier("TimmWrapper of resnet18", "TimmWrapperForImageClassification", architecture="resnet18"),
    classifier("TimmWrapper of repvit_m0_9", "TimmWrapperForImageClassification", architecture="repvit_m0_9"),
    hub_backbone("resnet18"),
    hub_backbone("mobileone_s0", out_indices=(1, 2, 3, 4)),
]  # fmt: skip


# segmentation-models-pytorch.


def segmentation(decoder: str, encoder: str) -> Client:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, decoder)(encoder, encoder_weights=None, classes=3)

    def predict(model: nn.Module) -> Any:
        return model.predict(images(1, 96))

    return Client(
        "segmentation-models-pytorch", f"{decoder} on {encoder}", build, 96, 128, images, pipelines={"predict": predict}
    )


SEGMENTATION = [
    segmentation("Unet", "resnet18"),
    segmentation("Unet", "tu-repvit_m0_9"),
    segmentation("FPN", "tu-mobileone_s0"),
    segmentation("DeepLabV3Plus", "tu-mobilenetv3_large_100"),
    segmentation("UnetPlusPlus", "tu-resnet18"),
]


# torchvision.


def torchvision(name: str, second: int = 128, **options: Any) -> Client:
    detects = name.endswith(("_fpn", "ssdlite320_mobilenet_v3_large"))

    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)

    return Client("torchvision", name, build, 96, second, list_of_images if detects else images)


# Detectors resize to their own sizes, which are given here; random scores hardly pass a threshold.
SMALL = {"min_size": 96, "max_size": 128}
TORCHVISION = [
    torchvision("fasterrcnn_mobilenet_v3_large_320_fpn", **SMALL, box_score_thresh=0.0, box_detections_per_img=20),
    torchvision("ssdlite320_mobilenet_v3_large", score_thresh=0.0, detections_per_img=20),
    torchvision("retinanet_resnet50_fpn", **SMALL, score_thresh=0.0, detections_per_img=20),
    torchvision("fcos_resnet50_fpn", **SMALL, score_thresh=0.0, detections_per_img=20),
    torchvision("lraspp_mobilenet_v3_large"),
    torchvision("deeplabv3_mobilenet_v3_large"),
    torchvision("fcn_resnet50", aux_loss=True),
]


# timm.


def features(name: str) -> Client:
    def build() -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=False, features_only=True)
        return model

    def channels(model: nn.Module) -> Any:
        """What decoders ask of it: its channels and reductions, and maps that have them."""
        information = model.feature_info
        maps = model(images(1, 96))
        assert [x.shape[1] for x in maps] == information.channels()
        assert [96 // x.shape[2] for x in maps] == information.reduction()
        return maps

    return Client(
        "timm",
        f"features of {name}",
        build,
        96,
        128,
        images,
        own=reparameterize_model,
        pipelines={"feature_info": channels},
    )


TIMM = [
    features(name) for name in ("resnet18", "mobilenetv3_large_100", "efficientnet_b0", "repvit_m0_9", "fastvit_t8")
]


# docTR.


def doctr() -> Client:
    def build() -> nn.Module:
        from doctr.models import fast_tiny

        return fast_tiny(pretrained=False, pretrained_backbone=False, exportable=True)

    def own(model: nn.Module) -> nn.Module:
        from doctr.models.detection.fast import reparameterize

        return reparameterize(model)

    def predictor(model: nn.Module) -> Any:
        from doctr.models.detection.predictor import DetectionPredictor
        from doctr.models.preprocessor import PreProcessor

        model.exportable = False
        model.postprocessor.bin_thresh = 0.0
        return DetectionPredictor(PreProcessor((128, 128), batch_size=1), model)([photograph(128)])

    return Client(
        "python-doctr", "fast_tiny", build, 128, 160, images, own=own, pipelines={"detection predictor": predictor}
    )


CLIENTS = [*ULTRALYTICS, *TRANSFORMERS, *SEGMENTATION, *TORCHVISION, *TIMM, doctr()]


def lived_in(client: Client) -> nn.Module:
    """Build a model with statistics and affines as after training, frozen norms included; return it, in eval mode.

    The statistics are those of some images. With others, what a deep network of random weights returns hardly depends
    on the image: the scores of a detector are the same everywhere, and which boxes it returns is up to rounding.
    """
    from support import randomise

    model = client.build()
    randomise(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            # Norms that are frozen keep all four as buffers, and are of no class of PyTorch's.
            buffers = dict(module.named_buffers(recurse=False))
            if not isinstance(module, nn.modules.batchnorm._NormBase) and "running_var" in buffers:
                for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                    if name in buffers:
                        buffers[name].copy_(torch.rand(buffers[name].shape, generator=generator) + low)
    norms = [module for module in model.eval().modules() if "running_var" in dict(module.named_buffers(recurse=False))]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    run(model, client.inputs(4, client.size))
    for hook in hooks:
        hook.remove()
    return model


def _take_statistics(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    x = inputs[0].transpose(0, 1).flatten(1)
    norm.running_mean.copy_(x.mean(1))
    # A channel that hardly varies would amplify rounding; training keeps none like that.
    variance = x.var(1)
    norm.running_var.copy_(variance.clamp(min=0.01 * float(variance.mean())))


def run(model: nn.Module, inputs: Any) -> Any:
    """Return what a model returns for inputs as :func:`reparam.compile` takes them, which stay as they are."""
    inputs = copy.deepcopy(inputs)
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def doubled(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, inputs)


def numbers(outputs: Any) -> list[Tensor]:
    """All numbers in outputs of a model or a pipeline, in order, as tensors of float64."""
    if isinstance(outputs, Tensor):
        return [outputs.detach().double()] if not outputs.is_complex() else [torch.view_as_real(outputs).double()]
    if isinstance(outputs, Mapping):
        return [tensor for key in outputs for tensor in numbers(outputs[key])]
    if isinstance(outputs, list | tuple):
        return [tensor for value in outputs for tensor in numbers(value)]
    if isinstance(outputs, int | float | np.ndarray | np.generic) or type(outputs).__module__.startswith("PIL"):
        return [torch.as_tensor(np.asarray(outputs, dtype=np.float64))]
    return []
