"""The networks of ``knn.py``: from images to features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Sequential):
    """Two convolutions and a linear layer, as in NeuralSort's experiments with MNIST (Grover et al. 2019).

    Args:
        channels: of the images.
        size: their height and width, a multiple of 4; images of less than 16 pixels are padded.
        features: how many features come out.
    """

    def __init__(self, channels: int, size: int, features: int = 500) -> None:
        padding = 0 if size >= 16 else 2
        pooled = ((size - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2
        super().__init__(
            nn.Conv2d(channels, 20, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(50 * pooled**2, features),
            nn.ReLU(),
        )
        self.features = features


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, h, w) to (n, out, h / stride, w / stride)."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """ResNet-18 (He et al. 2016) for small images: a 3 x 3 convolution in front, and no pooling after it.

    Args:
        channels: of the images.
        width: of the first stage; 64 in the paper.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            layers += [Block(before, out, stride), Block(out, out, 1)]
            before = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = before


class Autoencoder(nn.Module):
    """A network with a decoder behind it, which draws the image from the features.

    Args:
        encoder: from images to features.
        shape: (channels, height, width) of an image.
    """

    def __init__(self, encoder: ConvNet | ResNet18, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        pixels = int(torch.Size(shape).numel())
        self.decoder = nn.Sequential(
            nn.Linear(encoder.features, 500), nn.ReLU(), nn.Linear(500, pixels), nn.Unflatten(1, shape)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The image (n, channels, h, w) drawn again."""
        drawn: Tensor = self.decoder(self.encoder(x))
        return drawn
