"""Image classifiers that can be pruned by channel; they take images in [0, 1]."""

from collections.abc import Sequence

from torch import Tensor, nn

from hipp_ext.errors import MissingExtraError, UnsupportedModelError

_STAGE = (512, 512, 512, "M")
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", *_STAGE, *_STAGE)
MODEL_NAMES = ("resnet18", "resnet34", "vgg16_bn", "mobilevit_s", "small-resnet", "small-vgg")


def build_model(name: str, classes: int, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """A network with random weights (from the global random state).

    - resnet18, resnet34: torchvision's, with a 3x3 stem of stride 1 and no pooling after it, as is
      usual for 32x32 pixels;
    - vgg16_bn: torchvision's features, then a global average and one linear layer (its own two
      layers of 4,096 hold 90% of its parameters and are made for 224x224);
    - mobilevit_s: timm's;
    - small-resnet, small-vgg: 0.17M and 0.13M parameters, for 16x16 digits.

    Args:
        name: one of MODEL_NAMES.
        classes: number of classes.
        shape: (channels, height, width) of the images.

    Raises:
        UnsupportedModelError: the name is not one of these.
        MissingExtraError: timm is not installed (mobilevit_s).
    """
    if name in ("resnet18", "resnet34"):
        from torchvision.models import resnet18, resnet34

        model = (resnet18 if name == "resnet18" else resnet34)(num_classes=classes)
        model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()  # type: ignore[assignment]
        return model
    if name == "vgg16_bn":
        return ConvStack(VGG16, classes, shape[0])
    if name == "mobilevit_s":
        try:
            import timm
        except ModuleNotFoundError:
            raise MissingExtraError("timm", "robust") from None
        return timm.create_model("mobilevit_s", num_classes=classes, in_chans=shape[0])
    if name == "small-resnet":
        return SmallResNet(classes, shape[0])
    if name == "small-vgg":
        return ConvStack((16, 16, "M", 32, 32, 32, "M", 64, 64, 64), classes, shape[0])
    raise UnsupportedModelError(
        f"Known networks are {', '.join(MODEL_NAMES)}; got {name!r}. Any other nn.Module can be "
        "passed in Python."
    )


def fixed_layers(model: nn.Module) -> list[nn.Module]:
    """Layers whose output channels must stay because the forward hard-wires their number.

    For MobileViT, these are the residual streams of its transformer blocks and the projections
    whose reshape hard-wires the head size.
    """
    fixed = []
    for name, module in model.named_modules():
        in_block = ".transformer." in name and name.endswith(
            (".attn.qkv", ".attn.proj", ".mlp.fc2")
        )
        if in_block or (
            name.endswith(".conv_1x1")
            and hasattr(model.get_submodule(name.rpartition(".")[0]), "transformer")
        ):
            fixed.append(module)
    return fixed


class ConvStack(nn.Module):
    """3x3 convolutions with batch norm, poolings ("M"), a global average, one linear layer."""

    def __init__(self, widths: Sequence[int | str], classes: int, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class SmallResNet(nn.Module):
    """A stem of stride 2 and three stages of two basic blocks, 16, 32 and 64 channels wide."""

    def __init__(self, classes: int, channels: int = 1):
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        def down(inside: int, outside: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride=2, bias=False), nn.BatchNorm2d(outside)
            )

        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        for inside, outside in ((16, 16), (16, 32), (32, 64)):
            first = (
                BasicBlock(inside, outside, 2, down(inside, outside))
                if inside < outside
                else BasicBlock(inside, outside)
            )
            blocks += [first, BasicBlock(outside, outside)]
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))
