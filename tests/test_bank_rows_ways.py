"""Ways in which an operation may sit between two layers whose rows differ: right, or refused."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gift import DeltaBank, GiftWarning
from gift.factories import mc_path
from tests.test_bank_rows import alone, bank_of, lora_on

Way = Callable[[Tensor], Tensor]
NAMES = ["a", "b", None]


class Between(nn.Module):
    """An operation between two layers."""

    def __init__(self, f: Callable[..., Tensor], width: int = 4) -> None:
        super().__init__()
        self.first, self.last, self.f = nn.Linear(4, 4), nn.Linear(width, 4), f

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self.first(x)))


def belongs(bank: DeltaBank, x: Tensor) -> Tensor:
    """For each entry of the output a bit for each row of the input that changes it."""
    before, owners = bank.net(x), None
    for row in range(len(x)):
        changed = x.clone()
        changed[row] = torch.rand_like(x[row])
        after = bank.net(changed)
        if after.shape != before.shape:
            pytest.fail("the number of results depends on values: nothing to compare")
        own = ~torch.isclose(before, after, rtol=1e-9, atol=1e-12, equal_nan=True)
        owners = own * 2**row + (0 if owners is None else owners)
    assert owners is not None
    return owners


def outcome(bank: DeltaBank, x: Tensor, names: list[str | None]) -> str:
    """Compute rows, and compare each entry with the network that has only its row's delta.

    Returns:
        "right", or why the computation was refused.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        owners = alone(bank, None, lambda net: belongs(bank, x))
        each = {name: alone(bank, name, lambda net: net(x)) for name in {*names}}
        try:
            with bank.rows(names) as net:
                found = net(x)
        except ValueError as error:
            return str(error)
    assert found.shape == owners.shape
    for row, name in enumerate(names):
        own = owners == 2**row
        torch.testing.assert_close(found[own], each[name][own], rtol=1e-10, atol=1e-12)
    assert ((owners & (owners - 1)) == 0).all(), "entries of several rows were not refused"
    slices = [one[one > 0].unique().tolist() for one in owners]
    if len(slices) == len(names) and all(len(one) == 1 for one in slices):
        assert slices == [[2**row] for row in range(len(names))], "rows are in another order"
    return "right"


def way(f: Way, *shape: int, width: int = 4) -> str:
    outer = mc_path(glob="first") | mc_path(glob="last")
    bank = bank_of(Between(f, width).double(), a=lora_on(outer), b=lora_on(outer, 3))
    return outcome(bank, torch.randn(*(shape or (3, 5, 4))).double(), NAMES)


def constant(*shape: int) -> Tensor:
    """Values that are the same for all rows, made where they are needed."""
    return torch.arange(float(torch.Size(shape).numel())).double().cos().view(shape)


def shuffled(n: int) -> Tensor:
    return torch.arange(n).roll(1)


def filled(y: Tensor, index: Any, value: Any) -> Tensor:
    y = y.clone()
    y[index] = value
    return y


class Doubled(torch.autograd.Function):
    """An autograd function of somebody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x


@torch.library.custom_op("example::relu", mutates_args=())
def relu_of_others(x: Tensor) -> Tensor:
    """It has the name of a function that keeps rows apart, and does not."""
    return x.flip(0)


@torch.jit.script
def flipped_by_script(x: Tensor) -> Tensor:
    return x.flip(0)


class Attention(nn.Module):
    """Attention over the axis that is not the batch's, as `batch_first` has it."""

    def __init__(self, batch_first: bool, turned: bool = False) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.turned = turned

    def forward(self, y: Tensor) -> Tensor:
        y = y.transpose(0, 1) if self.turned else y
        found = self.layer(y, y, y)[0]
        return found.transpose(0, 1) if self.turned else found


def by_functional(y: Tensor) -> Tensor:
    bias = None
    return F.multi_head_attention_forward(
        y, y, y, 4, 2, constant(12, 4), bias, None, None, False, 0.0, constant(4, 4), bias,
        training=False,
    )[0]  # fmt: skip


class Last(nn.Module):
    """The last token."""

    def forward(self, y: Tensor) -> Tensor:
        return y[:, -1]


class StateOfOthers(nn.Module):
    """A recurrent layer that begins with the state of another row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(4, 4)

    def forward(self, y: Tensor) -> Tensor:
        state = y[:, 0].flip(0)
        if isinstance(self.layer, nn.GRUCell):
            return self.layer(y[:, 1], state)
        states = (state[None], state[None]) if isinstance(self.layer, nn.LSTM) else state[None]
        return self.layer(y.transpose(0, 1), states)[0].transpose(0, 1)


class OneSequence(nn.Module):
    """A recurrent layer for which the rows are the steps of one packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 4)

    def forward(self, y: Tensor) -> Tensor:
        return self.layer(nn.utils.rnn.PackedSequence(y, torch.tensor([1, 1, 1])))[0].data


class Second:
    """An object that is an index."""

    def __index__(self) -> int:
        return 1


class Recurrent(nn.Module):
    """A recurrent layer over the axis that is not the batch's, as `batch_first` has it."""

    def __init__(self, kind: str, batch_first: bool, turned: bool = False) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(4, 4, batch_first=batch_first)
        self.turned = turned

    def forward(self, y: Tensor) -> Tensor:
        found = self.layer(y.transpose(0, 1) if self.turned else y)[0]
        return found.transpose(0, 1) if self.turned else found


class Cell(nn.Module):
    """A cell, and its state for the next one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(4, 4)

    def forward(self, y: Tensor) -> Tensor:
        found = self.layer(y[:, 1], self.layer(y[:, 0]))
        return found[0] if isinstance(found, tuple) else found


def windows(y: Tensor) -> Tensor:
    parts = y.view(3, 2, 2, 4).permute(0, 2, 1, 3).reshape(-1, 2, 4)
    return parts.softmax(1).view(3, 2, 2, 4).permute(0, 2, 1, 3).reshape(3, 4, 4)


def rotary(y: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1])).double()
    turned = torch.cat([-y[..., 2:], y[..., :2]], -1)
    return y * torch.cat([angles, angles], -1).cos() + turned * angles.repeat(1, 2).sin()


def experts(y: Tensor) -> Tensor:
    """Tokens that are dispatched to one of two experts, and put back."""
    tokens, result = y.reshape(-1, 4), torch.zeros_like(y.reshape(-1, 4))
    chosen = F.one_hot(tokens[:, :2].argmax(-1), 2).T
    for expert in range(2):
        (where,) = torch.where(chosen[expert])
        result.index_add_(0, where, tokens[where] @ constant(4, 4) * (expert + 1))
    return result.view(y.shape)


def looped(y: Tensor) -> Tensor:
    return torch.stack([one.softmax(-1) + one.mean() for one in y])


def written_row_by_row(y: Tensor) -> Tensor:
    result = torch.zeros(3, 4).double()
    for i in range(3):
        result[i] = y[i].mean(0)
    return result


def looked_up(y: Tensor) -> Tensor:
    return F.embedding((y[..., 0] > 0).long(), constant(2, 4)) + y


def pooled(y: Tensor) -> Tensor:
    return F.adaptive_avg_pool1d(y.mT, 2).mT + F.max_pool1d(y.mT, 2).mT


def image(f: Way) -> Way:
    """The same for an image of four channels."""
    return lambda y: f(y.mT.unsqueeze(-1).expand(3, 4, 5, 6)).mean((2, 3))


def numbered(x: Tensor) -> Tensor:
    return x + torch.arange(len(x)).double()[:, None]


def second(f: Way) -> Way:
    """The same with the rows along the second axis."""
    return lambda y: turned(f(y.transpose(0, 1))) + 0 * y[:, :1]


def turned(y: Tensor) -> Tensor:
    return y.transpose(0, 1) if y.ndim > 2 else y[:, None]


RIGHT: dict[str, Way] = {
    "pointwise": lambda y: torch.sin(y) * 2 + F.gelu(y).exp().clamp(max=3) - F.silu(-y),
    "in_place": lambda y: y.clone().mul_(2).add_(1).relu_(),
    "comparison": lambda y: torch.where(y > 0, y, y.abs().sqrt()).nan_to_num(),
    "operators": lambda y: (1 - y) / (y**2 + 2) % 3 // 0.1 + 2**y,
    "bits": lambda y: y * ((y > 0) & ~(y > 1) | (y < -1)),
    "cast": lambda y: y.float().to(torch.float64).type_as(y) + y.half().double(),
    "with_constant": lambda y: y + constant(5, 4) * constant(4) - constant(1, 5, 1),
    "constant_for_each_row": lambda y: y + constant(3, 1, 1),
    "dropout": lambda y: F.dropout(y, 0.5, False).contiguous().detach().clone(),
    "masked_fill": lambda y: y.masked_fill(y < 0, 0.5),
    "layer_norm": lambda y: F.layer_norm(y, (4,)) + F.layer_norm(y, (5, 4)),
    "rms_norm": lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6),
    "group_norm": lambda y: F.group_norm(y, 5),
    "instance_norm": lambda y: F.instance_norm(y),
    "batch_norm_of_constants": lambda y: F.batch_norm(
        y, torch.ones(5).double(), torch.ones(5).double()
    ),
    "normalize": lambda y: F.normalize(y, dim=-1) + F.normalize(y, dim=1),
    "softmax": lambda y: y.softmax(-1) + F.log_softmax(y, 1) + torch.special.softmax(y, 2),
    "reduced": lambda y: (
        y - y.mean((1, 2), keepdim=True) / y.std(1, keepdim=True) + y.sum(1)[:, None]
    ),
    "largest": lambda y: y - y.max(-1, keepdim=True).values - y.amax(1, keepdim=True),
    "smaller_of_two": lambda y: torch.min(y, y.flip(1)),
    "argmax": lambda y: F.one_hot(y.argmax(-1), 4) * 1.0 + y,
    "sort": lambda y: y.sort(1).values + y.sort(-1, descending=True).values,
    "topk": lambda y: y.topk(3, 1).values,
    "cumsum": lambda y: y.cumsum(1) + y.cumprod(-1),
    "flip_and_roll": lambda y: y.flip(1) + y.roll(1, 1) + y.roll((1, 2), (1, 2)),
    "gather": lambda y: y.gather(1, y.argsort(1)) + torch.take_along_dim(y, y.argsort(-1), -1),
    "gather_constant": lambda y: y.gather(
        1, torch.arange(5).flip(0)[None, :, None].expand(3, 5, 4)
    ),
    "index_select": lambda y: y.index_select(1, torch.tensor([4, 0, 0])),
    "index": lambda y: (
        y[:, [2, 0]] + y[:, :2] + y[:, -2:] + y[..., torch.tensor([1, 0, 2, 3])][:, :2]
    ),
    "place_for_each": lambda y: y[torch.arange(3), torch.tensor([4, 0, 2])],
    "place_from_data": lambda y: y[torch.arange(3), y[..., 0].argmax(-1)],
    "places_for_each": lambda y: y[torch.arange(3)[:, None], y[..., 0].argsort(-1)],
    "reshape": lambda y: (
        y.reshape(-1, 4).view(3, 5, 2, 2).transpose(1, 2).flatten(2).view(3, -1, 4)
    ),
    "permuted": lambda y: y.permute(2, 0, 1).transpose(0, 1).mT,
    "expand": lambda y: y.unsqueeze(1).expand(-1, 2, -1, -1).mean(1) + y.mean(1, True).expand_as(y),
    "repeat": lambda y: y.repeat(1, 2, 1) + torch.tile(y, (1, 2, 1)),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 1),
    "cat": lambda y: torch.cat([y, constant(3, 1, 4), y[:, :1]], 1),
    "class_token": lambda y: torch.cat([constant(1, 1, 4).expand(3, -1, -1), y], 1),
    "stack": lambda y: torch.stack([y, 2 * y], 1).sum(1) + torch.stack([y, -y], -1).amax(-1),
    "chunk": lambda y: torch.cat(y.chunk(2, -1)[::-1], -1) + torch.cat(y.split([1, 3], -1), -1),
    "unbind": lambda y: sum(y.unbind(1))[:, None] + y,
    "pad": lambda y: F.pad(y, (0, 0, 1, 2), value=0.5),
    "linear": lambda y: F.linear(y, constant(4, 4), constant(4)),
    "matmul": lambda y: y @ constant(4, 4) + constant(5, 5) @ y,
    "scores": lambda y: (y @ y.mT).softmax(-1) @ y,
    "bmm": lambda y: torch.bmm(y, y.mT) @ y + torch.baddbmm(y, torch.bmm(y, y.mT), y),
    "einsum": lambda y: (
        torch.einsum("bik,bjk,bjl->bil", y, y, y) + torch.einsum("bij,j", y, constant(4))[..., None]
    ),
    "outer_of_each": lambda y: torch.einsum("bi,bj->bij", y[:, 0], y[:, 1]),
    "cdist": lambda y: torch.cdist(y, y) @ y,
    "heads": lambda y: (
        y.view(3, 5, 2, 2)
        .transpose(1, 2)
        .reshape(6, 5, 2)
        .softmax(1)
        .view(3, 2, 5, 2)
        .transpose(1, 2)
        .reshape(3, 5, 4)
    ),
    "attention": lambda y: F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0],
    "causal_attention": lambda y: F.scaled_dot_product_attention(
        y[:, None], y[:, None], y[:, None], is_causal=True
    )[:, 0],
    "masked_attention": lambda y: F.scaled_dot_product_attention(
        y, y, y, attn_mask=(y @ y.mT) > -9
    ),
    "attention_module": Attention(True),
    "attention_second": Attention(False, True),
    "attention_functional": lambda y: by_functional(y.transpose(0, 1)).transpose(0, 1),
    "rotary": rotary,
    "windows": lambda y: windows(y[:, :4]),
    "conv1d": lambda y: F.conv1d(y.mT, constant(4, 4, 3), padding=1).mT,
    "conv_depthwise": lambda y: F.conv1d(y.mT, constant(4, 1, 3), groups=4).mT,
    "conv2d": image(lambda y: F.conv2d(y, constant(4, 4, 3, 3))),
    "conv_transpose": image(lambda y: F.conv_transpose2d(y, constant(4, 4, 2, 2))),
    "pool2d": image(
        lambda y: F.max_pool2d(y, 2) + F.avg_pool2d(y, 2) + F.adaptive_avg_pool2d(y, (2, 3))
    ),
    "interpolate": image(lambda y: F.interpolate(y, scale_factor=2.0, mode="bilinear")),
    "grid_sample": image(
        lambda y: F.grid_sample(y, torch.tanh(y[:, :2].permute(0, 2, 3, 1)), align_corners=False)
    ),
    "pixel_shuffle": image(lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2)),
    "channel_shuffle": image(lambda y: y.view(3, 2, 2, 5, 6).transpose(1, 2).reshape(3, 4, 5, 6)),
    "unfold": image(lambda y: F.fold(F.unfold(y, 2), (5, 6), 2)),
    "batch_norm_2d": image(
        lambda y: F.batch_norm(y, torch.ones(4).double(), torch.ones(4).double())
    ),
    "pooled": pooled,
    "lstm": Recurrent("LSTM", True),
    "gru": Recurrent("GRU", True),
    "lstm_second": Recurrent("LSTM", False, True),
    "lstm_cell": Cell("LSTMCell"),
    "gru_cell": Cell("GRUCell"),
    "fft": lambda y: torch.fft.irfft(torch.fft.rfft(y, dim=1), n=5, dim=1) + torch.fft.fft(y).real,
    "fft2": lambda y: torch.fft.fft2(y).abs(),
    "complex": lambda y: torch.view_as_real(torch.view_as_complex(y.view(3, 5, 2, 2)) * 1j).flatten(
        2
    ),
    "det": lambda y: y + torch.linalg.det(y[:, :4])[:, None, None],
    "inverse": lambda y: torch.linalg.inv(y[:, :4] + 9 * torch.eye(4).double()),
    "svd": lambda y: torch.linalg.svdvals(y),
    "embedding": looked_up,
    "embedding_bag": lambda y: (
        F.embedding_bag((y[..., 0] > 0).long(), constant(2, 4), mode="sum") + y[:, 0]
    ),
    "masked_write": lambda y: filled(y, y > 0, 0.0),
    "written": lambda y: filled(y, (slice(None), slice(0, 2)), y[:, 2:4]),
    "written_constant": lambda y: filled(y, (slice(None), 0), 1.0),
    "scatter": lambda y: torch.zeros(3, 5, 4).double().scatter_(1, y.argsort(1), y),
    "scatter_add": lambda y: torch.zeros_like(y).scatter_add(-1, y.argsort(-1), y),
    "index_add": lambda y: torch.zeros_like(y).index_add(1, torch.tensor([0, 0, 1, 1, 2]), y),
    "cache": lambda y: torch.zeros(3, 9, 4).double().index_copy_(1, torch.arange(2, 7), y),
    "diagonal": lambda y: y[:, :4].diagonal(dim1=1, dim2=2),
    "tril": lambda y: y.tril() + y.triu(1),
    "unfolded": lambda y: y.unfold(1, 2, 1).mean(-1),
    "autograd_function": lambda y: Doubled.apply(y),
    "aten": lambda y: torch.ops.aten.relu.default(y) + torch.ops.aten.sin(y),
    "cosine": lambda y: y * F.cosine_similarity(y, y.flip(1), dim=-1)[..., None],
    "glu": lambda y: F.glu(torch.cat([y, y], -1)),
    "prelu": lambda y: F.prelu(y, torch.ones(5).double() * 0.3),
    "bucketize": lambda y: torch.bucketize(y, torch.tensor([-1.0, 0, 1]).double()) + y,
    "diff": lambda y: y.diff(dim=1),
    "experts": experts,
    "masked_sum": lambda y: (
        torch.zeros(3, 4).double().index_add(0, torch.where(y[..., 0] > 0)[0], y[y[..., 0] > 0])
        + y[:, 0]
    ),
    "looped": looped,
    "written_row_by_row": written_row_by_row,
    "chunks_of_the_batch": lambda y: torch.cat([y[:1] * 2, y[1:] * 2]),
    "chunks_in_turn": lambda y: torch.cat([part.softmax(1) for part in y.split(2)]),
    "flipped_and_back": lambda y: (y.flip(0) * 2).flip(0),
    "shuffled_and_back": lambda y: (y[shuffled(3)] * 2)[shuffled(3).argsort()],
    "batch_twice": lambda y: torch.cat([y, y]).chunk(2)[1],
    "batch_second": lambda y: y.transpose(0, 1).reshape(-1, 4).view(5, 3, 4).transpose(0, 1),
    "transposed_view": lambda y: y[:, :3, :].transpose(0, 1).contiguous().view(3, 3, 4),
    "batch_last": lambda y: y.permute(1, 2, 0).softmax(1).permute(2, 0, 1),
    "copied_over": lambda y: y.cumsum(0).copy_(y * 2),
    "into_a_part": lambda y: torch.cat([y, 2 * y], 1).index_fill(1, torch.tensor([0]), 3.0),
    "index_of_numpy": second(lambda y: y[np.array([4, 0, 2])] + y[np.array([4, 0, 2]), :]),
    "mask_of_numpy": second(lambda y: y[np.array([True, False, True, True, False])]),
    "index_of_tuple": second(lambda y: y[(4, 0, 2),] + y[..., [4, 0, 2], :, :][:, :, :]),
    "index_of_range": second(lambda y: y[range(4)]),
    "number_of_numpy": second(lambda y: y[np.int64(2)]),
    "mask_of_bytes": second(
        lambda y: y[..., torch.tensor([1, 0, 1, 1], dtype=torch.uint8)][:, :, [0, 1, 2, 0]]
    ),
    "rows_of_numpy": lambda y: y[np.array([2, 0, 1])][[1, 2, 0]],
    "each_twice": lambda y: y[torch.arange(3)[:, None].expand(3, 2)].mean(1),
    "all_twice": lambda y: y[torch.arange(3).expand(2, 3)].mean(0),
    "no_rows_by_slice": lambda y: torch.cat([y[:0], y]),
    "no_rows_by_index": lambda y: torch.cat([y[torch.tensor([]).long()], y]),
    "shuffled_repeated": lambda y: y[shuffled(3)].repeat(2, 1, 1)[3:][shuffled(3).argsort()],
    "rows_beside_themselves": lambda y: y.repeat_interleave(2, 0)[1::2],
    "shuffled_beside": lambda y: y[shuffled(3)].repeat_interleave(2, 0)[::2][shuffled(3).argsort()],
    "some_beside": lambda y: y.repeat_interleave(torch.tensor([2, 1, 3]), 0)[[1, 2, 5]],
    "shuffled_flat": lambda y: y[shuffled(3)].reshape(-1, 4).view(3, 5, 4)[shuffled(3).argsort()],
    "several_at_once": lambda y: (
        torch.atleast_3d(constant(5, 4), y)[1] + torch.atleast_2d(constant(4), y)[0]
    ),
    "other_dtype": lambda y: y.view(torch.float32).view(torch.float64),
    "strided_as_it_is": lambda y: y.as_strided((3, 4, 4), y.stride()),
    "hstack": lambda y: torch.hstack([y, 2 * y]) + torch.column_stack([y, -y]),
    "vstack": lambda y: torch.vstack([y[:1], y[1:]]),
    "dstack": lambda y: torch.dstack([y[..., :1], y[..., 1:]]),
    "table": lambda y: constant(7, 4).gather(0, (y[:, 0] > 0).long()) + y[:, 0],
    "selected": lambda y: torch.stack([y.select(0, i) * i for i in range(3)]),
    "mask_selected": lambda y: (
        torch.zeros(3).double().index_add(0, torch.where(y > 0)[0], y.masked_select(y > 0))[:, None]
        + y[:, 0]
    ),
    "one_row_written": lambda y: torch.stack(
        [filled(torch.zeros(5, 4).double(), 2, one[0]) for one in y]
    ),
    "rows_written_at_positions": lambda y: torch.stack(
        [filled(torch.zeros(5, 4).double(), torch.tensor([0, 2]), one[:2]) for one in y]
    ),
    "slice_scatter": lambda y: y.slice_scatter(2 * y[:, :2], 1, 1, 3),
    "slice_scatter_steps": lambda y: torch.zeros_like(y).slice_scatter(y[:, :3], 1, 0, 5, 2),
    "slice_scatter_of_rows": lambda y: (
        torch.zeros_like(y).slice_scatter(y[1:], 0, 1) + y.slice_scatter(2 * y[:2], 0, 0, 2)
    ),
    "slice_scatter_of_steps": lambda y: y.slice_scatter(2 * y[::2], 0, 0, 3, 2),
    "slice_scatter_by_names": lambda y: y.slice_scatter(src=2 * y[1:2], dim=0, start=1, end=2),
    "select_scatter_of_rows": lambda y: y.select_scatter(2 * y[1], 0, 1),
    "select_scatter": lambda y: y.select_scatter(y[:, 0], 1, 2),
    "linear_for_each": lambda y: F.bilinear(y, y, constant(4, 4, 4), constant(4)),
    "integers": lambda y: y[:, : int((y > -99).sum()) // 20] + (y > -99).all().item(),
    "einsum_without_arrow": lambda y: torch.einsum("bij, j", y, constant(4))[..., None] + y,
    "einsum_of_pairs": lambda y: torch.einsum("bi,bi->b", y[:, 0], y[:, 1])[:, None] + y[:, 0],
}

MIXING: dict[str, dict[str, Way]] = {
    "combines rows of different lengths with values for each position": {
        "places_among_chosen": lambda y: (
            torch.zeros(3, 4)
            .double()
            .index_add(0, torch.where(y[..., 0] > 0)[0], numbered(y[y[..., 0] > 0]))
            + y[:, 0]
        ),
    },
    "it is the same for all rows": {
        "constants": lambda y: torch.arange(12).double().view(4, 3).T,
    },
    "it comes from what torch does not show": {
        "vmap": lambda y: torch.vmap(lambda one: one.sum() + one)(y.transpose(0, 1)).transpose(
            0, 1
        ),
        "vmap_over_rows": lambda y: torch.vmap(lambda one: one * 2)(y),
        "vmapped_flip": lambda y: torch.vmap(lambda one: one.flip(0), in_dims=1, out_dims=1)(y),
        "script": flipped_by_script,
        "nested": lambda y: torch.nested.nested_tensor(list(y.flip(0))).to_padded_tensor(0.0),
        "nested_jagged": lambda y: torch.nested.nested_tensor(
            list(y.flip(0)), layout=torch.jagged
        ).to_padded_tensor(0.0),
    },
    "takes values of rows out of torch": {
        "numpy": lambda y: torch.from_numpy(np.ascontiguousarray(y.numpy()[::-1])),
        "list": lambda y: torch.tensor(y.tolist()[::-1], dtype=torch.float64),
        "number": lambda y: y / y.max().item(),
        "python_float": lambda y: y * float(y[0, 0, 0]),
        "dlpack": lambda y: torch.from_dlpack(y.contiguous()).flip(0),
    },
    "is not known to keep rows apart": {
        "operator_of_another_library": lambda y: torch.ops.example.relu(y),
        "sparse": lambda y: torch.sparse.mm(
            torch.eye(3).double()[shuffled(3)].to_sparse(), y[:, 0]
        ),
        "lstsq": lambda y: torch.linalg.lstsq(torch.eye(3).double()[shuffled(3)], y[:, 0]).solution,
        "unique": lambda y: y[y[:, 0, 0].unique(return_inverse=True)[1]],
        "trapezoid": lambda y: y + torch.trapezoid(y, dim=0),
        "quantile": lambda y: y - y.quantile(0.3, dim=0),
        "take": lambda y: y.take(torch.arange(60).flip(0).view(3, 5, 4)),
        "masked_scatter": lambda y: y.masked_scatter(y > 0, y.flip(0)),
        "tensordot": lambda y: torch.tensordot(torch.eye(3).double()[shuffled(3)], y, 1),
        "kron": lambda y: torch.kron(y[:, 0], y[:, 0])[:3, :4],
        "renorm": lambda y: y.renorm(2, 1, 1.0),
        "corrcoef": lambda y: torch.corrcoef(y[:, 0]) @ y[:, 0],
        "histogram": lambda y: y + torch.histc(y, 4),
        "bincount": lambda y: y + torch.bincount((y > 0).long().flatten(), minlength=4),
        "loss": lambda y: y - F.mse_loss(y, torch.zeros_like(y)),
        "packed": lambda y: nn.utils.rnn.pad_packed_sequence(
            nn.utils.rnn.pack_padded_sequence(y, [2, 5, 3], True, False), True
        )[0].flip(0),
        "meshgrid": lambda y: (
            torch.meshgrid(y[:, 0, 0], y[:, 1, 0], indexing="ij")[1][..., None] + y[:, :3]
        ),
        "cartesian": lambda y: (
            torch.cartesian_prod(y[:, 0, 0], torch.arange(2.0).double())[:3, :1] + y[:, 0]
        ),
        "data_of": lambda y: data_of(y),
    },
    "sums over the axis of the rows": {
        "sparse_matmul": lambda y: torch.eye(3).double()[shuffled(3)].to_sparse() @ y[:, 0],
        "whitened": lambda y: y[:, 0] @ torch.linalg.pinv(y[:, 0].T @ y[:, 0]),
        "rows_of_weights": lambda y: F.linear(torch.eye(3).double()[shuffled(3)], y[:, 0].T),
        "matmul": lambda y: torch.ones(3, 3).double().tril() @ y[:, 0],
        "einsum": lambda y: torch.einsum("ij,jkl->ikl", torch.ones(3, 3).double().tril(), y),
    },
    "gets rows in an argument that all rows share": {
        "bias_of_rows": lambda y: F.linear(y, constant(3, 4), y[:, 0, 0])[..., [0, 1, 2, 0]],
        "prelu_along_rows": lambda y: F.prelu(y.transpose(0, 1), constant(3)).transpose(0, 1),
        "embedding_of_rows": lambda y: F.embedding(shuffled(3), y[:, 0]),
        "embedding_bag_of_rows": lambda y: F.embedding_bag(shuffled(3)[:, None], y[:, 0]),
        "weights_from_rows": lambda y: F.conv1d(y.mT, y[:, :1].mT.contiguous()).mT.expand(3, 5, 3)[
            ..., [0, 1, 2, 0]
        ],
        "prelu_of_rows": lambda y: F.prelu(y.transpose(0, 1), y[:, 0, 0]).transpose(0, 1),
        "layer_norm_by_rows": lambda y: F.layer_norm(
            y.transpose(0, 2), (5, 3), y[:, 0, :1].T.expand(5, 3)
        ).transpose(0, 2),
    },
    "gets no batch along the first axis": {
        "embedding_bag_offsets": lambda y: (
            F.embedding_bag(
                (y[..., 0] > 0).long().flatten(), constant(2, 4), torch.tensor([0, 4, 9])
            )
            + y[:, 0]
        ),
        "conv_without_batch": lambda y: F.conv1d(y[:, 0], constant(3, 3, 1)),
    },
    "works along the axis of the rows": {
        "diagonal": lambda y: y[:, :3].diagonal(dim1=0, dim2=1).T,
        "diagonal_by_default": lambda y: y[:, :3].diagonal().T,
        "solve": lambda y: torch.linalg.solve(torch.eye(3).double()[shuffled(3)], y[:, 0]),
        "solve_triangular": lambda y: torch.linalg.solve_triangular(
            torch.ones(3, 3).double().tril(), y[:, 0], upper=False
        ),
        "qr": lambda y: torch.linalg.qr(y[:, 0]).Q @ torch.ones(3, 4).double(),
        "attention_over_rows": Attention(False),
        "attention_functional": by_functional,
        "sdpa_over_rows": lambda y: F.scaled_dot_product_attention(
            y.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1)
        ).transpose(0, 1),
        "roll": lambda y: y.roll(1, 0),
        "roll_flat": lambda y: y.roll(1),
        "sort": lambda y: y.sort(0).values,
        "argsort": lambda y: y[y[:, 0, 0].argsort()],
        "rank": lambda y: y + y.argsort(0).argsort(0),
        "topk": lambda y: y.topk(3, 0).values,
        "cumsum": lambda y: y.cumsum(0),
        "cummax": lambda y: y.cummax(0).values,
        "logcumsumexp": lambda y: torch.logcumsumexp(y, 0),
        "diff": lambda y: torch.diff(y, dim=0, prepend=constant(1, 5, 4)),
        "mean": lambda y: y - y.mean(0),
        "std": lambda y: y / y.std(0),
        "all": lambda y: y - y.mean(),
        "norm": lambda y: y / y.norm(),
        "normalize": lambda y: F.normalize(y, dim=0),
        "softmax": lambda y: y.softmax(0),
        "median": lambda y: y - y.median(0).values,
        "layer_norm_of_all": lambda y: F.layer_norm(y, y.shape),
        "group_norm_of_rows": lambda y: F.group_norm(y.transpose(0, 1), 3).transpose(0, 1),
        "instance_norm_of_rows": lambda y: F.instance_norm(y[:, 0].T[None])[0].T + y[:, 0],
        "conv_over_rows": lambda y: F.conv1d(
            y.permute(1, 2, 0), constant(4, 4, 3), padding=1
        ).permute(2, 0, 1),
        "pool_over_rows": lambda y: F.avg_pool1d(y.permute(1, 2, 0), 3, 1, 1).permute(2, 0, 1),
        "fft": lambda y: torch.fft.fft(y, dim=0).real,
        "fftn": lambda y: torch.fft.fftn(y).real,
        "fftshift": lambda y: torch.fft.fftshift(y),
        "lstm_over_rows": Recurrent("LSTM", False),
        "gru_over_rows": nn.Sequential(Last(), Recurrent("GRU", True)),
        "gather": lambda y: y.gather(0, shuffled(3)[:, None, None].expand(3, 5, 4)),
        "scatter": lambda y: torch.zeros_like(y).scatter(
            0, shuffled(3)[:, None, None].expand(3, 5, 4), y
        ),
        "neighbours": lambda y: torch.cat([y[:, :, :2], y.roll(1, 0)[:, :, 2:]], -1),
        "searchsorted": lambda y: y + torch.searchsorted(y[:, 0, 0].sort().values, y),
        "global_pool": lambda y: y + F.adaptive_avg_pool2d(y, 1).mean(),
    },
    "gets no batch along the second axis": {
        "attention_over_rows_2d": nn.Sequential(Last(), Attention(True)),
    },
    "combines tensors whose rows are along different axes or in another order": {
        "gru_with_a_state_of_others": StateOfOthers("GRU"),
        "lstm_with_a_state_of_others": StateOfOthers("LSTM"),
        "cell_with_a_state_of_others": StateOfOthers("GRUCell"),
        "grid_of_others": image(
            lambda y: F.grid_sample(
                y, torch.tanh(y[:, :2].permute(0, 2, 3, 1)).flip(0), align_corners=False
            )
        ),
        "sdpa_of_others": lambda y: F.scaled_dot_product_attention(y, y.flip(0), y),
        "sdpa_mask": lambda y: F.scaled_dot_product_attention(
            y, y, y, attn_mask=(y @ y.mT).flip(0)
        ),
        "memory_bank": lambda y: (y[:, 0] @ y[:, 0].T).softmax(-1) @ y[:, 0],
        "contrastive": lambda y: (
            F.normalize(y[:, 0], dim=-1) @ F.normalize(y[:, 1], dim=-1).T @ y[:, 0]
        ),
        "contrastive_cdist": lambda y: torch.cdist(y[:, 0], y[:, 0]) @ y[:, 0],
        "gram": lambda y: torch.einsum("ik,jk->ij", y[:, 0], y[:, 0]) @ y[:, 0],
        "flip_added": lambda y: y + y.flip(0),
        "flip_to_second": lambda y: torch.maximum(y, torch.flip(y, (0,))),
        "scatter_of_flipped": lambda y: torch.zeros_like(y).scatter(1, y.argsort(1).flip(0), y),
        "index_copy": lambda y: y.index_copy(0, shuffled(3), y),
        "mixup": lambda y: (
            0.7 * y + 0.3 * y[torch.randperm(3, generator=torch.Generator().manual_seed(1))]
        ),
        "addmm": lambda y: torch.addmm(y[:, 0].flip(0), y[:, 0], constant(4, 4)),
        "baddbmm": lambda y: torch.baddbmm(y.flip(0), y, constant(3, 4, 4)),
        "bilinear": lambda y: F.bilinear(y, y.flip(0), constant(4, 4, 4)),
        "broadcast": lambda y: (y[:, None] + y[None]).mean(0),
        "pairs": lambda y: (y[:, None] - y[None]).amax(1),
        "pairs_back": lambda y: (y[:, None] - y[None])[torch.arange(3), torch.arange(3).flip(0)],
    },
    "rows are in another order": {
        "flip": lambda y: y.flip(0),
        "index_select": lambda y: y.index_select(0, shuffled(3)),
        "index": lambda y: y[shuffled(3)],
        "chunks_exchanged": lambda y: torch.cat([y[1:], y[:1]]),
        "pieces_exchanged": lambda y: torch.cat(y.split(1)[::-1]),
        "stacked_in_another_order": lambda y: torch.stack([y[1], y[0], y[2]]),
    },
    "takes statistics over the batch, as in training": {
        "batch_norm": lambda y: F.batch_norm(y, None, None, training=True),
        "batch_norm_module": nn.BatchNorm1d(5, track_running_stats=False),
    },
    "combines different rows": {
        "two_rows": lambda y: y[0] + y[1],
        "rows_of_slices": lambda y: y[:1] * y[2:],
    },
    "picks other entries for each row": {
        "largest_for_all": lambda y: y[:, y[:, 0].argmax(-1)],
        "of_the_first": lambda y: y[0][y[..., 0].argmax(-1)],
    },
    "is indexed by a bool": {
        "true": lambda y: y[True][0],
        "tensor_of_true": lambda y: y[torch.tensor(True)][0],
        "byte": lambda y: y[torch.tensor(1, dtype=torch.uint8)][0],
        "array_of_true": lambda y: y[np.array(True)][0],
        "true_among_others": lambda y: y[..., None, True][..., 0, 0],
    },
    "picks entries whose positions depend on other rows": {
        "chosen": lambda y: large(y)[torch.tensor([0, 1, 2])],
        "sliced": lambda y: large(y)[:3],
        "in_two_steps": lambda y: large(y)[2:][:1],
    },
    "picks an entry whose position depends on other rows": {
        "first": lambda y: large(y)[0] + y,
        "selected": lambda y: large(y).select(0, 1) + y,
    },
    "repeats rows of different lengths": {"repeated": lambda y: large(y).repeat(2, 1)[:3]},
    "spreads one row over others": {
        "expanded": lambda y: y[filled(y > 99, (0, 0), True)[..., 0]].expand(3, 4),
    },
    "flattens rows": {"interleaved": lambda y: y.repeat_interleave(2)[:60].view(3, 5, 4)},
    "joins tensors of too few axes": {
        "hstack": lambda y: torch.hstack([y[:, 0, 0], y[:, 1, 0]])[:3, None].expand(3, 4),
        "column_stack": lambda y: torch.column_stack([y[:, 0, i] for i in range(4)]),
    },
    "takes some of the rows only": {
        "gathered": lambda y: y.gather(1, torch.zeros(2, 5, 4).long()),
    },
    "scatters some of the rows": {
        "scattered": lambda y: torch.zeros(3, 5, 4).double().scatter(1, y.argsort(1)[:2], 1.0),
    },
    "gets a packed sequence": {"packed_by_hand": nn.Sequential(Last(), OneSequence())},
    "gets vectors, which may be columns of one matrix": {
        "solve": lambda y: torch.linalg.solve(y[:, :4] + 9 * torch.eye(4).double(), y[:, 4]),
    },
    "is called in a way that is not known": {
        "by_an_object": lambda y: y[:, Second()] + y[:, 0],
    },
    "combines one row with others": {
        "index_from_data": lambda y: y[y[:, 0, 0].argmax()].expand(3, 5, 4) + y,
        "first_for_all": lambda y: y + y[0],
        "first_for_all_slice": lambda y: y - y[:1],
    },
    "writes rows where they cannot be told apart": {
        "index_add": lambda y: torch.zeros_like(y).index_add(0, torch.tensor([0, 0, 1]), y),
        "masked_positions": lambda y: (
            y
            + torch.zeros(3, 5, 1)
            .double()
            .index_put(
                torch.where(y[..., :1] > 0), torch.arange(int((y[..., :1] > 0).sum())).double()
            )
        ),
        "written_flipped": lambda y: filled(torch.zeros_like(y), [2, 1, 0], y),
    },
    "picks entries of other rows": {
        "masked_sum_flipped": lambda y: (
            torch.zeros(3, 4)
            .double()
            .index_add(0, torch.where(y[..., 0] > 0)[0], y.flip(0)[y[..., 0] > 0])
            + y[:, 0]
        ),
        "set_by_mask_of_others": lambda y: filled(y, (y > 0).flip(0), 0.0),
    },
    "writes rows over other rows": {
        "select_scatter": lambda y: y.select_scatter(y[0], 0, 1),
        "written": lambda y: filled(y, 0, y[1]),
    },
    "other rows were written into its memory, through another view": {
        "written_through_a_view": lambda y: through(y),
    },
    "joins rows with what is not theirs": {
        "temporal_shift": lambda y: torch.cat([y[1:], torch.zeros(1, 5, 4).double()]),
    },
    "all of it belongs to row 0": {
        "expanded_first": lambda y: y[:1].expand(3, 5, 4),
        "returned_elsewhere": lambda y: y.repeat(1, 3, 1).view(9, 5, 4)[:3],
    },
    "cuts rows into pieces that no axis holds": {
        "two_of_each": lambda y: y[torch.tensor([[0, 1], [1, 2]])].mean(1),
        "shuffled_in_pairs": lambda y: y[[0, 1, 2, 0]].reshape(2, 10, 4),
        "other_dtype": lambda y: (
            y.permute(1, 2, 0).contiguous().view(torch.int32).permute(2, 0, 1)[:3].double()
        ),
        "cut": lambda y: y.reshape(5, 12).sin().reshape(3, 5, 4)[:, :1].repeat(1, 5, 1),
    },
    "reads memory in an order of its own": {
        "strided": lambda y: y.as_strided((3, 5, 4), (4, 12, 1)),
    },
}


def large(y: Tensor) -> Tensor:
    """The tokens above the mean of their row, at least one of each."""
    first = y[..., 0]
    return y[first > first.mean(1, keepdim=True) - 9]


def through(y: Tensor) -> Tensor:
    y = y.clone()
    part = y[0]
    part.copy_(y[1])
    return y


def data_of(y: Tensor) -> Tensor:
    other = y.clone()
    other.data = y.flip(0)
    return other


LEAVING = MIXING["takes values of rows out of torch"]


@pytest.mark.parametrize("f", RIGHT.values(), ids=RIGHT)
def test_what_keeps_rows_apart_is_right(f: Way) -> None:
    assert way(f) == "right"


@pytest.mark.parametrize(
    ("f", "why"),
    [pytest.param(f, why, id=name) for why, ways in MIXING.items() for name, f in ways.items()],
)
def test_what_mixes_rows_is_refused(f: Way, why: str) -> None:
    assert why in way(f)


@pytest.mark.parametrize(("name", "function"), {
    "numpy": "numpy", "list": "tolist", "number": "item", "python_float": "__float__",
    "dlpack": "__dlpack__",
}.items())  # fmt: skip
def test_values_that_leave_torch_are_refused_where_they_leave(name: str, function: str) -> None:
    assert re.search(rf"takes values of rows out of torch by {function}:", way(LEAVING[name]))


class Returning(nn.Module):
    """Returns something of what a layer gives."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.f = nn.Linear(4, 4), f

    def forward(self, x: Tensor) -> Any:
        return self.f(self.first(x))


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (lambda y: y - y.mean(0), "mean in Returning works along the axis of the rows"),
        (lambda y: y.flip(0), "in another order"),
        (lambda y: y @ y.T, "matmul in Returning combines tensors whose rows"),
        (lambda y: y.expand(3, 3, 4)[:, 1], "belongs to row 1"),
        (lambda y: (y.sum(0), y.cov()), "sum in Returning"),
        (torch.vmap(torch.sin), "torch does not show"),
    ],
)
def test_a_network_that_returns_no_rows_is_refused(f: Callable[[Tensor], Any], why: str) -> None:
    bank = bank_of(Returning(f).double())
    with pytest.raises(ValueError, match=why), bank.rows(NAMES) as net:
        net(torch.randn(3, 4).double())


def test_what_is_returned_beside_rows() -> None:
    """Similarities of a batch are mixed, which a warning says; a loss says nothing of rows."""
    x = torch.randn(3, 4).double()
    bank = bank_of(Returning(lambda y: {"rows": y, "scores": y @ y.T, "loss": y.mean()}).double())
    with pytest.warns(GiftWarning, match="of 2 tensors .* 1 have no rows: matmul"):  # noqa: SIM117
        with bank.rows(NAMES) as net:
            found = net(x)["rows"]
    for row, name in enumerate(NAMES):
        expected = alone(bank, name, lambda net: net(x)["rows"])
        torch.testing.assert_close(found[row], expected[row], rtol=1e-12, atol=1e-12)


def test_constants_are_known_wherever_a_network_keeps_them() -> None:
    net = Between(lambda y: (y - net.mean) / net.deviations[0] + SHIFT)
    net.mean, net.deviations = constant(4), [constant(1, 4) + 2]
    x = torch.randn(3, 4).double()
    assert outcome(bank_of(net.double()), x, NAMES) == "right"
    elsewhere = constant(4)
    found = outcome(bank_of(Between(lambda y: y - elsewhere).double()), x, NAMES)
    assert "is not a parameter, buffer or attribute" in found


SHIFT = constant(4)


@pytest.mark.parametrize("way", ["network", "call", "part"])
@pytest.mark.parametrize("f", [torch.sin, lambda y: y - y.mean(0)], ids=["sin", "mean"])
def test_compiled_code_runs_as_it_is_written(f: Way, way: str) -> None:
    net: Any = Between(f).double()
    bank, x = bank_of(net), torch.randn(3, 4).double()
    expected = [alone(bank, name, lambda net: net(x))[row] for row, name in enumerate(NAMES)]
    call = torch.compile(net, backend="eager") if way == "network" else net
    if way == "call":
        net.compile(backend="eager")
    if way == "part":
        net.f = torch.compile(f, backend="eager")
    if f is not torch.sin:
        with pytest.raises(ValueError, match="mean in Between"), bank.rows(NAMES):
            call(x)
        return
    with bank.rows(NAMES):
        found = call(x)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
