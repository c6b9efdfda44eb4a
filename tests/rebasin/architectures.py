"""Small networks of every kind that people align, with the groups of units that each of them has."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Architecture(NamedTuple):
    """A network to be built from a seed, an input for it, and the sizes of its groups in ascending order."""

    build: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    groups: list[int]


def conv(channels_in: int, channels_out: int, *, stride: int = 1, size: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, stride, size // 2, groups=groups, bias=False)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 12), nn.LayerNorm(12), nn.GELU(), nn.Dropout(), nn.Linear(12, 3))


def vgg() -> nn.Module:
    features = [conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 4)]
    return nn.Sequential(*features, *head)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module], shortcut: str = "conv") -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(channels_in, channels, stride=stride), norm(channels)
        self.conv2, self.norm2 = conv(channels, channels), norm(channels)
        self.pad = 0
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels and shortcut == "conv":
            self.shortcut = nn.Sequential(conv(channels_in, channels, stride=stride, size=1), norm(channels))
        elif channels_in != channels:
            self.pad = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.pad)) if self.pad else self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, shortcut: str = "conv") -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), norm(8)
        self.layers = nn.Sequential(ResidualBlock(8, 8, 1, norm, shortcut), ResidualBlock(8, 12, 2, norm, shortcut))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.norm(self.stem(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class MobileNet(nn.Module):
    """An inverted residual with a depthwise convolution and a squeeze-and-excitation gate, then a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.Hardswish())
        self.expand = nn.Sequential(conv(6, 10, size=1), nn.BatchNorm2d(10), nn.ReLU6())
        self.depthwise = nn.Sequential(conv(10, 10, groups=10), nn.BatchNorm2d(10), nn.ReLU6())
        self.squeeze, self.excite = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.project = nn.Sequential(conv(10, 6, size=1), nn.BatchNorm2d(6))
        self.grouped = nn.Sequential(conv(6, 9, groups=3), nn.PReLU(9))
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(self.grouped(x + self.project(y)).mean([-2, -1]))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 14), nn.Linear(14, channels)
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 7, 2, 2), ConvNeXtBlock(7), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(7), nn.Linear(7, 3))


class UNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv(1, 4), norm(4), nn.SiLU())
        self.down2 = nn.Sequential(conv(4, 8, stride=2), norm(8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.fuse = nn.Sequential(norm(10), conv(10, 6), nn.SiLU())
        self.smooth, self.head = conv(10, 5), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        deep = self.down2(skip)
        fused = self.fuse(torch.cat([skip, self.up(deep)], dim=1))
        resized = F.interpolate(deep, scale_factor=2.0, mode="bilinear")
        return self.head(F.relu(self.smooth(torch.cat([resized[:, :4] + resized[:, 4:], fused], 1))))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(6 + 4 * i), nn.ReLU(), conv(6 + 4 * i, 4)) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.max_pool2d(F.relu(self.norm(torch.cat(features, 1))), 4)
        return self.head(x.view(x.size(0), -1))


class ShuffleNet(nn.Module):
    """Grouped convolutions with a channel shuffle, and a stream that is split in two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = conv(3, 8), conv(8, 12, groups=2, size=1), conv(12, 12, groups=2)
        self.side, self.head = conv(6, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = self.second(x).chunk(2, dim=1)
        return self.head(torch.cat([left, F.relu(self.side(right))], 1).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, features: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        b, t, e = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.view(b, t, self.heads, e // self.heads).transpose(1, 2) for part in (q, k, v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-2, -1) / (e // self.heads) ** 0.5, dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, t, e))


class ViTBlock(nn.Module):
    def __init__(self, features: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention = Attention(features, heads, fused=fused)
        self.mlp = nn.Sequential(nn.Linear(features, 11), nn.GELU(), nn.Linear(11, features))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 12, 4, 4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.blocks = nn.Sequential(ViTBlock(12, 3, fused=True), ViTBlock(12, 3, fused=False))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class LanguageModel(nn.Module):
    """The decoder's weight is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(9, 8), nn.Embedding(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.decoder = nn.Linear(8, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place(torch.arange(tokens.size(1), device=tokens.device))
        return self.decoder(self.encoder(x))


class Gated(nn.Module):
    """A gated feed-forward block with root-mean-square normalization, and mixing of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 8), nn.RMSNorm(8)
        self.up, self.down = nn.Linear(8, 14), nn.Linear(7, 8)
        self.mix = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.glu(self.up(self.norm(x)), dim=-1))
        x = x + self.mix(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.amax(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(14, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        _, last = self.gru(x)
        return self.head(last.squeeze(0))


def image(channels: int, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


ARCHITECTURES: dict[str, Architecture] = {
    "mlp": Architecture(mlp, lambda: torch.randn(3, 6), [10, 12]),
    "vgg": Architecture(vgg, image(3), [6, 8, 9]),
    "resnet batchnorm": Architecture(ResNet, image(3), [8, 8, 12, 12]),
    "resnet padded shortcut": Architecture(lambda: ResNet(shortcut="pad"), image(3), [4, 8, 8, 12]),
    "resnet groupnorm": Architecture(lambda: ResNet(lambda n: nn.GroupNorm(4, n)), image(3), [2, 2, 3, 3, 4, 4, 4, 4]),
    "mobilenet": Architecture(MobileNet, image(3), [2, 3, 3, 4, 10]),
    "convnext": Architecture(convnext, image(3), [7, 14]),
    "unet batchnorm": Architecture(lambda: UNet(nn.BatchNorm2d), image(1), [4, 4, 5, 6, 6]),
    "unet groupnorm": Architecture(lambda: UNet(lambda n: nn.GroupNorm(2, n)), image(1), [2, 2, 4, 5, 5, 6]),
    "densenet": Architecture(DenseNet, image(3), [4, 4, 4, 6]),
    "shufflenet": Architecture(ShuffleNet, image(3), [2, 3, 4, 6, 6]),
    "vit": Architecture(ViT, image(1), [3, 3, 4, 4, 4, 4, 11, 11, 12]),
    "language model": Architecture(LanguageModel, lambda: torch.randint(9, (2, 6)), [2, 2, 4, 4, 4, 4, 8, 10, 10]),
    "gated": Architecture(Gated, lambda: torch.randn(2, 4, 5), [2, 4, 4, 7, 8, 9]),
    "recurrent": Architecture(Recurrent, lambda: torch.randn(2, 5, 4), [6, 7, 7, 7, 7]),
}
