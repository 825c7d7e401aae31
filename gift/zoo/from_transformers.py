"""Networks of transformers."""

import warnings
from pathlib import Path
from typing import Any

from gift.data.examples import Reader
from gift.data.readers import ExtractorReader, PictureReader, SegmentationReader, TextReader
from gift.errors import DataError, GiftWarning, NetworkError, first_line
from gift.support.optional import require
from gift.zoo.errors import unreachable
from gift.zoo.loaded import HEAD_TASKS, LoadedNetwork
from gift.zoo.options import (
    NUMBERS,
    TRANSFORMERS,
    TRANSFORMERS_CONFIG,
    TRANSFORMERS_HUB,
    numbers_of_config,
    refuse_kernels,
    refuse_unknown,
)
from gift.zoo.states import put_state
from gift.zoo.transforms import reader_like

LENGTH = 128
"""Number of tokens of a text, if the network supports as many."""

_TASKS = (*HEAD_TASKS, "segmentation", "language", "contrastive")
_RESAMPLINGS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in PIL's numbering


def from_transformers(
    name: str,
    weights: str | Path | None,
    task: str | None,
    options: dict[str, Any],
    allow_import: bool = False,
) -> LoadedNetwork:
    """Load a text or image classifier or a language model, by hub name or from a folder."""
    transformers = require("transformers", "text")
    fresh: tuple[str, ...] = ()
    options = {"trust_remote_code": False, "weights_only": True, **options}
    try:
        config = _config(transformers, name, options, allow_import)
        task = task or _task_of(config)
        kind = _kind(config, task, name)
        maker = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
        if weights == "default":
            own = {} if allow_import else {"config": config}
            given = {**own, **options, "output_loading_info": True}
            net, about = maker.from_pretrained(name, **given)
            fresh = tuple(sorted(map(str, about["missing_keys"])))
        else:
            kept = ("trust_remote_code", "attn_implementation", "dtype", "torch_dtype")
            net = maker.from_config(config, **{k: options[k] for k in kept if k in options})
    except NetworkError:
        raise
    except OSError as error:
        here = "" if Path(name).is_dir() else f", and there is no folder {name!r}"
        raise unreachable(f"{name!r} of transformers{here}; it", error) from error
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise NetworkError(f"{name!r} cannot be made with {options}: {error}") from error
    if weights not in ("default", None):
        put_state(net, str(weights))
    reader = _reader(transformers, net, name, kind)
    return LoadedNetwork(net, reader, task, _classes(net.config, task, weights), fresh)


def _config(transformers: Any, name: str, options: dict[str, Any], allow_import: bool) -> Any:
    """Load the config, and move options that change it from the options to the config."""
    auto = transformers.AutoConfig
    if allow_import:
        return auto.from_pretrained(name, **options)
    own = TRANSFORMERS | TRANSFORMERS_CONFIG
    # Check before anything is downloaded; the config then says which numbers there are.
    refuse_unknown(name, options, dict.fromkeys(options, NUMBERS) | own)
    where = {key: value for key, value in options.items() if key in TRANSFORMERS_HUB}
    config = auto.from_pretrained(name, trust_remote_code=False, **where)
    refuse_kernels(name, config)
    refuse_unknown(name, options, numbers_of_config(config) | own)
    for key in [key for key in options if key not in TRANSFORMERS]:
        setattr(config, key, options.pop(key))
    return config


def _task_of(config: Any) -> str:
    """Return the task that the network was saved for."""
    ends = [str(name) for name in config.architectures or ()]
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in ends):
        return "language"
    is_dense = any(name.endswith("ForSemanticSegmentation") for name in ends)
    return "segmentation" if is_dense else "classification"


def _kind(config: Any, task: str, name: str) -> str:
    """Return the auto class that creates the network."""
    if task not in _TASKS:
        raise NetworkError(f"the task is {task!r}, networks of transformers are for {_TASKS}")
    auto = require("transformers.models.auto.modeling_auto", "text")
    kinds = {
        "SequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "ImageClassification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "AudioClassification": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
        "SemanticSegmentation": auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
        "CausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    }
    if task == "contrastive" and type(config) in auto.MODEL_MAPPING:
        return ""
    own = {"language": ("CausalLM",), "segmentation": ("SemanticSegmentation",)}
    others = [kind for kind in kinds if kind != "SemanticSegmentation"]
    fitting = [kind for kind in own.get(task, others) if type(config) in kinds[kind]]
    if not fitting:
        raise NetworkError(f"transformers has no {config.model_type!r} for {task} ({name})")
    return fitting[0]


def _reader(transformers: Any, net: Any, name: str, kind: str) -> Reader | None:
    if not kind:  # the body of a network for texts, images or sounds
        kinds = {"input_ids": "Text", "pixel_values": "Image"}
        kind = kinds.get(net.main_input_name, "AudioClassification")
    if kind == "SemanticSegmentation":
        return _images(transformers, name, SegmentationReader)
    if kind == "AudioClassification":
        return _sounds(name)
    return _images(transformers, name) if "Image" in kind else _texts(net, name)


def _sounds(name: str) -> Reader | None:
    try:
        return ExtractorReader(name)
    except DataError as error:
        _warn(name, error)
        return None


def _texts(net: Any, name: str) -> Reader | None:
    try:
        reader = TextReader(name, LENGTH)
    except DataError as error:
        _warn(name, error)
        return None
    tokenizer, positions = reader.tokenizer, getattr(net.config, "max_position_embeddings", None)
    length = min(n for n in (LENGTH, tokenizer.model_max_length, positions) if n and n > 0)
    if getattr(net.config, "pad_token_id", None) is None:  # decoders find the last token by it
        net.config.pad_token_id = tokenizer.pad_token_id
    return TextReader(tokenizer, int(length))


def _images(
    transformers: Any, name: str, made: type[PictureReader] = PictureReader
) -> Reader | None:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        _warn(name, error)
        return None

    def transform(image: Any) -> Any:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    try:
        settings = _settings(processor)
    except (AttributeError, TypeError, KeyError, IndexError):  # missing in some processors
        settings = {}
    if made is SegmentationReader:
        settings.pop("resize", None)
    return reader_like(settings, transform, name, made)


def _settings(processor: Any) -> dict[str, Any]:
    """Translate a processor to `PictureReader` settings, which `reader_like` then verifies."""
    size, cut = processor.size, getattr(processor, "crop_size", None)
    resize: Any = [size.height, size.width] if size.height else size.shortest_edge
    crop = (
        [cut.height, cut.width] if cut and getattr(processor, "do_center_crop", False) else resize
    )
    if percent := getattr(processor, "crop_pct", None):  # of ConvNeXt
        crop = [size.shortest_edge] * 2
        resize = crop if size.shortest_edge >= 384 else int(size.shortest_edge / percent)
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if processor.do_normalize:
        mean, std = processor.image_mean, processor.image_std
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    return {
        "size": crop,
        "resize": resize,
        "mean": [(value + offset) / factor for value in mean],
        "std": [value / factor for value in std],
        "interpolation": _RESAMPLINGS[int(processor.resample)],
    }


def _warn(name: str, error: Exception) -> None:
    warnings.warn(
        f"nothing says how {name} reads its inputs: give load_network(..., reader=...) "
        f"({first_line(error)})",
        GiftWarning,
        stacklevel=5,
    )


def _classes(config: Any, task: str, weights: Any) -> tuple[str, ...] | None:
    names = getattr(config, "id2label", None) or {}
    if task not in (*HEAD_TASKS, "segmentation") or weights is None or len(names) < 2:
        return None
    if all(str(name).startswith("LABEL_") for name in names.values()):
        return None  # default names, not real ones
    return tuple(str(names[number]) for number in sorted(names))
