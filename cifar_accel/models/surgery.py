"""Changes to a model in place that leave its function and its state dict as they are."""

import torch


def apply(model: torch.nn.Module) -> None:
    """Change `model` in place, new or loaded, so that figures are equal to the last digit."""
    shorten_convolutions(model)


class _CentreConv2d(torch.nn.Conv2d):
    """A convolution that multiplies a map of one pixel by its kernel's centre alone.

    The rest of the kernel would meet padding only.
    """

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if input.shape[-2:] != (1, 1):
            return super()._conv_forward(input, weight, bias)
        _, _, height, width = weight.shape
        # [out, in]: a convolution of one pixel is a matrix product.
        centre = weight[:, :, height // 2, width // 2]
        output = torch.nn.functional.linear(input.flatten(1), centre, bias)
        return output[:, :, None, None]


def shorten_convolutions(model: torch.nn.Module) -> None:
    """Let dense convolutions that keep a map's size skip the padding around one pixel, in place.

    A network of stride 32 has maps of one pixel at an image size of 32, where 8 of 9 products of a
    3x3 kernel are with zeros.
    """
    for layer in model.modules():
        # Subclasses have a forward of their own.
        if type(layer) is not torch.nn.Conv2d:
            continue
        if layer.groups != 1 or layer.padding_mode != "zeros":
            continue
        pairs = zip(layer.dilation, layer.kernel_size, strict=True)
        same_padding = tuple(dilation * (size - 1) / 2 for dilation, size in pairs)
        # A 1x1 kernel, which needs no padding, is its centre already.
        if layer.padding == same_padding != (0, 0):
            layer.__class__ = _CentreConv2d
