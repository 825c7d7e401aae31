"""What is refused: by which error, with what was found and what would work, and without a trace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gift import (
    FineTuningStrategy,
    GiftWarning,
    ModuleIterator,
    disable_fine_tuning,
    enable_fine_tuning,
    load_strategy_from_config,
    merge_strategies,
    plan_fine_tuning,
)
from gift.core.weights.record import weight_deltas
from gift.factories import (
    ma_adapt,
    ma_freeze,
    ma_train,
    mc_any,
    mc_layer,
    mc_name,
    pa_adapt,
    pc_any,
)
from gift.schedules import load_schedule_from_config
from gift.strategies import (
    DebugStrategy,
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRAConvFineTuningStrategy,
)
from tests.common import enabled, full_state

LORA = LoRAAllFineTuningStrategy


def mlp() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
    net[0].register_forward_hook(lambda *call: None)
    net[2].weight.requires_grad = False
    net[2].eval()
    return net


class Raw(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, tensor.is_floating_point()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def caps(*module_caps: Any, para: Any = (), types: Any = ()) -> FineTuningStrategy:
    return FineTuningStrategy(list(module_caps), list(para), types)


def raising(error: BaseException, at: str) -> Callable[..., bool]:
    """A check or an action that fails at the module of that path, and is true elsewhere."""

    def part(*place: Any, **params: Any) -> bool:
        if place[2] == at:
            raise error
        return at == "" or place[2] != ""

    return part


def int8() -> nn.Module:
    net = mlp()
    net[2].weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    return net


def clashing(**attributes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Raw()
        for name, value in attributes.items():
            setattr(net.layer, name, value)
        return net

    return make


def tied_for_two_methods() -> tuple[nn.Module, FineTuningStrategy]:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    return net, caps((mc_name("0"), ma_adapt(rank=1)), (mc_name("2"), ma_adapt(rank=2)))


def adapt_twice(*place: Any) -> None:
    ma_adapt(rank=1)(*place)
    ma_adapt(rank=2)(*place)


Refusal = tuple[Callable[[], Any], Any, type[BaseException], list[str]]
REFUSALS: dict[str, Refusal] = {
    # no module, no strategy
    "a number": (lambda: 5, LORA(), TypeError, ["expected a torch.nn.Module", "int"]),
    "a class": (lambda: nn.Linear, LORA(), TypeError, ["expected a torch.nn.Module", "type"]),
    "a list": (lambda: [nn.Linear(2, 2)], LORA(), TypeError, ["torch.nn.Module", "list"]),
    "no strategy": (mlp, None, TypeError, ["expected a FineTuningStrategy", "None"]),
    "a name": (mlp, "lora", TypeError, ["expected a FineTuningStrategy", "'lora'"]),
    "a strategy class": (mlp, LORA, TypeError, ["an instance", "parentheses", LORA.__name__]),
    "caps alone": (mlp, [(mc_any(), ma_train())], TypeError, ["FineTuningStrategy", "mc_any()"]),
    "two the wrong way round": (LORA, mlp(), TypeError, ["torch.nn.Module"]),
    "another type": (mlp, caps((mc_any(), ma_train()), types=nn.Conv2d), TypeError,
                     ["FineTuningStrategy is for Conv2d", "the network is Sequential"]),
    "two other types": (mlp, caps((mc_any(), ma_train()), types=[nn.Conv2d, nn.LSTM]), TypeError,
                        ["Conv2d or LSTM", "Sequential"]),
    "another type, nested": (
        mlp, caps((mc_name("2"), caps((mc_any(), ma_train()), types=nn.Conv2d))), TypeError,
        ["is for Conv2d", "Linear"]),
    # nothing to do
    "no caps": (mlp, FineTuningStrategy(), ValueError, ["no caps", "FreezeStrategy()"]),
    "no match": (mlp, LoRAConvFineTuningStrategy(), ValueError,
                 ["no cap of LoRAConvFineTuningStrategy", "mc_layer('conv')", "['Linear', 'ReLU'"]),
    "no match, misspelt": (lambda: Raw(), caps((mc_name("layr"), ma_train())), ValueError,
                           ["mc_name('layr')", "closest names: ['layer']"]),
    "no match, in a lambda": (
        lambda: Raw(), caps((lambda *p: p[1] == "layr", ma_train())), ValueError,
        ["<lambda> (test_bad_input.py:", "closest names: ['layer']"]),
    "no match, misspelt parameter": (
        lambda: Raw(gate=torch.ones(2)), caps(para=[(lambda *p: p[5] == "gates", ma_train())]),
        ValueError, ["parameter cap 0", "'gate'"]),
    "no match, misspelt class": (
        mlp, caps((lambda *p: p[3] == "Linaer", ma_train())), ValueError, ["'Linear'"]),
    "no such head": (lambda: Raw(), HeadReplacementStrategy(3, "layers"), ValueError, ["'layer'"]),
    # checks and actions
    "a check raises": (
        mlp, caps((mc_name("0"), ma_adapt()), (raising(KeyError("here"), "2"), ma_train())),
        KeyError, ["here", "check", "module cap 1", "on 2"]),
    "a parameter check raises": (
        mlp, caps((mc_name("0"), ma_adapt()), para=[(raising(KeyError("here"), "2"), ma_train())]),
        KeyError, ["here", "check", "parameter cap 0", "on 2.weight"]),
    "a class for a check": (mlp, caps((nn.Linear, ma_train())), TypeError, ["check", "Linear"]),
    "a factory for a check": (mlp, caps((mc_any, ma_train())), TypeError, ["check", "mc_any"]),
    "an action raises": (mlp, caps((mc_layer(), raising(OSError("full"), "2"))), OSError,
                         ["full", "raised by the action of mc_layer() -> part", "on 2"]),
    "an action is interrupted": (
        mlp, caps((mc_layer(), raising(KeyboardInterrupt(), "2"))), KeyboardInterrupt, []),
    "an action takes no params": (
        mlp, caps((mc_name("0"), ma_adapt()), (mc_name("2"), ma_train(), {"rank": 3})), TypeError,
        ["rank", "action of mc_name('2') -> ma_train() with {'rank': 3} on 2"]),
    "a factory for an action": (mlp, caps((mc_name("2"), ma_train)), TypeError, ["on 2"]),
    "a parameter check for modules": (mlp, caps((pc_any(), ma_train())), TypeError, ["para_caps"]),
    # weights
    "rank of several layers": (
        lambda: nn.Sequential(*(nn.Linear(4 + i, 4) for i in range(3)), nn.Linear(64, 64)),
        LORA(rank=8, clip_rank=False), ValueError,
        ["the network is unchanged", "rank 8 is above 4", "4 x 4", "4 x 5", "4 x 6", "0", "1", "2",
         "clip_rank=True"]),
    "rank of a parameter and a layer": (
        lambda: Raw(gate=torch.ones(5, 3)),
        caps((mc_name("layer"), ma_adapt(rank=9)), para=[(pc_any(), pa_adapt(rank=9))]), ValueError,
        ["rank 9 is above 3", "5 x 3", "gate", "rank 9 is above 8", "8 x 8", "layer"]),
    "rank inside a block": (
        lambda: nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4), nn.LSTM(5, 5))}),
        caps((mc_name("block"), ma_adapt(rank=6))), ValueError,
        ["block (Sequential)", "0.weight: rank 6", "1.weight_ih_l0: rank 6", "above 4", "above 5"]),
    "int8": (int8, LORA(rank=2), ValueError,
             ["2 (Linear)", "torch.int8", "floating-point", "before quantising"]),
    "no elements": (lambda: nn.ModuleDict({"empty": nn.Linear(4, 0)}), LORA(), ValueError,
                    ["empty", "no elements", "(0, 4)"]),
    "a name is taken": (clashing(lora_A=3), LORA(), ValueError,
                        ["layer", "['lora_A']", "already"]),
    "names are taken by a module": (clashing(lora_B=nn.ReLU()), LORA(), ValueError, ["['lora_B']"]),
    "all kinds at once": (
        lambda: nn.Sequential(nn.Linear(4, 0), clashing(lora_A=3)().layer, nn.Linear(2, 2)),
        LORA(rank=5), ValueError,
        ["no elements", "['lora_A']", "rank 5 is above 2", *(f"{i} (Linear)" for i in range(3))]),
    "adapted twice": (mlp, caps((mc_name("2"), adapt_twice)), ValueError,
                      ["'weight' is already adapted by lora(rank=1)"]),
    "nothing to adapt": (mlp, caps((mc_name("1"), ma_adapt())), ValueError,
                         ["ReLU has no weight of a known layer type", "pa_adapt"]),
    "a head without inputs": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), HeadReplacementStrategy(3),
        ValueError, ["1", "lazy"]),
    "no head": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3)), HeadReplacementStrategy(3), ValueError,
                ["mc_last_linear()", "'Conv2d'"]),
    "the network is its head": (lambda: nn.Linear(4, 4), HeadReplacementStrategy(3), ValueError,
                                ["the network itself (Linear) cannot be replaced"]),
    # wrapped, enabled
    "enabled": (lambda: enabled(mlp()), LORA(), RuntimeError,
                ["the network is already being fine-tuned", "disable_fine_tuning", "merge"]),
    "enabled inside": (lambda: nn.ModuleDict({"inner": enabled(mlp())}), LORA(), RuntimeError,
                       ["inner is already being fine-tuned"]),
    "a part of an enabled one": (lambda: enabled(mlp())[0], LORA(), RuntimeError, ["already"]),
    "scripted": (lambda: torch.jit.script(Raw()), LORA(), ValueError,
                 ["RecursiveScriptModule", "network inside first"]),
    "scripted inside": (lambda: nn.Sequential(nn.ReLU(), torch.jit.script(Raw())), LORA(),
                        ValueError, ["1 is a RecursiveScriptModule"]),
    "traced": (lambda: torch.jit.trace(Raw(), torch.ones(1, 8)), LORA(), ValueError, ["Module"]),
    "compiled": (lambda: torch.compile(mlp()), LORA(), ValueError, ["OptimizedModule", "inside"]),
    "compiled inside": (lambda: nn.Sequential(torch.compile(mlp())), LORA(), ValueError,
                        ["0 is a OptimizedModule"]),
    "data parallel": (lambda: nn.DataParallel(mlp()), LORA(), ValueError, ["DataParallel"]),
}  # fmt: skip


def text_of(error: BaseException) -> str:
    """The message, and the notes that a traceback shows below it."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("call", [enable_fine_tuning, plan_fine_tuning])
@pytest.mark.parametrize(("make", "strategy", "kind", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal(
    make: Callable[[], Any], strategy: Any, kind: type[BaseException], words: list[str], call: Any
) -> None:
    net = make()
    before = full_state(net) if isinstance(net, nn.Module) else None
    with pytest.raises(kind) as caught:
        call(net, strategy)
    for word in words:
        assert word in text_of(caught.value)
    if isinstance(net, nn.Module):
        assert full_state(net) == before


@pytest.mark.parametrize("call", [enable_fine_tuning, plan_fine_tuning])
def test_a_tied_tensor_takes_one_method(call: Any) -> None:
    net, strategy = tied_for_two_methods()
    before = full_state(net)
    with pytest.raises(
        ValueError, match=r"2\.weight is tied.*rank=1.*rank=2.*one tensor can have one"
    ):
        call(net, strategy)
    assert full_state(net) == before


# --- whatever an action did --------------------------------------------------------------------


def change_values(layer: Any) -> None:
    nn.init.constant_(layer.weight, 7.0)


def change_data(layer: Any) -> None:
    layer.weight.data = torch.ones(3, 3, dtype=torch.float64)


def change_everything(layer: Any) -> None:
    layer.weight.requires_grad = not layer.weight.requires_grad
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.register_buffer("extra", torch.ones(2))
    layer.register_parameter("more", nn.Parameter(torch.ones(2)))
    layer.add_module("child", nn.ReLU())
    layer.register_forward_hook(lambda *call: None)
    layer.register_forward_pre_hook(lambda *call: None)
    layer.note, layer.bias = "changed", None
    del layer.in_features
    layer.train(not layer.training)


def change_class(layer: Any) -> None:
    layer.__class__ = nn.Bilinear
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


VANDALS = [change_values, change_data, change_everything, change_class]


@pytest.mark.parametrize("vandal", VANDALS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["refused", "planned", "disabled"])
def test_whatever_an_action_changed_is_taken_back(vandal: Callable[[Any], None], how: str) -> None:
    net = mlp()
    before = full_state(net)
    strategy = caps((mc_name("0"), lambda *place: vandal(place[4])), (mc_name("2"), ma_train()))
    if how == "planned":
        plan_fine_tuning(net, strategy)
    elif how == "disabled":
        enable_fine_tuning(net, strategy)
        assert full_state(net) != before
        disable_fine_tuning(net)
    else:
        strategy = caps(strategy.module_caps[0], (mc_name("2"), raising(OSError("full"), "2")))
        with pytest.raises(OSError, match="full"):
            enable_fine_tuning(net, strategy)
    assert full_state(net) == before


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
def test_containers_that_an_action_shuffled_come_back_in_order(kind: Any) -> None:
    layers = {str(i): nn.Linear(2, 2) for i in range(4)}
    net = kind(layers) if kind is nn.ModuleDict else kind(list(layers.values()))

    def shuffle(parent: Any, name: str, *place: Any) -> None:
        first = parent._modules.pop("0")
        del parent._modules["2"]
        parent._modules["0"] = first
        if name == "3":
            raise OSError

    before = full_state(net)
    with pytest.raises((OSError, KeyError)):
        enable_fine_tuning(net, caps((lambda *place: place[1] != "", shuffle)))
    assert full_state(net) == before


# --- other calls -------------------------------------------------------------------------------

MALFORMED = [(mc_any(),), (mc_any(), ma_train(), {}, 4), ("fc", ma_train()), (mc_any(), "train"),
             (mc_any(), ma_train(), ["rank"]), 7, (mc_any(), None)]  # fmt: skip


@pytest.mark.parametrize("kind", ["module_caps", "para_caps"])
def test_all_malformed_caps_are_named_at_once(kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        FineTuningStrategy(**{kind: [(mc_any(), ma_train()), *MALFORMED]})
    message = str(caught.value)
    for index in range(1, 1 + len(MALFORMED)):
        assert f"{kind}[{index}]" in message
    assert f"{kind}[0]" not in message
    for words in (
        "'fc', expected a callable",
        "'train', expected a callable or a strategy",
        "['rank'], expected a dict",
        "7, expected (check, action[, params])",
    ):
        assert words in message


@pytest.mark.parametrize("cap", [cap for cap in MALFORMED if cap != 7 and 2 <= len(cap) <= 3])
def test_a_malformed_cap_is_not_registered(cap: Any) -> None:
    strategy = FullFineTuningStrategy()
    for register in (strategy.register_module_cap, strategy.register_para_cap):
        with pytest.raises(TypeError, match="expected"):
            register(*cap)
    assert (len(strategy.module_caps), len(strategy.para_caps)) == (0, 1)
    assert strategy.to_config() == FullFineTuningStrategy().to_config()


MAKING: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one cap for caps": (lambda: FineTuningStrategy((mc_any(), ma_train())), TypeError,
                         r"module_caps\[0\] is mc_any\(\), expected \(check, action"),
    "None for caps": (lambda: FineTuningStrategy(None), TypeError, "module_caps is None, expected"),
    "a dict for caps": (lambda: FineTuningStrategy(para_caps=5), TypeError, "para_caps is 5, exp"),
    "a strategy class for an action": (
        lambda: FineTuningStrategy([(mc_any(), LORA)]), TypeError, "LoRAAll.*parentheses"),
    "a module for an action": (
        lambda: FineTuningStrategy([(mc_any(), nn.ReLU())]), TypeError, "ReLU.*ma_replace"),
    "a name for a type": (
        lambda: FineTuningStrategy(constraint_type="Conv2d"), TypeError, "'Conv2d'"),
    "a layer for a type": (
        lambda: FineTuningStrategy(constraint_type=[nn.ReLU()]), TypeError, "ReLU.*not a type"),
    "unknown option": (lambda: LORA(ranks=3), TypeError, "ranks"),
    "bad conv_layout": (lambda: LORA(conv_layout="flat"), ValueError, "'flat', expected 'bal"),
    "bad dtype": (lambda: LORA(dtype=torch.int8), ValueError, "int8, expected a floating-point"),
    "bad dtype by name": (lambda: LORA(dtype="float31"), ValueError, "'float31', expected"),
    "bad rank": (lambda: LORA(rank="3"), ValueError, "rank is '3', expected an integer"),
    "True for a rank": (lambda: LORA(rank=True), ValueError, "rank is True"),
    "all settings at once": (lambda: LORA(0, float("nan"), 2), ValueError,
                             "rank is 0.*lora_alpha is nan.*lora_dropout is 2"),
    "no class": (lambda: HeadReplacementStrategy(0), ValueError, "num_classes is 0, expected"),
    "half a class": (lambda: HeadReplacementStrategy(2.5), ValueError, "num_classes is 2.5"),
    "True for classes": (lambda: HeadReplacementStrategy(True), ValueError, "num_classes is True"),
    "no strategies": (lambda: merge_strategies([]), TypeError, "expected strategies.*none"),
    "no strategy": (lambda: merge_strategies([LORA(), "x"]), TypeError, "expected strategies.*'x'"),
    "a class in a merge": (lambda: merge_strategies([LORA]), TypeError, "expected strat.*LoRAAll"),
    "debug a class": (lambda: DebugStrategy(LORA), TypeError, "expected a strategy, got"),
    "iterate over none": (lambda: ModuleIterator("net"), TypeError, "torch.nn.Module, got str"),
    "disable nothing": (lambda: disable_fine_tuning(None), TypeError, "torch.nn.Module, got None"),
    "disable a plain one": (lambda: disable_fine_tuning(mlp()), RuntimeError, "not being fine-t"),
    "disable an outer one": (lambda: disable_fine_tuning(nn.ModuleDict({"a": enabled(mlp())})),
                             RuntimeError, r"not being fine-tuned; inside it, \['a'\] are"),
    "config: text": (lambda: load_strategy_from_config({"lora": 3}), ValueError,
                     r"'name' and 'init_paras', found \['lora'\]"),
    "schedule: other keys": (lambda: load_schedule_from_config({"freeze": 3}), ValueError,
                             r"'name' and 'init_paras', found \['freeze'\]"),
    "schedule: a name": (lambda: load_schedule_from_config("freeze"), ValueError,
                         r"'name' and 'init_paras', found 'freeze'"),
    "config: unknown": (lambda: load_strategy_from_config(config("LoRAAllFineTuning")), ValueError,
                        r"not registered, closest: \['LoRAAllFineTuningStrategy'"),
    "config: unknown check": (
        lambda: load_strategy_from_config(config("FineTuningStrategy", module_caps=[
            [config("mc_nam", **{"*": ["fc"]}), config("ma_train")]])),
        ValueError, r"'mc_nam' is not registered, closest: \['mc_name'"),
    "config: no such option": (
        lambda: load_strategy_from_config(config("LoRAAllFineTuningStrategy", ranks=3)),
        ValueError, "init_paras of LoRAAllFineTuningStrategy do not fit.*ranks"),
    "config: bad option": (
        lambda: load_strategy_from_config(config("LoRAAllFineTuningStrategy", rank=0)),
        ValueError, "rank is 0"),
    "config: a check": (lambda: load_strategy_from_config(config("mc_any")), ValueError,
                        "'mc_any' is a Check, expected a strategy"),
    "config: bad init_paras": (
        lambda: load_strategy_from_config({"name": "FullFineTuningStrategy", "init_paras": 3}),
        ValueError, "init_paras of FullFineTuningStrategy is 3, expected a mapping"),
    "config: bad caps": (
        lambda: load_strategy_from_config(config("FineTuningStrategy", module_caps=[["fc", 3]])),
        (TypeError, ValueError), "'fc', expected a callable"),
    "config: no file": (lambda: load_strategy_from_config("none.yaml"), FileNotFoundError, "none"),
    "save a lambda": (
        lambda: FineTuningStrategy([(lambda *p: True, ma_train())]).to_config(), ValueError,
        r"module_caps\[0\]\[0\] is .*lambda.*cannot name.*gift.factories"),
}  # fmt: skip


def config(name: str, **init_paras: Any) -> dict[str, Any]:
    return {"name": name, "init_paras": init_paras}


@pytest.mark.parametrize(("make", "error", "message"), MAKING.values(), ids=MAKING)
def test_an_argument_is_refused(make: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_disabling_without_the_base_is_refused_and_leaves_the_network_enabled() -> None:
    net, base = mlp(), mlp()
    enable_fine_tuning(net, FullFineTuningStrategy(), keep_base=False)
    before = full_state(net)
    with pytest.raises(RuntimeError, match=r"base was not kept.*keep_base=False"):
        disable_fine_tuning(net)
    assert full_state(net) == before
    assert type(net).__name__ == type(base).__name__


def test_a_file_that_cannot_be_written_is_not_begun(tmp_path: Any) -> None:
    path = tmp_path / "strategy.yaml"
    LORA().save_init_paras(path)
    before = path.read_text()
    with pytest.raises(ValueError, match="cannot name"):
        FineTuningStrategy([(lambda *p: True, ma_freeze())]).save_init_paras(path)
    assert path.read_text() == before


def test_a_network_refused_once_can_be_enabled_with_what_fits() -> None:
    net = mlp()
    twin = copy.deepcopy(net)
    for rank in (1000, 17):
        with pytest.raises(ValueError, match=f"rank {rank}"):
            enable_fine_tuning(net, LORA(rank=rank))
    enable_fine_tuning(net, LORA(rank=1))
    x = torch.randn(3, 16)
    assert torch.equal(net(x), twin(x))


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_network_as_it_was() -> None:
    net = mlp()
    before = full_state(net)
    with pytest.raises(GiftWarning, match="took nothing"):
        enable_fine_tuning(net, caps((mc_layer(), ma_adapt()), (mc_name("head"), ma_train())))
    assert full_state(net) == before


def test_classes_with_demands_on_their_subclasses_can_be_enabled() -> None:
    """Enabling makes a subclass: nobody asked the user for it, so no hook of theirs may see it."""
    known = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, kind: str, **settings: Any) -> None:
            super().__init_subclass__(**settings)
            known[kind] = cls

    class Net(Registered, kind="mlp"):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

    net = enabled(Net())
    assert isinstance(net, Net)
    assert known == {"mlp": Net}


# --- sizes that some layers cannot have --------------------------------------------------------

SIZES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, int]]]] = {
    "lora": ("lora", {"rank": 6}, {"1.weight": ("rank", 4), "2.weight": ("rank", 2)}),
    "hra": ("hra", {"rank": 10}, {"1.weight": ("rank", 8)}),
    "lokr": ("lokr", {"rank": 3, "factor": 2},
             {"1.weight": ("rank", 2), "2.weight": ("rank", 2)}),
    "fourierft": ("fourierft", {"n_frequency": 33}, {"1.weight": ("n_frequency", 32)}),
    "oft": ("oft", {"block_size": 7}, {"1.weight": ("block_size", 8),
                                       "2.weight": ("block_size", 6)}),
}  # fmt: skip


def of_three_sizes() -> nn.Module:
    return nn.Sequential(nn.Linear(14, 16), nn.Linear(8, 4), nn.Linear(24, 2))


@pytest.mark.filterwarnings("ignore:the delta has more parameters:gift.GiftWarning")
@pytest.mark.parametrize(("method", "settings", "clipped"), SIZES.values(), ids=SIZES)
def test_a_size_fits_the_network_if_not_each_layer(
    method: str, settings: dict[str, Any], clipped: dict[str, tuple[str, int]]
) -> None:
    net = of_three_sizes()
    with pytest.warns(GiftWarning) as raised:
        report = enable_fine_tuning(net, caps((mc_layer(), ma_adapt(method, **settings))))
    (text,) = [str(w.message) for w in raised if "cannot have the requested size" in str(w.message)]
    assert report.clipped == clipped
    for path, (setting, size) in clipped.items():
        assert f"{path} ({setting} {size})" in text
        adapter = weight_deltas(net[int(path[0])])["weight"]
        assert getattr(adapter.method, setting) == size
    assert plan_fine_tuning(of_three_sizes(), caps((mc_layer(), ma_adapt(method, **settings)))
                            ).clipped == clipped  # fmt: skip
    (setting,) = {f"clip_{setting}" for setting, _ in clipped.values()}
    for clip in (False, True):
        strategy = caps((mc_layer(), ma_adapt(method, **settings, **{setting: clip})))
        if clip:  # asked for: without a word
            assert enable_fine_tuning(of_three_sizes(), strategy).clipped == {}
        else:
            with pytest.raises(ValueError, match=f"(?s)1 .Linear.*{setting}=True"):
                enable_fine_tuning(of_three_sizes(), strategy)


def test_a_rank_counts_for_the_layers_that_it_is_asked_for() -> None:
    """A head that cannot have its own rank is refused, though the body could have it."""
    net = of_three_sizes()
    strategy = caps((mc_name("2"), ma_adapt(rank=5)), (mc_layer(), ma_adapt(rank=4)))
    with pytest.raises(ValueError, match=r"2 \(Linear\): weight: rank 5 is above 2") as caught:
        enable_fine_tuning(net, strategy)
    assert "1 (Linear)" not in str(caught.value)


def test_a_strategy_file_of_old_still_refuses() -> None:
    """It says ``clip_rank: false``, which was the default when it was written."""
    old = LORA(rank=6).to_config()
    old["init_paras"]["clip_rank"] = False
    with pytest.raises(ValueError, match="rank 6 is above 4"):
        enable_fine_tuning(of_three_sizes(), load_strategy_from_config(old))
