"""Private parts of other libraries: each is there, and where it is not, what is public does."""

import ast
import collections
import importlib.util
import pkgutil
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import gift
from gift import DeltaBank, FineTuningStrategy, enable_fine_tuning
from gift.core.undo.copy_on_write import CopyOnWrite
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_layer
from gift.kernels import onednn
from gift.methods.draws import seeded_buffer, sorted_entries
from gift.private import torch as torch_parts
from gift.private.diffusers import source_of
from gift.private.python import frames_of_threads, parsed_pattern
from gift.private.torch import calls, containers, layers, operations, tensors, tracing
from gift.private.torch.parts import part
from gift.private.transformers import checkpointing_parts, checkpoints_openly
from gift.strategies import ActivatedLoRAFineTuningStrategy, LoRAAllFineTuningStrategy
from gift.support.patterns import problem_of_patterns

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

ROOT = Path(gift.__file__).parent
CUSTOMARY = {
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_forward_pre_hooks", "_load_state_dict_post_hooks", "_metadata"),
    *("_apply", "_load_from_state_dict", "_save_to_state_dict"),
}
"""What `gift.private` says that subclasses of ``nn.Module`` use by custom."""

PUBLIC = {"_replace", "_make", "_fields", "_asdict", "_exit"}  # in spite of their names


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return bool(re.match(r"_[a-zA-Z]", name)) and not name.startswith("_gift_")


def own_names() -> set[str]:
    """Private names that gift itself gives: to functions, classes, variables and attributes."""
    found: set[str] = set()
    for path, tree in trees():
        if path.parts[0] == "private":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                found.add(node.attr)
    return found


def asked_for(node: ast.AST) -> list[str]:
    """Names of others that a node touches: attributes, imports, and what `getattr` is given."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("gift"):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        name = node.args[1]
        looks = node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        if looks and isinstance(name, ast.Constant) and isinstance(name.value, str):
            return [name.value]
    return []


def is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")


def test_no_private_name_of_others_is_used_elsewhere() -> None:
    known = own_names() | CUSTOMARY | PUBLIC
    torch_names = {*dir(nn.LSTM(1, 1)), *dir(nn.Conv2d(1, 1, 1)), *dir(Tensor), *dir(torch.Size)}
    used = {
        f"{path}: {name}"
        for path, tree in trees()
        if path.parts[0] != "private"
        for node in ast.walk(tree)
        for name in asked_for(node)
        if is_private(name) and (name not in known or name in torch_names - CUSTOMARY)
        if not (is_of_self(node) and name in known)
    }
    assert used == set(), "move these to gift/private, with a reason, a check and a fallback"


def test_customary_names_are_listed_and_there() -> None:
    module = nn.Linear(1, 1)
    state = module.state_dict()
    for name in CUSTOMARY:
        assert f"``{name}``" in (gift.private.__doc__ or "")
        assert hasattr(state if name == "_metadata" else module, name), name


ROOMS = [
    importlib.import_module(f"gift.private.torch.{found.name}")
    for found in pkgutil.iter_modules(torch_parts.__path__)
]


@pytest.mark.parametrize("path", [path for room in ROOMS for path in getattr(room, "PARTS", ())])
def test_the_part_is_there(path: str) -> None:
    """Where this fails gift still works, but slower: see what the part was for, and mend that."""
    assert part(path) is not None


def test_parts_of_instances_are_there() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    assert list(conv._reversed_padding_repeated_twice) == [1, 1, 1, 1]
    assert layers.knows_recurrent()
    assert calls.COMPILED in dict(torch.compile(nn.Linear(1, 1)).named_modules())
    assert not torch.backends.mkldnn.is_available() or operations.has_onednn()


def test_what_is_gone_is_none() -> None:
    assert part("torch._C._no_such_thing") is None
    assert part("torch.no_such_module._thing") is None


def adapted(layer: nn.Module, method: str = "lora", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    enable_fine_tuning(layer, FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))]))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def result(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "lokr"])
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    "gone", ["_functorch_is_active", "_is_legacy_batched", "_dispatch_modes", "_function_modes"]
)
def test_layers_compute_the_same_without(
    gone: str, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NETS[kind]
    net, x = adapted(make().double(), method), torch.randn(shape, dtype=torch.float64)
    expected = result(net, x)
    monkeypatch.setattr(tracing, gone, None)
    torch.testing.assert_close(result(net, x), expected)


def test_transforms_are_noticed_and_suspected_where_they_cannot_be() -> None:
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(tracing.is_transformed())
        return x

    ask(torch.ones(2))
    torch.func.vmap(ask)(torch.ones(2))
    torch.func.jvp(ask, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        ask(torch.ones(2))
    torch.jit.trace(ask, torch.ones(2), check_trace=False)
    assert seen == [False, True, True, True, True]


@pytest.mark.parametrize("gone", ["_functorch_is_active", "_current_level"])
def test_without_knowing_of_transforms_they_are_suspected(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gone == "_current_level":
        monkeypatch.delattr(torch.autograd.forward_ad, gone)
    else:
        monkeypatch.setattr(tracing, gone, None)
    assert tracing.is_transformed()


def test_batched_gradients_are_noticed() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(lambda g: seen.append(tracing.is_batched(g)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_modes_are_noticed() -> None:
    assert not tracing.is_followed()
    with FlopCounterMode(display=False):
        assert tracing.is_followed()
    with TorchFunctionMode():
        assert tracing.is_followed()


def test_exporting_is_noticed_and_all_that_is_compiled_taken_for_it_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if tracing.is_exporting() else x

    assert not tracing.is_exporting()
    assert torch.export.export(Asks(), (torch.zeros(2),)).module()(torch.zeros(2))[0] == 1
    torch._dynamo.reset()
    if tracing._exporting is not None:
        assert torch.compile(Asks(), backend="eager", fullgraph=True)(torch.zeros(2))[0] == 0
    torch._dynamo.reset()
    monkeypatch.setattr(tracing, "_exporting", None)
    assert torch.compile(Asks(), backend="eager", fullgraph=True)(torch.zeros(2))[0] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("rank", [3, 10])
def test_a_compiled_layer_is_right_where_sizes_cannot_be_asked(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = adapted(nn.Linear(12, 11), rank=rank)
    assert tracing.is_known(True)
    assert not tracing.is_known(False)
    known = "gift.kernels.thin.is_known"
    monkeypatch.setattr(known, lambda it: not torch.compiler.is_compiling() and bool(it))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    for rows in (3, 2048):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(compiled(x), net(x))
        found, expected = (torch.autograd.grad(f(x).sum(), net.lora_B) for f in (compiled, net))
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_products_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(8, 6), torch.randn(6, 7)
    torch.testing.assert_close(operations.by_onednn(a, b), a @ b)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not operations.has_onednn()
    assert torch.equal(operations.by_onednn(a, b), a @ b)
    assert torch.equal(onednn.matmul(a, b), a @ b)


def gone(*paths: str) -> Callable[[str], Any]:
    """`part` where these are gone."""
    return lambda path: None if path in paths else part(path)


def test_rows_of_a_bank_where_functions_cannot_be_left_unfollowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "part", gone("torch._C.DisableTorchFunction"))
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
    bank, x = DeltaBank(net), torch.randn(3, 6)
    for name in ("a", "b"):
        bank.add(name, strategy=LoRAAllFineTuningStrategy(rank=2))
        bank.activate(name)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    expected = []
    for i, name in enumerate(("a", "b", "a")):
        bank.activate(name)
        expected.append(net(x[i : i + 1]))
    with bank.rows(["a", "b", "a"]):
        got = net(x)
    torch.testing.assert_close(got, torch.cat(expected))


class Uncounted(nn.Parameter):
    """A tensor whose writes torch does not tell."""

    _version = property(lambda self: None)  # type: ignore[assignment]


def test_writes_are_reported_with_and_without_torchs_count() -> None:
    for tensor in (torch.zeros(2), Uncounted(torch.zeros(2), requires_grad=False)):
        was_written = tensors.written_since(tensor)
        assert not was_written()
        tensor.add_(1)
        assert was_written()
    with torch.inference_mode():
        assert tensors.writes_of(torch.zeros(2)) is None


def test_shared_buffers_and_rescaled_outputs_without_that_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = adapted(nn.Linear(6, 5).double(), "ia3"), torch.randn(3, 6, dtype=torch.float64)
    expected = result(net, x)
    for path in ("gift.kernels.torch_state.writes_of", "gift.methods.draws.writes_of"):
        monkeypatch.setattr(path, lambda tensor: None)
    torch.testing.assert_close(result(net, x), expected)
    cpu = torch.device("cpu")
    draws = [seeded_buffer(sorted_entries, 0, (3,), 9, device=cpu) for _ in range(2)]
    assert torch.equal(*draws)


def copy_without(monkeypatch: pytest.MonkeyPatch, room: ModuleType, *paths: str) -> ModuleType:
    """A module of `gift.private.torch`, imported where these parts are gone."""
    with monkeypatch.context() as patch:
        for path in paths:
            patch.delattr(path)
        spec = importlib.util.spec_from_file_location("copy_of_private", room.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_types_of_layers_without_their_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = ("conv._ConvNd", "conv._ConvTransposeNd", "batchnorm._NormBase")
    other = copy_without(monkeypatch, layers, *(f"torch.nn.modules.{base}" for base in bases))
    for name in ("CONV", "CONV_TRANSPOSE", "NORM_WITH_STATISTICS"):
        assert isinstance(getattr(other, name), tuple)
        for kind in vars(nn).values():
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                here = issubclass(kind, getattr(layers, name))
                assert issubclass(kind, getattr(other, name)) == here, (name, kind)


def test_values_are_kept_where_operations_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy_without(monkeypatch, operations, "torch.utils._python_dispatch.TorchDispatchMode")
    for base in (operations.BeforeWrites, other.BeforeWrites):
        kind = type(
            "Kept", (base,), {k: v for k, v in vars(CopyOnWrite).items() if k != "__init__"}
        )
        net = nn.Linear(3, 2)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        kept = kind.__new__(kind)
        base.__init__(kept)
        kept.tensors = list(net.parameters())
        kept.storages = {tensors.storage_key(p): p.untyped_storage() for p in net.parameters()}
        kept.kept = {}
        with kept, torch.no_grad():
            net.weight.fill_(7)
        assert torch.equal(kept.original(net.weight), before["weight"])
        kept.restore()
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_storages_by_address() -> None:
    class Tensorlike:
        def __init__(self, tensor: Tensor) -> None:
            self.untyped_storage = lambda: Storage(tensor)

    class Storage:
        def __init__(self, tensor: Tensor) -> None:
            self.data_ptr = tensor.untyped_storage().data_ptr

    x, other = torch.zeros(4), torch.zeros(4)
    for kind in (lambda tensor: tensor, Tensorlike):
        keys = [tensors.storage_key(kind(t)) for t in (x, x[1:], other)]  # type: ignore[no-untyped-call]
        assert keys[0] == keys[1] != keys[2]


def test_containers_without_torchs_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = collections.namedtuple("pair", "a b")
    counts = collections.defaultdict(int, {"x": 1})
    tree = {"a": [1, (2, None)], "b": pair(3, {"c": 4}), "d": counts}
    expected = containers.tree_map(str, tree), containers.tree_leaves(tree)
    paths = (f"torch.utils._pytree.tree_{name}" for name in ("map", "leaves"))
    monkeypatch.setattr(containers, "part", gone(*paths))
    got = containers.tree_map(str, tree), containers.tree_leaves(tree)
    assert got == expected
    assert type(got[0]["b"]) is pair
    assert got[0]["d"].default_factory is int


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2),
    "same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", padding_mode="replicate"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", dilation=2),
    "groups": lambda: nn.Conv3d(4, 6, 2, groups=2, padding="same", dilation=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_without_their_method(kind: str) -> None:
    conv: Any = CONVOLUTIONS[kind]()
    x = torch.randn(2, 4, *[7] * len(conv.kernel_size))
    expected = conv(x)
    assert torch.equal(layers.convolve(conv, x, conv.weight, conv.bias), expected)

    class Bare:  # what is public of the layer
        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return getattr(conv, name)

    torch.testing.assert_close(layers.convolve(Bare(), x, conv.weight, conv.bias), expected)
    if conv.padding_mode != "zeros":
        assert layers.padding_around(Bare()) == layers.padding_around(conv)


def test_who_convolves_otherwise_is_noticed() -> None:
    class Other(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight * 2, bias)

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    conv = nn.Conv2d(1, 1, 1)
    assert layers.convolves_as(conv, kinds)
    assert not layers.convolves_as(Other(1, 1, 1), kinds)
    conv._conv_forward = lambda *args: args[0]  # type: ignore[method-assign]
    assert not layers.convolves_as(conv, kinds)


def test_who_pads_transposed_outputs_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.ConvTranspose2d):
        def _output_padding(self, *args: Any, **kwargs: Any) -> list[int]:
            return [1, 1]

    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    conv = nn.ConvTranspose2d(1, 1, 1)
    assert layers.convolves_transposed_as(conv, kinds)
    assert not layers.convolves_transposed_as(nn.Conv2d(1, 1, 1), kinds)
    assert not layers.convolves_transposed_as(Other(1, 1, 1), kinds)
    conv._output_padding = lambda *args: [0, 0]  # type: ignore[method-assign]
    assert not layers.convolves_transposed_as(conv, kinds)
    del conv._output_padding
    for kind in nn.ConvTranspose2d.__mro__:
        if "_output_padding" in vars(kind):
            monkeypatch.delattr(kind, "_output_padding")
    assert layers.convolves_transposed_as(conv, kinds)  # nobody can override it


def test_recurrent_layers_that_hold_no_list_are_not_understood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "nn", Without(nn))
    layers.knows_recurrent.cache_clear()
    try:
        assert not layers.knows_recurrent()
    finally:
        layers.knows_recurrent.cache_clear()


class Without:
    """torch.nn with recurrent layers that hold no list."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __getattr__(self, name: str) -> Any:
        return (lambda *args, **kwargs: object()) if name == "LSTM" else getattr(self.given, name)


def test_recurrent_layers_say_why_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gift.layers.layouts.knows_recurrent", lambda: False)
    with pytest.raises(AdaptationError, match="hold their weights in a way"):
        adapted(nn.LSTM(3, 3))


def test_attention_is_known_where_it_asks_whether_weights_override_it() -> None:
    assert calls.asks_until(F.multi_head_attention_forward) > 0
    assert calls.asks_until(test_without_frames_nobody_is_known) == 0


def test_without_frames_nobody_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    name_of = attrgetter("f_code.co_name")

    def asks() -> list[str]:
        return list(map(name_of, calls.callers()))

    assert asks()[0] == "test_without_frames_nobody_is_known"
    net = adapted(nn.Linear(3, 3))
    average = AveragedModel(net)
    average.update_parameters(net)
    assert all(
        torch.equal(a, b)
        for a, b in zip(average.module.parameters(), net.parameters(), strict=True)
    )
    monkeypatch.setattr(calls.inspect, "currentframe", lambda: None)
    assert asks() == []
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["lora_B", "lora_A"]
    assert len(list(net.parameters())) == 2


@pytest.mark.parametrize("frames", [True, False])
def test_a_bigger_module_says_by_its_frame_whether_keys_may_be_missing(
    frames: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without frames it loads what there is before it complains, as torch does."""
    net = adapted(nn.Linear(3, 3))
    outer, before = nn.Sequential(net), net.lora_A.detach().clone()
    if not frames:
        monkeypatch.setattr(calls.inspect, "currentframe", lambda: None)
    state = {"0.lora_A": before + 1}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.lora_B"):
        outer.load_state_dict(state)
    assert torch.equal(net.lora_A, before if frames else before + 1)
    outer.load_state_dict(state, strict=False)
    assert torch.equal(net.lora_A, before + 1)


def test_where_a_network_came_from() -> None:
    class Config:
        pass

    net: Any = nn.Linear(1, 1)
    assert source_of(net) is None
    net.config = Config()
    assert source_of(net) is None
    net.config._name_or_path = "a/diffuser"
    assert source_of(net) == "a/diffuser"
    net.config.name_or_path = "a/transformer"
    assert source_of(net) == "a/transformer"


def test_the_names_are_where_the_libraries_have_them() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    assert source_of(FakeModel(transformers.BertConfig(name_or_path="here"))) == "here"
    unet = pytest.importorskip("diffusers", reason="diffusers is not installed").UNet2DModel
    net = unet(
        block_out_channels=(4, 4), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    net.register_to_config(_name_or_path="there")
    assert source_of(net) == "there"


def test_by_which_function_models_checkpoint() -> None:
    """Where that is not known, what would be called again without its positions is refused."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    net = transformers.LlamaForCausalLM(config).train()
    enable_fine_tuning(net, ActivatedLoRAFineTuningStrategy([5], rank=1))
    assert checkpointing_parts(net) == []
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parts = checkpointing_parts(net)
    assert parts
    assert all(map(checkpoints_openly, parts))
    ids = torch.tensor([[3, 5, 4]])
    net(input_ids=ids).logits.sum().backward()
    for block in parts:
        del block._gradient_checkpointing_func
    with pytest.raises(AdaptationError, match=r"call gradient_checkpointing_disable\(\)"):
        net(input_ids=ids)


class FakeModel(nn.Module):
    """A module with a configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def test_nothing_that_gift_does_imports_the_compiler() -> None:
    """It takes torch seconds; who compiles imports it anyway."""
    program = (
        "import copy, sys, tempfile, torch, gift\n"
        "from gift.strategies import LoRALinearFineTuningStrategy as LoRA\n"
        "base = torch.nn.Linear(16, 16); net = copy.deepcopy(base)\n"
        "gift.enable_fine_tuning(net, LoRA(rank=2)); net(torch.ones(1, 16)).sum().backward()\n"
        "path = tempfile.mkdtemp() + '/delta.safetensors'\n"
        "gift.save(net, path); gift.load(base, path); gift.merge(base)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.parent,
    )
    assert done.stdout.strip() == "False", done.stderr


def test_without_stacks_no_thread_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change then waits for nobody, as it did before."""
    own = threading.get_ident()
    assert "frames_of_threads" in frames_of_threads()[own].f_code.co_name
    monkeypatch.delattr(sys, "_current_frames")
    assert frames_of_threads() == {}


def test_without_the_structure_of_patterns_none_is_read_from_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parsed_pattern("ab?") == [("LITERAL", 97), ("MAX_REPEAT", (0, 1, [("LITERAL", 98)]))]
    assert problem_of_patterns(["ab?"]) == ""
    monkeypatch.delattr(re, "_parser")
    assert "'ab?' may take too long" in problem_of_patterns(["ab?"])
