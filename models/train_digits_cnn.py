"""Train `digits_cnn.onnx`, a small convolutional network that reads handwritten digits.

Its blocks are those of ResNet and MobileNetV2; the exported file keeps BatchNormalization apart
from the convolutions, as a model does that nobody has optimized yet.

Data: the 1797 images of 8x8 pixels of `sklearn.datasets.load_digits`, a part of the UCI data set
"Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (CC BY 4.0).
Reached: test accuracy 0.9925 on 400 images, in half a minute.
Run: python models/train_digits_cnn.py
"""

import torch
from common import accuracy, export, fit, make_reproducible, save_samples
from sklearn.datasets import load_digits
from torch import Tensor, nn

NAME = "digits_cnn"
TEST_SAMPLES = 400
CALIBRATION_SAMPLES = 200


class ConvBN(nn.Sequential):
    """Convolution, batch normalization and, unless told otherwise, a ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            activation(),
        )


class Separable(nn.Sequential):
    """A depthwise convolution over space, then a pointwise one over channels."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__(
            ConvBN(inputs, inputs, 3, stride=stride, groups=inputs),
            ConvBN(inputs, outputs, 1),
        )


class BasicResidual(nn.Module):
    """Two full convolutions around a skip, as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBN(channels, channels, 3, activation=nn.ReLU)
        self.second = ConvBN(channels, channels, 3, activation=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.second(self.first(x)))


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project, around a skip, as in MobileNetV2."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = ConvBN(channels, wide, 1)
        self.depthwise = ConvBN(wide, wide, 3, groups=wide)
        self.project = ConvBN(wide, channels, 1, activation=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class DigitsCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvBN(1, 32, 3, activation=nn.ReLU),
            BasicResidual(32),
            Separable(32, 64, stride=2),
            InvertedResidual(64, expansion=2),
            Separable(64, 128, stride=2),
            InvertedResidual(128, expansion=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.pool(self.features(image)).flatten(1))


def main() -> None:
    make_reproducible(seed=0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    test, train = torch.randperm(len(images)).tensor_split([TEST_SAMPLES])

    model = DigitsCNN()

    def batch_loss() -> Tensor:
        batch = train[torch.randint(len(train), (64,))]
        return nn.functional.cross_entropy(
            model(images[batch]), labels[batch], label_smoothing=0.05
        )

    fit(model, batch_loss, steps=800, peak_lr=4e-3, weight_decay=0.05)

    export(
        model,
        NAME,
        example={"image": images[:2]},
        outputs=["logits"],
        dynamic_shapes=({0: "batch"},),
        probe={"image": images[:7]},
        keep_batchnorm=True,
    )
    print(f"test accuracy {accuracy(NAME, {'image': images[test]}, labels[test]):.4f}")
    save_samples(
        NAME,
        calib={"image": images[train[:CALIBRATION_SAMPLES]]},
        test={"image": images[test], "label": labels[test]},
    )


if __name__ == "__main__":
    main()
