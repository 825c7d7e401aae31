"""Weights that are read many times: one effective weight, with the values and gradients of many."""

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import pa_adapt, pc_any
from gift.methods import METHODS
from gift.strategies import DoRAAllFineTuningStrategy, LoHaAllFineTuningStrategy
from gift.strategies import LoRAAllFineTuningStrategy as LoRAAll
from tests.common import bytes_kept

DOUBLE = torch.float64


class Experts(nn.Module):
    """As those of mixtures: three axes, and a loop over the first."""

    def __init__(self, experts: int = 16, rows: int = 12, columns: int = 10) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, rows, columns, dtype=DOUBLE))
        self.down = nn.Parameter(torch.randn(experts, columns, rows, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        each = [F.linear(F.linear(x, self.up[e]).relu(), self.down[e]) for e in range(len(self.up))]
        return torch.stack(each).sum(0)


class Again(nn.Module):
    """A cell that is called again and again."""

    def __init__(self, kind: type[nn.Module] = nn.LSTMCell, steps: int = 40) -> None:
        super().__init__()
        self.cell = kind(16, 16, dtype=DOUBLE)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for _ in range(self.steps):
            state = self.cell(x, state)
        return state[0] if isinstance(state, tuple) else state


def moved(net: nn.Module) -> Any:
    """`net`, its delta as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return net


def raw(method: str = "lora", **settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy([], [(pc_any(), pa_adapt(method, **settings))])


def experts(method: str = "lora", **settings: Any) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    base = Experts()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, raw(method, rank=2, **settings))
    return base, moved(net), torch.randn(5, 10, dtype=DOUBLE, requires_grad=True)


def delta(net: Any, name: str) -> Tensor:
    """The formulas of LoRA and LoHa."""
    if hasattr(net, f"{name}_lora_B"):
        return getattr(net, f"{name}_lora_B") @ getattr(net, f"{name}_lora_A")
    b1, a1, b2, a2 = (getattr(net, f"{name}_loha_{part}") for part in ("B1", "A1", "B2", "A2"))
    return (b1 @ a1) * (b2 @ a2)


def formula(base: nn.Module, net: nn.Module, x: Tensor) -> Tensor:
    """The output with weights of which each is made once, in plain autograd."""
    weights = {n: p.detach() + delta(net, n) for n, p in base.named_parameters()}
    return functional_call(base, weights, (x,))


def gradients(y: Tensor, net: nn.Module, *more: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), [*net.parameters(), *more], **options)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def makings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices that LoRA made."""
    made: list[tuple[int, ...]] = []
    weight = METHODS["lora"].effective_weight

    def counted(self: Any, matrix: Tensor, parameters: Any) -> Tensor:
        made.append(tuple(matrix.shape))
        return weight(self, matrix, parameters)

    monkeypatch.setattr(METHODS["lora"], "effective_weight", counted)
    return made


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("method", ["lora", "loha"])
def test_experts_in_a_loop(method: str, whole: bool) -> None:
    base, net, x = experts(method)
    if whole:  # read by products of all matrices
        for one in (base, net):
            one.forward = lambda x, one=one: torch.einsum("eor,eri,bi->bo", one.down, one.up, x)
    found, expected = net(x), formula(base, net, x)
    close(found, expected)
    close(gradients(found, net, x), gradients(expected, net, x))


@pytest.mark.parametrize("method", ["lora", "loha", "dora", "oft"])
def test_experts_keep_one_weight(method: str) -> None:
    torch.manual_seed(0)
    net, settings = Experts(), {} if method == "oft" else {"rank": 2}
    enable_fine_tuning(net, raw(method, **settings))
    base = Experts()
    base.requires_grad_(False)
    x = torch.randn(5, 10, dtype=DOUBLE, requires_grad=True)
    weights = sum(p.nbytes for p in base.parameters())
    # Each of the 32 readings would keep half of it.
    assert bytes_kept(net, x) <= bytes_kept(base, x) + 1.2 * weights


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_experts_make_one_weight_a_call(
    mode: Callable[[], Any], makings: list[tuple[int, ...]]
) -> None:
    base, net, x = experts()
    makings.clear()
    with mode():
        found = net(x), net(x.detach())
    assert len(makings) == 4  # two tensors, two calls
    close(found[0].detach(), formula(base, net, x).detach())
    close(found[1].detach(), formula(base, net, x).detach())


def test_large_weights_of_a_part_are_made_once_while_it_runs(
    makings: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights too large to keep until the network has run."""
    monkeypatch.setattr("gift.core.weights.reading._FEW_BYTES", 0)
    net = nn.Sequential(Experts(), nn.Tanh())
    enable_fine_tuning(net, raw("lora", rank=2))
    makings.clear()
    with torch.no_grad():
        net(torch.randn(5, 10, dtype=DOUBLE))
    assert len(makings) == 2


@pytest.mark.parametrize("index", [1, -1, torch.tensor(2), slice(1, 3), [0, 2], (1, 2)], ids=str)
def test_parts_of_a_batch_of_matrices(index: Any) -> None:
    base, net, _ = experts()
    found = net.up[index]
    expected = (base.up.detach() + delta(net, "up"))[index]
    close(found.detach(), expected.detach())
    parameters = [net.up_lora_B, net.up_lora_A]
    g = torch.randn(expected.shape, dtype=DOUBLE)
    close(torch.autograd.grad(found, parameters, g), torch.autograd.grad(expected, parameters, g))


def test_the_gradient_of_one_expert_is_never_as_large_as_all() -> None:
    """Through the whole weight each reading would fill it with zeros."""
    _, net, x = experts()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            sizes.extend([result.numel()] if isinstance(result, Tensor) else [])
            return result

    loss = net(x).sum()
    with Watch():
        loss.backward()
    assert sizes
    assert max(sizes) < net.up_lora_A.numel() * 4 < net._parameters["up"].numel()


@pytest.mark.parametrize(
    "strategy", [LoRAAll, LoHaAllFineTuningStrategy, DoRAAllFineTuningStrategy]
)
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("whole", [True, False], ids=["network", "cell"])
def test_a_cell_keeps_little_more_than_the_plain_one(
    kind: type[nn.Module], strategy: Any, whole: bool
) -> None:
    base = Again(kind)
    net = copy.deepcopy(base)
    enable_fine_tuning(net if whole else net.cell, strategy())
    x = torch.randn(3, 16, dtype=DOUBLE)
    weights = sum(p.nbytes for p in base.parameters())
    assert bytes_kept(net, x) <= bytes_kept(base, x) + 1.1 * weights


@pytest.mark.parametrize("whole", [True, False], ids=["network", "cell"])
def test_a_cell_that_is_called_again(whole: bool) -> None:
    torch.manual_seed(0)
    base = Again(steps=5)
    net = copy.deepcopy(base)
    enable_fine_tuning(net if whole else net.cell, LoRAAll(rank=2))
    moved(net if whole else net.cell)
    x, cell = torch.randn(3, 16, dtype=DOUBLE), net.cell
    weights = {name: p.detach() for name, p in base.named_parameters()}
    for end in ("ih", "hh"):
        b, a = getattr(cell, f"weight_{end}_lora_B"), getattr(cell, f"weight_{end}_lora_A")
        weights[f"cell.weight_{end}"] = weights[f"cell.weight_{end}"] + b @ a
    expected, found = functional_call(base, weights, (x,)), net(x)
    trained = [p for p in nn.Module.parameters(net) if p.requires_grad]
    close(found, expected)
    close(
        torch.autograd.grad(found.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
    )


def test_few_weights_are_made_once_in_a_call_without_gradients(
    makings: list[tuple[int, ...]],
) -> None:
    net = Again()
    enable_fine_tuning(net, LoRAAll())
    makings.clear()
    with torch.no_grad():
        net(torch.randn(3, 16, dtype=DOUBLE))
    assert len(makings) == 2


@pytest.mark.parametrize(("fitting", "times"), [(2, 2), (1, 1 + 4), (0, 4 + 4)])
def test_weights_are_kept_up_to_some_bytes_in_all(
    fitting: int, times: int, makings: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two equally large weights of a cell that is called four times."""
    net = Again(steps=4)
    enable_fine_tuning(net, LoRAAll())
    size = max(net.cell.weight_ih.nbytes, net.cell.weight_hh.nbytes)
    assert net.cell.weight_ih.nbytes == net.cell.weight_hh.nbytes
    monkeypatch.setattr("gift.core.weights.reading._FEW_BYTES", fitting * size)
    makings.clear()
    with torch.no_grad():
        net(torch.randn(3, 16, dtype=DOUBLE))
    assert len(makings) == times


def test_backward_after_backward() -> None:
    """Accumulation without a step in between, and a graph that is kept."""
    base, net, x = experts()
    expected = gradients(formula(base, net, x), net)
    for _ in range(2):
        close(gradients(net(x), net), expected)
    first, second = net(x), net(x)  # of one weight
    close(gradients(first, net), expected)
    close(gradients(second, net), expected)
    kept = net(x)
    for _ in range(2):
        close(gradients(kept, net, retain_graph=True), expected)
    other = net(x)
    torch.autograd.grad(other.sum(), x, retain_graph=True)
    close(gradients(other, net), expected)
    weight = net.up  # held by a user
    for _ in range(2):
        close(gradients(net(x), net), expected)
    assert weight.requires_grad


def test_what_a_graph_keeps_is_let_go_with_it() -> None:
    _, net, x = experts()
    places: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().nbytes() == net._parameters["up"].nbytes:
            places.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x).sum()
    assert places
    assert all(place() is not None for place in places)
    loss.backward()
    assert all(place() is None for place in places)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nobody_keeps_a_weight_after_a_call(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net, x = experts()
    places: list[Any] = []
    linear = F.linear

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        places.append(weakref.ref(weight.untyped_storage()))
        return linear(x, weight)

    monkeypatch.setattr(F, "linear", watched)
    with mode():
        net(x)
    assert len(places) == 32
    assert all(place() is None for place in places)


def test_a_step_of_an_optimizer_is_seen() -> None:
    base, net, x = experts()
    held = net.up, net(x)  # an old weight and an old graph
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        close(net(x), formula(base, net, x))
        close(net.up.detach(), (base.up + delta(net, "up")).detach())
    assert not torch.equal(held[0], net.up)


@pytest.mark.parametrize("tensor", ["up_lora_B", "up_lora_A", "up"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_write_behind_autograd_is_seen(tensor: str, mode: Any) -> None:
    """What is written through ``.data`` changes no version that torch counts."""
    base, net, x = experts()
    with mode():
        held = net(x), net.up
        net._parameters[tensor].data.mul_(-2)
        if tensor == "up":
            base.up.data.mul_(-2)
        close(net.up.detach(), (base.up + delta(net, "up")).detach())
        close(net(x), formula(base, net, x))
    assert not torch.equal(held[1], net.up)


def test_a_write_while_a_network_runs_is_seen() -> None:
    class Learning(nn.Module):
        """That takes a step of its own before it answers."""

        def __init__(self, experts: nn.Module) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                loss = self.experts(x).square().sum()
                factors = [self.experts.up_lora_A, self.experts.up_lora_B]
                for factor, g in zip(factors, torch.autograd.grad(loss, factors), strict=True):
                    factor.data.sub_(1e-3 * g)
            return self.experts(x)

    base, x = Experts(), torch.randn(5, 10, dtype=DOUBLE)
    net = Learning(copy.deepcopy(base))
    enable_fine_tuning(net, raw(rank=2))
    moved(net)
    close(net(x), formula(base, net.experts, x))


def test_a_factor_that_was_changed_before_the_backward_pass_is_reported() -> None:
    _, net, x = experts()
    for values in (lambda: net(x), lambda: net.up.square()):
        y = values()
        with torch.no_grad():
            net.up_lora_A.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("method", ["lora", "loha"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_shared_layer(method: str, reentrant: bool) -> None:
    """Which of the calls makes the weight differs between the passes."""
    base, net, x = experts(method)
    block = nn.Sequential(net)

    def twice(of: Callable[[Tensor], Tensor]) -> Tensor:
        return of(of(x) / 100)

    found = twice(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    expected = twice(lambda x: formula(base, net, x))
    close(found, expected)
    found.square().sum().backward()
    close([p.grad for p in net.parameters()], list(gradients(expected, net)))
    assert not any(p.grad.requires_grad for p in net.parameters())


def test_offloading_what_is_saved() -> None:
    base, net, x = experts()
    with torch.autograd.graph.save_on_cpu():
        found = net(x)
    close(gradients(found, net), gradients(formula(base, net, x), net))


@pytest.mark.parametrize("method", ["lora", "loha"])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "one"])
def test_gradients_of_gradients(method: str, part: bool) -> None:
    torch.manual_seed(0)
    net: Any = Experts(2, 5, 5)
    enable_fine_tuning(net, raw(method, rank=1))
    moved(net)
    names = [name for name in dict(net.named_parameters()) if name.startswith(f"up_{method}")]
    values = [getattr(net, name).detach().clone().requires_grad_() for name in names]

    class Reading(nn.Module):
        def forward(self) -> Tensor:
            return net.up[1].sin() if part else net.up.sin()

    reading = Reading()
    reading.net = net

    def weight(*values: Tensor) -> Tensor:
        return functional_call(
            reading, {f"net.{name}": v for name, v in zip(names, values, strict=True)}, ()
        )

    assert torch.autograd.gradcheck(weight, values)
    assert torch.autograd.gradgradcheck(weight, values)


def test_a_delta_that_is_computed() -> None:
    """The gradient passes through what a factor was made from, each time on its own."""
    base, net, x = experts()
    source = torch.ones((), dtype=DOUBLE, requires_grad=True)
    changed = {"up_lora_B": net.up_lora_B * source, "up_lora_A": net.up_lora_A * source.exp()}
    found = functional_call(net, changed, (x,))
    weights = {"up": base.up.detach() + changed["up_lora_B"] @ changed["up_lora_A"]}
    weights["down"] = base.down.detach() + delta(net, "down")
    expected = functional_call(base, weights, (x,))
    close(found, expected)
    options = {"retain_graph": True}
    close(gradients(found, net, source, **options), gradients(expected, net, source, **options))
    twice = [
        torch.autograd.grad(
            gradients(y, net, source, create_graph=True)[-1], source, retain_graph=True
        )
        for y in (found, expected)
    ]
    close(*twice)
    close(net(x), formula(base, net, x))


def test_threads_read_on_their_own() -> None:
    base, net, x = experts()
    expected = formula(base, net, x).detach()
    problems: list[Exception] = []

    def work(mode: Any) -> None:
        try:
            for _ in range(20):
                with mode():
                    y = net(x.detach())
                close(y.detach(), expected)
                assert y.requires_grad == (mode is torch.enable_grad)
        except Exception as error:
            problems.append(error)

    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad)
    threads = [threading.Thread(target=work, args=(mode,)) for mode in modes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_reads_its_own(copied: Any) -> None:
    base, net, x = experts()
    held = net.up, net(x)
    twin = copied(net)
    with torch.no_grad():
        twin.up_lora_B.mul_(3)
    close(twin(x), formula(base, twin, x))
    close(net(x), held[1])
    assert twin.up.untyped_storage().data_ptr() != held[0].untyped_storage().data_ptr()


def test_dropout_draws_at_each_reading() -> None:
    _, net, _ = experts(lora_dropout=0.5)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = net

        def forward(self) -> tuple[Tensor, Tensor]:
            return self.experts.up.clone(), self.experts.up.clone()

    torch.manual_seed(0)
    one, other = Twice()()
    assert not torch.equal(one, other)
    one, other = Twice().eval()()
    assert torch.equal(one, other)


def test_modes_have_weights_of_their_own() -> None:
    """One that was made without gradients is none for training, and so on."""
    base, net, x = experts()

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = net

        def forward(self) -> Iterator[Tensor]:
            modes = (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.no_grad)
            return [self._in(mode) for mode in modes]

        def _in(self, mode: Any) -> Tensor:
            with mode():
                return self.experts(x)

    outer = Modes()
    outputs = outer()
    assert [y.requires_grad for y in outputs] == [False, False, True, False]
    close(gradients(outputs[2], net), gradients(formula(base, net, x), net))
    for frozen in ("up_lora_A", "up_lora_B"):
        getattr(net, frozen).requires_grad = False
    y = net(x)
    y.sum().backward()
    assert net.up_lora_B.grad is None
    assert net.down_lora_B.grad is not None


@pytest.mark.parametrize("first", [True, False])
def test_autocast_has_a_weight_of_its_own(first: bool) -> None:
    net = Again(nn.GRUCell, 2).float()
    enable_fine_tuning(net, LoRAAll())
    with torch.no_grad():
        net.cell.weight_ih_lora_B.normal_()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> list[Tensor]:
            found = []
            for cast in (first, not first):
                with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
                    found.append(net.cell.weight_ih.clone())
            return found

    cast, exact = Both()()[:: 1 if first else -1]
    frozen, b, a = (net.cell._parameters[f"weight_ih{end}"] for end in ("", "_lora_B", "_lora_A"))
    torch.testing.assert_close(exact, frozen + b @ a)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cast, (frozen + b @ a).to(cast.dtype), rtol=0.02, atol=0.02)
    assert cast.dtype == exact.dtype == torch.float32


def test_torch_func_and_batches_of_gradients() -> None:
    base, net, x = experts()
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach())
    for i, row in enumerate(x.detach()):
        expected = gradients(formula(base, net, row[None]), net)
        close([g[i] for g in each.values()], list(expected))
    y = net.up
    g = torch.randn(3, *y.shape, dtype=DOUBLE)
    factors = (net.up_lora_B, net.up_lora_A)
    found = torch.autograd.grad(y, factors, g, is_grads_batched=True)
    expected = [torch.autograd.grad(base.up + delta(net, "up"), factors, one) for one in g]
    close(found, tuple(map(torch.stack, zip(*expected, strict=True))))


def test_compiled_in_one_graph() -> None:
    base, net, x = experts()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = compiled(x)
    close(found, formula(base, net, x))
    close(gradients(found, net), gradients(formula(base, net, x), net))


def test_tied_tensors_have_one_weight(makings: list[tuple[int, ...]]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self) -> tuple[Tensor, Tensor]:
            return self.table.weight, self.head.weight

    net = Tied()
    enable_fine_tuning(net, LoRAAll(rank=1))
    makings.clear()
    one, other = net()
    assert len(makings) == 1
    assert one.data_ptr() == other.data_ptr()


def test_disabling_while_a_weight_is_held() -> None:
    base, net, x = experts()
    held = net.up
    disable_fine_tuning(net)
    assert torch.equal(net(x), base(x))
    assert not torch.equal(held, net.up)
