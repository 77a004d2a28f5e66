"""Small networks that predecessors get wrong, and a module from a function of its parts."""

import torch
import torch.nn.functional as F
from torch import nn


class Doubled(torch.autograd.Function):
    """A function of the user's own, for which there is no rule."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Function(nn.Module):
    """A module from a function of parts."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self._forward(self, *args)


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, **options)


def residual(m, x):
    return F.relu(m.b(F.relu(m.a(x))) + m.skip(x))


def dense(m, x):
    for layer in (m.a, m.b, m.c):
        x = torch.cat([x, layer(F.relu(x))], 1)
    return m.last(x)


def unet(m, x):
    a = F.relu(m.down(x))
    b = F.relu(m.deeper(F.max_pool2d(a, 2)))
    up = F.pad(F.interpolate(b, scale_factor=2), (0, 1, 0, 1))
    return m.out(torch.cat([a, up], 1))


def channels_last(m, x):
    x = m.patch(x).permute(0, 2, 3, 1)
    x = x + m.mlp(m.norm(x))
    return m.depthwise(x.permute(0, 3, 1, 2))


def shuffle(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def split_and_join(m, x):
    a, b = m.a(x).chunk(2, 1)
    c, d, e = torch.split(m.b(b), [1, 2, 1], 1)
    return torch.cat([a, e, d], 1) * c


def in_place(m, x):
    x = F.relu_(m.a(x))
    y = m.b(x)
    y += x[:, :, 1:-1, 1:-1]
    return y.mul_(2)


def squeeze_excite(m, x):
    x = m.b(F.relu(m.a(x)))
    gate = m.gate(x.mean((2, 3), keepdim=True))
    return m.c(F.relu(x * gate))


CASES = {
    "three convolutions": nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 2)),
    "bias, padding and stride": nn.Sequential(
        conv(3, 4, 3, stride=2, padding=1), conv(4, 3, 5, stride=3, padding=2)
    ),
    "even kernels": nn.Sequential(conv(2, 3, 2), conv(3, 3, 4, padding=1), conv(3, 2, 2, stride=2)),
    "rectangular kernel": nn.Sequential(conv(1, 3, (3, 5), padding=(1, 0)), conv(3, 2, (1, 7), stride=(1, 2))),
    "dilation": nn.Sequential(conv(2, 3, 3, dilation=3, padding=3), conv(3, 2, 3, dilation=(1, 2), stride=2)),
    "same": nn.Sequential(conv(2, 3, 4, padding="same"), conv(3, 2, 3, padding="same", dilation=2)),
    "stride larger than kernel": nn.Sequential(conv(2, 3, 1, stride=3), conv(3, 2, 2, stride=3, padding=1)),
    "padded 1x1": nn.Sequential(conv(2, 3, 1, padding=2), nn.ReLU(), conv(3, 2, 3, stride=2, padding=2)),
    "groups": nn.Sequential(conv(4, 4, groups=4, padding=1), conv(4, 6, groups=2), conv(6, 13, 1)),
    "max pool": nn.Sequential(conv(2, 3), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
    "max pool, dilated": nn.Sequential(conv(2, 3), nn.MaxPool2d(2, 1, 1, dilation=2), conv(3, 2)),
    "max pool, ceil and padding": nn.Sequential(
        conv(2, 3, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), conv(3, 2, 1)
    ),
    "average pool": nn.Sequential(conv(2, 3), nn.AvgPool2d(2, 2), nn.AvgPool2d((4, 2), 2, (2, 1)), conv(3, 2, 1)),
    "average pool, ceil": nn.Sequential(conv(2, 3), nn.AvgPool2d(2, 2, ceil_mode=True), conv(3, 2, 1)),
    "average pool, pad not counted": nn.Sequential(
        conv(2, 3), nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=False), conv(3, 2, 1)
    ),
    "average pool, divisor": nn.Sequential(conv(2, 3), nn.AvgPool2d(3, 2, 1, divisor_override=4), conv(3, 2, 1)),
    "frozen batch norm": nn.Sequential(conv(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2)),
    "transposed": nn.Sequential(nn.ConvTranspose2d(2, 3, 4, 2, 1), nn.ReLU(), conv(3, 2, 3, stride=2)),
    "transposed, output padding": nn.Sequential(
        conv(2, 3, 3, stride=2), nn.ConvTranspose2d(3, 2, 3, 2, 1, output_padding=1), conv(2, 2, 3)
    ),
    "transposed with gaps": nn.Sequential(
        conv(2, 3, 3, stride=2), nn.ConvTranspose2d(3, 2, 2, 4, 0, output_padding=3), conv(2, 2, 3)
    ),
    "transposed, dilated, grouped": nn.Sequential(
        conv(2, 4, 3), nn.ConvTranspose2d(4, 2, 3, 3, 2, groups=2, dilation=2), conv(2, 2, 3)
    ),
    "nearest upsampling": nn.Sequential(conv(2, 3, stride=2), nn.Upsample(scale_factor=(2, 3)), conv(3, 2)),
    "nearest, by any factor": Function(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=(1.7, 0.6))), a=conv(2, 3), b=conv(3, 2)
    ),
    "nearest, by sizes": Function(
        lambda m, x: m.b(F.interpolate(m.a(x), size=(31, 13), mode="nearest-exact")), a=conv(2, 3), b=conv(3, 2)
    ),
    "bilinear, by powers of two": Function(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=(2, 4), mode="bilinear")), a=conv(2, 3), b=conv(3, 2)
    ),
    "bilinear, to half": Function(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=0.5, mode="bilinear")), a=conv(2, 3), b=conv(3, 2, 2)
    ),
    "bicubic, by powers of two": Function(
        lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=(4, 2), mode="bicubic")), a=conv(2, 3), b=conv(3, 2)
    ),
    "reflected": Function(lambda m, x: m.b(F.pad(m.a(x), (4, 1, 2, 3), "reflect")), a=conv(2, 3), b=conv(3, 2)),
    "repeated": Function(lambda m, x: m.b(F.pad(m.a(x), (4, 1, 9, 3), "replicate")), a=conv(2, 3), b=conv(3, 2)),
    "reflected, cropped": Function(
        lambda m, x: m.b(F.pad(m.a(x), (4, -1, -2, 3), "reflect")), a=conv(2, 3), b=conv(3, 2)
    ),
    "reflected in every layer": nn.Sequential(
        conv(2, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        conv(3, 3, 5, padding=2, stride=2, padding_mode="reflect"),
        conv(3, 2, padding=(1, 2), padding_mode="replicate"),
    ),
    "windows as a dim": Function(
        lambda m, x: m.b(m.a(x).unfold(2, 3, 2).unfold(3, 2, 1).sum((4, 5))), a=conv(2, 3), b=conv(3, 2)
    ),
    "windows over channels": Function(
        lambda m, x: m.c(F.max_pool3d(m.b(m.a(x).unsqueeze(1)), 3, 1, 1)[:, 0]),
        a=conv(2, 4),
        b=nn.Conv3d(1, 1, (3, 3, 2), padding=(1, 1, 0)),
        c=conv(4, 2),
    ),
    "padded between activations": nn.Sequential(
        nn.ReLU(), nn.ZeroPad2d(2), nn.ReLU(), nn.ReflectionPad2d(1), nn.ReLU(), conv(2, 2, 1), nn.ReLU()
    ),
    "pixel shuffle": nn.Sequential(
        conv(2, 8), nn.PixelShuffle(2), conv(2, 3), nn.PixelUnshuffle(2), conv(12, 2, 2)
    ),
    "pad and crop": nn.Sequential(conv(2, 3), nn.ZeroPad2d((1, -2, 3, -1)), nn.ConstantPad2d(2, 3.0), conv(3, 2)),
    "prelu": nn.Sequential(conv(2, 3), nn.PReLU(3), conv(3, 2)),
    "residual": Function(
        residual, a=conv(2, 3, stride=2, padding=1), b=conv(3, 3, padding=1), skip=conv(2, 3, 1, stride=2)
    ),
    "dense block": Function(
        dense, a=conv(2, 2, padding=1), b=conv(4, 2, padding=1), c=conv(6, 2, padding=1), last=conv(8, 2)
    ),
    "unet": Function(unet, down=conv(2, 3, padding=1), deeper=conv(3, 4, padding=1), out=conv(7, 2)),
    "channel shuffle": Function(shuffle, a=conv(2, 4), b=conv(4, 2)),
    "splits": Function(split_and_join, a=conv(2, 4), b=conv(2, 4, 1)),
    "in place": Function(in_place, a=conv(2, 3, padding=1), b=conv(3, 3)),
    "strided slice": Function(lambda m, x: m.b(m.a(x)[:, :, 1::2, -19:]), a=conv(2, 3), b=conv(3, 2)),
    "frozen stem": nn.Sequential(conv(2, 3).requires_grad_(False), nn.ReLU(), conv(3, 2)),
    "shared module": Function(lambda m, x: m.last(m.a(F.relu(m.a(x)))), a=conv(2, 2, padding=1), last=conv(2, 2)),
    "two outputs": Function(
        lambda m, x: (m.b(m.a(x)), m.c(m.a(x))), a=conv(2, 3), b=conv(3, 2, stride=2), c=conv(3, 1, 5)
    ),
    "positional parameter": Function(
        lambda m, x: m.b(m.a(x) + m.grid),
        a=conv(2, 3, padding=1),
        b=conv(3, 2),
        grid=nn.Parameter(torch.zeros(1, 3, 21, 17)),
    ),
    "weight standardisation": Function(
        lambda m, x: m.b(F.conv2d(x, m.a.weight - m.a.weight.sum((1, 2, 3), keepdim=True), m.a.bias)),
        a=conv(2, 3),
        b=conv(3, 2),
    ),
}
