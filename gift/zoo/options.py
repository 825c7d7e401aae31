"""The options that are allowed when a file, or a name alone, creates a network.

Some options of libraries unpickle files, download code or read any path. Options that are not
known to be harmless are refused; code may permit them with ``allow_import=True``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from gift.errors import NetworkError, closest

LARGEST = 2**24
"""Largest number among options, since some become sizes of tensors."""

_WORD = re.compile(r"[A-Za-z0-9_]{0,64}")
_ENCODER = re.compile(r"[A-Za-z0-9_-]{1,80}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class Allowed(NamedTuple):
    """The values that an option may have.

    Args:
        fits: returns whether a value is allowed.
        expected: the allowed values in words.
    """

    fits: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    """Whether a value is a number or a bool, which cannot name code or a file."""
    if isinstance(value, bool):
        return True
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(map(_is_plain, value))
    return value is None or _is_number(value)


def _is_path_below(value: Any) -> bool:
    return isinstance(value, str) and bool(_REVISION.fullmatch(value))


def one_of(*values: Any) -> Allowed:
    """Allow one of these values, with the same type."""
    known = {(type(value), value) for value in values}
    return Allowed(
        lambda v: isinstance(v, str | bool) and (type(v), v) in known,
        f"one of {list(values)}",
    )


COUNT = Allowed(
    lambda v: type(v) is int and 1 <= v <= LARGEST, f"a whole number from 1 to {LARGEST}"
)
NUMBERS = Allowed(_is_plain, f"numbers up to {LARGEST}, true or false, or a list of them")
WORD = Allowed(
    lambda v: v is None or isinstance(v, bool) or (isinstance(v, str) and bool(_WORD.fullmatch(v))),
    "a word of letters and digits",
)
SWITCH = Allowed(lambda v: isinstance(v, bool), "true or false")
NAMES = Allowed(
    lambda v: (
        isinstance(v, Mapping)
        and all(isinstance(one, str | int) for pair in v.items() for one in pair)
    ),
    "names and numbers",
)
BELOW = Allowed(_is_path_below, "a name, or names with / between them, without ..")
DTYPE = one_of("float32", "float16", "bfloat16", "float64", "auto")


def _all(kind: Allowed, names: str) -> dict[str, Allowed]:
    return dict.fromkeys(names.split(), kind)


TORCHVISION = {
    **_all(COUNT, "num_classes"),
    **_all(WORD, "weights_backbone"),
    **_all(NUMBERS, """
        aux_logits aux_loss attention_dropout bbox_reg_weights box_batch_size_per_image
        box_bg_iou_thresh box_detections_per_img box_fg_iou_thresh box_nms_thresh
        box_positive_fraction box_score_thresh center_sampling_radius detections_per_img
        dropout fg_iou_thresh bg_iou_thresh groups image_mean image_std image_size init_weights
        iou_thresh max_size min_size memory_efficient neg_to_pos_ratio nms_thresh positive_fraction
        progress replace_stride_with_dilation rpn_batch_size_per_image rpn_bg_iou_thresh
        rpn_fg_iou_thresh rpn_nms_thresh rpn_positive_fraction rpn_post_nms_top_n_test
        rpn_post_nms_top_n_train rpn_pre_nms_top_n_test rpn_pre_nms_top_n_train rpn_score_thresh
        score_thresh size stochastic_depth_prob topk_candidates trainable_backbone_layers
        transform_input width_mult width_per_group zero_init_residual bn_size drop_rate
    """),
}  # fmt: skip

TIMM = {
    **_all(COUNT, "num_classes in_chans"),
    **_all(WORD, "global_pool act_layer norm_layer class_token fc_norm pool_type"),
    **_all(NUMBERS, """
        attn_drop_rate base_width block_dpr cardinality depth depths dims drop_block_rate
        drop_connect_rate drop_path_rate drop_rate dynamic_img_pad dynamic_img_size embed_dim
        fix_group_width head_dropout head_init_scale img_size init_values kernel_size layers
        ls_init_value mlp_ratio num_features num_heads output_stride patch_drop_rate patch_size
        pos_drop_rate proj_drop_rate qk_norm qkv_bias reg_tokens stem_width strict_img_size
        window_size zero_init_last
    """),
}  # fmt: skip

SMP = {
    **_all(COUNT, "classes in_channels"),
    "encoder_name": Allowed(
        lambda v: isinstance(v, str) and bool(_ENCODER.fullmatch(v)), "the name of an encoder"
    ),
    **_all(WORD, "decoder_attention_type decoder_interpolation decoder_merge_policy upsampling "
           "decoder_use_norm decoder_use_batchnorm psp_use_batchnorm"),
    **_all(NUMBERS, """
        decoder_aspp_dropout decoder_aspp_separable decoder_atrous_rates decoder_channels
        decoder_dropout decoder_pab_channels decoder_pyramid_channels
        decoder_segmentation_channels encoder_depth encoder_output_stride psp_dropout
        psp_out_channels upsampling
    """),
}  # fmt: skip

TRANSFORMERS_HUB = {
    **_all(BELOW, "revision subfolder"),
    **_all(SWITCH, "local_files_only force_download"),
}
"""Options that locate the files of a network."""

TRANSFORMERS = {
    **TRANSFORMERS_HUB,
    **_all(DTYPE, "dtype torch_dtype"),
    # Others may be downloaded as compiled code, including "flash_attention_2".
    "attn_implementation": one_of("eager", "sdpa", "flex_attention"),
    "use_safetensors": one_of(True),
    "weights_only": one_of(True),
    "trust_remote_code": one_of(False),
    **_all(WORD, "variant"),
    **_all(SWITCH, "ignore_mismatched_sizes low_cpu_mem_usage"),
}
"""Options of `from_pretrained` that are not attributes of the config."""

TRANSFORMERS_CONFIG = {
    "num_labels": COUNT,
    **_all(NAMES, "id2label label2id"),
    "problem_type": one_of(
        "regression", "single_label_classification", "multi_label_classification"
    ),
    **_all(WORD, "hidden_act hidden_activation activation activation_function "
           "position_embedding_type classifier_pooling"),
}  # fmt: skip
"""Attributes of the config that are not numbers; all numbers may be set."""


def refuse_unknown(
    name: str, options: Mapping[str, Any], known: Mapping[str, Allowed]
) -> None:  # fmt: skip
    """Raise an error that names all options that are not known or have other values.

    Args:
        name: name of the network.
        options: options for creating it.
        known: allowed values by name.

    Raises:
        NetworkError: if there are any.
    """
    if problems := list(_problems(options, known)):
        raise NetworkError(
            f"{name!r} cannot be made with these options, {'; '.join(problems)}: others may run "
            "foreign code or read other files, which only allow_import=True permits, in your code"
        )


def _problems(options: Mapping[str, Any], known: Mapping[str, Allowed]) -> Iterator[str]:
    for option, value in options.items():
        if option not in known:
            close = closest(option, known)
            yield f"{option} (not known, closest: {close})"
        elif not known[option].fits(value):
            yield f"{option}={value!r:.60} (expected {known[option].expected})"


def numbers_of_config(config: Any) -> dict[str, Allowed]:
    """Return the numeric attributes of all configs of a transformers config class.

    They are read from the class's defaults, because a downloaded config may have any other
    attributes.
    """
    try:
        defaults = type(config)().to_dict()
    except Exception:  # some have no default
        return {}
    return {
        key: NUMBERS
        for key, value in defaults.items()
        if not key.startswith("_") and key not in TRANSFORMERS and _is_plain(value)
    }


def refuse_kernels(name: str, config: Any, seen: frozenset[int] = frozenset()) -> None:
    """Refuse a transformers config that names code to download.

    Raises:
        NetworkError: if it does.
    """
    for key, value in list(vars(config).items()):
        if key.endswith(("_implementation", "_implementation_internal")) and "/" in str(value):
            raise NetworkError(
                f"the configuration of {name!r} asks for {value!r} as {key.strip('_')}, which is "
                "foreign code: only allow_import=True permits it"
            )
        if hasattr(value, "to_dict") and id(value) not in seen:
            refuse_kernels(name, value, seen | {id(config)})
