"""`merge` and `merged`: the plain network with the weights of the formula, and the way back."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import gift
from gift import (
    FineTuningStrategy,
    GiftWarning,
    disable_fine_tuning,
    disabled,
    enable_fine_tuning,
    merge,
    merged,
)
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_path
from gift.strategies import (
    BottleneckFineTuningStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    NormFineTuningStrategy,
    PromptFineTuningStrategy,
    merge_strategies,
)
from gift.strategies import DoRALinearFineTuningStrategy as DoRA
from gift.strategies import LoRAAllFineTuningStrategy as LoRA
from tests.cases.layers import LayerCase
from tests.cases.methods import METHODS, MethodCase
from tests.cases.selection import STEP, cells, selected
from tests.common import all_bits, bits, enabled, full_state
from tests.test_matrix import (
    PLACED,
    adapt,
    added,
    as_dtype,
    everywhere,
    expected_weights,
    frozen_tensors,
    owner_of,
    randomise,
    run,
    twin,
)


def look(net: nn.Module) -> dict[str, Any]:
    """All that a network is but its numbers and its objects: two networks are comparable."""
    return {
        path: (_look(type(module)), {key: _look(value) for key, value in vars(module).items()})
        for path, module in net.named_modules(remove_duplicate=False)
    }


def _look(value: Any) -> Any:
    if isinstance(value, Tensor):
        trained = value.requires_grad if isinstance(value, nn.Parameter) else None
        return type(value), value.dtype, value.shape, trained, value.grad is None
    if isinstance(value, dict):  # hooks are numbered through
        return [(key if isinstance(key, str) else "", _look(v)) for key, v in value.items()]
    if isinstance(value, list | tuple):
        return [_look(item) for item in value]
    if isinstance(value, bool | int | float | str | set | None):
        return copy.copy(value)
    # By name: torch makes a class of its own for each parametrized module.
    return [str(cls) for cls in (value if isinstance(value, type) else type(value)).__mro__]


# --- every method on every layer -----------------------------------------------------------------


@everywhere
def test_merging_gives_the_plain_layer_with_the_weights_of_the_formula(
    method: MethodCase, layer: LayerCase, request: pytest.FixtureRequest
) -> None:
    """In float64: class, keys, attributes, hooks, flags; the weights; the outputs, also while
    merged; a plain layer takes the state; what cannot be merged is refused and unchanged.
    """
    net = layer.make().double().eval()
    inputs = as_dtype(layer.inputs(), torch.float64)
    run(net, layer, inputs)  # a weight that is computed by a hook is there from now on
    plain = look(net)
    fresh = twin(net, layer)
    frozen = frozen_tensors(net, method, layer)
    adapt(net, method, layer)
    randomise(net)
    parameters = {name: added(net, name) for name in layer.weights}
    expected = expected_weights(method, layer, net, frozen, parameters)
    output = run(net, layer, inputs).detach()
    before = full_state(net)

    with merged(net):
        torch.testing.assert_close(run(net, layer, inputs), output, rtol=0, atol=1e-11)
    assert full_state(net) == before

    if cannot_be_merged(method, request):
        with pytest.raises(AdaptationError, match="cannot give every value: make it plain first"):
            merge(net)
        assert full_state(net) == before
        return
    assert merge(net) is net
    assert look(net) == plain
    # An orthogonal matrix made in float32 is one to that precision, and is made anew.
    close = 1e-5 if "-orthogonal]" in request.node.name else 1e-11
    for name, value in expected.items():
        got = getattr(*owner_of(net, name)).detach()
        torch.testing.assert_close(got, value.detach(), rtol=0, atol=close)
    torch.testing.assert_close(run(net, layer, inputs), output, rtol=0, atol=10 * close)
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(run(fresh, layer, inputs), run(net, layer, inputs))


def cannot_be_merged(method: MethodCase, request: pytest.FixtureRequest) -> bool:
    """What is computed and does not take every value; a rotated orthogonal matrix is one."""
    row = request.node.name.rpartition("-")[2].rstrip("]")
    rotated = row == "orthogonal" and method.method in ("oft", "hra")
    return row in ("orthogonal", "spectral_norm") and not rotated


# One row for each method: settings do not matter here.
FIRST = {case.method: case for case in reversed(METHODS.values())}
ONCE = selected([at for at in PLACED if at[2].values[0] in FIRST.values()], 0, 2 * STEP)


@pytest.mark.parametrize(("method", "layer"), ONCE)
def test_a_bfloat16_weight_is_rounded_once(
    method: MethodCase, layer: LayerCase, request: pytest.FixtureRequest
) -> None:
    """The merged numbers are those of the formula in double precision, rounded once."""
    if "bfloat16" in layer.differs:
        return
    net = layer.make().bfloat16().eval()
    run(net, layer, as_dtype(layer.inputs(), torch.bfloat16))
    frozen = frozen_tensors(net, method, layer)
    adapt(net, method, layer)
    randomise(net)
    if cannot_be_merged(method, request):
        with pytest.raises(AdaptationError, match="cannot give every value: make it plain first"):
            merge(net)
        return
    parameters = {name: added(net, name) for name in layer.weights}
    expected = expected_weights(method, layer, net, frozen, parameters)
    merge(net)
    roundings = 4 if "weight_norm" in request.node.name else 1  # it is computed in bfloat16
    for name, value in expected.items():
        got = getattr(*owner_of(net, name)).detach()
        assert got.dtype == torch.bfloat16
        once = torch.finfo(torch.bfloat16).eps / 2
        torch.testing.assert_close(got.double(), value.detach(), rtol=roundings * once, atol=1e-5)


# --- networks ------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One module under two names, and a table that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.first = self.second = nn.Linear(6, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.table(ids)).tanh()))


class Recurrent(nn.Module):
    """A recurrent layer keeps its weights in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, dropout=0.5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 5))


def cnn() -> nn.Module:
    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), pool, nn.Linear(6, 5))


def with_new_head(net: nn.Module) -> nn.Module:
    net[-1] = nn.Linear(net[-1].in_features, 4)
    return net


def normed() -> nn.Module:
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
    nn.utils.parametrizations.weight_norm(net[3])
    return net


def spectral() -> nn.Module:
    net = mlp()
    nn.utils.parametrizations.spectral_norm(net[0])
    nn.utils.spectral_norm(net[3])
    return net


def pruned() -> nn.Module:
    net = mlp()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=11, intermediate_size=12, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16))


@dataclass(frozen=True)
class Case:
    """A network, and how it is fine-tuned.

    Args:
        make: the network.
        strategy: makes the strategy.
        inputs: makes an input.
        plain: the network that merging gives; None means the same as `make`.
        refused: of what cannot be merged, all that the error must name.
    """

    make: Callable[[], nn.Module]
    strategy: Callable[[], Any] = LoRA
    inputs: Callable[[], Tensor] = lambda: torch.randn(4, 6)
    plain: Callable[[], nn.Module] | None = None
    refused: tuple[str, ...] = ()


def only(path: str) -> FineTuningStrategy:
    return FineTuningStrategy(module_caps=[(mc_path(glob=path), ma_adapt())])


def images() -> Tensor:
    return torch.randn(4, 3, 7, 7)


def ids() -> Tensor:
    return torch.randint(0, 9, (2, 5))


def sequences() -> Tensor:
    return torch.randn(2, 5, 8)


NETWORKS = {
    "dropout": Case(mlp, lambda: LoRA(lora_dropout=0.5)),
    "norms and statistics": Case(
        cnn, lambda: merge_strategies([NormFineTuningStrategy(), LoRA()]), images
    ),
    "statistics that stand still": Case(cnn, lambda: LoRA(freeze_statistics=True), images),
    "a new head": Case(
        cnn,
        lambda: merge_strategies([HeadReplacementStrategy(4), LoRA(train_bias=True)]),
        images,
        lambda: with_new_head(cnn()),
    ),
    "no delta at all": Case(mlp, FullFineTuningStrategy),
    "one module twice": Case(Twice, inputs=ids),
    "recurrent": Case(Recurrent, inputs=lambda: torch.randn(2, 4, 6)),
    "encoder": Case(encoder, inputs=sequences),
    "bert": Case(bert, inputs=ids),
    "gpt2": Case(gpt2, DoRA, inputs=ids),
    "weight norms": Case(normed),
    "spectral norms": Case(spectral, refused=("0.weight: it is computed", "3.weight: ")),
    "pruned": Case(pruned, refused=("0.weight: it is computed",)),
    "bottlenecks": Case(
        encoder,
        lambda: merge_strategies([BottleneckFineTuningStrategy(size=2), LoRA()]),
        sequences,
        refused=("layers.0 is wrapped by bottleneck", "layers.1 is wrapped by bottleneck"),
    ),
    "prompts": Case(
        bert,
        lambda: PromptFineTuningStrategy(num_virtual_tokens=2),
        ids,
        refused=("is wrapped by prompt",),
    ),
}
networks = pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
mergeable = pytest.mark.parametrize(
    "case", [pytest.param(c, id=n) for n, c in NETWORKS.items() if not c.refused]
)


def call(net: nn.Module, x: Tensor) -> Tensor:
    output = net(x)
    return output if isinstance(output, Tensor) else output.logits


def tuned(case: Case) -> Any:
    """As in the middle of training: no delta is zero, statistics moved, gradients wait."""
    net = case.make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        enable_fine_tuning(net, case.strategy())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    call(net.train(), case.inputs()).square().mean().backward()
    return net


@mergeable
def test_a_network_is_merged(case: Case) -> None:
    net, x = tuned(case).eval(), case.inputs()
    expected = call(net, x).detach()
    plain = (case.plain or case.make)().eval()
    call(plain, x)
    buffers = {name: bits(b) for name, b in net.named_buffers() if "dora_" not in name}
    assert merge(net) is net
    torch.testing.assert_close(call(net, x), expected, rtol=1e-5, atol=1e-5)
    assert look(net) == look(plain)
    assert {name: bits(buffer) for name, buffer in net.named_buffers()} == buffers
    call(net, x).sum().backward()  # flags are the base's: it can be trained
    plain.load_state_dict(net.state_dict())
    assert torch.equal(call(plain, x), call(net, x))


@mergeable
def test_mode_and_dropout_do_not_enter_the_weights(case: Case) -> None:
    net = tuned(case)
    other = copy.deepcopy(net).eval()
    assert all_bits(merge(net.train())) == all_bits(merge(other))


@pytest.mark.parametrize("case", [c for c in NETWORKS.values() if c.refused])
def test_what_cannot_be_merged_is_named_and_unchanged(case: Case) -> None:
    net = tuned(case)
    before = full_state(net)
    with pytest.raises(AdaptationError, match="nothing was merged") as caught:
        merge(net)
    assert all(text in str(caught.value) for text in case.refused)
    assert full_state(net) == before


@pytest.mark.parametrize("fold", [merge, lambda net: merged(net).__enter__()])
def test_numbers_that_are_not_finite_are_all_named(fold: Callable[[Any], Any]) -> None:
    """A delta with infinities, and one that a half-precision weight cannot take."""
    net = enabled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).half(), nn.Linear(4, 4)))
    with torch.no_grad():
        net[0].lora_B[0, 0] = float("nan")
        net[1].lora_B.fill_(1e5)
        net[1].lora_A.fill_(1.0)
    before = full_state(net)
    with pytest.raises(AdaptationError) as caught:
        fold(net)
    named = [line for line in str(caught.value).splitlines() if "not finite" in line]
    assert [line.split()[0] for line in named] == ["0.weight", "1.weight"]
    assert full_state(net) == before


def test_a_computed_weight_that_is_not_finite_is_named_for_that_alone() -> None:
    """That it can then not be set either is no reason of its own."""
    net = enabled(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))))
    with torch.no_grad():
        net[0].lora_B[0, 0] = float("nan")
    with pytest.raises(AdaptationError) as caught:
        merge(net)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith("  0.weight ")
    assert line.endswith("not finite")


@pytest.mark.parametrize("fold", [merge, lambda net: merged(net).__enter__()])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LazyLinear(64), "no shape yet: run a batch"),
        (lambda: nn.Linear(64, 64, device="meta"), "on the meta device"),
    ],
)
def test_weights_without_values(
    make: Callable[[], nn.Module], reason: str, fold: Callable[[Any], Any]
) -> None:
    net = nn.Sequential(make(), nn.Linear(64, 64))
    enable_fine_tuning(net, LoRA())
    with pytest.raises(AdaptationError, match=rf"0\.weight .*{reason}"):
        fold(net)


def test_memory_that_two_parameters_share_is_parted() -> None:
    """Each has a delta of its own; that one has none is refused."""
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    net[1].weight.data = net[2].weight.data = net[0].weight.data
    adapted = enabled(net, only("[012]"))
    x = torch.randn(2, 6)
    expected = adapted(x)
    torch.testing.assert_close(merge(net)(x), expected)


def test_a_thousand_rounds_leave_a_bfloat16_base_bit_exact() -> None:
    net = enabled(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16())
    frozen = {n: (p, p.data_ptr(), bits(p)) for n, p in net.named_parameters() if "lora" not in n}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    for _ in range(1000):
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()
        with merged(net):
            net(x)
    now = {n: (p, p.data_ptr(), bits(p)) for n, p in net.named_parameters() if "lora" not in n}
    assert all(now[n][0] is p and now[n][1:] == (*rest,) for n, (p, *rest) in frozen.items())


# --- merged for a while --------------------------------------------------------------------------


def replace(net: nn.Module) -> None:
    for module in list(net.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not nn.utils.parametrize.is_parametrized(module):
                setattr(module, name, nn.Parameter(torch.zeros_like(parameter)))
    name, child = next(iter(net.named_children()))
    setattr(net, name, nn.Sequential(child))
    net.note = "something new"


def unfreeze(net: nn.Module) -> None:
    """Whatever is a copy is written to, over the gradients of now and of before."""
    for parameter in net.parameters():
        parameter.requires_grad_().grad = torch.ones_like(parameter)


def write_to_buffers(net: nn.Module) -> None:
    for buffer in net.buffers():
        buffer.zero_()
    for module in net.modules():
        for name in list(module._buffers):
            module._buffers[name] = None


def hook(net: nn.Module) -> None:
    net.register_forward_hook(lambda *args: None)
    net.register_load_state_dict_post_hook(lambda *args: None)


def run_out(net: nn.Module) -> None:
    raise KeyboardInterrupt


def fail(net: nn.Module) -> None:
    raise ZeroDivisionError


DONE: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda net: None,
    "evaluated": lambda net: net.eval(),
    "trained": lambda net: net.train(),
    "half": lambda net: net.half(),
    "double": lambda net: net.to(torch.float64),
    "meta": lambda net: net.to("meta"),
    "unfrozen": lambda net: net.requires_grad_(True),
    "gradients": unfreeze,
    "replaced": replace,
    "buffers": write_to_buffers,
    "hooked": hook,
    "interrupted": run_out,
    "failed": fail,
    "copied": copy.deepcopy,
    "state": lambda net: net.state_dict(),
    "cleared": lambda net: net.zero_grad(),
}


@cells(2, case=NETWORKS, what=DONE)
def test_all_comes_back(case: Case, what: Callable[[Any], Any]) -> None:
    """Every object, bit, flag, hook, mode and gradient, after two forward passes in train mode."""
    net, x = tuned(case), case.inputs()
    before = full_state(net)
    with suppress(ZeroDivisionError, KeyboardInterrupt), merged(net):
        call(net, x)
        call(net.train(), x)
        what(net)
    assert full_state(net) == before


@networks
def test_outputs_are_the_same_while_merged(case: Case) -> None:
    net, x = tuned(case).eval(), case.inputs()
    expected = call(net, x).detach()
    with merged(net) as same:
        assert same is net
        output = call(net, x)
        assert not output.requires_grad
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(call(net, x), expected)


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    assert b"gift" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(net: nn.Module) -> nn.Module:
    data = pickle.dumps(net)
    assert b"gift" not in data
    return pickle.loads(data)


@mergeable
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_made_inside_are_plain_networks(case: Case, copied: Callable[[Any], Any]) -> None:
    """They know nothing of gift, and can be trained, loaded, saved and fine-tuned."""
    if case.make is normed:
        return  # computed weights keep their deltas
    net, x = tuned(case).eval(), case.inputs()
    expected = call(net, x).detach()
    with merged(net):
        state = copy.deepcopy(net.state_dict())
        twin = copied(net)
    torch.testing.assert_close(call(twin, x), expected, rtol=1e-5, atol=1e-5)
    plain = (case.plain or case.make)().eval().requires_grad_(False)
    call(plain, x)
    assert look(twin) == look(plain)
    assert {n: bits(t) for n, t in twin.state_dict().items()} == {
        n: bits(t) for n, t in state.items()
    }
    twin.load_state_dict(plain.state_dict())
    call(twin.requires_grad_(True), x).sum().backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    twin.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        enable_fine_tuning(twin, LoRA())
    assert torch.equal(call(net, x), expected)


INSIDE: dict[str, Callable[[Any, Any], Any]] = {
    "merge": lambda net, path: merge(net),
    "merged": lambda net, path: merged(net).__enter__(),
    "disabled": lambda net, path: disabled(net).__enter__(),
    "disable": lambda net, path: disable_fine_tuning(net),
    "enable": lambda net, path: enable_fine_tuning(net, LoRA()),
    "enable a part": lambda net, path: enable_fine_tuning(net[0], LoRA()),
    "enable around": lambda net, path: enable_fine_tuning(nn.ModuleList([net]), LoRA()),
    "plan": lambda net, path: gift.plan_fine_tuning(net, LoRA()),
    "save": lambda net, path: gift.save(net, path / "new"),
    "load": lambda net, path: gift.load(net, path / "saved"),
    "load a state": lambda net, path: net.load_state_dict(net.state_dict()),
    "load around": lambda net, path: nn.ModuleList([net]).load_state_dict(
        nn.ModuleList([net]).state_dict()
    ),
}


@pytest.mark.parametrize("what", INSIDE.values(), ids=INSIDE)
def test_what_needs_the_deltas_is_refused_while_merged(what: Any, tmp_path: Any) -> None:
    net = enabled(mlp())
    gift.save(net, tmp_path / "saved")
    before = full_state(net)
    with merged(net):
        inside = full_state(net)
        with pytest.raises(RuntimeError, match=r"temporarily merged: .* after the with block"):
            what(net, tmp_path)
        assert full_state(net) == inside
    assert full_state(net) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("within", [merged, disabled])
def test_no_training_for_a_while(within: Any) -> None:
    """Nothing takes a gradient, and an optimizer that steps all the same finds none."""
    net, x = enabled(mlp()).eval(), torch.randn(2, 6)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    before = full_state(net)
    with within(net):
        output = net(x)
        with pytest.raises(RuntimeError, match="does not require grad"):
            output.sum().backward()
        optimizer.step()
        assert torch.equal(net(x), output)
    after = full_state(net)
    for path in before:  # hooks have numbers, which go on
        before[path][1].pop("_load_state_dict_post_hooks")
        after[path][1].pop("_load_state_dict_post_hooks")
    assert after == before
    optimizer.step()


def test_frozen_statistics_stand_still_while_merged() -> None:
    """A training loop that calls ``train()`` before the block does not move them."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net = enabled(net, LoRA(rank=1, freeze_statistics=True)).train()
    x, plain = 3 + torch.randn(8, 3, 5, 5), nn.BatchNorm2d(4).eval()
    output = net(x)
    torch.testing.assert_close(output, plain(net[0](x)))
    with merged(net):
        torch.testing.assert_close(net(x), output)
        assert torch.equal(net[1].running_mean, torch.zeros(4))
        assert net[1].num_batches_tracked == 0


@pytest.mark.parametrize("train", [torch.optim.SGD, torch.optim.AdamW])
def test_writing_to_the_base_while_merged_is_reported(train: Any) -> None:
    """Biases have no delta here, so they are those of the base."""
    net = enabled(mlp())

    def train_inside() -> None:
        with merged(net):
            net.requires_grad_(True)
            net(torch.randn(2, 6)).sum().backward()
            train(net.parameters(), 0.1).step()

    with pytest.raises(RuntimeError, match=r"\['0.bias', '3.bias'\] of the base were written to"):
        train_inside()


def test_an_embedding_with_a_largest_norm_is_not_scaled_while_merged() -> None:
    net = nn.Sequential(nn.Embedding(9, 6, max_norm=0.1), nn.Linear(6, 3))
    enabled(net, only("1"))
    before = full_state(net)
    with merged(net):
        net(ids())
    assert full_state(net) == before


def test_a_generator_that_is_left_early() -> None:
    net = enabled(mlp())
    before = full_state(net)

    def predictions() -> Any:
        with merged(net):
            for _ in range(3):
                yield net(torch.randn(2, 6))

    for _ in predictions():
        break
    assert full_state(net) == before


def test_a_compiled_network() -> None:
    net, x = enabled(mlp()).eval(), torch.randn(2, 6)
    compiled = torch.compile(net, backend="eager")
    expected = compiled(x)
    for _ in range(2):
        with merged(net):
            assert torch.equal(compiled(x), net(x))
            torch.testing.assert_close(compiled(x), expected)
        assert torch.equal(compiled(x), expected)


def test_two_deltas_that_share_a_tensor_of_which_one_is_computed() -> None:
    """A layer in which one weight is computed keeps its deltas, and what is tied to it does."""
    net = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    nn.utils.parametrizations.weight_norm(net[1], "weight_hh_l0")
    net[1].weight_ih_l0 = net[0].weight_ih_l0
    enabled(net)
    x = torch.randn(3, 2, 4)
    expected = [lstm(x)[0] for lstm in net]
    with merged(net):
        torch.testing.assert_close([lstm(x)[0] for lstm in net], expected)
    merge(net)
    torch.testing.assert_close([lstm(x)[0] for lstm in net], expected)


def test_under_inference_mode() -> None:
    """Nothing is an inference tensor afterwards, and training goes on."""
    case = NETWORKS["norms and statistics"]
    net, x = tuned(case), case.inputs()
    before = full_state(net)
    with torch.inference_mode(), merged(net):
        call(net, x)
    assert full_state(net) == before
    assert not any(t.is_inference() for t in (*net.parameters(), *net.buffers()))
    call(net, x).sum().backward()


def test_a_graph_made_before_is_still_good() -> None:
    """The backward pass of an output from before the block, after it."""
    net, x = tuned(NETWORKS["norms and statistics"]).eval(), torch.randn(4, 3, 7, 7)
    net.zero_grad()
    twin = copy.deepcopy(net)
    output, expected = net(x), twin(x)
    with merged(net):
        net.train()(x)
    output.sum().backward()
    expected.sum().backward()
    gradients = [[bits(p.grad) for p in one.parameters()] for one in (net, twin)]
    assert gradients[0] == gradients[1]
