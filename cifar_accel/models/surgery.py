"""Changes to a model in place that leave what it computes as it is."""

import torch


class _CentreConv2d(torch.nn.Conv2d):
    """A convolution that, on a map of one pixel, multiplies with its kernel's centre alone: the rest meets padding."""

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if input.shape[-2:] != (1, 1):
            return super()._conv_forward(input, weight, bias)
        centre = weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
        return torch.nn.functional.linear(input.flatten(1), centre, bias)[:, :, None, None]


def shorten_convolutions(model: torch.nn.Module) -> None:
    """Let every dense convolution that keeps a map's size skip the padding around a map of one pixel, in place.

    A network of stride 32 has such maps at 32 pixels, and 8 of 9 products of its last 3x3 kernels are with zeros.
    """
    for layer in model.modules():
        if type(layer) is torch.nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            around = tuple(
                d * (k - 1) / 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
            )
            if layer.padding == around != (0, 0):
                layer.__class__ = _CentreConv2d
