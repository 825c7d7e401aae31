"""Fine-tuned networks under torch's own machinery: what the plain network can do, they can do.

The reference throughout is the plain network, called with the weights ``W + B A`` that are written
out here, and differentiated by plain autograd.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from gift import GiftWarning, disable_fine_tuning, enable_fine_tuning, merge
from gift.strategies import LoRAAllFineTuningStrategy
from tests.cases.selection import cells
from tests.common import delta, enabled

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*batching rule"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 20, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embedding(tokens))))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def resnet() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,  # transformers 4 looks for it among the tokens, which vmap can not
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
        attn_implementation="eager",  # transformers 4.48 makes the mask of the other in 32 bits
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tokens() -> Tensor:
    return torch.randint(0, 20, (3, 6))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(3, 8)),
    "resnet": (resnet, lambda: torch.randn(3, 3, 32, 32)),
    "encoder": (encoder, lambda: torch.randn(3, 5, 16)),
    "lstm": (Recurrent, lambda: torch.randn(3, 5, 8)),
    "tied": (Tied, tokens),
    "bert": (bert, tokens),
    "gpt2": (gpt2, tokens),
}
ALL = tuple(NETWORKS)
TRACEABLE = ("mlp", "resnet", "lstm", "tied")  # by torch.fx and torch.jit, when they are plain


class Case(NamedTuple):
    base: nn.Module
    net: nn.Module
    x: Tensor


def fine_tuned(net: nn.Module, **options: object) -> nn.Module:
    """The network with deltas that are not zero."""
    return enabled(net, LoRAAllFineTuningStrategy(**options), std=0.2)


def case(name: str, dtype: torch.dtype = torch.float64, train: bool = True) -> Case:
    build, example = NETWORKS[name]
    base, x = build().to(dtype).train(train), example()
    net = fine_tuned(copy.deepcopy(base))
    return Case(base, net, x.to(dtype) if x.is_floating_point() else x)


def output(net: Callable[..., object], *inputs: Tensor) -> Tensor:
    result = net(*inputs)
    return result if isinstance(result, Tensor) else result[0]


def deltas(net: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def frozen(net: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if not p.requires_grad}


def with_deltas(base: nn.Module, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain network's weights, ``B A`` added where there is one."""
    weights = {name: p.detach() for name, p in base.named_parameters()}
    for name, b in deltas.items():
        if name.endswith("lora_B"):
            stem = name.removesuffix("lora_B")
            tensor = stem[:-1] if stem.endswith("_") else f"{stem}weight"
            module, weight = base.get_submodule(tensor.rpartition(".")[0]), weights[tensor]
            weights[tensor] = weight + delta(module, weight, b, deltas[f"{stem}lora_A"])
    return weights


def reference(base: nn.Module, net: nn.Module, x: Tensor) -> Tensor:
    """What the fine-tuned network should give."""
    plain = copy.deepcopy(base)  # in training, it moves its running statistics
    return output(lambda x: functional_call(plain, with_deltas(plain, deltas(net)), (x,)), x)


def weighted(result: Tensor) -> Tensor:
    """A sum with fixed weights: a loss that no normalisation makes constant."""
    return result.flatten() @ torch.linspace(-1, 1, result.numel(), dtype=result.dtype)


def gradients(result: Tensor, net: nn.Module, **options: object) -> list[Tensor]:
    """The gradient of the weighted sum in each delta."""
    return list(torch.autograd.grad(weighted(result), [*net.parameters()], **options))


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    tensors = itertools.chain(net.named_parameters(), net.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_bitwise(left: object, right: object) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def assert_same_function(case: Case, call: Callable[[Tensor], object]) -> None:
    """`call` gives the reference's output, and its gradients in the deltas."""
    expected, found = reference(*case), output(call, case.x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, case.net), gradients(expected, case.net))


both_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@both_modes
@pytest.mark.parametrize("name", ALL)
def test_eager(name: str, train: bool) -> None:
    """The reference of this file holds for the network as such."""
    made = case(name, train=train)
    assert_same_function(made, made.net)


# --- compiling, exporting, tracing ---------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def frames(net: nn.Module, x: Tensor) -> tuple[int, Callable]:
    """How many graphs are compiled over train, eval, train, eval; and the compiled network."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for train in (True, False, True, False):
        net.train(train)
        output(compiled, x).sum().backward()
    return counter.frame_count, compiled


@pytest.mark.parametrize("name", ALL)
def test_compile_gives_one_graph_and_no_more_recompilations(name: str, dynamo: None) -> None:
    base, net, x = case(name)
    plain, _ = frames(copy.deepcopy(base), x)
    found, compiled = frames(net, x)
    assert found <= plain
    base.load_state_dict(dict(net.named_buffers()), strict=False)  # moved by the training above
    assert_same_function(Case(base.eval(), net, x), compiled)


@pytest.mark.parametrize("name", ["mlp", "lstm", "tied"])
def test_compile_with_aot_autograd(name: str, dynamo: None) -> None:
    base, net, x = case(name)
    assert_same_function(
        Case(base, net, x), torch.compile(net, backend="aot_eager", fullgraph=True)
    )


class Mixed(nn.Module):
    """Layers whose delta is a side path, a convolution of its own, and part of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.linear = nn.Linear(36, 6)
        self.pair = nn.Bilinear(6, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(self.conv(x).flatten(1))
        return self.pair(hidden, hidden)


def test_compile_with_dropout_on_the_delta(dynamo: None) -> None:
    """The same seed gives the same masks, eager or compiled."""
    net, x, results = fine_tuned(Mixed(), rank=2, lora_dropout=0.5), torch.randn(3, 2, 5, 5), []
    for call in (net, torch.compile(net, backend="eager", fullgraph=True)):
        torch.manual_seed(1)
        results.append(call(x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[0], net(x)), "another mask, another output"


class Asking(nn.Sequential):
    """A network that asks itself for its parameters in its forward, as many do."""

    def forward(self, x: Tensor) -> Tensor:
        penalty = sum(p.square().mean() for p in self.parameters() if p.requires_grad)
        return super().forward(x.to(next(self.parameters()).dtype)) + penalty


def test_compile_of_a_network_that_reads_its_parameters(dynamo: None) -> None:
    net, x = fine_tuned(Asking(nn.Linear(8, 6), nn.Tanh())), torch.randn(3, 8)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(gradients(compiled(x), net), gradients(net(x), net))


def test_compile_with_inductor(dynamo: None) -> None:
    base, net, x = case("mlp", torch.float32)
    assert_same_function(Case(base, net, x), torch.compile(net, fullgraph=True))


def test_module_compile_in_place(dynamo: None) -> None:
    base, net, x = case("mlp")
    net.compile(backend="eager", fullgraph=True)
    assert_same_function(Case(base, net, x), net)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(copied(x), net(x))
    assert_bitwise(disable_fine_tuning(net)(x), base(x))


@pytest.mark.parametrize("in_place", [True, False])
def test_what_was_compiled_before_enabling_sees_the_adapter(in_place: bool, dynamo: None) -> None:
    base, x = mlp().double(), torch.randn(3, 8, dtype=torch.float64)
    net = copy.deepcopy(base)
    if in_place:
        net.compile(backend="eager")
    compiled = net if in_place else torch.compile(net, backend="eager")
    compiled(x)
    assert_same_function(Case(base, fine_tuned(net), x), compiled)
    disable_fine_tuning(net)
    torch.testing.assert_close(compiled(x), base(x))


@cells(2, name=ALL, strict={"strict": True, "non-strict": False})
def test_export(name: str, strict: bool) -> None:
    base, net, x = case(name, train=False)
    exported = torch.export.export(net, (x,), strict=strict).module()
    torch.testing.assert_close(output(exported, x), reference(base, net, x))


@both_modes
@pytest.mark.parametrize("name", TRACEABLE)
def test_jit_trace(name: str, train: bool) -> None:
    made = case(name, train=train)
    assert_same_function(made, torch.jit.trace(made.net, (made.x,), check_trace=False))


@pytest.mark.parametrize("name", TRACEABLE)
def test_symbolic_trace(name: str) -> None:
    made = case(name)
    assert_same_function(made, torch.fx.symbolic_trace(made.net))


@pytest.mark.parametrize("name", TRACEABLE)
def test_graph_modules_can_be_fine_tuned(name: str) -> None:
    """An `fx.GraphModule` has a class of its own for each instance, and copies itself."""
    build, example = NETWORKS[name]
    base = torch.fx.symbolic_trace(build().eval())
    net, x = fine_tuned(copy.deepcopy(base)), example()
    torch.testing.assert_close(net(x), reference(base, net, x), atol=1e-4, rtol=1e-4)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_bitwise(other(x), net(x))
        assert list(other.state_dict()) == list(net.state_dict())
        assert len(list(other.parameters())) == len(list(net.parameters()))
        assert_bitwise(disable_fine_tuning(other)(x), base(x))
    assert_bitwise(disable_fine_tuning(net)(x), base(x))


def test_a_copy_that_fails_leaves_the_network_fine_tuned() -> None:
    """Of a class with its own ``__deepcopy__``, which is called as that of a plain module."""

    class CopiesItself(nn.Linear):
        def __deepcopy__(self, memo: dict) -> nn.Module:
            raise MemoryError

    net = nn.Sequential(CopiesItself(8, 8), nn.ReLU())
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=2))
    cls, x = type(net[0]), torch.randn(2, 8)
    nn.init.normal_(net[0].lora_B)
    before = net(x)
    with pytest.raises(MemoryError):
        copy.deepcopy(net)
    assert type(net[0]) is cls
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == ["0.lora_B", "0.lora_A"]


# --- precision, checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_autocast(name: str) -> None:
    """The plain network's output dtype, a bfloat16 error, gradients in the deltas' own dtype."""
    base, net, x = case(name, torch.float32, train=False)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            plain = output(base, x)
        except RuntimeError as error:  # an LSTM, where oneDNN has no such kernel
            pytest.skip(f"torch cannot run the plain network in bfloat16 here: {error}")
        found = output(net, x)
    assert found.dtype == plain.dtype
    exact = reference(base, net, x)
    assert (found - exact).norm() < 0.05 * exact.norm()
    found, exact = gradients(found, net), gradients(exact, net)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    found, exact = nn.utils.parameters_to_vector(found), nn.utils.parameters_to_vector(exact)
    assert (found - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["mlp", "resnet", "tied", "lstm"])
def test_changing_the_dtype_of_the_network(name: str, dtype: torch.dtype) -> None:
    base, net, x = case(name, torch.float64, train=False)
    exact = reference(base, net, x)
    net.to(dtype)
    assert {p.dtype for p in nn.Module.parameters(net)} == {dtype}
    found = output(net, x.to(dtype) if x.is_floating_point() else x)
    assert found.dtype == dtype
    assert (found - exact).norm() < 20 * torch.finfo(dtype).eps * exact.norm()
    assert all(g.isfinite().all() for g in gradients(found, net))


def test_half_and_double_are_short_for_to() -> None:
    _, net, x = case("mlp", torch.float32)
    before = net(x)
    assert net.half()(x.half()).dtype == torch.float16
    assert net.double()(x.double()).dtype == torch.float64
    torch.testing.assert_close(net.float()(x), before, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("name", ["mlp", "resnet", "encoder", "lstm", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(name: str, reentrant: bool) -> None:
    base, net, x = case(name)
    if reentrant:  # that kind gives gradients only if an input asks for one
        anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
        expected = reference(base, net, x)
        found = checkpoint(lambda a: output(net, x) + a, anchor, use_reentrant=True)
        weighted(found).backward()  # torch.autograd.grad is refused by that kind
        torch.testing.assert_close([p.grad for p in net.parameters()], gradients(expected, net))
    else:
        made = Case(base, net, x)
        assert_same_function(made, lambda x: checkpoint(net, x, use_reentrant=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_dropout_of_the_delta(reentrant: bool) -> None:
    net = fine_tuned(mlp(), lora_dropout=0.5)
    x = torch.randn(3, 8, requires_grad=True)
    results = []
    for call in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        net.zero_grad()
        call(x).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    assert_bitwise(*results)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_checkpointing_of_transformers(name: str, reentrant: bool) -> None:
    base, net, x = case(name)
    calls: list[nn.Module] = []
    blocks = net.encoder.layer if name == "bert" else net.transformer.h
    inside = next(m for m in blocks.modules() if hasattr(m, "lora_A"))
    inside.register_forward_pre_hook(lambda module, _: calls.append(module))
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = reference(base, net, x)
    weighted(output(net, x)).backward()
    assert len(calls) == 2, "once forward, once again for the gradient"
    torch.testing.assert_close([p.grad for p in net.parameters()], gradients(expected, net))


# --- casts and copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_recurrent_layer_is_copied_after_a_cast(copied: Callable[[Any], Any]) -> None:
    """Its cast empties the list of weights that torch copies a plain layer with."""
    net = enabled(nn.LSTM(4, 6)).double()
    twin, x = copied(net), torch.randn(5, 2, 4, dtype=torch.float64)
    assert torch.equal(twin(x)[0], net(x)[0])
    assert torch.equal(copied(disable_fine_tuning(twin))(x)[0], disable_fine_tuning(net)(x)[0])


# --- torch.func ----------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("name", ALL)
def test_functional_call(name: str, train: bool) -> None:
    """With its own parameters, with other deltas, with another base; the network stays itself."""
    base, net, x = case(name, train=train)
    other_base, other, _ = case(name, train=train)
    before = snapshot(net)
    buffers = snapshot(base)  # in training, the call moves the running statistics it is given

    def call(parameters: dict[str, Tensor]) -> Tensor:
        own = {name: b.clone() for name, b in buffers.items() if name in dict(net.named_buffers())}
        return output(lambda x: functional_call(net, (parameters, own), (x,)), x)

    own = dict(net.named_parameters())
    torch.testing.assert_close(call(own), reference(base, net, x))
    torch.testing.assert_close(call(own | deltas(other)), reference(base, other, x))
    torch.testing.assert_close(call(own | frozen(other)), reference_on(other_base, base, net, x))
    assert_bitwise(snapshot(net), before)


def reference_on(weights_of: nn.Module, base: nn.Module, net: nn.Module, x: Tensor) -> Tensor:
    """The reference with the weights of another network, and the buffers of `base`."""
    mixed = copy.deepcopy(base)
    mixed.load_state_dict(dict(weights_of.named_parameters()), strict=False)
    return reference(mixed, net, x)


# Torch has no BatchNorm with moving statistics under vmap, and no LSTM in double precision.
per_sample = [(n, train) for n in ALL for train in (True, False) if (n, train) != ("resnet", True)]


@pytest.mark.parametrize(("name", "train"), per_sample)
def test_per_sample_gradients(name: str, train: bool) -> None:
    dtype = torch.float32 if name == "lstm" else torch.float64
    base, net, x = case(name, dtype, train)
    before = snapshot(net)
    fixed = {name: p.detach() for name, p in frozen(net).items()}

    def loss(trained: dict[str, Tensor], one: Tensor) -> Tensor:
        return weighted(output(lambda x: functional_call(net, (trained, fixed), (x,)), one[None]))

    found = vmap(grad(loss), in_dims=(None, 0), randomness="error")(deltas(net), x)
    for index, one in enumerate(x):
        expected = gradients(reference(base, net, one[None]), net)
        torch.testing.assert_close([g[index] for g in found.values()], expected)
    assert_bitwise(snapshot(net), before)


def test_ensemble_by_stack_module_state() -> None:
    base, _, x = case("mlp")
    nets = [fine_tuned(copy.deepcopy(base)) for _ in range(3)]
    parameters, buffers = stack_module_state(nets)
    assert {n for n, p in parameters.items() if p.requires_grad} == set(deltas(nets[0]))
    found = vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([reference(base, net, x) for net in nets]))


@pytest.mark.parametrize("name", ALL)
def test_double_backward(name: str) -> None:
    """The gradient of the gradients' norm, as in a gradient penalty."""
    base, net, x = case(name)
    results = []
    # Only the plain kernel of attention has a second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for result in (output(net, x), reference(base, net, x)):
            first = gradients(result, net, create_graph=True)
            penalty = sum(g.square().sum() for g in first)
            results.append(torch.autograd.grad(penalty, list(net.parameters()), allow_unused=True))
    torch.testing.assert_close(*results)


# --- hooks, and layers held elsewhere ------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 5, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_hooks_fire_once_and_see_the_adapted_layer(layer: nn.Module, moment: str) -> None:
    layer = copy.deepcopy(layer).double()
    seen: dict[str, list] = {"pre": [], "forward": [], "backward pre": [], "backward": []}

    def register() -> None:
        layer.register_forward_pre_hook(lambda m, inputs: seen["pre"].append(inputs[0]))
        layer.register_forward_hook(lambda m, inputs, out: seen["forward"].append(out))
        layer.register_full_backward_pre_hook(lambda m, out: seen["backward pre"].append(out[0]))
        layer.register_full_backward_hook(lambda m, into, out: seen["backward"].append(into[0]))

    if moment == "before":
        register()
    net = fine_tuned(nn.Sequential(copy.deepcopy(layer), layer, nn.Tanh()))
    if moment == "after":
        register()
    x = torch.randn(2, *([6] if isinstance(layer, nn.Linear) else [3, 4, 4]), dtype=torch.float64)
    x.requires_grad_()
    net[1:](x).sum().backward()

    weight = layer._parameters["weight"].detach()
    weight = weight + (layer.lora_B @ layer.lora_A).detach().reshape(weight.shape)
    plain = x.detach().requires_grad_()
    function = F.linear if weight.ndim == 2 else F.conv2d
    out = function(plain, weight, layer.bias)
    out.retain_grad()
    out.tanh().sum().backward()
    expected = {"pre": x, "forward": out, "backward pre": out.grad, "backward": plain.grad}
    for kind, values in seen.items():
        assert len(values) == 1, kind
        torch.testing.assert_close(values[0], expected[kind])


@pytest.mark.parametrize("name", ALL)
def test_hooks_fire_as_often_as_in_the_plain_network(name: str) -> None:
    counts = []
    base, net, x = case(name, train=False)
    for network in (base, net):
        fired: list[str] = []
        for path, module in network.named_modules():
            module.register_forward_hook(lambda *_, path=path, to=fired: to.append(path))
        output(network, x)
        counts.append(fired)
    assert counts[0] == counts[1] != []


def test_references_held_elsewhere_see_the_adapter() -> None:
    net = mlp()
    held, bound, by_list = net[0], net[0].forward, [net[0]]
    x = torch.randn(3, 8)
    before = held(x)
    fine_tuned(net)
    weight = held._parameters["weight"] + held.lora_B @ held.lora_A
    expected = F.linear(x, weight, held.bias)
    assert not torch.allclose(expected, before)
    assert held is net[0]
    assert isinstance(held, nn.Linear)
    for call in (held, by_list[0], lambda x: F.linear(x, held.weight, held.bias)):
        torch.testing.assert_close(call(x), expected)
    # A bound method keeps the function of the plain class, which reads the effective weight.
    torch.testing.assert_close(bound(x), expected)


# --- copies, files, processes --------------------------------------------------------------------


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda net: copy.deepcopy(copy.deepcopy(net)),
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
    "pickle of a copy": lambda net: pickle.loads(pickle.dumps(copy.deepcopy(net))),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ALL)
def test_copies_train_deltas_of_their_own(name: str, how: str) -> None:
    base, net, x = case(name, train=False)
    other = COPIES[how](net)
    before = snapshot(net)
    assert type(other) is type(net)
    assert_bitwise(output(other, x), output(net, x))
    assert not {id(p) for p in nn.Module.parameters(other)} & {
        id(p) for p in nn.Module.parameters(net)
    }
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    output(other, x).square().mean().backward()
    optimizer.step()
    assert_bitwise(snapshot(net), before)
    assert all(p.grad is None for p in nn.Module.parameters(net))
    changed = {n for n, t in snapshot(other).items() if not torch.equal(t, before[n])}
    assert changed <= set(deltas(net))
    assert changed
    torch.testing.assert_close(output(other, x), reference(base, other, x))


def test_a_copy_of_a_part_is_independent() -> None:
    """Copying one adapted layer out of a network brings its delta along."""
    net = fine_tuned(mlp())
    x = torch.randn(3, 8)
    part = copy.deepcopy(net[0])
    assert_bitwise(part(x), net[0](x))
    with torch.no_grad():
        part.lora_B.zero_()
    assert not torch.equal(part(x), net[0](x))


def test_slices_of_a_network_are_plain() -> None:
    """``net[:2]`` makes another `nn.Sequential`, of the same layers; nobody fine-tunes that one."""
    net, x = fine_tuned(mlp()), torch.randn(3, 8)
    part = net[:2]
    assert type(part) is nn.Sequential
    assert part[0] is net[0]
    torch.testing.assert_close(net[2](part(x)), net(x))
    assert list(part.state_dict()) == ["0.weight", "0.bias", "0.lora_B", "0.lora_A"]
    assert len(list(part.parameters())) == 4
    part.load_state_dict(part.state_dict())
    assert_bitwise(copy.deepcopy(part)(x), part(x))


def test_share_memory() -> None:
    net = fine_tuned(resnet())
    tensors = [*nn.Module.parameters(net), *net.buffers()]
    assert not any(tensor.is_shared() for tensor in tensors)
    assert net.share_memory() is net
    assert all(tensor.is_shared() for tensor in tensors)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("frozen_are_left_out", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_states_of_distributed_checkpoints(
    name: str, frozen_are_left_out: bool, outer: bool
) -> None:
    """They are those of the network, whether torch leaves out what is frozen or gift alone does."""
    _, net, _ = case(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = nn.ModuleDict({"net": net}) if outer else net
    options = StateDictOptions(ignore_frozen_params=frozen_are_left_out)
    expected = model.state_dict()
    assert not [key for key in expected if key.removeprefix("net.") in frozen(net)]
    assert_bitwise(get_model_state_dict(model, options=options), expected)
    state, _ = get_state_dict(model, optimizer, options=options)
    assert_bitwise(state, expected)
    set_model_state_dict(model, state, options=options)
    assert_bitwise(model.state_dict(), expected)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["mlp", "resnet", "tied"])
def test_averaged_model_averages_the_deltas(name: str, use_buffers: bool) -> None:
    """An average over two states; nothing frozen moves."""
    base, net, x = case(name, train=False)
    average = AveragedModel(net, use_buffers=use_buffers)
    states = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(net)
        states.append(snapshot(net))
    found = snapshot(average.module)
    assert found.keys() == states[0].keys()
    for key, (first, second) in ((k, (states[0][k], states[1][k])) for k in found):
        mean = (first + second) / 2 if key in deltas(net) else first
        torch.testing.assert_close(found[key], mean.to(found[key].dtype))
    torch.testing.assert_close(average(x), reference(base, average.module, x))


def test_exponential_average_inside_a_bigger_network() -> None:
    outer = nn.Sequential(fine_tuned(mlp().double()), nn.Linear(4, 2).double())
    average = AveragedModel(outer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(outer)
    before = snapshot(outer)
    with torch.no_grad():
        for parameter in outer[0].parameters():
            parameter.add_(1)
    average.update_parameters(outer)
    trained = {f"0.{name}" for name in deltas(outer[0])}
    expected = {n: t + 0.1 if n in trained else t for n, t in before.items()}
    torch.testing.assert_close(snapshot(average.module), expected)


# --- optimizers, flags, gradients ----------------------------------------------------------------


def test_optimizer_groups_with_rates_of_their_own() -> None:
    net = fine_tuned(mlp().double())
    rates = {"0": 0.1, "2": 0.01}
    groups = [
        {"params": [p for n, p in deltas(net).items() if n.startswith(layer)], "lr": rate}
        for layer, rate in rates.items()
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for factor in (1.0, 0.5):
        before = snapshot(net)
        net.zero_grad()
        net(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        moved = {n: before[n] - factor * rates[n[0]] * p.grad for n, p in deltas(net).items()}
        torch.testing.assert_close(snapshot(net), before | moved)


@pytest.mark.parametrize("which", ["parameters", "named_parameters"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_leave_frozen_tensors_alone(kind: type, which: str) -> None:
    """Weight decay would move all that an optimizer holds and that has a gradient."""
    base, net, x = case("resnet", train=False)
    optimizer = kind(getattr(net, which)(), lr=0.1, weight_decay=0.1)
    before = snapshot(net)
    output(net, x).square().sum().backward()
    optimizer.step()
    changed = {n for n, t in snapshot(net).items() if not torch.equal(t, before[n])}
    assert changed == set(deltas(net))
    torch.testing.assert_close(output(net, x), reference(base, net, x))


def test_training_resumes_from_network_and_optimizer_states() -> None:
    """Four steps, and two steps, a save, and two more in a fresh network, end in one place."""

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    base, x = mlp(), torch.randn(3, 8)
    nets = [copy.deepcopy(base) for _ in range(2)]
    for net in nets:
        enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.01) for net in nets]
    steps(nets[0], optimizers[0], 4)
    steps(nets[1], optimizers[1], 2)

    fresh = copy.deepcopy(base)
    enable_fine_tuning(fresh, LoRAAllFineTuningStrategy())
    fresh.load_state_dict(nets[1].state_dict())
    resumed = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    resumed.load_state_dict(optimizers[1].state_dict())
    steps(fresh, resumed, 2)
    assert_bitwise(fresh.state_dict(), nets[0].state_dict())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    net = fine_tuned(mlp())
    net(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.requires_grad_(False)  # what is frozen for a while is cleared as well
    net.zero_grad(set_to_none)
    for parameter in net.parameters():
        assert parameter.grad is None if set_to_none else not parameter.grad.any()


def test_freezing_for_a_while_brings_back_the_deltas_alone() -> None:
    net = fine_tuned(mlp())
    chosen, keys = set(deltas(net)), list(net.state_dict())
    assert net.requires_grad_(False) is net
    assert not deltas(net)
    assert not net(torch.randn(3, 8)).requires_grad
    assert list(net.state_dict()) == keys
    assert len(list(net.parameters())) == len(chosen)
    net.requires_grad_(True)
    assert set(deltas(net)) == chosen


def test_freezing_one_layer_for_a_while() -> None:
    net = fine_tuned(mlp())
    chosen = set(deltas(net))
    net[0].requires_grad_(False)
    assert set(deltas(net)) == {"2.lora_B", "2.lora_A"}
    assert len(list(net.parameters())) == len(chosen)
    net[0].requires_grad_(True)
    assert set(deltas(net)) >= chosen
    assert "0.weight" not in deltas(net)


def test_flags_set_from_a_bigger_network() -> None:
    """Freezing from outside keeps what was chosen. Training all from outside is what torch makes
    of it, the frozen tensors included, and the network shows it.
    """
    net = fine_tuned(mlp())
    chosen = set(deltas(net))
    outer = nn.Sequential(net, nn.Linear(4, 2))
    outer.requires_grad_(False)
    assert len(list(net.parameters())) == len(chosen)
    net.requires_grad_(True)
    assert set(deltas(net)) == chosen
    outer.requires_grad_(True)
    with pytest.warns(GiftWarning, match=r"4 parameters were frozen.*: 0.weight, 0.bias, 2.wei"):
        net.parameters()
    everything = {name for name, _ in net.named_parameters()}
    assert set(deltas(net)) == set(net.state_dict()) == everything
    outer(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, lambda net: nn.ModuleList([net])])
def test_inside_a_bigger_network(wrap: Callable, name: str) -> None:
    """Its output, its training mode and its gradients do not depend on who calls it."""
    base, net, x = case(name)
    outer = wrap(net)
    call = outer[0] if isinstance(outer, nn.ModuleList) else outer
    for train in (False, True):
        outer.train(train)
        assert {m.training for m in net.modules()} == {train}
        assert_same_function(Case(base.train(train), net, x), call)
    assert {id(p) for p in outer.parameters() if p.requires_grad} == {
        id(p) for p in net.parameters()
    }


def test_vectors_and_norms_over_the_parameters() -> None:
    net = fine_tuned(mlp())
    vector = nn.utils.parameters_to_vector(net.parameters())
    assert vector.numel() == sum(p.numel() for p in deltas(net).values())
    before = net(x := torch.randn(3, 8))
    nn.utils.vector_to_parameters(vector.detach() * 0, net.parameters())
    assert not torch.equal(net(x), before)
    assert_bitwise(net(x), disable_fine_tuning(net)(x))
    net = fine_tuned(net)
    net(x).square().sum().backward()
    norm = torch.cat([p.grad.flatten() for p in deltas(net).values()]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(net.parameters(), 1e-3), norm)


# --- reparametrised weights ----------------------------------------------------------------------


def magnitude_prune(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


REPARAMETRISED = {
    "prune": magnitude_prune,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, the old kind": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm, the old kind": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("how", REPARAMETRISED)
def test_reparametrised_before(how: str) -> None:
    """The delta is added to the weight that is computed; its sources stay frozen."""
    net, x = mlp().double().eval(), torch.randn(3, 8, dtype=torch.float64)
    REPARAMETRISED[how](net[0])
    net(x)
    before, weight, keys = net(x), net[0].weight.detach().clone(), list(net.state_dict())
    held = snapshot(net)
    fine_tuned(net)
    assert set(deltas(net)) == {f"{i}.lora_{f}" for i in "02" for f in "AB"}
    first, last = net[0], net[2]
    hidden = F.linear(x, weight + first.lora_B @ first.lora_A, first.bias).tanh()
    expected = F.linear(hidden, last._parameters["weight"] + last.lora_B @ last.lora_A, last.bias)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(gradients(net(x), net), gradients(expected, net))
    assert_bitwise(copy.deepcopy(net)(x), net(x))
    disable_fine_tuning(net)
    assert_bitwise(net(x), before)
    assert list(net.state_dict()) == keys
    assert_bitwise(snapshot(net), held)


def test_each_tensor_that_a_hook_computes_is_its_own() -> None:
    """A cell has two such weights, of different shapes: each has its delta, and is merged."""
    net, x = nn.LSTMCell(3, 4).double().eval(), torch.randn(2, 3, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh"):
        nn.utils.weight_norm(net, name)
    state = tuple(torch.randn(2, 2, 4, dtype=torch.float64))
    before = net(x, state)
    weights = {name: getattr(net, name).detach().clone() for name in ("weight_ih", "weight_hh")}
    fine_tuned(net)
    plain = nn.LSTMCell(3, 4).double()
    plain.bias_ih, plain.bias_hh = net.bias_ih, net.bias_hh
    for name, weight in weights.items():
        left, right = getattr(net, f"{name}_lora_B"), getattr(net, f"{name}_lora_A")
        setattr(plain, name, nn.Parameter(weight + (left @ right).detach()))
    expected = plain(x, state)
    assert not torch.allclose(expected[0], before[0])
    torch.testing.assert_close(net(x, state), expected)
    torch.testing.assert_close(merge(net)(x, state), expected)


@pytest.mark.parametrize("how", REPARAMETRISED)
def test_reparametrised_after_is_refused(how: str) -> None:
    """The weight that is read is the effective one already: a clear error, never a second delta."""
    net = fine_tuned(mlp())
    with pytest.raises((RuntimeError, TypeError)):
        REPARAMETRISED[how](net[0])


@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm", "orthogonal"])
def test_reparametrised_after_leaves_the_network_as_it_was(how: str) -> None:
    """Only the old norms move the tensor before anybody can object."""
    net, x = fine_tuned(mlp().double()), torch.randn(3, 8, dtype=torch.float64)
    before, held = net(x), snapshot(net)
    with pytest.raises((RuntimeError, TypeError)):
        REPARAMETRISED[how](net[0])
    assert_bitwise(snapshot(net), held)
    assert_bitwise(net(x), before)


class Halved(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor / 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_delta_can_be_parametrised(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:  # torch.compile replaces this, for good, by a function that calls it

        def tagging(self: nn.Module, state: Any, own: Any = nn.Module.__setstate__) -> None:
            own(self, state)

        monkeypatch.setattr(nn.Module, "__setstate__", tagging)
        monkeypatch.setattr("gift.core.dynamic_class._classes", {})
    base, net, x = case("mlp")
    parametrize.register_parametrization(net[0], "lora_B", Halved())
    halved = {n.replace("parametrizations.lora_B.original", "lora_B"): p for n, p in deltas(net).items()}  # noqa: E501  # fmt: skip
    halved["0.lora_B"] = halved["0.lora_B"] / 2
    torch.testing.assert_close(net(x), functional_call(base, with_deltas(base, halved), (x,)))
    assert set(net.state_dict()) == set(deltas(net))
    assert_bitwise(copy.deepcopy(net)(x), net(x))
    parametrize.remove_parametrizations(net[0], "lora_B")
    assert_bitwise(disable_fine_tuning(net)(x), base(x))


def test_a_delta_can_be_pruned() -> None:
    base, net, x = case("mlp")
    full = net[0].lora_B.detach().clone()
    prune.l1_unstructured(net[0], "lora_B", 0.5)
    pruned = {n.replace("lora_B_orig", "lora_B"): p for n, p in deltas(net).items()}
    mask = full.abs() > full.abs().flatten().kthvalue(full.numel() // 2).values
    pruned["0.lora_B"] = full * mask
    torch.testing.assert_close(net(x), functional_call(base, with_deltas(base, pruned), (x,)))
    prune.remove(net[0], "lora_B")
    assert_bitwise(net[0].lora_B.detach(), full * mask)
    assert_bitwise(disable_fine_tuning(net)(x), base(x))


@pytest.mark.parametrize("how", ["parametrise", "prune"])
def test_a_changed_delta_must_be_put_back_before_disabling(how: str) -> None:
    """A network whose deltas are no longer where they were is refused whole, by name."""
    base, net, x = case("mlp")
    if how == "prune":
        prune.l1_unstructured(net[2], "lora_B", 0.5)
    else:
        parametrize.register_parametrization(net[2], "lora_B", Halved())
    before, keys = net(x), list(net.state_dict())
    with pytest.raises(RuntimeError, match=r"'2\.lora_B'"):
        disable_fine_tuning(net)
    assert_bitwise(net(x), before)
    assert list(net.state_dict()) == keys
    if how == "prune":
        prune.remove(net[2], "lora_B")
    else:
        parametrize.remove_parametrizations(net[2], "lora_B")
    assert_bitwise(disable_fine_tuning(net)(x), base(x))


# --- meta device, lazy modules -------------------------------------------------------------------


def on_meta(build: Callable[[], nn.Module], **options: object) -> nn.Module:
    with torch.device("meta"):
        net = build()
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(**options))
    assert all(p.is_meta for p in nn.Module.parameters(net))
    return net


@pytest.mark.parametrize("route", ["to_empty, copy", "to_empty, assign", "assign"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "encoder", "lstm", "tied"])
def test_from_the_meta_device_to_a_base_checkpoint(name: str, route: str) -> None:
    """The deltas get their initial values, so that the output is the base's bit for bit."""
    build, example = NETWORKS[name]
    base, x, net = build().eval(), example(), on_meta(build).eval()
    trained = set(deltas(net))
    if route.startswith("to_empty"):
        net.to_empty(device="cpu")
    net.load_state_dict(base.state_dict(), assign=route.endswith("assign"))
    assert set(deltas(net)) == trained
    with torch.no_grad():  # torch computes some layers a little differently where they are frozen
        assert_bitwise(net(x), copy.deepcopy(base).requires_grad_(False)(x))
    for key, parameter in deltas(net).items():
        assert parameter.isfinite().all()
        assert bool(parameter.any()) == key.endswith("lora_A")
    output(net, x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    disable_fine_tuning(net)
    assert_bitwise(net.state_dict(), base.state_dict())
    assert all(p.requires_grad for p in net.parameters())


def test_reset_parameters_after_to_empty() -> None:
    """The deferred initialisation of a network from the meta device: layer by layer."""
    net = on_meta(mlp).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in nn.Module.parameters(net):
            parameter.fill_(torch.nan)
    for layer in (net[0], net[2]):
        layer.reset_parameters()
        assert 0 < layer._parameters["weight"].abs().max() <= layer.in_features**-0.5
        assert 0 < layer.lora_A.abs().max() <= layer.in_features**-0.5
        assert not layer.lora_B.any()
    assert set(deltas(net)) == {f"{i}.lora_{f}" for i in "02" for f in "AB"}
    x = torch.randn(3, 8)
    assert_bitwise(net(x), disable_fine_tuning(net)(x))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


def lazily_adapted(**options: object) -> nn.Module:
    net = lazy()
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(**options))
    return net


IMAGES = torch.linspace(-1, 1, 216).reshape(2, 3, 6, 6)


def test_lazy_modules_get_their_delta_with_their_shape() -> None:
    net = lazily_adapted()
    trained = [name for name, _ in net.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    first = net(IMAGES)
    assert isinstance(net[0], nn.Conv2d)
    assert not isinstance(net[0], nn.LazyConv2d)
    assert {n: tuple(p.shape) for n, p in deltas(net).items()} == {
        "0.lora_B": (12, 3), "0.lora_A": (3, 9), "3.lora_B": (5, 3), "3.lora_A": (3, 64)
    }  # fmt: skip
    assert list(deltas(net)) == trained == list(net.state_dict())
    plain = lazy()
    plain(IMAGES)
    plain.load_state_dict(frozen(net))
    assert_bitwise(first, plain(IMAGES))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    torch.testing.assert_close(net(IMAGES), reference(plain, net, IMAGES))
    disable_fine_tuning(net)
    assert_bitwise(net(IMAGES), first)
    assert type(net[0]) is nn.Conv2d
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("fresh", ["lazy", "materialised"])
def test_state_of_a_lazily_adapted_network_round_trips(fresh: str) -> None:
    net, other = lazily_adapted(), lazily_adapted()
    net(IMAGES)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    if fresh == "materialised":
        other(IMAGES)
    other.load_state_dict(dict(net.named_parameters()))
    assert_bitwise(other(IMAGES), net(IMAGES))
    other = lazily_adapted()
    if fresh == "materialised":
        other(IMAGES)
    other.load_state_dict(net.state_dict())
    other(IMAGES)
    assert_bitwise(other.state_dict(), net.state_dict())


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_network_that_is_still_lazy(how: str) -> None:
    net = lazily_adapted()
    other = COPIES[how](net)
    other(IMAGES)
    assert set(deltas(other)) == {f"{i}.lora_{f}" for i in "03" for f in "AB"}
    assert all(nn.parameter.is_lazy(p) for p in nn.Module.parameters(net))


def test_disabling_a_network_that_is_still_lazy() -> None:
    net = disable_fine_tuning(lazily_adapted())
    assert type(net[0]) is nn.LazyConv2d
    assert net(IMAGES).shape == (2, 5)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_a_rank_that_a_lazy_module_cannot_have() -> None:
    """It is clipped with a warning; or refused, at each forward until it is disabled."""
    with pytest.warns(GiftWarning, match=r"rank 6 is above 5.*5 x 64.*got 5"):
        assert lazily_adapted(rank=6)(IMAGES).shape == (2, 5)
    net = lazily_adapted(rank=6, clip_rank=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rank 6 is above 5.*5 x 64"):
            net(IMAGES)
    assert disable_fine_tuning(net)(IMAGES).shape == (2, 5)
    assert lazily_adapted(rank=6, clip_rank=True)(IMAGES).shape == (2, 5)
