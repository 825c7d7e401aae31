"""What is written to an adapted weight is refused in words; all else reads it as a plain tensor."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import gift
from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import ma_adapt, mc_path
from gift.methods import METHODS
from gift.strategies import DoRAAllFineTuningStrategy, LoRAAllFineTuningStrategy
from tests.common import enabled, full_state

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def layer() -> Any:
    torch.manual_seed(0)
    return enabled(nn.Linear(8, 8), LoRAAllFineTuningStrategy(rank=1))


def added(weight: Tensor) -> None:
    weight += 1


def entry(weight: Tensor) -> None:
    weight[0, 0] = 1


def rows(weight: Tensor) -> None:
    for row in weight:
        row.zero_()


def data(weight: Tensor) -> None:
    weight.data = torch.zeros(8, 8)


def gradient(weight: Tensor) -> None:
    weight.grad = torch.ones(8, 8)


ZEROS = torch.zeros(8, 8)
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(ZEROS),
    "clamp_": lambda w: w.clamp_(0, 1),
    "lerp_": lambda w: w.lerp_(ZEROS, 0.1),
    "masked_fill_": lambda w: w.masked_fill_(w > 0, 0),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([0]), ZEROS[:1]),
    "renorm_": lambda w: w.renorm_(2, 0, 1),
    "bernoulli_": lambda w: w.bernoulli_(),
    "detach_": lambda w: w.detach_(),
    "share_memory_": lambda w: w.share_memory_(),
    "set_": lambda w: w.set_(ZEROS),
    "resize_": lambda w: w.resize_(4, 4),
    "an operator": added,
    "an entry": entry,
    "rows": rows,
    "data": data,
    "into data": lambda w: w.data.copy_(ZEROS),
    "into detached": lambda w: w.detach().mul_(2),
    "gradient": gradient,
    "a row": lambda w: w[0].zero_(),
    "some rows": lambda w: w[2:4].fill_(1),
    "a view": lambda w: w.view(-1).zero_(),
    "transposed": lambda w: w.T.mul_(2),
    "torch.t": lambda w: torch.t(w).zero_(),
    "chunks": lambda w: w.chunk(2)[1].zero_(),
    "unbind": lambda w: torch.unbind(w)[1].zero_(),
    "to": lambda w: w.to("cpu").zero_(),
    "contiguous": lambda w: w.contiguous().zero_(),
    "out": lambda w: torch.add(ZEROS, 1, out=w),
    "two outs": lambda w: torch.linalg.qr(ZEROS, out=(w, torch.zeros(8, 8))),
    "relu_": lambda w: torch.relu_(w),
    "F.relu": lambda w: F.relu(w, inplace=True),
    "F.dropout": lambda w: F.dropout(w, 0.5, training=True, inplace=True),
    "fill_": lambda w: torch.fill_(w, 1),
    "index_put_": lambda w: torch.index_put_(w, (torch.tensor([0]),), ZEROS[0]),
    "an operation of aten": lambda w: torch.ops.aten.add_(w, 1),
    "an overload of aten": lambda w: torch.ops.aten.add_.Tensor(w, ZEROS),
    "foreach": lambda w: torch._foreach_mul_([torch.zeros(2), w], 2),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(64), [w]),
    "swap_tensors": lambda w: torch.utils.swap_tensors(w, torch.zeros(8, 8)),
    "numpy": lambda w: w.detach().numpy().fill(0),
    **{
        f"nn.init.{name}": (lambda init: lambda w: init(w))(getattr(nn.init, name))
        for name in ("normal_", "zeros_", "eye_", "orthogonal_", "trunc_normal_", "xavier_uniform_")
    },
    "nn.init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "nn.init.constant_": lambda w: nn.init.constant_(w, 1.0),
    "nn.init.sparse_": lambda w: nn.init.sparse_(w, 0.1),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", WRITES)
def test_a_write_is_refused_and_changes_nothing(how: str, mode: Any) -> None:
    net, x = layer(), torch.randn(3, 8)
    with mode():
        before, y = net.weight.clone(), net(x)
        held = {name: p.clone() for name, p in net.named_parameters()}
        with pytest.raises((RuntimeError, ValueError)) as caught:
            WRITES[how](net.weight)
        if how not in ("swap_tensors", "numpy"):  # which are refused by torch and by NumPy
            assert "Linear.weight is adapted" in str(caught.value)
            assert "gift.merge(network)" in str(caught.value)
        assert torch.equal(net.weight, before)
        assert torch.equal(net(x), y)
        assert all(torch.equal(p, held[name]) for name, p in net.named_parameters())


def assigned(net: Any) -> None:
    net.weight = nn.Parameter(torch.zeros(8, 8))


def removed(net: Any) -> None:
    del net.weight


def none(net: Any) -> None:
    net.weight = None


def tensor(net: Any) -> None:
    net.weight = torch.zeros(8, 8)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a parameter": assigned,
    "none": none,
    "a tensor": tensor,
    "deleted": removed,
    "itself": lambda net: setattr(net, "weight", nn.Parameter(net.weight)),
    "that of another": lambda net: setattr(net, "weight", nn.Linear(8, 8).weight),
    "registered": lambda net: net.register_parameter("weight", nn.Parameter(torch.zeros(8, 8))),
    "a buffer": lambda net: net.register_buffer("weight", torch.zeros(8, 8)),
    "the old weight_norm": nn.utils.weight_norm,
    "the old spectral_norm": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda net: prune.l1_unstructured(net, "weight", 0.5),
    "pruned by rows": lambda net: prune.random_structured(net, "weight", 0.5, dim=0),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", CHANGES)
def test_another_weight_is_refused_and_changes_nothing(how: str) -> None:
    net, x = layer(), torch.randn(3, 8)
    before, y, order = full_state(net), net(x), list(net._parameters)
    with pytest.raises((RuntimeError, TypeError, KeyError), match="weight"):
        CHANGES[how](net)
    assert full_state(net) == before
    assert list(net._parameters) == order
    assert torch.equal(net(x), y)


def test_the_frozen_tensor_itself_may_be_assigned() -> None:
    """As by those who tie weights again."""
    net, x = layer(), torch.randn(3, 8)
    before = net(x)
    net.weight = net._parameters["weight"]
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_the_base_is_loaded(assign: bool) -> None:
    net, other, x = layer(), nn.Linear(8, 8), torch.randn(3, 8)
    with pytest.warns(gift.GiftWarning, match="replaced 2 frozen tensors"):
        net.load_state_dict(other.state_dict(), assign=assign)
    torch.testing.assert_close(net(x), other(x) + x @ net.lora_A.T @ net.lora_B.T)


@pytest.mark.parametrize("fuse", [fusion.fuse_conv_bn_eval, None], ids=["torch", "by hand"])
def test_fused_with_a_norm(fuse: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    enabled(net, LoRAAllFineTuningStrategy(rank=1))
    x = torch.randn(2, 3, 8, 8)
    before = net(x)
    if fuse is not None:
        with pytest.raises(RuntimeError, match=r"Conv2d.weight is adapted.*gift.merge\(network\)"):
            fuse(net[0], net[1])
        with gift.merged(net):
            fused = fuse(net[0], net[1])
    else:  # into a new layer, as others do
        weight, bias = fusion.fuse_conv_bn_weights(
            net[0].weight, net[0].bias, net[1].running_mean, net[1].running_var, net[1].eps,
            net[1].weight, net[1].bias,
        )  # fmt: skip
        assert type(weight) is nn.Parameter
        fused = nn.Conv2d(3, 8, 3)
        with torch.no_grad():
            fused.weight.copy_(weight)
            fused.bias.copy_(bias)
    torch.testing.assert_close(fused(x), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(net(x), before)


def test_a_write_in_a_forward_pass_is_refused() -> None:
    """As layers do that hold the norm of their weight below a bound."""

    class Bounded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
            return super().forward(input)

    net = enabled(Bounded(3, 4, 3))
    with pytest.raises(RuntimeError, match=r"Bounded.weight is adapted.*data = "):
        net(torch.randn(1, 3, 5, 5))


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 2

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return tensor / 2


def doubled(*names: str) -> Callable[[nn.Module], None]:
    def register(module: nn.Module) -> None:
        for name in names:
            parametrize.register_parametrization(module, name, Doubled())

    return register


def take(name: str, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda module: parametrize.remove_parametrizations(module, name, **options)


NORM = parametrizations.weight_norm
REFUSED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "removed": (doubled("weight"), take("weight")),
    "undone": (doubled("weight"), take("weight", leave_parametrized=False)),
    "weight_norm removed": (NORM, take("weight")),
    "spectral_norm removed": (parametrizations.spectral_norm, take("weight")),
    "another one": (NORM, doubled("weight")),
    "assigned": (doubled("weight"), tensor),
    "old weight_norm removed": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral_norm removed": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruned for good": (
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        lambda module: prune.remove(module, "weight"),
    ),
}


def computed(how: Callable[[Any], Any]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    how(net[0])
    net(x)
    return enabled(net, LoRAAllFineTuningStrategy(rank=1)), x


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_removing_what_computes_an_adapted_weight_is_refused(case: str) -> None:
    how, undo = REFUSED[case]
    (net, x), (twin, _) = computed(how), computed(how)
    before, held = net(x), full_state(net)
    with pytest.raises(RuntimeError, match=r"'weight' is adapted.*disable_fine_tuning"):
        undo(net[0])
    assert full_state(net) == held
    assert torch.equal(net(x), before)
    assert torch.equal(twin(x), before)  # of a class that may be the same
    undone = disable_fine_tuning(net)(x)
    assert torch.equal(undone, disable_fine_tuning(twin)(x))
    undo(net[0])  # which now has its effect
    assert not case.startswith("removed") or torch.equal(net(x), undone)


@pytest.mark.parametrize("names", [("bias",), ("bias", "weight")], ids=str)
@pytest.mark.parametrize("leave", [True, False])
def test_a_parametrization_of_the_bias_is_removed(names: tuple[str, ...], leave: bool) -> None:
    (net, x), (expected, _) = computed(doubled(*names)), computed(doubled(*names))
    if not leave:
        with torch.no_grad():
            expected[0].parametrizations.bias.original.div_(2)
    parametrize.remove_parametrizations(net[0], "bias", leave_parametrized=leave)
    assert "bias" in net[0]._parameters
    torch.testing.assert_close(net(x), expected(x))
    assert set(net.state_dict()) == set(expected.state_dict())
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x), expected(x))
    plain = disable_fine_tuning(net)
    torch.testing.assert_close(plain(x), disable_fine_tuning(expected)(x))
    assert parametrize.is_parametrized(plain[0]) == ("weight" in names)


def test_a_parametrization_of_the_bias_comes_and_goes() -> None:
    net, x = computed(lambda module: None)
    before = net(x)
    parametrize.register_parametrization(net[0], "bias", Doubled())
    torch.testing.assert_close(net(x), before)
    parametrize.remove_parametrizations(net[0], "bias")
    torch.testing.assert_close(net(x), before)


# --- reading ------------------------------------------------------------------------------------


def test_what_is_computed_from_a_weight_is_plain() -> None:
    net = layer()
    weight = net.weight
    for made in (weight.clone(), weight + 1, weight @ weight, weight[[0, 1]], weight.double()):
        assert type(made) is Tensor
        made.zero_()
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    frozen, b, a = (net._parameters[name] for name in ("weight", "lora_B", "lora_A"))
    torch.testing.assert_close(weight, frozen + b @ a)
    assert weight.detach().numpy().sum() == pytest.approx(float((frozen + b @ a).sum()), rel=1e-4)


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_made_from_a_weight_is_one_of_its_own(trained: bool) -> None:
    net = layer()
    for made in (
        nn.Parameter(net.weight, trained),
        nn.Parameter(net.weight.data, trained),
        nn.Parameter(net.weight.detach(), trained),
    ):
        before = net.weight.clone()
        assert type(made) is nn.Parameter
        assert made.is_leaf
        assert made.requires_grad == trained
        assert torch.equal(made, before)
        with torch.no_grad():
            made.zero_()
        assert torch.equal(net.weight, before)
        assert type(copy.deepcopy(made)) is nn.Parameter
        assert type(pickle.loads(pickle.dumps(made))) is nn.Parameter
    other = nn.Linear(8, 4)
    other.weight = nn.Parameter(net.weight[:4])
    torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 8)).sum().backward()
    assert other.weight.grad is not None
    assert net.lora_B.grad is None


def test_copies_and_files_are_plain() -> None:
    net = layer()
    with torch.no_grad():
        weight = net.weight
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    loaded = torch.load(file)["weight"]  # which allows no class of ours
    for made in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), loaded):
        assert type(made) is Tensor
        assert torch.equal(made, weight)


def test_hooks_and_gradients_of_a_weight() -> None:
    net, seen = layer(), []
    weight = net.weight
    weight.register_hook(seen.append)
    weight.retain_grad()
    weight.sin().sum().backward()
    assert torch.equal(seen[0], weight.grad)
    torch.testing.assert_close(net.lora_B.grad, weight.detach().cos() @ net.lora_A.T)
    net.weight.grad = None  # as loops do that know no `zero_grad`


def test_the_flag_of_a_weight() -> None:
    net = layer()
    net.weight.requires_grad_()
    net.weight.requires_grad = True
    for change in (
        lambda: net.weight.requires_grad_(False),
        lambda: setattr(net.weight, "requires_grad", False),
    ):
        with pytest.raises(RuntimeError, match=r"Linear.weight is adapted.*requires_grad_"):
            change()
    net.requires_grad_(False)
    net.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"Linear.weight is adapted"):
        net.weight.requires_grad_(True)
    assert net.weight.detach().requires_grad_().requires_grad


class Marked(Tensor):
    """Of another library, which gives its own class for all that it is given to."""


def test_tensors_of_other_libraries() -> None:
    net = enabled(nn.ConvTranspose1d(3, 4, 3), DoRAAllFineTuningStrategy())
    x = torch.randn(2, 3, 6)
    found = net(x.as_subclass(Marked))
    assert type(found) is Marked
    assert torch.equal(found.as_subclass(Tensor), net(x))
    with pytest.raises(RuntimeError, match="is adapted"):
        torch.add(x.as_subclass(Marked), 1, out=net.weight)


def test_rows_that_an_embedding_scales_are_those_of_its_output() -> None:
    """With a largest norm torch scales the rows of the weight that it looks up, in place."""
    torch.manual_seed(0)
    net = enabled(nn.Embedding(6, 4, max_norm=1.0), LoRAAllFineTuningStrategy(rank=1), std=1.0)
    weight, index = net.weight.detach().clone(), torch.tensor([1, 4, 1])
    expected = weight.renorm(2, 0, 1.0)[index]
    torch.testing.assert_close(net(index), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(net.weight, weight)
    bag = enabled(nn.EmbeddingBag(6, 4, max_norm=1.0, mode="sum"), std=1.0)
    expected = bag.weight.detach().clone().renorm(2, 0, 1.0)[index].sum(0, keepdim=True)
    torch.testing.assert_close(bag(index[None]), expected, rtol=1e-4, atol=1e-4)


def test_the_fast_paths_of_encoders_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are barred for tensors that override functions of torch."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    called: list[str] = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: called.append("fast") or fast(*args)
    )
    with torch.no_grad():
        net(torch.randn(2, 3, 8))
    assert called == ["fast"]


def test_optimizers_refuse_a_weight() -> None:
    """In torch's own words: it is not a leaf."""
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([layer().weight], lr=0.1)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6"),
    reason="the compiler of torch 2.6 refuses such classes of tensors",
)
def test_a_compiled_function_of_a_weight() -> None:
    net, x = layer(), torch.randn(3, 8)
    compiled = torch.compile(lambda x, weight: x @ weight.T, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, net.weight), x @ net.weight.T)


def test_a_bias_that_is_adapted_is_guarded_too() -> None:
    net = enabled(nn.Linear(8, 8), gift.strategies.IA3AllFineTuningStrategy())
    with pytest.raises(RuntimeError, match=r"Linear.bias is adapted"):
        nn.init.zeros_(net.bias)


@pytest.mark.filterwarnings("ignore::gift.GiftWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_base_that_is_written_before_the_backward_pass_harms_no_gradient(method: str) -> None:
    """The gradient of the input is that of the weight in the forward pass, or an error."""
    for layer, x in (
        (nn.Linear(64, 64), torch.randn(512, 64)),
        (nn.Conv2d(8, 8, 3, groups=2), torch.randn(2, 8, 40, 40)),
    ):
        strategy = FineTuningStrategy([(mc_path(""), ma_adapt(method))])
        enable_fine_tuning(layer, strategy)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        y = layer(x)
        with torch.no_grad():
            layer._parameters["weight"].add_(1)  # type: ignore[union-attr]
        problem = ""
        try:
            (found,) = torch.autograd.grad(y.square().sum(), x)
        except RuntimeError as error:
            problem = str(error)
        if problem:
            assert "modified by an inplace operation" in problem
        else:
            torch.testing.assert_close(found, expected)
