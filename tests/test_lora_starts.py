"""PiSSA, OLoRA and LoRA-FA: their starts, against PEFT and by what defines them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_any
from gift.methods import METHODS, pissa
from tests.common import trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

ANCHORED = ["pissa", "olora"]
anchored = pytest.mark.parametrize("method", ANCHORED)
NAMES = ("lora_B", "lora_A")


def adapted(net: Any, method: str, **settings: Any) -> Any:
    enable_fine_tuning(net, FineTuningStrategy([(mc_any(), ma_adapt(method, **settings))]))
    return net


def move(net: nn.Module) -> None:
    """As after training."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)


def anchors(net: Any, method: str) -> tuple[Tensor, Tensor]:
    return getattr(net, f"{method}_B0"), getattr(net, f"{method}_A0")


# Against PEFT.

LINEAR = (lambda: nn.Linear(9, 7), False)
UNBIASED = (lambda: nn.Linear(6, 11, bias=False), False)
CONV1D = (lambda: Conv1D(7, 9), True)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 3},
    "alpha": {"lora_alpha": 7},
    "rslora": {"lora_alpha": 2, "use_rslora": True},
    "dropout": {"lora_alpha": 3, "lora_dropout": 0.4},
}
settings_of_peft = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def with_peft(base: nn.Module, start: Any, transposed: bool = False, **settings: Any) -> Any:
    """PEFT's model of a copy, and its layer."""
    config = LoraConfig(
        r=3, init_lora_weights=start, target_modules=["0"], fan_in_fan_out=transposed, **settings
    )
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    return model, model.base_model.model.get_submodule("0")


def assert_same_step(ours: Any, theirs: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Outputs and gradients, of the same dropout."""
    x = torch.randn(2, 4, ours.lora_A.shape[1], dtype=torch.float64)
    outputs = []
    for net in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(net(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    for mine, other in pairs:
        assert other.grad is not None
        assert other.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-11)


@settings_of_peft
@pytest.mark.parametrize(
    ("method", "make", "transposed"),
    [("pissa", *LINEAR), ("pissa", *UNBIASED), ("pissa", *CONV1D), ("olora", *LINEAR),
     ("olora", *UNBIASED)],
    ids=["pissa", "pissa_unbiased", "pissa_conv1d", "olora", "olora_unbiased"],
)  # fmt: skip
def test_start_and_training_are_those_of_peft(
    method: str, make: Callable[[], nn.Module], transposed: bool, settings: dict[str, Any]
) -> None:
    """PEFT decomposes in single precision, and knows no other; signs of vectors may differ."""
    base = make()
    model, theirs = with_peft(base, method, transposed, **settings)
    ours = adapted(copy.deepcopy(base).double(), method, rank=3, **settings)
    b, a = theirs.lora_B["default"].weight, theirs.lora_A["default"].weight
    scaling = theirs.scaling["default"]
    assert len(trainable(ours)) == len(trainable(model)) == 2
    assert sum(p.numel() for p in ours.parameters()) == b.numel() + a.numel()
    b0, a0 = anchors(ours, method)
    part = scaling * b0 @ a0
    torch.testing.assert_close(part.float(), scaling * b @ a, rtol=0, atol=1e-5)
    residual = base.weight.double() - (part.T if transposed else part)
    torch.testing.assert_close(theirs.base_layer.weight, residual.float(), rtol=0, atol=1e-5)

    move(ours)
    model.double()
    with torch.no_grad():
        theirs.base_layer.weight.copy_(residual)
        b.copy_(ours.lora_B)
        a.copy_(ours.lora_A)
    assert_same_step(ours, model, [(ours.lora_B, b), (ours.lora_A, a)])


@settings_of_peft
def test_lora_fa_is_that_of_peft(settings: dict[str, Any]) -> None:
    """What PEFT's optimizer for it freezes is frozen here."""
    base = nn.Linear(9, 7).double()
    model, theirs = with_peft(base, True, **settings)
    create_lorafa_optimizer(model, r=3, lora_alpha=settings["lora_alpha"], lr=0.1)
    ours = adapted(copy.deepcopy(base), "lora_fa", rank=3, **settings)
    b, a = theirs.lora_B["default"].weight, theirs.lora_A["default"].weight
    assert trainable(ours) == ["lora_B"]
    assert sum(p.numel() for p in ours.parameters()) == b.numel() == 3 * 7
    assert [p.requires_grad for p in (b, a)] == [True, False]
    model.double()
    with torch.no_grad():
        ours.lora_B.copy_(b.normal_())
        a.copy_(ours.lora_A)
    assert_same_step(ours, model, [(ours.lora_B, b)])


# The starts.

MATRICES: dict[str, Tensor] = {
    "tall": torch.randn(9, 6),
    "wide": torch.randn(5, 11),
    "double": torch.randn(6, 6, dtype=torch.float64),
    "bfloat16": torch.randn(8, 5).bfloat16(),
    "complex": torch.randn(6, 4, dtype=torch.complex128),
    "batch": torch.randn(3, 6, 5),
    "zero": torch.zeros(6, 4),
    "zero_first_columns": torch.cat([torch.zeros(6, 2), torch.randn(6, 3)], 1),
    "equal_columns": torch.randn(6, 1).expand(6, 5),
    "orthogonal": torch.linalg.qr(torch.randn(7, 7)).Q,
    "one_row": torch.randn(1, 5),
    "one_column": torch.randn(5, 1),
}
matrices = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)


def start_of(method: str, matrix: Tensor, **settings: Any) -> tuple[Tensor, Tensor, float]:
    """``B0``, ``A0`` in double precision, and the scaling."""
    fitted: Any = METHODS[method](rank=3, clip_rank=True, **settings).fit(matrix.shape)
    values = fitted.init_parameters(matrix)
    b, a = values["lora_B"], values["lora_A"]
    b0, a0 = values[f"{method}_B0"], values[f"{method}_A0"]
    assert torch.equal(b, b0)
    assert torch.equal(a, a0)
    assert len({t.untyped_storage().data_ptr() for t in values.values()}) == 4
    for tensor in values.values():
        assert tensor.isfinite().all()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    return b0.to(wide), a0.to(wide), fitted.scaling


@pytest.mark.parametrize("alpha", [None, 6])
@matrices
def test_pissa_starts_at_the_best_approximation_of_that_rank(
    matrix: Tensor, alpha: float | None
) -> None:
    """By Eckart, Young and Mirsky: what is left has the norm of the smaller singular values."""
    b, a, scaling = start_of("pissa", matrix, lora_alpha=alpha)
    rest = torch.linalg.matrix_norm(matrix.to(b.dtype) - scaling * b @ a)
    smaller = torch.linalg.svdvals(matrix.to(b.dtype))[..., b.shape[-1] :]
    torch.testing.assert_close(rest, smaller.norm(dim=-1), rtol=1e-5, atol=1e-5)
    squares = b.mH @ b  # both have the same, which is diagonal
    torch.testing.assert_close(a @ a.mH, squares, rtol=0, atol=1e-5)
    torch.testing.assert_close(squares, squares * torch.eye(b.shape[-1]), rtol=0, atol=1e-5)


@matrices
def test_olora_starts_at_the_first_columns_of_a_qr_decomposition(matrix: Tensor) -> None:
    q, r, _ = start_of("olora", matrix)
    one = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q.mH @ q)
    torch.testing.assert_close(q.mH @ q, one, rtol=0, atol=1e-5)
    assert torch.equal(r, r.triu())
    diagonal = torch.view_as_real(r.diagonal(dim1=-2, dim2=-1) + 0j)
    assert (diagonal[..., 0] >= 0).all()
    assert diagonal[..., 1].abs().max() < 1e-12
    wide = matrix.to(q.dtype)
    torch.testing.assert_close(q.mH @ wide, r, rtol=0, atol=1e-5)
    n = q.shape[-1]
    torch.testing.assert_close((q @ r)[..., :n], wide[..., :n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), True])
def test_pissa_needs_a_scaling_that_has_a_root(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"PiSSA: lora_alpha is .*, expected .* above zero"):
        METHODS["pissa"](lora_alpha=alpha)


# The delta.


@pytest.mark.parametrize("delta", [None, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*ANCHORED, "lora_fa"])
def test_the_start_is_exact(method: str, dtype: torch.dtype, delta: torch.dtype | None) -> None:
    base = nn.Linear(15, 7, dtype=dtype)
    net = adapted(copy.deepcopy(base), method, dtype=delta)
    x = torch.randn(4, 15, dtype=dtype)
    assert torch.equal(net(x), base(x))
    assert torch.equal(net.weight, base.weight)


@anchored
def test_a_small_difference_keeps_its_digits(method: str) -> None:
    """In single precision, steps of a millionth are right to four digits of their own."""
    fitted: Any = METHODS[method]().fit((20, 20))
    values = fitted.init_parameters(torch.randn(20, 20))
    values["lora_B"] += 1e-6 * torch.randn(20, 3)
    b, a, b0, a0 = (tensor.double() for tensor in values.values())
    assert torch.equal(a, a0)
    expected, got = (b - b0) @ a0, fitted.delta(values)
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4 * scale)


@anchored
def test_a_trained_delta_is_a_lora_of_twice_the_rank(method: str) -> None:
    base = nn.Linear(9, 8).double()
    net = adapted(copy.deepcopy(base), method, rank=2, lora_alpha=5)
    move(net)
    lora = adapted(copy.deepcopy(base), "lora", rank=4)
    b0, a0 = anchors(net, method)
    with torch.no_grad():
        lora.lora_B.copy_(torch.cat([2.5 * net.lora_B, -2.5 * b0], 1))
        lora.lora_A.copy_(torch.cat([net.lora_A, a0]))
    torch.testing.assert_close(net.weight, lora.weight, rtol=0, atol=1e-13)


@anchored
def test_a_state_holds_trained_factors_and_where_they_started(method: str) -> None:
    net = adapted(nn.Conv2d(4, 6, 3, bias=False), method, rank=2)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes == {
        "lora_B": (18, 2), "lora_A": (2, 12), f"{method}_B0": (18, 2), f"{method}_A0": (2, 12),
    }  # fmt: skip
    assert trainable(net) == list(NAMES)


def test_a_reload_needs_no_agreement_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of the other sign, as another library may give them, are those of the state then."""
    base = nn.Linear(9, 8)
    net = adapted(copy.deepcopy(base), "pissa")
    move(net)

    def other_signs(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, sigma, vh = svd(matrix)
        return -u, sigma, -vh

    svd = pissa.svd
    monkeypatch.setattr(pissa, "svd", other_signs)
    fresh = adapted(copy.deepcopy(base), "pissa")
    assert torch.equal(fresh.pissa_B0, -net.pissa_B0)
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(5, 9)
    assert torch.equal(fresh(x), net(x))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(9, 7), (4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "conv1d_grouped": (nn.Conv1d(4, 6, 3, groups=2, bias=False), (2, 4, 5)),
}


@pytest.mark.parametrize(("base", "shape"), LAYERS.values(), ids=LAYERS)
@anchored
def test_dropout_drops_inputs_of_the_trained_part_alone(
    method: str, base: nn.Module, shape: tuple[int, ...]
) -> None:
    """``W0 x + s B A dropout(x) - s B0 A0 x``; the same weight as ever in evaluation."""
    base = copy.deepcopy(base).double()
    net = adapted(copy.deepcopy(base), method, rank=2, lora_alpha=3, lora_dropout=0.4)
    plain = adapted(copy.deepcopy(base), method, rank=2, lora_alpha=3)
    move(net)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(5)
    output = net.train()(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)

    part = copy.deepcopy(base)  # s B A alone: what is added where the start is zero
    part.bias, whole = None, copy.deepcopy(plain)
    with torch.no_grad():
        for anchor in anchors(whole, method):
            anchor.zero_()
        part.weight.copy_(whole.weight - base.weight)
    change = part(dropped - x)
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(output, plain(x) + change, rtol=0, atol=1e-12)
    assert torch.equal(net.eval()(x), plain(x))


@anchored
def test_dropout_of_a_layer_that_reads_its_weight_drops_features_of_the_trained_part(
    method: str,
) -> None:
    net = adapted(nn.LSTM(6, 4), method, rank=2, lora_dropout=0.5)
    move(net)
    parts = [getattr(net, f"weight_ih_l0_{n}") for n in (*NAMES, f"{method}_B0", f"{method}_A0")]
    b, a, b0, a0 = parts
    frozen = net._parameters["weight_ih_l0"] - b0 @ a0
    torch.manual_seed(5)
    dropped = net.train().weight_ih_l0
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(6), 0.5)
    assert 0 < mask.count_nonzero() < 6
    torch.testing.assert_close(dropped, frozen + b @ (a * mask), rtol=0, atol=1e-5)


def kept_for_backward(net: nn.Module, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return kept


@pytest.mark.as_large
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 48), lambda: Conv1D(48, 64)])
def test_lora_fa_keeps_r_numbers_for_each_token(make: Callable[[], nn.Module]) -> None:
    """Of an input that the network needs a gradient of, too; LoRA keeps the input itself."""
    x = (torch.randn(2, 50, 64) * torch.ones((), requires_grad=True)).clone()
    sizes = {}
    for method in ("lora", "lora_fa"):
        net = adapted(make(), method, rank=3)
        owned = {t.data_ptr() for t in (*nn.Module.parameters(net), *net.buffers())}
        kept = kept_for_backward(net, x)
        activations = {t.data_ptr(): t for t in kept if t.data_ptr() not in owned}
        sizes[method] = sum(t.numel() for t in activations.values())
        assert (x.data_ptr() in activations) == (method == "lora")
    assert sizes == {"lora": 100 * 64, "lora_fa": 100 * 3}
