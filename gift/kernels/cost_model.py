"""Choose from shapes alone how to compute a layer with a low-rank delta."""

from dataclasses import dataclass
from typing import Literal

from gift.kernels.geometry import Geometry

Form = Literal["merged", "side", "whole"]
"""How a layer with a low-rank delta is computed.

``"merged"`` computes with ``W + left right``, which is made for the forward pass and again for the
backward pass. It takes the factors' gradients from ``right x`` and ``left^T g``, the outputs of the
delta's filters and their gradients. ``"side"`` adds the delta's output to that of the frozen
weight, and takes the gradients from the same tensors. ``"whole"`` computes like ``"merged"``, and
takes the gradients from the gradient of the whole weight.
"""

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
    """Return the form of a linear layer that needs the fewest multiplications on a CPU.

    A thin product multiplies a factor by the layer's inputs or outputs, and costs ``rank rows
    inputs`` or ``rank rows outputs``. In training, all forms but "whole" take two of each kind for
    the factors' gradients. "side" takes one more of each kind, and "merged" makes the weight twice.

    Args:
        shape: shape of the weight, ``(outputs, inputs)``.
        rank: rank of the delta.
        rows: number of rows that are computed.
        trained: whether there will be a backward pass.
        form: the form to return; None chooses the cheapest.
        on_processor: whether the layer runs on a CPU. Elsewhere the form is "side".

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
    """How to compute a convolution.

    Args:
        form: see `Form`.
        as_product: whether filters are applied by matrix products (see
            `gift.kernels.conv_as_gemm`).
    """

    form: Form
    as_product: bool


# Nanoseconds, fitted to layers on two cores of a server's processor by `benchmarks/forms.py`; only
# their ratios matter.
CONV = 0.0138  # per multiplication in a convolution, or in the gradient of its input
WHOLE = 0.0108  # per multiplication in the gradient of its weight
SPREAD = 1.6  # how many times as long that of a transposed convolution takes
GEMM = 0.02  # per multiplication in a matrix product
SHIFT = 0.3  # per element of shifted images
TOUCH = 0.2  # per element of activations that is read or written once more
NARROW = 24  # overhead of matrix products for each image, in positions
MERGE = 0.5  # per element of a weight that is made
START = 1.5e4  # per operation, however small
BLOCK = 16  # outputs that convolution kernels compute at once


def plan(
    geometry: Geometry,
    rank: int,
    cuts: int,
    positions: int,
    *,
    images: int = 1,
    swept: int | None = None,
    trained: bool = True,
    form: Form | None = None,
    on_processor: bool = True,
) -> Plan:
    """Return the cheapest plan for a convolution.

    Args:
        geometry: the convolution.
        rank: rank of the delta.
        cuts: rows of the delta's matrix for each output.
        positions: number of positions that are computed in the whole batch.
        images: number of images in the batch.
        swept: number of positions at which filters are applied, if it is not `positions`: those of
            the input of a transposed convolution.
        trained: whether there will be a backward pass.
        form: the form to use; None chooses the cheapest.
        on_processor: whether the layer runs on a CPU, where many small operations are cheap. On an
            accelerator they are not.

    Example:
        Many positions and a small weight, the reverse, and a rank that saves nothing:

        >>> early = Geometry((64, 64, 3, 3), (1, 1), (1, 1), (1, 1))
        >>> late = Geometry((512, 512, 3, 3), (1, 1), (1, 1), (1, 1))
        >>> [plan(*case).form for case in ((early, 3, 1, 16384), (late, 3, 1, 256))]
        ['merged', 'side']
        >>> plan(early, 64, 1, 16384).form
        'whole'
    """
    swept = positions if swept is None else swept
    sizes = geometry, rank, cuts, swept, images
    can_shift = on_processor and geometry.shifts
    as_product = geometry.pointwise or (
        can_shift
        and (
            geometry.transposed  # kernels with few outputs take 2 to 8 times as long
            or filtering(*sizes, as_product=True) < filtering(*sizes, as_product=False)
        )
    )
    if form is None:
        costs = extra_costs(
            geometry, rank, cuts, positions, images, as_product, trained, swept=swept
        )
        form, *others = costs  # torch.compile does not support `min` with a key for symbolic sizes
        for other in others:
            if costs[other] < costs[form]:
                form = other
    return Plan(form, as_product)


def filtering(
    geometry: Geometry, rank: int, cuts: int, swept: int, images: int, as_product: bool
) -> float:
    """Return the cost of applying the delta's filters to the input, or of their gradient."""
    inputs, filters, taps = geometry.shape[1], rank * cuts * geometry.groups, geometry.taps
    if not as_product:
        blocks = -(-rank * cuts // BLOCK) * BLOCK * geometry.groups
        return CONV * blocks * taps * inputs * swept + 5 * START
    moved = 0 if geometry.pointwise else SHIFT
    busy = swept + NARROW * images
    each = GEMM * inputs / cuts * busy + moved * min(cuts, 2) * swept
    return each * filters * taps + START * (3 + cuts)


def extra_costs(
    geometry: Geometry,
    rank: int,
    cuts: int,
    positions: int,
    images: int,
    as_product: bool,
    trained: bool,
    swept: int | None = None,
) -> dict[Form, float]:
    """Return the cost of each form beyond that of the frozen convolution, see `plan`."""
    outputs, inputs, *_ = geometry.shape
    filters, size = rank * cuts, outputs * inputs * geometry.taps
    swept = positions if swept is None else swept
    # `thin`: the filters on the input, or their gradient. `wide`: from the filters' outputs to
    # those of the layer, or back.
    thin = filtering(geometry, rank, cuts, swept, images, as_product)
    wide = (GEMM * filters + TOUCH) * outputs * positions
    merging = (MERGE + GEMM * rank) * size
    if not trained:
        return {"merged": merging, "side": thin + wide}
    back = thin
    if as_product:
        all_filters = filters * geometry.groups
        back = GEMM * inputs * all_filters * geometry.taps * (swept + NARROW * images)
    back += TOUCH * inputs * geometry.groups * swept
    each = WHOLE * (SPREAD if geometry.transposed else 1)
    whole = each * size * swept + 2 * (GEMM * rank / cuts + TOUCH) * size
    return {
        "merged": 2 * merging + 2 * thin + 2 * wide + 7 * START,
        "side": 2 * thin + 3 * wide + back + 7 * START,
        "whole": 2 * merging + whole,
    }
