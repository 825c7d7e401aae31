"""Prompt tuning in front of embeddings: what it computes, where it starts, the way back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift import enable_fine_tuning
from gift.factories import mc_path
from gift.strategies import PromptFineTuningStrategy as Prompts
from tests.common import trainable

N, DIM, TIME = 3, 8, 5


def prompted(net: nn.Module, n: int = N, **settings: Any) -> Any:
    """`net` with `n` virtual tokens, as after some training."""
    enable_fine_tuning(net, Prompts(n, **settings))
    for parameter in net.parameters():
        parameter.data.normal_()
    return net


def layer(width: int = DIM, **options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 12, **{"batch_first": True} | options)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoder(layer(**options), 2)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, 12, batch_first=True), 2)


def padding() -> Tensor:
    return torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def local(size: int) -> Tensor:
    """A mask that is not causal: neighbours see each other."""
    places = torch.arange(size)
    return (places[:, None] - places).abs() > 1


# --- what it computes ----------------------------------------------------------------------------


def by_hand(mask: Tensor) -> Tensor:
    """Entry by entry: tokens see virtual tokens, those see the virtual ones up to themselves."""
    blocked = True if mask.dtype is torch.bool else -float("inf")
    result = torch.zeros(N + TIME, N + TIME, dtype=mask.dtype)
    for row in range(N + TIME):
        for column in range(N + TIME):
            if row < N and column > row:
                result[row, column] = blocked
            elif row >= N and column >= N:
                result[row, column] = mask[row - N, column - N]
    return result


SEEN = torch.zeros(2, N).bool()
PADDED = torch.cat([SEEN, padding()], 1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TIME, dtype=torch.float64)
LOCAL = local(TIME)
MEMORY = torch.randn(2, 4, DIM, dtype=torch.float64)
PART = torch.rand(TIME, 4) > 0.7

# the network, the axis of time, what it is called with beside the embeddings, and the same for the
# plain network
Case = tuple[Callable[[], nn.Module], int, dict[str, Any], dict[str, Any]]
NETS: dict[str, Case] = {
    "encoder": (encoder, 1, {}, {}),
    "padding": (encoder, 1, {"src_key_padding_mask": padding()}, {"src_key_padding_mask": PADDED}),
    "causal": (encoder, 1, {"mask": CAUSAL}, {"mask": by_hand(CAUSAL)}),
    "causal, by a hint": (
        encoder, 1, {"mask": CAUSAL, "is_causal": True}, {"mask": by_hand(CAUSAL)}),
    "local": (encoder, 1, {"mask": LOCAL}, {"mask": by_hand(LOCAL)}),
    "local and padding": (
        encoder, 1, {"mask": LOCAL, "src_key_padding_mask": padding()},
        {"mask": by_hand(LOCAL), "src_key_padding_mask": PADDED}),
    "a mask for each head": (
        encoder, 1, {"mask": LOCAL.expand(4, -1, -1)}, {"mask": by_hand(LOCAL).expand(4, -1, -1)}),
    "layer": (layer, 1, {"src_mask": CAUSAL}, {"src_mask": by_hand(CAUSAL)}),
    "norm first": (lambda: layer(norm_first=True), 1, {}, {}),
    "time first": (
        lambda: encoder(batch_first=False), 0, {"src_key_padding_mask": padding()},
        {"src_key_padding_mask": PADDED}),
    "decoder": (
        decoder, 1,
        {"memory": MEMORY, "tgt_mask": CAUSAL, "memory_mask": PART},
        {"memory": MEMORY, "tgt_mask": by_hand(CAUSAL),
         "memory_mask": torch.cat([torch.zeros(N, 4).bool(), PART])}),
    "lstm": (lambda: nn.LSTM(DIM, 6, batch_first=True), 1, {}, {}),
    "lstm, time first": (lambda: nn.LSTM(DIM, 6, 2), 0, {}, {}),
    "own": (lambda: nn.Sequential(nn.Linear(DIM, 12), layer(12)), 1, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "axis", "given", "plain"), NETS.values(), ids=NETS)
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no_grad"])
def test_it_is_the_network_on_a_longer_sequence(
    make: Callable[[], nn.Module], axis: int, given: Any, plain: Any, gradients: bool
) -> None:
    """``f([P; X])`` without the first positions; values, and gradients of P and X, in float64."""
    base = make().double().eval()
    net = prompted(copy.deepcopy(base))
    x = torch.randn(2, TIME, DIM).double().transpose(0, 1 - axis).requires_grad_(gradients)
    own = net.prompt_tokens.detach().clone().requires_grad_(gradients)
    tokens = torch.stack([own, own], 1 - axis)
    with torch.set_grad_enabled(gradients):
        output, expected = net(x, **given), base(torch.cat([tokens, x], axis), **plain)
    if isinstance(output, tuple):  # the states of a recurrent layer are as they are
        torch.testing.assert_close(output[1], expected[1])
        output, expected = output[0], expected[0]
    expected = expected.narrow(axis, N, TIME)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    if gradients:
        mine = torch.autograd.grad(output.square().sum(), [net.prompt_tokens, x])
        theirs = torch.autograd.grad(expected.square().sum(), [own, x])
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_causal_network_stays_causal() -> None:
    """No token learns of later ones by way of the virtual tokens."""
    net, x = prompted(encoder().eval()), torch.randn(1, TIME, DIM, requires_grad=True)
    some = torch.randn(DIM)  # as the sum of what a norm gives depends on nothing
    mask = nn.Transformer.generate_square_subsequent_mask(TIME)
    for place in range(TIME):
        (gradient,) = torch.autograd.grad((net(x, mask=mask)[:, place] @ some).sum(), x)
        assert not gradient[:, place + 1 :].any()
        assert gradient[:, : place + 1].abs().sum(-1).all()


def test_a_sequence_without_a_batch() -> None:
    for net in (prompted(encoder().eval()), prompted(encoder(batch_first=False).eval())):
        x = torch.randn(TIME, DIM)
        batched = x.unsqueeze(0 if net.layers[0].self_attn.batch_first else 1)
        torch.testing.assert_close(net(x), net(batched).reshape(TIME, DIM))


class Pooled(nn.Module):
    """Gives one vector for each sequence, of as many features as positions sometimes."""

    def __init__(self, masked: str = "mask") -> None:
        super().__init__()
        self.body = layer()

    def forward(self, embeddings: Tensor, labels: Any = None) -> dict[str, Tensor]:
        return {"pooled": self.body(embeddings).mean(1)}


def test_what_is_no_sequence_stays_whole() -> None:
    net = prompted(Pooled().eval())
    assert net(torch.randn(2, DIM - N, DIM))["pooled"].shape == (2, DIM)
    kept = prompted(encoder().eval(), strip=False)
    assert kept(torch.randn(2, TIME, DIM)).shape == (2, N + TIME, DIM)


# --- where it starts -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["initial", "zero", "huge"])
def test_it_cannot_start_as_what_the_network_was(tokens: str) -> None:
    """A softmax gives every key a weight above zero, whatever the key is, so that the others get
    less: an attention over one more key is ``(1 - w) old + w value``, with `w` above zero.

    This is the one method whose start is not that of the base; nothing is skipped here.
    """
    base = nn.MultiheadAttention(DIM, 1, batch_first=True, dtype=torch.float64)
    nn.init.normal_(base.in_proj_bias)
    p = torch.randn(1, DIM).double() * {"initial": 0.02, "zero": 0.0, "huge": 3.0}[tokens]
    x = torch.randn(1, TIME, DIM).double()
    longer = torch.cat([p.unsqueeze(0), x], 1)
    old, old_weights = base(x, x, x)
    new, weights = base(x, longer, longer)
    w = weights[..., :1]
    assert (w > 0).all()
    torch.testing.assert_close(weights[..., 1:], (1 - w) * old_weights)
    value = base.out_proj(p @ base.in_proj_weight[-DIM:].T + base.in_proj_bias[-DIM:])
    torch.testing.assert_close(new, (1 - w) * old + w * value)
    assert (new - old).abs().max() > 1e-3


def test_the_start_is_close_to_zero_where_there_is_no_vocabulary() -> None:
    net = encoder()
    before, x = copy.deepcopy(net).eval(), torch.randn(2, TIME, DIM)
    enable_fine_tuning(net, Prompts(500))
    tokens = net.prompt_tokens
    assert tokens.shape == (500, DIM)
    assert abs(tokens.std().item() - 0.02) < 0.001
    assert abs(tokens.mean().item()) < 0.002
    assert (net.eval()(x) - before(x)).abs().max() > 1e-3, "no identity, see above"


def test_only_the_tokens_are_trained() -> None:
    net, x = encoder(), torch.randn(2, TIME, DIM)
    report = enable_fine_tuning(net, Prompts(N))
    assert trainable(net) == ["prompt_tokens"]
    assert [(c.what, c.trainable) for c in report.claims] == [
        (f"prompt(num_virtual_tokens={N})", N * DIM)
    ]
    net(x).square().sum().backward()
    assert net.prompt_tokens.grad.abs().sum(1).all()
    assert all(p.grad is None for n, p in net.named_parameters() if n != "prompt_tokens")


def test_a_head_is_trained_as_well() -> None:
    net = nn.Sequential(encoder(), nn.Linear(DIM, 4))
    for head in (True, "1", mc_path("1")):
        twin = copy.deepcopy(net)
        enable_fine_tuning(twin, Prompts(N, at="0", head=head))
        assert trainable(twin) == ["0.prompt_tokens", "1.weight", "1.bias"]
        assert twin(torch.randn(2, TIME, DIM)).shape == (2, TIME, 4)
