"""The choice, from shapes alone, of how a layer with a low-rank delta is computed."""

from dataclasses import dataclass
from typing import Literal

from gift.kernels.geometry import Geometry

Form = Literal["merged", "side", "whole"]
"""``"merged"`` computes with ``W + left right``, which is made for the forward pass and again for
the backward pass, and takes the factors' gradients from ``right x`` and ``left^T g``, the outputs
of the delta's filters and their gradients. ``"side"`` adds the delta's output to that of the frozen
weight, and takes the gradients from the same. ``"whole"`` is merged, and takes them from the
gradient of the whole weight."""

FORMS: tuple[Form, ...] = ("merged", "side", "whole")


def linear_form(
    shape: tuple[int, int],
    rank: int,
    rows: int,
    *,
    trained: bool = True,
    form: Form | None = None,
    on_processor: bool = True,
) -> Form:
    """The cheapest form of a linear layer, by the multiplications that it takes on a processor.

    Each thin product, of a factor and what comes in or out, is one of ``rank rows inputs`` or
    ``rank rows outputs``. While training all forms but "whole" take two of either for the factors'
    gradients; "side" takes one more of either, and "merged" makes the weight twice.

    Args:
        shape: of the weight, ``(outputs, inputs)``.
        rank: of the delta.
        rows: that are computed.
        trained: whether there will be a backward pass.
        form: take this one.
        on_processor: elsewhere it is "side".

    Example:
        Many rows and a small weight, the reverse, and a rank that saves nothing:

        >>> [linear_form(*case) for case in (((384, 384), 3, 3072), ((4096, 4096), 3, 512))]
        ['merged', 'side']
        >>> linear_form((384, 384), 256, 3072)
        'whole'
    """
    if form is not None or not on_processor:
        return form or "side"
    outputs, inputs = shape
    size, thin = outputs * inputs, rank * rows * (outputs + inputs)
    merging = rank * size
    if not trained:
        return "merged" if merging <= thin else "side"
    best: Form = "merged" if 2 * merging <= thin else "side"
    cost = 2 * thin + (2 * merging if best == "merged" else thin)
    return "whole" if rows * size + 4 * merging < cost else best


@dataclass(frozen=True)
class Plan:
    """How a convolution is computed.

    Args:
        form: see `Form`.
        as_product: whether filters are applied by products of matrices (see
            `gift.kernels.conv_as_gemm`).
    """

    form: Form
    as_product: bool


# Nanoseconds, measured on two cores of a server's processor; only their ratios matter.
CONV = 0.0138  # a multiplication in a convolution, or in the gradient of its input
WHOLE = 0.0108  # in the gradient of its weight
GEMM = 0.02  # in a product of matrices
SHIFT = 0.3  # an element of shifted pictures
TOUCH = 0.2  # an element of activations that is read or written once more
NARROW = 24  # positions more, for each picture, that products of matrices take the time of
MERGE = 0.5  # an element of a weight that is made
START = 1.5e4  # any operation, however small
BLOCK = 16  # outputs that kernels for convolutions compute at once


def plan(
    geometry: Geometry,
    rank: int,
    cuts: int,
    positions: int,
    *,
    pictures: int = 1,
    trained: bool = True,
    form: Form | None = None,
    on_processor: bool = True,
) -> Plan:
    """The cheapest plan.

    Args:
        geometry: the convolution.
        rank: of the delta.
        cuts: rows of the delta's matrix for each output.
        positions: that are computed, in the whole batch.
        pictures: in the batch.
        trained: whether there will be a backward pass.
        form: take this one.
        on_processor: whether many small operations are cheap, as on an accelerator they are not.

    Example:
        Many positions and a small weight, the reverse, and a rank that saves nothing:

        >>> early = Geometry((64, 64, 3, 3), (1, 1), (1, 1), (1, 1))
        >>> late = Geometry((512, 512, 3, 3), (1, 1), (1, 1), (1, 1))
        >>> [plan(*case).form for case in ((early, 3, 1, 16384), (late, 3, 1, 256))]
        ['merged', 'side']
        >>> plan(early, 64, 1, 16384).form
        'whole'
    """
    outputs, inputs, *_ = geometry.shape
    filters, taps = rank * cuts, geometry.taps
    size = outputs * inputs * taps
    blocks = -(-filters // BLOCK) * BLOCK
    by_conv = CONV * blocks * taps * inputs * positions + 5 * START
    moved = 0 if geometry.pointwise else SHIFT
    busy = positions + NARROW * pictures
    by_product = GEMM * inputs / cuts * busy + moved * min(cuts, 2) * positions
    by_product = by_product * filters * taps + START * (3 + cuts)
    shifts = on_processor and geometry.stride_one and by_product < by_conv
    as_product = geometry.pointwise or shifts

    # The filters on the input, or their gradient; their outputs to those of the layer, or back.
    thin = by_product if as_product else by_conv
    wide = (GEMM * filters + TOUCH) * outputs * positions
    merging = (MERGE + GEMM * rank) * size
    back = GEMM * inputs * filters * taps * busy if as_product else by_conv
    back += TOUCH * inputs * positions
    whole = WHOLE * size * positions + 2 * (GEMM * rank / cuts + TOUCH) * size
    costs: dict[Form, float] = {"merged": merging, "side": thin + wide}
    if trained:
        costs = {
            "merged": 2 * merging + 2 * thin + 2 * wide + 7 * START,
            "side": 2 * thin + 3 * wide + back + 7 * START,
            "whole": 2 * merging + whole,
        }
    if form is None:
        form, *others = costs  # torch.compile has no `min` with a key for sizes that it leaves open
        for other in others:
            if costs[other] < costs[form]:
                form = other
    return Plan(form, as_product)
