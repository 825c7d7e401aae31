"""Every check and action of `gift.factories`, alone, combined, beside lambdas, and as a file."""

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from gift import (
    FineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    factories,
    load_strategy_from_config,
    plan_fine_tuning,
)
from gift.factories import (
    Check,
    all_of,
    any_of,
    ma_adapt,
    ma_freeze,
    ma_replace,
    ma_replace_head,
    ma_train,
    mc_any,
    mc_blocks,
    mc_class_name,
    mc_depth,
    mc_last,
    mc_last_linear,
    mc_layer,
    mc_name,
    mc_norm,
    mc_path,
    mc_type,
    none_of,
    pa_adapt,
    pa_freeze,
    pa_train,
    pc_any,
    pc_bias,
    pc_name,
    pc_ndim,
    pc_path,
)
from gift.methods import LoRA
from tests.common import all_bits, enabled, full_state, trainable

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")


class Classifier(nn.Linear):
    """A subclass, as networks have them."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(Block(), Block(), nn.Identity())
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(4, 4)
        self.head = nn.ModuleDict({"fc1": nn.Linear(4, 4), "out": Classifier(4, 10)})


PATHS = [
    "", "stem",
    "blocks", "blocks.0", "blocks.0.conv", "blocks.0.norm", "blocks.0.act",
    "blocks.1", "blocks.1.conv", "blocks.1.norm", "blocks.1.act", "blocks.2",
    "attention", "attention.out_proj", "rnn", "head", "head.fc1", "head.out",
]  # fmt: skip
LINEAR = ["attention.out_proj", "head.fc1", "head.out"]
CONVS = ["stem", "blocks.0.conv", "blocks.1.conv"]
NORMS = ["blocks.0.norm", "blocks.1.norm"]

MODULE_CHECKS: dict[str, tuple[Callable[..., bool], list[str]]] = {
    "mc_any": (mc_any(), PATHS),
    "mc_name, one": (mc_name("conv"), CONVS[1:]),
    "mc_name, several": (mc_name("conv", "stem"), CONVS),
    "mc_name, the path is not a name": (mc_name("head.out"), []),
    "mc_name, contains": (mc_name(contains="o"), [
        "blocks", "blocks.0.conv", "blocks.0.norm", "blocks.1.conv", "blocks.1.norm", "attention",
        "attention.out_proj", "head.out"]),
    "mc_name, glob": (mc_name(glob="fc?"), ["head.fc1"]),
    "mc_name, globs know case": (mc_name(glob="FC*"), []),
    "mc_name, regex": (mc_name(regex=r"\d"), ["blocks.0", "blocks.1", "blocks.2"]),
    "mc_name, a regex matches the whole": (mc_name(regex="c"), []),
    "mc_name, any way": (mc_name("stem", glob=["fc*"], contains=["rn"]), [
        "stem", "rnn", "head.fc1"]),
    "mc_path": (mc_path("blocks.1.conv", "rnn", "fc1"), ["blocks.1.conv", "rnn"]),
    "mc_path, the network": (mc_path(""), [""]),
    "mc_path, contains": (mc_path(contains="s.1"), [
        "blocks.1", "blocks.1.conv", "blocks.1.norm", "blocks.1.act"]),
    "mc_path, glob": (mc_path(glob="blocks.*.conv"), CONVS[1:]),
    "mc_path, regex": (mc_path(regex=r"blocks\.[12]"), ["blocks.1", "blocks.2"]),
    "mc_class_name": (mc_class_name("Linear"), ["head.fc1"]),
    "mc_class_name, several": (mc_class_name("Block", "Net"), ["", "blocks.0", "blocks.1"]),
    "mc_type, with subclasses": (mc_type(nn.Linear), LINEAR),
    "mc_type, several": (mc_type(nn.Conv2d, nn.BatchNorm2d), [
        "stem", "blocks.0.conv", "blocks.0.norm", "blocks.1.conv", "blocks.1.norm"]),
    "mc_layer": (mc_layer(), [*CONVS, "attention", "attention.out_proj", "rnn", *LINEAR[1:]]),
    "mc_layer, linear": (mc_layer("linear"), LINEAR),
    "mc_layer, two": (mc_layer("conv", "recurrent"), [*CONVS, "rnn"]),
    "mc_layer, attention": (mc_layer("attention"), ["attention"]),
    "mc_norm": (mc_norm(), NORMS),
    "mc_blocks": (mc_blocks(), ["blocks.0", "blocks.1"]),
    "mc_depth": (mc_depth(1, 1), ["stem", "blocks", "attention", "rnn", "head"]),
    "mc_depth, from": (mc_depth(3), [path for path in PATHS if path.count(".") == 2]),
    "mc_depth, to": (mc_depth(at_most=0), [""]),
    "mc_last": (mc_last(1), ["head"]),
    "mc_last, two": (mc_last(2), ["rnn", "head"]),
    "mc_last, those with parameters": (mc_last(1, within="blocks"), ["blocks.1"]),
    "mc_last_linear": (mc_last_linear(), ["head.out"]),
    "all_of": (all_of(mc_layer(), mc_depth(1, 1)), ["stem", "attention", "rnn"]),
    "any_of": (any_of(mc_name("rnn"), mc_name("stem")), ["stem", "rnn"]),
    "none_of": (none_of(mc_depth(0, 1), mc_path(contains="blocks")), LINEAR),
    "&": (mc_type(nn.Linear) & mc_path(contains="head"), LINEAR[1:]),
    "|": (mc_last_linear() | mc_name("stem"), ["stem", "head.out"]),
    "~": (~(mc_path(contains=".") | mc_layer() | mc_name("blocks")), ["", "head"]),
    "& lambda": (mc_layer("conv") & (lambda *p: p[4].in_channels == 3), ["stem"]),
    "lambda &": ((lambda *p: p[1] == "norm") & mc_path(glob="*.1.*"), ["blocks.1.norm"]),
    "lambda |": ((lambda *p: p[1] == "norm") | mc_last(1), [*NORMS, "head"]),
    "| lambda": (mc_last(1) | (lambda *p: p[3] == "LSTM"), ["rnn", "head"]),
    "~ lambda": (~any_of(lambda *p: p[0] is not None), [""]),
    "nested": (mc_layer() & ~mc_type(nn.Linear) & ~(mc_layer("conv") | mc_name("rnn")), [
        "attention"]),
    "lambda": (lambda parent, name, path, cls, module: len(list(module.children())) == 3, [
        "blocks", "blocks.0", "blocks.1"]),
}  # fmt: skip

PARAMETERS = [
    "token", "stem.weight", "stem.bias",
    "blocks.0.conv.weight", "blocks.0.conv.bias", "blocks.0.norm.weight", "blocks.0.norm.bias",
    "blocks.1.conv.weight", "blocks.1.conv.bias", "blocks.1.norm.weight", "blocks.1.norm.bias",
    "attention.in_proj_weight", "attention.in_proj_bias",
    "attention.out_proj.weight", "attention.out_proj.bias",
    "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0",
    "head.fc1.weight", "head.fc1.bias", "head.out.weight", "head.out.bias",
]  # fmt: skip

PARAMETER_CHECKS: dict[str, tuple[Callable[..., bool], list[str]]] = {
    "pc_any": (pc_any(), PARAMETERS),
    "pc_name": (pc_name("token", "bias_ih_l0"), ["token", "rnn.bias_ih_l0"]),
    "pc_name, contains": (pc_name(contains="in_proj"), [
        "attention.in_proj_weight", "attention.in_proj_bias"]),
    "pc_name, glob": (pc_name(glob="*_l0"), [p for p in PARAMETERS if p.startswith("rnn")]),
    "pc_name, regex": (pc_name(regex="(t|k)o.*"), ["token"]),
    "pc_path": (pc_path("token", "head.out.bias", "bias"), ["token", "head.out.bias"]),
    "pc_path, contains": (pc_path(contains="norm.b"), [f"{norm}.bias" for norm in NORMS]),
    "pc_path, glob": (pc_path(glob="head.*.weight"), ["head.fc1.weight", "head.out.weight"]),
    "pc_path, regex": (pc_path(regex=r"[^.]*\.[^.]*bias"), ["stem.bias", "attention.in_proj_bias"]),
    "pc_ndim": (pc_ndim(3, 3), ["token"]),
    "pc_ndim, from": (pc_ndim(3), ["token", *[f"{conv}.weight" for conv in CONVS]]),
    "pc_ndim, to": (pc_ndim(at_most=1) & pc_path(contains="stem"), ["stem.bias"]),
    "pc_bias": (pc_bias(), [p for p in PARAMETERS if "bias" in p]),
    "of modules: mc_type": (mc_type(nn.BatchNorm2d) & pc_name("weight"),
                            [f"{norm}.weight" for norm in NORMS]),
    "of modules: mc_last_linear": (mc_last_linear() & pc_any(), [
        "head.out.weight", "head.out.bias"]),
    "of modules: alone": (mc_name("fc1"), ["head.fc1.weight", "head.fc1.bias"]),
    "& lambda": (pc_ndim(2) & (lambda *p: p[6].shape[0] == 10), ["head.out.weight"]),
    "lambda |": ((lambda *p: p[5] == "token") | pc_path("stem.bias"), ["token", "stem.bias"]),
    "~": (~pc_name(contains="eight") & ~pc_name(contains="bias"), ["token"]),
    "lambda": (lambda *p: p[6].numel() == 40, ["head.out.weight"]),
}  # fmt: skip


def places(net: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What a module check is asked, for each module."""
    for path, module in net.named_modules():
        parent, _, name = path.rpartition(".")
        above = net.get_submodule(parent) if path else None
        yield above, name, path, type(module).__name__, module


@pytest.mark.parametrize(("check", "expected"), MODULE_CHECKS.values(), ids=MODULE_CHECKS)
def test_a_check_of_modules(check: Callable[..., bool], expected: list[str]) -> None:
    """As a cap's check it is asked for every module, as no cap claims any."""
    net, found = Net(), []

    def listen(*place: Any) -> bool:
        if bound(*place):
            found.append(place[2])
        return False

    bound = check.bind(net) if isinstance(check, Check) else check
    strategy = FineTuningStrategy([(listen, ma_train())], [(pc_any(), pa_train())])
    plan_fine_tuning(net, strategy)
    assert found == expected
    assert found == [place[2] for place in places(net) if bound(*place)]


@pytest.mark.parametrize(("check", "expected"), PARAMETER_CHECKS.values(), ids=PARAMETER_CHECKS)
def test_a_check_of_parameters(check: Callable[..., bool], expected: list[str]) -> None:
    net = Net()
    report = enable_fine_tuning(net, FineTuningStrategy(para_caps=[(check, pa_train())]))
    assert [claim.name for claim in report.claims] == expected
    assert trainable(net) == expected


@pytest.mark.parametrize("check", [c for c, _ in MODULE_CHECKS.values() if isinstance(c, Check)])
def test_a_check_of_modules_in_a_cap_claims_from_the_top(check: Check) -> None:
    """What lies below a claimed module is not asked for again."""
    net = Net()
    expected = next(e for c, e in MODULE_CHECKS.values() if c is check)
    tops = [p for p in expected if not any(p.startswith(f"{q}.") or q == "" != p for q in expected)]
    strategy = FineTuningStrategy([(check, ma_freeze())], [(pc_path("token"), pa_train())])
    claims = plan_fine_tuning(net, strategy).claims
    assert [claim.name for claim in claims if claim.name != "token"] == tops


def test_the_operators_are_those_of_logic() -> None:
    """For all pairs and all modules, ``&``, ``|`` and ``~`` are ``and``, ``or`` and ``not``."""
    net = Net()
    checks = [check.bind(net) for check, _ in MODULE_CHECKS.values() if isinstance(check, Check)]
    asked = list(places(net))
    truth = [[check(*place) for place in asked] for check in checks]
    for one, of_one in zip(checks, truth, strict=True):
        assert [(~one)(*place) for place in asked] == [not value for value in of_one]
        for other, of_other in zip(checks[::5], truth[::5], strict=True):
            for combine in (operator.and_, operator.or_):
                both = combine(one, other)
                assert [both(*place) for place in asked] == list(map(combine, of_one, of_other))


def test_and_or_not_are_refused_as_they_would_drop_a_check() -> None:
    """``a and b`` is `b` in Python, and ``not a`` is False: not what anybody means."""
    with pytest.raises(TypeError, match=r"&.*\|.*~"):
        mc_layer("conv") and mc_name("stem")
    with pytest.raises(TypeError, match=r"&.*\|.*~"):
        not mc_name("stem")


# --- actions -----------------------------------------------------------------------------------

HEAD = ["head.fc1.weight", "head.fc1.bias", "head.out.weight", "head.out.bias"]
LORA = [f"head.{name}.lora_{factor}" for name in ("fc1", "out") for factor in "BA"]
ACTIONS: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "ma_train": ("module", ma_train(), {}, HEAD),
    "ma_freeze": ("module", ma_freeze(), {}, []),
    "ma_adapt": ("module", ma_adapt(), {}, LORA),
    "ma_adapt, by name": ("module", ma_adapt("lora", rank=1), {}, LORA),
    "ma_adapt, a method": ("module", ma_adapt(LoRA(rank=2)), {}, LORA),
    "ma_adapt, train_bias": ("module", ma_adapt(train_bias=True), {}, [
        "head.fc1.bias", *LORA[:2], "head.out.bias", *LORA[2:]]),
    "ma_adapt, params": ("module", ma_adapt(), {"rank": 2, "train_bias": True}, [
        "head.fc1.bias", *LORA[:2], "head.out.bias", *LORA[2:]]),
    "a lambda": ("module", lambda *place, **params: None, {}, HEAD),
    "pa_train": ("parameter", pa_train(), {}, ["head.fc1.weight", "head.out.weight"]),
    "pa_freeze": ("parameter", pa_freeze(), {}, []),
    "pa_adapt": ("parameter", pa_adapt(), {}, LORA),
    "pa_adapt, params": ("parameter", pa_adapt("lora", rank=1), {"lora_alpha": 4}, LORA),
    "a lambda on parameters": ("parameter", lambda *place: None, {}, [
        "head.fc1.weight", "head.out.weight"]),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "action", "params", "expected"), ACTIONS.values(), ids=ACTIONS)
def test_an_action(kind: str, action: Any, params: dict[str, Any], expected: list[str]) -> None:
    net = Net()
    before = full_state(net)
    caps: dict[str, Any] = {"module_caps": [(mc_name("head"), action, params)]}
    if kind == "parameter":
        caps = {"para_caps": [(pc_path(glob="head.*.weight"), action, params)]}
    enable_fine_tuning(net, FineTuningStrategy(**caps))
    assert sorted(trainable(net)) == sorted(expected)
    if "rank" in params and expected:
        assert net.head["out"].lora_A.shape == (params["rank"], 4)
    if "lora_alpha" in params:
        net.head["out"].lora_B.data.fill_(1)
        update = net.head["out"].weight - net.head["out"]._parameters["weight"]
        torch.testing.assert_close(update, 4.0 * net.head["out"].lora_A.expand(10, 4))
    disable_fine_tuning(net)
    assert full_state(net) == before


def test_ma_freeze_keeps_statistics_still_whatever_train_says() -> None:
    net, x = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), torch.randn(8, 4) + 3
    enable_fine_tuning(net, FineTuningStrategy([(mc_name("0"), ma_freeze(statistics=True)),
                                                (mc_name("1"), ma_freeze())]))  # fmt: skip
    before = all_bits(net)
    net.train()(x)
    moved = {name for name, value in all_bits(net).items() if value != before[name]}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    disable_fine_tuning(net)
    assert net[0].training
    net(x)
    assert net[0].num_batches_tracked == 1


@pytest.mark.parametrize("how", ["a module", "a function", "a class"])
def test_ma_replace_puts_another_module_in_each_place(how: str) -> None:
    net, new = Net(), nn.GroupNorm(2, 4)
    makers = {"a module": new, "a function": lambda old: nn.GroupNorm(2, old.num_features),
              "a class": nn.Identity}  # fmt: skip
    old, before = [net.blocks[0].norm, net.blocks[1].norm], full_state(net)
    strategy = FineTuningStrategy([(mc_name("norm"), ma_replace(makers[how]))])
    report = enable_fine_tuning(net, strategy)
    now = [net.blocks[0].norm, net.blocks[1].norm]
    assert {type(norm) for norm in now} == {nn.Identity if how == "a class" else nn.GroupNorm}
    assert now[0] is not now[1]
    assert new not in now, "each place has its own copy"
    expected = [] if how == "a class" else [f"{n}.{p}" for n in NORMS for p in ("weight", "bias")]
    assert trainable(net) == expected
    assert [claim.what for claim in report.claims] == [f"replaced by {type(now[0]).__name__}"] * 2
    disable_fine_tuning(net)
    assert [net.blocks[0].norm, net.blocks[1].norm] == old
    assert full_state(net) == before


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_what_was_replaced_comes_back_in_the_mode_of_the_network(modes: tuple[bool, bool]) -> None:
    """A dropout in the old head must not stay active in a network that is evaluated."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)))
    strategy = FineTuningStrategy([(mc_name("1"), ma_replace(nn.Linear(4, 3)))])
    enable_fine_tuning(net.train(modes[0]), strategy)
    assert {module.training for module in net.modules()} == {modes[0]}
    disable_fine_tuning(net.train(modes[1]))
    assert {module.training for module in net.modules()} == {net.training}


def test_a_shared_module_is_replaced_under_both_names() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    enable_fine_tuning(net, FineTuningStrategy([(mc_name("0"), ma_replace(nn.Linear(4, 4)))]))
    assert net[0] is net[2] is not shared
    assert disable_fine_tuning(net)[2] is net[0] is shared


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, Classifier])
def test_ma_replace_head_makes_a_layer_like_the_old_one(
    kind: Any, dtype: torch.dtype, bias: bool
) -> None:
    sizes = (6, 10, 1) if kind is nn.Conv2d else (6, 10)
    net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": kind(*sizes, bias=bias)}).to(dtype)
    net.num_classes = 10
    old = net["head"]
    enable_fine_tuning(net, FineTuningStrategy([(mc_name("head"), ma_replace_head(4))]))
    new = net["head"]
    assert new is not old
    assert tuple(new.weight.shape) == (4, *old.weight.shape[1:])
    assert (new.bias is None) == (not bias)
    assert new.weight.dtype == dtype
    assert new.weight.float().std() > 0.05, "drawn, not empty"
    assert trainable(net) == ["head.weight"] + ["head.bias"] * bias
    assert net.num_classes == 4
    assert disable_fine_tuning(net)["head"] is old
    assert net.num_classes == 10


# --- refusals ----------------------------------------------------------------------------------

MAKING: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no name": (lambda: mc_name(), ValueError, "no name given"),
    "no path": (lambda: pc_path(), ValueError, "no name given"),
    "a module for a name": (lambda: mc_path(nn.ReLU()), TypeError, r"expected names.*ReLU"),
    "a number for a glob": (lambda: pc_name(glob=[3]), TypeError, r"expected names, got \[3\]"),
    "a name for a type": (lambda: mc_type("Linear"), TypeError, r"expects classes.*'Linear'"),
    "not a type": (lambda: mc_type(), TypeError, "expects classes, got none"),
    "unknown family": (lambda: mc_layer("convs"), ValueError, r"\['convs'\], expected.*'conv'"),
    "no block": (lambda: mc_last(0), ValueError, "number of blocks is 0, expected at least 1"),
    "unknown method": (lambda: ma_adapt("lorra"), ValueError, r"'lorra'.*closest: \['lora'"),
    "unknown setting": (lambda: ma_adapt("lora", ranks=3), ValueError, r"\['ranks'\].*'rank'"),
    "unknown setting of pa_adapt": (lambda: pa_adapt(r=3), ValueError, r"no setting \['r'\]"),
    "two settings": (lambda: ma_adapt(LoRA(), rank=3), ValueError, "has its settings already"),
    "bad rank": (lambda: ma_adapt(rank=0), ValueError, "rank is 0, expected"),
    "bad conv_layout": (lambda: ma_adapt(conv_layout="in"), ValueError, "'in', expected 'bal"),
    "no class": (lambda: ma_replace_head(0), ValueError, "num_classes is 0, expected"),
    "classes as text": (lambda: ma_replace_head("10"), ValueError, "num_classes is '10'"),
    "no module to replace by": (lambda: ma_replace(5), TypeError, "5, expected a module"),
    "no check to combine": (lambda: mc_any() & 5, TypeError, "5, expected a callable"),
    "no check in all_of": (lambda: all_of(mc_any(), "conv"), TypeError, "'conv', expected a"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), MAKING.values(), ids=MAKING)
def test_arguments_are_refused_where_they_are_given(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


USING: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "too many blocks": (mc_last(4, "blocks"), ma_train(), ValueError,
                        "blocks has 2 blocks with parameters, the last 4"),
    "no such container": (mc_last(1, "layers"), ma_train(), ValueError, "no module 'layers'"),
    "pc_ in a module cap": (pc_name("bias"), ma_train(), TypeError, "use it in para_caps"),
    "the network is replaced": (mc_any(), ma_replace(nn.ReLU()), ValueError, "cannot be replaced"),
    "by no module": (mc_name("head"), ma_replace(lambda old: "new"), TypeError, "'new', expected"),
    "no head": (mc_name("rnn"), ma_replace_head(4), ValueError, "LSTM is not a head.*nn.Linear"),
    "nothing to adapt": (mc_name("norm"), ma_adapt(), ValueError, "BatchNorm2d has no weight of"),
    "wrong params": (mc_name("head"), ma_adapt(), ValueError, r"no setting \['rnk'\]"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "action", "error", "message"), USING.values(), ids=USING)
def test_what_does_not_fit_the_network_is_refused(
    check: Any, action: Any, error: type[Exception], message: str
) -> None:
    net = Net()
    before = full_state(net)
    params = {"rnk": 3} if "rnk" in message else {}
    with pytest.raises(error, match=message):
        enable_fine_tuning(net, FineTuningStrategy([(check, action, params)]))
    assert full_state(net) == before


def test_what_must_know_the_network_says_so_when_called_alone() -> None:
    place = (None, "", "", "Net", Net())
    for part in (mc_last(1), mc_last_linear(), ~mc_last(1), mc_any() & mc_last(2)):
        with pytest.raises(RuntimeError, match="needs the whole network"):
            part(*place)
    with pytest.raises(RuntimeError, match="needs the whole network"):
        ma_replace_head(3)(*place)


# --- files, completeness -----------------------------------------------------------------------

SAVABLE = [
    c for table in (MODULE_CHECKS, PARAMETER_CHECKS) for name, (c, _) in table.items()
    if isinstance(c, Check) and "lambda" not in name and "type" not in name
    and name not in ("&", "nested")
]  # fmt: skip


@pytest.mark.parametrize("check", SAVABLE, ids=repr)
def test_a_check_from_a_file_says_the_same(check: Check) -> None:
    strategy = FineTuningStrategy([(check, ma_train())], [(check, pa_train())])
    loaded = load_strategy_from_config(strategy.to_config())
    net = Net()
    for one, other in zip(
        [*strategy.module_caps, *strategy.para_caps], [*loaded.module_caps, *loaded.para_caps],
        strict=True,
    ):  # fmt: skip
        assert repr(one) == repr(other)
    mine, theirs = check.bind(net), loaded.module_caps[0].check.bind(net)
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            place = (None, path.rpartition(".")[2], path, type(module).__name__, module, name)
            assert mine(*place, parameter) == theirs(*place, parameter)


def test_a_class_has_no_name_in_a_file() -> None:
    strategy = FineTuningStrategy([(mc_type(nn.Linear), ma_train())])
    with pytest.raises(ValueError, match=r"Linear.*which a file cannot name"):
        strategy.to_config()


def test_checks_and_actions_print_as_they_were_written() -> None:
    written = "all_of(mc_path(glob='head.*'), none_of(mc_type(Linear)))"
    assert repr(mc_path(glob="head.*") & ~mc_type(nn.Linear)) == written
    assert repr(ma_adapt("lora", rank=2, train_bias=True)) == (
        "ma_adapt(method='lora', rank=2, train_bias=True)"
    )
    assert repr(ma_replace_head(4)) == "ma_replace_head(num_classes=4)"


ELSEWHERE = {
    "pc_experts",  # tests/test_leftover.py
    "mc_top", "mc_grouped",  # tests/test_recommended.py
    "ma_bottleneck", "ma_prompt",  # tests/test_wrapping.py
    "ma_prefix",  # tests/test_prefix.py
    "ma_loreft",  # tests/test_loreft.py
    "ma_activated_lora", "ma_invocation",  # tests/test_activated.py
    "ma_visual_prompt",  # tests/test_visual_prompts.py
    "mc_detection_head", "ma_replace_detection_head",  # tests/test_zoo.py
    "mc_segmentation_head", "ma_replace_segmentation_head",  # tests/test_tasks_segmentation.py
}  # fmt: skip


def test_every_factory_is_tested_here() -> None:
    tested = {name.partition(",")[0] for table in (MODULE_CHECKS, PARAMETER_CHECKS, ACTIONS)
              for name in table} | {"ma_replace", "ma_replace_head"} | ELSEWHERE  # fmt: skip
    assert set(factories.__all__) - {"Action", "Check"} <= tested


def test_a_check_can_be_used_again_for_another_network() -> None:
    strategy = FineTuningStrategy([(mc_last_linear() | mc_last(1), ma_adapt(rank=2))])
    for width in (4, 8):
        net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
        enabled(net, strategy)
        assert trainable(net) == ["2.lora_B", "2.lora_A"]
    twin = copy.deepcopy(strategy)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(4, 5))
    assert [claim.name for claim in plan_fine_tuning(net, twin).claims] == ["1"]
