"""`disabled`: the base bit for bit, and the fine-tuned network afterwards."""

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gift
from gift import GiftWarning, disable_fine_tuning, disabled, enable_fine_tuning, merge, merged
from gift.factories import ma_adapt, ma_train, mc_path
from gift.methods import METHODS
from gift.strategies import STRATEGIES, FullFineTuningStrategy
from gift.strategies import LoRAAllFineTuningStrategy as LoRA
from tests.cases.selection import cells
from tests.common import all_bits, bits, enabled, full_state
from tests.test_merging import NETWORKS, Case, call, cnn, fail, ids, look, mlp, run_out, tuned

networks = pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)

SUFFIX = "FineTuningStrategy"


def from_base(case: Case) -> tuple[Any, Any]:
    """A base, and one with the same numbers in the middle of fine-tuning."""
    torch.manual_seed(1)
    base = case.make()
    torch.manual_seed(1)
    return base, tuned(case)


@networks
def test_the_base_bit_for_bit_and_back(case: Case) -> None:
    """Inside: outputs, numbers, classes, attributes, hooks of the base, all of it frozen.
    Outside: every object, bit, flag, mode and gradient as before, in the same order.
    """
    base, net = from_base(case)
    x = case.inputs()
    base, net = base.eval().requires_grad_(False), net.eval()
    expected, plain = call(base, x), look(base)
    output, before = call(net, x).detach(), full_state(net)
    parameters = [name for name, _ in net.named_parameters()]
    state = list(net.state_dict())
    with disabled(net) as same:
        assert same is net
        assert torch.equal(call(net, x), expected)
        assert all_bits(net) == all_bits(base)
        assert list(net.state_dict()) == list(base.state_dict())
        assert look(net) == plain
    assert full_state(net) == before
    assert torch.equal(call(net, x), output)
    assert [name for name, _ in net.named_parameters()] == parameters
    assert list(net.state_dict()) == state


DONE: dict[str, Callable[[Any], Any]] = {
    "eval": lambda net: net.eval(),
    "train": lambda net: net.train(),
    "zero_grad": lambda net: net.zero_grad(),
    "state": lambda net: net.state_dict(),
    "unfrozen": lambda net: net.requires_grad_(True),
    "copied": copy.deepcopy,
    "interrupted": run_out,
    "failed": fail,
    "other": lambda net: enable_fine_tuning(net, FullFineTuningStrategy(), keep_base=False),
    "other part": lambda net: enable_fine_tuning(next(net.children()), FullFineTuningStrategy()),
    "refused": lambda net: merged(net.eval()).__enter__(),
}


@cells(case=NETWORKS, what=DONE)
def test_all_comes_back(case: Case, what: Callable[[Any], Any]) -> None:
    net = tuned(case)
    before = full_state(net)
    with suppress(ZeroDivisionError, KeyboardInterrupt, RuntimeError), disabled(net):
        call(net.eval(), case.inputs())
        what(net)
    assert full_state(net) == before


def test_training_goes_on_as_if_nothing_had_been() -> None:
    """The optimizer holds the same objects, and no number differs from a run without it."""
    runs = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        net = tuned(NETWORKS["norms and statistics"])
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(4):
            x = torch.randn(4, 3, 7, 7)
            loss = net(x).square().mean()
            loss.backward()
            if interrupted:
                with disabled(net):
                    net.eval()(x)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(all_bits(net))
    assert runs[0] == runs[1]


def test_policy_and_reference_from_one_network() -> None:
    """Direct preference optimisation: losses and gradients as with a reference of its own."""
    case = NETWORKS["bert"]
    base, net = from_base(case)
    base, net = base.eval().requires_grad_(False), net.eval()
    twin = copy.deepcopy(net)
    chosen, rejected = ids(), ids()

    def likelihood(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        logs = call(model, tokens).log_softmax(-1)
        return logs.gather(-1, tokens[..., None]).sum((1, 2))

    def loss_of(policy: nn.Module, reference: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        ratios = [likelihood(policy, t) - reference(t) for t in (chosen, rejected)]
        return -F.logsigmoid(0.1 * (ratios[0] - ratios[1])).mean()

    def by_disabling(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), disabled(net):
            return likelihood(net, tokens)

    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (net, twin)]
    for _ in range(3):
        losses = loss_of(net, by_disabling), loss_of(twin, lambda t: likelihood(base, t))
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        gradients = [[bits(p.grad) for p in model.parameters()] for model in (net, twin)]
        assert gradients[0] == gradients[1]
        for optimizer in optimizers:
            optimizer.step()


def test_a_graph_made_before_is_still_good() -> None:
    """The backward pass of an output from before the block, after it."""
    net = tuned(NETWORKS["norms and statistics"]).eval()
    net.zero_grad()
    twin = copy.deepcopy(net)
    x = torch.randn(4, 3, 7, 7)
    output, expected = net(x), twin(x)
    with disabled(net):
        reference = net(x).detach()
    F.mse_loss(output, reference).backward()
    F.mse_loss(expected, reference).backward()
    gradients = [[bits(p.grad) for p in one.parameters()] for one in (net, twin)]
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_that_is_loaded_inside_is_the_base(assign: bool) -> None:
    """Deltas and what is trained in place stay; the frozen weights are the new ones."""
    case = NETWORKS["norms and statistics"]
    base, net = from_base(case)
    new = case.make()
    x, trained = case.inputs(), net.state_dict()
    trained = {name: tensor.clone() for name, tensor in trained.items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with disabled(net):
        net.load_state_dict(copy.deepcopy(new.state_dict()), assign=assign)
        assert torch.equal(net.eval()(x), new.eval()(x))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in net.state_dict().items())
    assert {id(p) for p in net.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert [p.requires_grad for p in net.parameters()] == [True] * len(trained_names(net))
    assert torch.equal(net[0]._gift_frozen("weight"), new[0].weight)
    disable_fine_tuning(net)
    assert all_bits(net) == all_bits(new)
    assert all_bits(net) != all_bits(base)


def trained_names(net: nn.Module) -> list[str]:
    return [name for name, p in net.named_parameters() if p.requires_grad]


def test_statistics_that_the_base_moves_are_the_base_s() -> None:
    net = tuned(NETWORKS["norms and statistics"]).train()
    now = bits(net[1].running_mean)
    x = torch.randn(4, 3, 7, 7)
    with disabled(net):
        before = bits(net[1].running_mean)
        net.train()(x)
        moved = bits(net[1].running_mean)
    assert moved != before
    assert bits(net[1].running_mean) == now
    disable_fine_tuning(net)
    assert bits(net[1].running_mean) == moved


def test_what_is_enabled_inside_is_gone_afterwards() -> None:
    """Another delta is trained on the same base; the first one then finds that base."""
    base = mlp().eval()
    net, x = enabled(copy.deepcopy(base)), torch.randn(2, 6)
    before = full_state(net)
    with disabled(net):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GiftWarning)
            enable_fine_tuning(net, NETWORKS["no delta at all"].strategy())
        net(x).sum().backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
        assert not torch.equal(net(x), base(x))
    assert full_state(net) == before
    with disabled(net):
        assert torch.equal(net.eval()(x), base(x))


def test_one_block_in_another() -> None:
    """A second strategy has a base of its own: the same."""
    net, x = enabled(cnn()).eval(), torch.randn(4, 3, 7, 7)
    output = net(x)
    with disabled(net):
        base = net(x)
        enabled(net, LoRA(rank=1))
        second, inside = net(x), full_state(net)
        with disabled(net):
            assert torch.equal(net(x), base)
        assert full_state(net) == inside
        with merged(net):
            torch.testing.assert_close(net(x), second)
        assert full_state(net) == inside
    assert torch.equal(net(x), output)


@pytest.mark.parametrize(
    "what",
    [
        merge,
        disable_fine_tuning,
        lambda net: merged(net).__enter__(),
        lambda net: disabled(net).__enter__(),
        lambda net: gift.save(net, "never"),
    ],
)
def test_what_needs_the_deltas_is_refused_inside(what: Callable[[Any], Any]) -> None:
    net = enabled(mlp())
    with disabled(net):
        before = full_state(net)
        with pytest.raises(RuntimeError, match=r"temporarily disabled: .* after the with block"):
            what(net)
        assert full_state(net) == before


def test_a_base_that_was_not_kept() -> None:
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        enable_fine_tuning(net, LoRA(), keep_base=False)
    before = full_state(net)
    with pytest.raises(RuntimeError, match="the base was not kept"):
        disabled(net).__enter__()
    assert full_state(net) == before


def test_a_network_without_shapes_is_refused() -> None:
    net = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64))
    enable_fine_tuning(net, LoRA())
    before = full_state(net)
    with pytest.raises(RuntimeError, match="no shape yet: run a batch"):
        disabled(net).__enter__()
    assert full_state(net) == before


def test_parts_keep_their_own_modes() -> None:
    """A new head of which one part was set to evaluation."""
    case = NETWORKS["a new head"]
    net = tuned(case).train()
    net[-1].eval()
    net[2][0].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    with disabled(net):
        net.eval()
    assert {name: module.training for name, module in net.named_modules()} == modes


def test_a_base_that_gets_another_dtype_inside() -> None:
    """What is trained in place goes with it; deltas are computed with as they are."""
    net, x = tuned(NETWORKS["norms and statistics"]).eval(), torch.randn(4, 3, 7, 7)
    expected = net(x)
    with disabled(net):
        net.double()
    torch.testing.assert_close(net(x.double()), expected.double(), rtol=1e-5, atol=1e-5)
    net(x.double()).sum().backward()
    assert all(p.grad.dtype == p.dtype for p in net.parameters())


@pytest.mark.filterwarnings("ignore::gift.GiftWarning")
@pytest.mark.parametrize("method", ["vera", "fourierft", "shira", "randlora"])
def test_a_base_that_is_cast_inside_leaves_other_networks_as_they_are(method: str) -> None:
    """Layers of all networks share what is drawn from a seed."""

    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        enable_fine_tuning(net, STRATEGIES[f"{METHODS[method].strategy_prefix}All{SUFFIX}"]())
        return net

    other, net = make(), make()
    before = full_state(other)
    with disabled(net):
        net.double()
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        assert tensor.dtype in (torch.float64, torch.int64), name
    drawn = [name for name, _ in net.named_buffers() if name.startswith("0.")]
    pairs = [(net.get_buffer(name), net.get_buffer(f"1{name[1:]}")) for name in drawn]
    assert all(one is same for one, same in pairs), "the layers of one network share it still"
    for one in (other, make()):
        assert {t.dtype for t in one.buffers()} <= {torch.float32, torch.int64}
        assert one(torch.ones(2, 8)).dtype == torch.float32
    assert full_state(other) == before


def test_under_inference_mode() -> None:
    """Nothing is an inference tensor afterwards, and training and the way back go on."""
    case = NETWORKS["norms and statistics"]
    base, net = from_base(case)
    x, before = case.inputs(), full_state(net)
    with torch.inference_mode(), disabled(net):
        call(net.eval(), x)
    assert full_state(net) == before
    assert not any(t.is_inference() for t in (*net.named_parameters(), *net.buffers())
                   if isinstance(t, torch.Tensor))  # fmt: skip
    call(net, x).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    twin = copy.deepcopy(net)
    with disabled(twin):
        assert all_bits(twin) == all_bits(base)
    disable_fine_tuning(net)
    assert all_bits(net) == all_bits(base)


def test_hooks_fire_for_both() -> None:
    net, seen = enabled(mlp()), []
    net[0].register_forward_hook(lambda *args: seen.append(args[2].detach()))
    net.eval()
    x = torch.randn(2, 6)
    net(x)
    with disabled(net):
        net(x)
        base = net[0](x).detach()
    net(x)
    assert len(seen) == 4
    assert torch.equal(seen[1], base)
    assert torch.equal(seen[3], seen[0])
    assert not torch.equal(seen[1], seen[0])


def test_a_compiled_network() -> None:
    net, x = enabled(mlp()).eval(), torch.randn(2, 6)
    compiled = torch.compile(net, backend="eager")
    expected = compiled(x)
    for _ in range(2):
        with disabled(net):
            assert torch.equal(compiled(x), net(x))
            assert not torch.allclose(compiled(x), expected)
        assert torch.equal(compiled(x), expected)


def test_what_is_refused_keeps_its_gradients() -> None:
    net = nn.Linear(6, 5)
    enable_fine_tuning(net, FullFineTuningStrategy(), keep_base=False)
    net(torch.ones(2, 6)).sum().backward()
    before = full_state(net)
    with pytest.raises(RuntimeError, match="was not kept"), disabled(net):
        pass
    assert full_state(net) == before
    assert net.weight.grad is not None


class Listed(nn.Module):
    """Has a list and a set of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.notes, self.tags = nn.Linear(4, 4), ["own"], {"own"}


@pytest.mark.parametrize("kind", ["notes", "tags"])
def test_what_an_action_adds_to_a_list_of_the_author_is_taken_back(kind: str) -> None:
    """Nothing else of that module changes."""
    net = nn.Sequential(Listed(), nn.Linear(4, 4))

    def note(parent: Any, name: str, path: str, class_name: str, module: Any) -> None:
        module.notes.append("more") if kind == "notes" else module.tags.add("more")

    gift.enable_fine_tuning(net, gift.FineTuningStrategy([(mc_path("0"), note)]))
    assert len(getattr(net[0], kind)) == 2
    gift.disable_fine_tuning(net)
    assert list(getattr(net[0], kind)) == ["own"]


class Kept(nn.Module):
    """A network whose methods somebody keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.fc(x))


@pytest.mark.parametrize("after", ["disable", "merge", "another"])
def test_methods_that_were_kept_are_those_of_the_present_network(after: str) -> None:
    net, x = Kept(), torch.randn(3, 4)
    gift.enable_fine_tuning(net, LoRA(rank=1))
    kept = {name: getattr(net, name) for name in ("state_dict", "parameters", "load_state_dict")}
    call, of_layer, reset = net.__call__, net.fc.state_dict, net.fc.reset_parameters
    merge(net) if after == "merge" else disable_fine_tuning(net)
    if after == "another":
        gift.enable_fine_tuning(net, FullFineTuningStrategy())
    expected = ["fc.bias", "fc.weight", "head.bias", "head.weight"]
    state = kept["state_dict"]()
    assert sorted(state) == expected
    assert [id(p) for p in kept["parameters"]()] == [id(p) for p in net.parameters()]
    assert sorted(of_layer()) == ["bias", "weight"]
    torch.testing.assert_close(call(x), net(x), rtol=0, atol=0)
    kept["load_state_dict"]({name: value + 1 for name, value in state.items()})
    before = bits(net.fc.weight)
    reset()
    assert bits(net.fc.weight) != before


def test_a_class_of_a_user_on_top_keeps_its_methods() -> None:
    net = enabled(Kept())

    class Mine(type(net)):  # type: ignore[misc]
        def own(self) -> int:
            return 5

    assert Mine.own.__qualname__.endswith("Mine.own")
    assert not hasattr(Mine.own, "__wrapped__")
    net.__class__ = Mine
    assert net.own() == 5


def test_what_is_trained_in_place_may_be_written_while_the_network_is_merged() -> None:
    """It is another tensor for that while, as an optimizer within the block expects."""
    net, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(3, 4)
    strategy = gift.FineTuningStrategy(
        [(mc_path("0"), ma_adapt("lora", rank=1)), (mc_path("1"), ma_train())]
    )
    gift.enable_fine_tuning(net, strategy)
    before, expected = bits(net[1].weight), net(x)
    with merged(net), torch.no_grad():
        net[1].weight.add_(1)
        assert not torch.allclose(net(x), expected)
    assert bits(net[1].weight) == before
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
