"""The gradient of a depthwise convolution's weight, as a depthwise convolution itself.

Each channel of each example is a convolution of one image, whose gradient is

    dW[t] = sum over positions p of x[s p + d t] dy[p],

with the stride `s` and the dilation `d`: the image convolved with the gradient of its output, with
stride `d` and dilation `s`. All of them are one depthwise convolution, with as many groups as there
are images. torch's own gradient of filters of 7 x 7 takes 10 to 16 times its forward pass, this one
1 to 2 times (oneDNN, float32). For filters of 3 x 3 both take the same time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift.private.torch.tracing import is_batched, is_followed

Sizes = tuple[int, ...]

FEW = 9  # taps, up to which torch's own gradient takes no longer
NEAR = 3  # padding, up to which oneDNN has a fast kernel
PLAIN = (Tensor, nn.Parameter)


def is_quicker(g: Tensor, x: Tensor, taps: int) -> bool:
    """Whether `gradient_of_filters` is quicker than torch's own gradient, and nothing observes it.

    Args:
        g: the gradient of the output.
        x: the input.
        taps: the number of elements of a filter.
    """
    return (
        taps > FEW
        and not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and type(g) in PLAIN
        and x.dtype is torch.float32
        and x.is_cpu
        and 3 <= x.dim() <= 4
        and g.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not is_followed()
        and not is_batched(g)
    )


def gradient_of_filters(
    g: Tensor, x: Tensor, kernel: Sizes, padding: Sizes, stride: Sizes, dilation: Sizes
) -> Tensor:
    """Return the gradient of the filters, ``(out, 1, *kernel)``.

    Args:
        g: the gradient of the output, ``(batch, out, *positions)``. For a transposed convolution it
            is the input, and `x` is the gradient of the output.
        x: the input, ``(batch, in, *positions)``, where `in` divides `out`.
        kernel: the size of the filters.
        padding: of the convolution, as are `stride` and `dilation`.
        stride: see `padding`.
        dilation: see `padding`.
    """
    images = x.shape[0] * x.shape[1]
    x = x.reshape(1, images, *x.shape[2:])
    filters = g.reshape(g.shape[0] * g.shape[1], 1, *g.shape[2:])
    if any(p > NEAR or p >= n for p, n in zip(padding, g.shape[2:], strict=True)):
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
        padding = (0,) * len(padding)
    none = [0] * len(kernel)
    found = torch.convolution(x, filters, None, dilation, padding, stride, False, none, images)
    for axis, size in enumerate(kernel, 2):  # a stride may leave positions that no output reads
        found = found.narrow(axis, 0, size)
    return found[0].unflatten(0, g.shape[:2]).sum(0).unsqueeze(1)
