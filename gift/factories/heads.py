"""The layers at the end of a network: its head, and what stands between it and the body."""

from collections.abc import Iterator

from torch import nn

from gift.core.iterator import Site
from gift.factories.checks import Check, Test
from gift.factories.serializable import recorded
from gift.layers.table import family_of, reader_of


@recorded
def mc_last_linear() -> Check:
    """Match the last linear layer of the network in registration order, usually its head.

    In a network without linear layers it is the last 1x1 convolution, as in SqueezeNet.
    """

    def prepare(network: nn.Module) -> Test:
        _, last = last_linear(network)
        return lambda *place: last is not None and Site(*place).module is last

    return Check(prepare=prepare)


def last_linear(network: nn.Module) -> tuple[str, nn.Module | None]:
    """Return path and module of the last linear layer in registration order, or None.

    In a network without linear layers it is the last 1x1 convolution.
    """
    read = {  # by an attention, which never calls them
        id(child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if reader_of(parent, name) is not None
    }
    layers = [
        (path, module)
        for path, module in network.named_modules()
        if family_of(module) == "linear" and id(module) not in read
    ]
    layers = layers or [
        (path, module)
        for path, module in network.named_modules()
        if family_of(module) == "conv" and set(getattr(module, "kernel_size", ())) == {1}
    ]
    return layers[-1] if layers else ("", None)


@recorded
def mc_top() -> Check:
    """Match what stands above the body of a network: its head, and the pooler below it.

    For networks of transformers these are the layers outside of the base model, and its pooler;
    language models have none, since their head belongs to the vocabulary. For other networks it is
    the last linear layer. Layers that hold parameters are matched one by one.
    """

    def prepare(network: nn.Module) -> Test:
        found = {id(module) for module in _top(network) if _holds_parameters(module)}
        return lambda *place: id(Site(*place).module) in found

    check = Check(prepare=prepare)
    check.optional = True
    return check


def _top(network: nn.Module) -> Iterator[nn.Module]:
    body = getattr(network, str(getattr(network, "base_model_prefix", "") or "-"), None)
    if not isinstance(body, nn.Module) or body is network:
        yield from [layer for layer in [last_linear(network)[1]] if layer is not None]
        return
    outputs = getattr(network, "get_output_embeddings", None)
    if callable(outputs) and outputs() is not None:
        return
    inside = {id(module) for module in body.modules()}
    yield from (module for module in network.modules() if id(module) not in inside)
    for module in body.modules():
        if type(module).__name__.endswith("Pooler"):
            yield from module.modules()


def _holds_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())
