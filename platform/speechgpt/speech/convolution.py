"""A convolution in double precision that is as fast as the others."""

import torch
from torch import Tensor
from torch.nn import functional as F


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, margin: int = 0) -> Tensor:
    """`F.conv1d` of stride 1: [clips, in, n] -> [clips, out, n + 2 margin - kernel + 1]. margin: zeros at either end.

    PyTorch has no kernel of its own for depth-wise convolutions of doubles on CPUs, and goes through them channel by
    channel; tap by tap they take a tenth of the time on the short pieces of a stream, a fifth on a whole clip.
    """
    if bias is None or x.dtype != torch.float64 or not groups == x.shape[1] == len(weight) or x.device.type != "cpu":
        return F.conv1d(x, weight, bias, padding=margin, groups=groups)
    x = F.pad(x, (margin, margin))
    taps = weight[:, 0].T[:, None, :, None]
    count = x.shape[2] - len(taps) + 1
    y = torch.addcmul(bias[None, :, None], x[:, :, :count], taps[0])
    for place in range(1, len(taps)):
        y.addcmul_(x[:, :, place : place + count], taps[place])
    return y
