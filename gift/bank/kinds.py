"""Functions of torch that keep the rows of a batch apart, by what they do to an axis.

A function that is in no table may mix rows. `gift/bank/rules.py` has a rule for each kind.
"""

from functools import cache
from typing import Any

import torch

# fmt: off
# Functions that torch does not tag as pointwise, since they consist of others, or move, convert or
# draw values without changing places.
_POINTWISE = frozenset((
    "absolute", "negative", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2",
    "arctanh", "multiply", "divide", "subtract", "floor_divide", "float_power", "greater",
    "greater_equal", "less", "less_equal", "not_equal", "fix", "square", "isclose", "isreal",
    "real", "imag", "conj", "resolve_conj", "resolve_neg", "complex", "polar", "special_expit",
    "special_erf", "special_erfc", "special_erfinv", "special_exp2", "special_expm1",
    "special_log1p", "special_logit", "special_ndtr", "special_psi", "special_round",
    "special_sinc", "special_xlogy", "special_digamma", "special_gammaln", "special_i0",
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__iadd__", "__isub__",
    "__mul__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__neg__",
    "__pos__", "__abs__", "__and__", "__iand__", "__or__", "__ior__", "__xor__", "__invert__",
    "__lshift__",
    "__rshift__", "__irshift__", "__pow__", "__rpow__", "__sub__", "__rsub__", "__div__",
    "__rdiv__", "__truediv__", "__rtruediv__", "__floordiv__", "__rfloordiv__", "__mod__",
    "__rmod__", "__rand__", "__ror__", "__rxor__", "__rlshift__", "__rrshift__", "__radd__",
    "__rmul__",
    "logsigmoid", "log_sigmoid", "threshold", "_threshold", "softsign", "tanhshrink", "rrelu",
    "hardswish", "sigmoid", "native_dropout",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "bernoulli", "normal", "uniform", "exponential", "log_normal",
    "cauchy", "geometric", "random", "tril", "triu", "fill", "zero",
    "float", "double", "half", "bfloat16", "int", "long", "short", "char", "byte", "bool", "cfloat",
    "cdouble", "cpu", "cuda", "xpu", "mps", "type", "_to_copy", "as_tensor", "asarray",
    "contiguous", "detach", "data", "requires_grad", "retain_grad", "alias", "pin_memory",
    "lift_fresh",
))
# What is pointwise in one of its forms only has a rule of its own.
_OWN_RULE = ("max", "min", "where")
# Functions whose values depend on the other tensors only, or on the first.
MAKING = frozenset((
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "new_empty_strided", "new",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
))
READING_FIRST = frozenset(("to", "type_as", "expand_as", "view_as", "reshape_as", "bucketize",
                           "isin"))
# Functions whose second and later tensors must be the same for all rows.
WEIGHTED = frozenset(("prelu", "bucketize", "isin"))
PERMUTING = frozenset((
    "transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "T", "mT", "H",
    "mH", "adjoint",
))
RESHAPING = frozenset((
    "reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "squeeze",
    "unsqueeze", "atleast_1d", "atleast_2d", "atleast_3d", "_unsafe_view",
))
EXPANDING = frozenset(("expand", "expand_as", "broadcast_to", "broadcast_tensors"))
JOINING: dict[str, tuple[int, int]] = {  # the axis, and how many axes parts need to have
    "cat": (0, 1), "concat": (0, 1), "concatenate": (0, 1), "hstack": (1, 2), "vstack": (0, 2),
    "row_stack": (0, 2), "dstack": (2, 3), "column_stack": (1, 2),
}
SPLITTING = frozenset((
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk",
    "tensor_split", "narrow", "narrow_copy", "unbind", "select", "select_copy", "__iter__",
    "hsplit", "vsplit", "dsplit",
))
# Functions that reorder, choose, split or reduce along axes: which argument holds the axes
# (9: none), and their default (None: all).
ALONG: dict[str, tuple[int, Any]] = {
    "flip": (1, None), "flipud": (9, 0), "fliplr": (9, 1), "rot90": (2, (0, 1)),
    "roll": (2, None), "fft_fftshift": (1, None), "fft_ifftshift": (1, None),
    "gather": (1, None), "take_along_dim": (2, None), "diff": (2, -1), "cross": (2, None),
    "sort": (1, -1), "argsort": (1, -1), "msort": (9, 0), "topk": (2, -1), "kthvalue": (2, -1),
    "unbind": (1, 0), "select": (1, None), "select_copy": (1, None), "__iter__": (9, 0),
    "hsplit": (9, 1), "vsplit": (9, 0), "dsplit": (9, 2),
    "normalize": (2, 1), "norm": (2, None), "linalg_norm": (2, None),
    "linalg_vector_norm": (2, None), "linalg_matrix_norm": (2, (-2, -1)), "linalg_cross": (2, -1),
    "pairwise_distance": (9, -1),
    "glu": (1, -1), "gumbel_softmax": (4, -1), "cosine_similarity": (2, 1),
    **dict.fromkeys(
        ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk",
         "unsafe_chunk", "tensor_split"), (2, 0),
    ),
    **dict.fromkeys(("narrow", "narrow_copy", "unfold"), (1, None)),
    **dict.fromkeys(
        ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"), (2, -1)
    ),
    **dict.fromkeys(("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2"), (2, (-2, -1))),
    **dict.fromkeys(("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn"), (2, None)),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "softmax", "log_softmax",
         "softmin", "special_softmax", "special_log_softmax", "special_logsumexp", "mean",
         "nanmean", "sum", "nansum", "prod", "amax", "amin", "aminmax", "max", "min", "argmax",
         "argmin", "var", "std", "var_mean", "std_mean", "logsumexp", "all", "any",
         "count_nonzero"), (1, None),
    ),
    **dict.fromkeys(("median", "nanmedian", "mode"), (1, None)),
}
# Functions that mix entries of the last axes only: how many these are.
TRAILING: dict[str, int] = {
    "one_hot": 0, "multinomial": 1, "view_as_real": 0, "view_as_complex": 1,
    "pixel_shuffle": 3, "pixel_unshuffle": 3,
    **{
        f"{name}{d}d{rest}": d for d in (1, 2, 3) for rest in ("", "_with_indices")
        for name in ("max_pool", "avg_pool", "lp_pool", "fractional_max_pool", "adaptive_max_pool",
                     "adaptive_avg_pool", "max_unpool", "_max_pool", "_adaptive_avg_pool")
    },
    **dict.fromkeys(
        ("inverse", "det", "logdet", "slogdet", "cholesky", "svd", "qr", "matrix_exp",
         "matrix_power", "pinverse", "cholesky_inverse", "linalg_inv", "linalg_inv_ex",
         "linalg_det", "linalg_slogdet", "linalg_cholesky", "linalg_cholesky_ex", "linalg_svd",
         "linalg_svdvals", "linalg_qr", "linalg_eig", "linalg_eigvals", "linalg_eigh",
         "linalg_eigvalsh", "linalg_matrix_exp", "linalg_matrix_power"), 2,
    ),
}
NORMALISING = frozenset(("layer_norm", "rms_norm"))
# Functions whose tensors have the batch as their first axis, or none: how many axes the first one
# has then (None: any number).
BATCHED: dict[str, int | None] = {
    "conv1d": 3, "conv2d": 4, "conv3d": 5, "conv_transpose1d": 3, "conv_transpose2d": 4,
    "conv_transpose3d": 5, "im2col": 4, "fold": 3, "embedding_bag": 2,
    **dict.fromkeys(
        ("group_norm", "instance_norm", "local_response_norm", "batch_norm", "channel_shuffle",
         "interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "grid_sample",
         "affine_grid"), None,
    ),
}
SAMPLES = {"grid_sample": 2}  # how many of their tensors are samples, if not the first only
CELLS = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))
RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
# Products, as the letters of their axes; dots are axes that are broadcast.
PRODUCTS = {
    "mm": "ij,jk->ik", "bmm": "bij,bjk->bik", "mv": "ij,j->i", "outer": "i,j->ij", "ger": "i,j->ij",
    "linear": "...j,kj->...k", "bilinear": "...i,...j,kij->...k", "cdist": "...ik,...jk->...ij",
}
ADDED = {"addmm": "mm", "baddbmm": "bmm", "addmv": "mv"}  # the first argument and a product
WRITING = frozenset((
    "__setitem__", "index_put", "index_add", "index_copy", "index_fill", "index_reduce",
    "select_scatter", "slice_scatter",
))
SCATTERING = frozenset(("scatter", "scatter_add", "scatter_reduce"))
# Functions that take data out of torch.
LEAVING = frozenset(("numpy", "__array__", "__dlpack__", "item", "tolist", "__float__",
                     "__complex__"))
# fmt: on


@cache
def is_pointwise(name: str) -> bool:
    """Return whether each entry of a function's result is made of the same entry of its arguments.

    torch tags its operators of this kind.
    """
    if name in _POINTWISE:
        return True
    operator: Any = getattr(torch.ops.aten, name, None)
    tag = getattr(torch.Tag, "pointwise", None)
    return (
        tag is not None
        and name not in _OWN_RULE
        and hasattr(operator, "overloads")
        and any(tag in getattr(operator, overload).tags for overload in operator.overloads())
    )
