"""Writing a trained network as an ONNX file, or as an exported program of torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gift.core.merging import merge
from gift.errors import DataError, JobError
from gift.support.atomic_files import replace_file
from gift.support.optional import require
from gift.training.tasks.base import main_output

FORMATS = (".onnx", ".pt2")


class _OfTensors(nn.Module):
    """A network as a function of tensors in order, which returns its main output.

    Args:
        net: the network.
        names: names of its arguments; None if it takes one tensor.
    """

    def __init__(self, net: nn.Module, names: list[str] | None) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, *tensors: Tensor) -> Any:
        """Call the network."""
        if self.names is None:
            return main_output(self.net(*tensors))
        return main_output(self.net(**dict(zip(self.names, tensors, strict=True))))


def write_exported(net: nn.Module, out: str | Path, batch: Any) -> tuple[Path, str]:
    """Merge the delta of a network, and write the network as a program that needs no gift.

    The number of examples in a batch stays free, and so does the length of texts, if the network
    can be exported so.

    Args:
        net: a network that is being fine-tuned; it is merged in place.
        out: an ``.onnx`` or ``.pt2`` file.
        batch: inputs of at least two examples: a tensor, or a dictionary of tensors.

    Returns:
        The path, and a description of the inputs.

    Raises:
        JobError: if it is another file, or the network cannot be exported.
    """
    out = Path(out).expanduser()
    if out.suffix.lower() not in FORMATS:
        raise JobError(f"{out} cannot hold a network", [f"expected one of {', '.join(FORMATS)}"])
    if out.suffix.lower() == ".onnx":
        require("onnxscript", "export")
    names, tensors = _tensors(batch)
    merge(net)
    program = _program(_OfTensors(net.eval().cpu(), names), tensors)
    labels = names or ["inputs"]
    if out.suffix.lower() == ".pt2":
        replace_file(out, lambda temporary: _save(program, temporary))
    else:
        made: Any = torch.onnx.export(
            program, input_names=labels, output_names=["outputs"], dynamo=True, verbose=False
        )
        replace_file(out, lambda temporary: made.save(temporary, external_data=False))
    shapes = zip(labels, _shapes(program), strict=True)
    return out, ", ".join(f"{name} {shape}" for name, shape in shapes)


def _save(program: Any, path: str) -> None:
    with open(path, "wb") as file:  # a path would have to end in .pt2
        torch.export.save(program, file)


def _tensors(batch: Any) -> tuple[list[str] | None, tuple[Tensor, ...]]:
    if isinstance(batch, Mapping):
        return list(batch), tuple(batch.values())
    if isinstance(batch, Tensor):
        return None, (batch,)
    what = type(batch).__name__
    raise JobError("the network cannot be exported", [f"it takes a {what}, expected tensors"])


def _program(net: _OfTensors, tensors: tuple[Tensor, ...]) -> Any:
    """Return the exported program, in which torch decides which axes can be free."""
    axes = (0, 1) if net.names is not None else (0,)
    free = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for _ in tensors)
    try:
        with torch.no_grad():
            return torch.export.export(net, tensors, dynamic_shapes=(free,), strict=False)
    except Exception as error:  # tracing can meet anything
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        raise JobError("the network cannot be exported", [reason]) from error


def _shapes(program: Any) -> list[str]:
    """Return the shape of each input, with names for the axes that are free."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    sizes = [nodes[name].meta["val"].shape for name in program.graph_signature.user_inputs]
    names = ("batch", "length")
    return [
        " x ".join(str(n) if isinstance(n, int) else names[axis] for axis, n in enumerate(shape))
        for shape in sizes
    ]


def example_batch(run: Any) -> Any:
    """Return a batch of two inputs for the network of a run, as its reader makes them.

    Args:
        run: `gift.jobs.Run`.

    Raises:
        JobError: if the reader reads neither images nor texts, and the examples are not there.
    """
    reader = run.reader
    kind = getattr(reader, "kind", "")
    if kind == "text":
        return reader.collate([reader("a text"), reader("another one, which is longer")])
    if kind in ("picture", "segmentation"):
        image = require("PIL.Image", "vision").new("RGB", (64, 64))
        return reader.collate([reader(image), reader(image)])
    try:
        examples = run.examples()
        items = [examples[place] for place in (0, 1)]
    except (DataError, IndexError) as error:
        raise JobError("an export needs two examples of the run", [str(error)]) from error
    batch = (examples.collate or torch.utils.data.default_collate)(items)
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k not in ("label", "labels")}
    return batch[0]
