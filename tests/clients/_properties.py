"""What has to be true of a network that a client trains, saves and loads.

A test makes the network, and says what it computes, before it hands it to the client:

    client = Client(net, lambda: logits(net))
    client.enable(LoRALinearFineTuningStrategy(rank=2))
    trainer.train()
    client.check(losses, reload)
"""

import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from statistics import fmean

import torch
from torch import Tensor, nn

import gift
from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning
from tests.common import all_bits, trainable


class Client:
    """A network in the hands of a client: what it was, and what the client made of it.

    Args:
        net: the network, not yet fine-tuned. `enable` fine-tunes this object.
        output: what the client computes with it, always on the same inputs and in evaluation mode.
        atol: how far merged weights, which round differently, may move an output.
    """

    def __init__(self, net: nn.Module, output: Callable[[], Tensor], atol: float = 1e-5) -> None:
        self.net, self.atol = net, atol
        self._output = output
        self.classes, self.flags = [type(module) for module in net.modules()], flags(net)
        self.base, self.base_output = all_bits(net), self.output()
        # torch multiplies a strided input by a frozen weight in another order.
        nn.Module.requires_grad_(net, False)
        self.frozen_output = self.output()
        for name, parameter in net.named_parameters():
            parameter.requires_grad = self.flags[name]

    def output(self) -> Tensor:
        with torch.no_grad():
            return self._output().detach().clone()

    def enable(self, strategy: FineTuningStrategy) -> None:
        """Fine-tune the network by a method that starts as the network that it is given."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GiftWarning)  # small layers: ranks are clipped
            enable_fine_tuning(self.net, strategy)
        assert torch.equal(self.output(), self.frozen_output)
        self.deltas = trainable(self.net)
        self.start = all_bits(self.net)

    def check(
        self,
        losses: Sequence[float],
        reload: Callable[[], Tensor] | None,
        *,
        exact: bool = False,
        saved_as: torch.dtype | None = None,
        still: Sequence[str] = (),
    ) -> None:
        """Check every property, once the client has trained the network.

        Args:
            losses: what training made smaller, in its order.
            reload: lets the client save the network and load it somewhere else, and gives what
                that computes. None: the client has nothing that saves.
            exact: whether what is loaded has deltas beside the base, and is the same bit for bit.
            saved_as: the dtype to which the client rounds a merged network as it saves.
            still: glob patterns of trainable parameters that this network does not use.
        """
        self.losses, self.reload, self.still = losses, reload, still
        self.exact, self.saved_as = exact, saved_as
        for holds in PROPERTIES:
            holds(self)


def the_loss_falls(client: Client) -> None:
    """The mean of the last third is below that of the first."""
    losses = torch.tensor(client.losses)
    assert losses.isfinite().all(), client.losses
    third = max(1, len(losses) // 3)
    assert fmean(client.losses[-third:]) < fmean(client.losses[:third]), client.losses


def only_deltas_move(client: Client) -> None:
    """Each delta did, unless the network does not use it; no frozen parameter did."""
    assert trainable(client.net) == client.deltas
    now, expected = all_bits(client.net), set(client.deltas)
    expected -= {name for name in expected for glob in client.still if fnmatch(name, glob)}
    left_out = {name for name, _ in client.net.named_buffers(remove_duplicate=False)}
    left_out |= {name for name, _ in client.net.named_parameters(remove_duplicate=False)}
    left_out -= {name for name, _ in client.net.named_parameters()}  # which have one name each
    moved = {name for name, value in client.start.items() if now.get(name) != value} - left_out
    assert moved == expected, moved ^ expected
    assert not torch.allclose(client.output(), client.base_output, rtol=0, atol=10 * client.atol)


def the_base_is_what_it_was(client: Client) -> None:
    """Bit for bit, under its own names."""
    now = all_bits(client.net)
    parameters = {name for name, _ in client.net.named_parameters(remove_duplicate=False)}
    for name, value in client.base.items():
        assert name in now, name
        if name in parameters and name not in client.deltas:
            assert now[name] == value, name


def what_is_saved_comes_back(client: Client) -> None:
    """With the same output; and saving leaves the network as it is."""
    if client.reload is None:
        return
    before, expected = all_bits(client.net), client.output()
    found = client.reload()
    assert all_bits(client.net) == before
    assert torch.equal(client.output(), expected)
    if client.saved_as is not None:
        with gift.merged(client.net):
            client.net.to(client.saved_as).to(torch.float32)
            expected = client.output()
    if client.exact:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=client.atol)


def merged_equals_enabled(client: Client) -> None:
    before, expected = all_bits(client.net), client.output()
    with gift.merged(client.net):
        torch.testing.assert_close(client.output(), expected, rtol=1e-4, atol=client.atol)
    assert all_bits(client.net) == before
    assert torch.equal(client.output(), expected)


def disabled_is_the_base(client: Client) -> None:
    """For a while, and for good: classes, tensors, flags and output."""
    before, expected = all_bits(client.net), client.output()
    with gift.disabled(client.net):
        assert torch.equal(client.output(), client.frozen_output)
    assert all_bits(client.net) == before
    assert torch.equal(client.output(), expected)
    gift.disable_fine_tuning(client.net)
    assert [type(module) for module in client.net.modules()] == client.classes
    assert all_bits(client.net) == client.base
    assert flags(client.net) == client.flags
    assert torch.equal(client.output(), client.base_output)


def flags(net: nn.Module) -> dict[str, bool]:
    """What an optimizer may move."""
    return {name: parameter.requires_grad for name, parameter in net.named_parameters()}


# The last one takes the deltas off.
PROPERTIES: list[Callable[[Client], None]] = [
    the_loss_falls,
    only_deltas_move,
    the_base_is_what_it_was,
    what_is_saved_comes_back,
    merged_equals_enabled,
    disabled_is_the_base,
]
