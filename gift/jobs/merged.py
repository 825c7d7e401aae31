"""Writing a network with its delta merged, as a file or folder that does not need gift."""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gift.core.merging import merge
from gift.errors import JobError
from gift.support.atomic_files import replace_file

TORCH = (".pt", ".pth", ".bin")


def write_merged(
    net: nn.Module, out: str | Path, classes: Sequence[str] | None = None, reader: Any = None
) -> Path:
    """Merge the delta of a network into its weights, and write these atomically.

    Args:
        net: a network that is being fine-tuned; it is merged in place.
        out: ``.safetensors`` or ``.pt`` file for the state of the network; or, for a transformers
            network, a folder for the model.
        classes: names of the classes, which transformers saves with a model.
        reader: reader of the inputs, whose tokenizer is saved with a model.

    Raises:
        JobError: if `out` is neither, or a folder that is not empty.
        AdaptationError: naming what cannot be merged.
    """
    out = Path(out).expanduser()
    suffix = out.suffix.lower()
    is_model = hasattr(net, "save_pretrained")
    if suffix != ".safetensors" and suffix not in TORCH and not is_model:
        expected = "expected a file: .safetensors, or one of " + ", ".join(TORCH)
        raise JobError(f"{out} cannot hold a {type(net).__name__}", [expected])
    merge(net)
    if suffix == ".safetensors":
        # Copies, because tied tensors share memory, which safetensors files do not support.
        state = {n: t.cpu().clone().contiguous() for n, t in net.state_dict().items()}
        replace_file(out, lambda temporary: save_file(state, temporary, {"format": "pt"}))
    elif suffix in TORCH:
        replace_file(out, lambda temporary: torch.save(net.state_dict(), temporary))
    else:
        _write_model(net, out, classes, reader)
    return out


def _write_model(net: Any, out: Path, classes: Sequence[str] | None, reader: Any) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise JobError(f"{out} cannot hold a model", ["expected an empty folder, or none"])
    if classes is not None:
        net.config.id2label = dict(enumerate(classes))
        net.config.label2id = {name: number for number, name in enumerate(classes)}
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        net.save_pretrained(temporary)
        tokenizer = getattr(reader, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:  # raised again below
        shutil.rmtree(temporary, ignore_errors=True)
        raise
