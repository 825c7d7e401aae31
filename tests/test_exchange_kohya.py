"""kohya files beside formulas, LyCORIS and diffusers: the same of the same tensors, both ways."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextConfig, CLIPTextModel

import gift
from gift import FineTuningStrategy, enable_fine_tuning
from gift.core.trained import moved_buffers
from gift.factories import (
    ma_adapt,
    ma_bottleneck,
    ma_train,
    mc_layer,
    mc_name,
    mc_path,
    pa_adapt,
    pa_train,
    pc_name,
    pc_path,
)  # fmt: skip
from gift.interop.kohya import load_kohya, save_kohya
from tests.common import full_state

pytestmark = pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")

X = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out(F.scaled_dot_product_attention(q, k, v))


class UNet(nn.Module):
    """Convolutions, linear layers and attention, as in the U-Net of a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.Conv2d(16, 32, (3, 2), stride=2, padding=1)])
        self.norm = nn.GroupNorm(4, 32)
        self.proj_in = nn.Conv2d(32, 32, 1)
        self.attn1 = Attention(32)
        self.proj_out = nn.Linear(32, 16)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(self.norm(self.down_blocks[0](self.conv_in(x))))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.proj_out(tokens + self.attn1(tokens)).transpose(1, 2)
        return self.conv_out(tokens.unflatten(2, x.shape[2:]))


class Volumes(nn.Module):
    """Convolutions over one and three axes, and one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 12, 3, padding=1)
        self.volume = nn.Conv3d(12, 8, (1, 3, 2), padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.volume(self.line(x.flatten(2)).unflatten(2, (2, 4, 8)))
        return self.grouped(x.flatten(2, 3))


@pytest.fixture
def lycoris(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LyCORIS, of which every version asks for its own torch."""
    wrapper = pytest.importorskip("lycoris.wrapper")
    monkeypatch.setattr(wrapper.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    return wrapper


def randomise(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)


def adapted(net: nn.Module, method: str, families: Any = (), **settings: Any) -> Any:
    """A copy of `net`, its layers adapted; the delta as after some training."""
    net, action = copy.deepcopy(net), ma_adapt(method, **settings)
    enable_fine_tuning(net, FineTuningStrategy([(mc_layer(*families), action)]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def trained_by(
    lycoris: Any, net: nn.Module, path: Path, dtype: Any = None, **settings: Any
) -> nn.Module:
    """A copy of `net` with modules of LyCORIS, which writes them to `path`."""
    net = copy.deepcopy(net)
    settings = {"lora_dim": 4, "conv_lora_dim": 4, "alpha": 4, "conv_alpha": 4} | settings
    network = lycoris.LycorisNetwork(net, warn_on_unmatched=False, **settings)
    network.apply_to()
    randomise(network.double())
    network.save_weights(str(path), dtype, {})
    return net


def assert_same(ours: nn.Module, theirs: nn.Module, base: nn.Module, tolerance: float) -> None:
    with torch.no_grad():
        output, expected = ours(X), theirs(X)
        assert not torch.allclose(expected, base(X), rtol=1e-2, atol=1e-2), "it has no effect"
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


OF_LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"network_module": "lora"},
    "lora, alpha": {"network_module": "lora", "alpha": 1.0, "conv_lora_dim": 3, "conv_alpha": 8.0},
    "lora, rslora": {"network_module": "lora", "rs_lora": True, "alpha": 2.0},
    "lora, Tucker": {"network_module": "lora", "use_tucker": True, "conv_alpha": 2.0},
    "lora, rank above matrices": {"network_module": "lora", "lora_dim": 40, "conv_lora_dim": 39},
    "dora": {"network_module": "lora", "weight_decompose": True, "alpha": 2.0},
    "loha": {"network_module": "loha", "alpha": 1.0},
    "loha, Tucker": {"network_module": "loha", "use_tucker": True, "conv_alpha": 2.0},
    "loha, rank above matrices": {"network_module": "loha", "lora_dim": 40, "alpha": 3.0},
    "lokr": {"network_module": "lokr", "factor": 4, "lora_dim": 3, "alpha": 2.0},
    "lokr, one conv dim": {"network_module": "lokr", "factor": 2, "conv_lora_dim": 1},
    "lokr, Tucker": {"network_module": "lokr", "factor": 2, "use_tucker": True, "conv_alpha": 1.0},
    "lokr, full": {"network_module": "lokr", "factor": 4, "full_matrix": True},
    "full": {"network_module": "full"},
    "ia3": {"network_module": "ia3"},
    "ia3, inputs": {"network_module": "ia3", "train_on_input": True},
    "glora": {"network_module": "glora", "alpha": 2.0, "conv_lora_dim": 1},
    "lokr, both": {
        "network_module": "lokr", "factor": 8, "lora_dim": 1, "alpha": 0.5, "decompose_both": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", OF_LYCORIS.values(), ids=OF_LYCORIS)
def test_files_of_lycoris_give_its_outputs(
    settings: dict[str, Any], lycoris: Any, tmp_path: Path
) -> None:
    base = UNet().double()
    theirs = trained_by(lycoris, base, tmp_path / "lora.safetensors", **settings)
    ours = copy.deepcopy(base)
    report = load_kohya(ours, tmp_path / "lora.safetensors")
    assert_same(ours, theirs, base, 1e-9)
    assert len(report.claims) == 9
    assert len(report.caps) < 9, "layers with the same settings have one cap"


OTHER_CONVOLUTIONS: list[dict[str, Any]] = [
    {"network_module": "lora"},
    {"network_module": "loha"},
    {"network_module": "full"},
    {"network_module": "ia3"},
    {"network_module": "lokr", "factor": 4},
    {"network_module": "lokr", "factor": 2},
    {"network_module": "lokr", "factor": 4, "decompose_both": True, "full_matrix": True},
]


@pytest.mark.parametrize("settings", OTHER_CONVOLUTIONS)
@pytest.mark.parametrize("rank", [1, 3])
def test_other_convolutions(
    settings: dict[str, Any], rank: int, lycoris: Any, tmp_path: Path
) -> None:
    base, path = Volumes().double(), tmp_path / "lora.safetensors"
    theirs = trained_by(lycoris, base, path, conv_lora_dim=rank, conv_alpha=2 * rank, **settings)
    ours = copy.deepcopy(base)
    load_kohya(ours, path)
    assert_same(ours, theirs, base, 1e-9)


BY_GIFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3, "lora_alpha": 5.0}),
    "lora, as rows of outputs": ("lora", {"rank": 4, "conv_layout": "out_as_h"}),
    "lora, alpha below zero": ("lora", {"rank": 2, "lora_alpha": -1.5}),
    "rslora": ("rslora", {"rank": 3, "lora_alpha": 4.0}),
    "lora_fa": ("lora_fa", {"rank": 3}),
    "pissa": ("pissa", {"rank": 2, "lora_alpha": 3.0}),
    "olora": ("olora", {"rank": 2, "conv_layout": "out_as_h"}),
    "dora": ("dora", {"rank": 3, "lora_alpha": 5.0}),
    "loha": ("loha", {"rank": 3, "alpha": 2.0}),
    "full": ("full_delta", {}),
    "full, balanced": ("full_delta", {"conv_layout": "balanced"}),
    "loha, balanced": ("loha", {"rank": 2, "conv_layout": "balanced"}),
}
KRONECKER: dict[str, tuple[str, dict[str, Any]]] = {
    "lokr": ("lokr", {"rank": 2, "alpha": 3.0, "factor": 2}),
    "lokr, ranks that LyCORIS does not have": (
        "lokr",
        {"rank": 12, "clip_rank": True, "alpha": 3.0, "factor": 2},
    ),
    "lokr, both": ("lokr", {"rank": 2, "alpha": 3.0, "factor": 2, "decompose_both": True}),
    "lokr, both, in the file as well": (
        "lokr",
        {"rank": 1, "factor": 4, "decompose_both": True, "families": ["linear"]},
    ),
    "lokr, full": ("lokr", {"full_matrix": True, "factor": 2}),
    "lokr, balanced": ("lokr", {"rank": 2, "alpha": 3.0, "conv_layout": "balanced"}),
    "lokr, full, balanced": ("lokr", {"full_matrix": True, "conv_layout": "balanced"}),
    "lokr, across inputs": ("lokr", {"rank": 1, "alpha": 2.5}),
    "lokr, both, across inputs": ("lokr", {"rank": 2, "alpha": -9.0, "decompose_both": True}),
    "lokr, full, across inputs": ("lokr", {"full_matrix": True}),
}


def through(lycoris: Any, base: nn.Module, path: Path) -> nn.Module:
    """A copy of `base` with what LyCORIS reads from a file, into modules of float32."""
    net = copy.deepcopy(base)
    network, tensors = lycoris.create_lycoris_from_weights(1.0, str(path), net)
    assert len(network.loras) == len({key.partition(".")[0] for key in tensors})
    network.apply_to()
    network.double()
    return net


def by_formula(frozen: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """The weight that these tensors of a file make of a frozen one, as the formats define it."""
    rank = 0

    def product(left: str, right: str) -> Tensor:
        nonlocal rank
        rank = len(parts[right])
        return parts[left].flatten(1) @ parts[right].flatten(1)

    def factor(name: str) -> Tensor:
        return parts[name] if name in parts else product(f"{name}_a", f"{name}_b")

    if "lora_up.weight" in parts:
        delta = product("lora_up.weight", "lora_down.weight")
    elif "diff" in parts:
        delta = parts["diff"]
    elif "hada_w1_a" in parts:
        delta = factor("hada_w1") * factor("hada_w2")
    else:
        kernel = frozen.shape[2:]
        left, right = factor("lokr_w1"), factor("lokr_w2").flatten(1)
        right = right.reshape(len(right), -1, *kernel)
        delta = torch.kron(left.reshape(*left.shape, *[1] * len(kernel)), right)
    scale = parts["alpha"].double() / rank if rank else 1.0
    weight = frozen + scale * delta.reshape(frozen.shape)
    if "dora_scale" in parts:
        rows = weight.flatten(1)
        weight = (rows / rows.norm(dim=1, keepdim=True)).view_as(weight) * parts["dora_scale"]
    return weight


METHODS = BY_GIFT | KRONECKER
WRITTEN = {f"U-Net, {name}": (UNet, *METHODS[name]) for name in METHODS}
WRITTEN |= {
    f"volumes, {name}": (Volumes, *METHODS[name])
    for name in METHODS
    if "families" not in METHODS[name][1]
}
everything_written = pytest.mark.parametrize(
    ("make", "method", "settings"), WRITTEN.values(), ids=WRITTEN
)


@everything_written
def test_what_gift_writes_is_what_the_format_defines(
    make: Callable[[], nn.Module], method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """And gift reads the same from it."""
    base, path = make().double(), tmp_path / "lora.safetensors"
    ours, again = adapted(base, method, **settings), copy.deepcopy(base)
    save_kohya(ours, path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        layer, _, part = key.removeprefix("lora_unet_").partition(".")
        parts.setdefault(layer, {})[part] = tensor
    for name, module in base.named_modules():
        if (of_layer := parts.pop(name.replace(".", "_"), None)) is not None:
            expected, found = by_formula(module.weight, of_layer), ours.get_submodule(name).weight
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            assert not torch.allclose(expected, module.weight, rtol=1e-2, atol=1e-2)
    assert not parts
    load_kohya(again, path)
    assert_same(again, ours, base, 1e-9)


@everything_written
def test_lycoris_reads_what_gift_writes(
    make: Callable[[], nn.Module],
    method: str,
    settings: dict[str, Any],
    lycoris: Any,
    tmp_path: Path,
) -> None:
    base, path = make().double(), tmp_path / "lora.safetensors"
    ours = adapted(base, method, **settings)
    save_kohya(ours, path)
    assert_same(ours, through(lycoris, base, path), base, 2e-5)


def test_files_of_16_bits_are_read_exactly(lycoris: Any, tmp_path: Path) -> None:
    """Into factors of float32, beside a base of bfloat16 too."""
    base, path = UNet(), tmp_path / "lora.safetensors"
    trained_by(lycoris, base.double(), path, torch.float16, network_module="lora")
    file = load_file(path)
    for dtype in (torch.float32, torch.bfloat16):
        net = copy.deepcopy(base).to(dtype)
        load_kohya(net, path)
        for name, layer in (("proj_in", net.proj_in), ("attn1_to_q", net.attn1.to_q)):
            for ours, theirs in (("lora_B", "lora_up.weight"), ("lora_A", "lora_down.weight")):
                value = file[f"lora_unet_{name}.{theirs}"]
                mine = getattr(layer, ours)
                assert value.dtype == torch.float16
                assert mine.dtype == torch.float32
                assert torch.equal(mine, value.float().reshape(mine.shape))


def with_biases(base: nn.Module) -> Any:
    """A copy with full deltas, its biases trained in place; both as after some training."""
    net = copy.deepcopy(base)
    cap = mc_layer(), ma_adapt("full_delta", train_bias=True)
    enable_fine_tuning(net, FineTuningStrategy([cap]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def test_biases_of_full_deltas(lycoris: Any, tmp_path: Path) -> None:
    """Trained in place here, differences in files."""
    base, path = UNet().double(), tmp_path / "lora.safetensors"
    ours, again = with_biases(base), copy.deepcopy(base)
    save_kohya(ours, path)
    found = load_file(path)["lora_unet_conv_in.diff_b"]
    torch.testing.assert_close(found, ours.conv_in.bias - base.conv_in.bias)
    assert "lora_unet_attn1_to_q.diff_b" not in load_file(path)
    assert_same(ours, through(lycoris, base, path), base, 2e-5)
    before = full_state(again.norm)
    load_kohya(again, path)
    assert_same(again, ours, base, 1e-12)
    assert again.conv_in.bias.requires_grad
    assert full_state(again.norm)[""][0] == before[""][0]
    gift.disable_fine_tuning(again)
    assert torch.equal(again(X), base(X))


@pytest.mark.parametrize("inputs", [False, True])
def test_scaled_weights(inputs: bool, lycoris: Any, tmp_path: Path) -> None:
    """(IA)^3 of weights alone, compared with modules of LyCORIS that have the tensors."""
    from lycoris.modules.ia3 import IA3Module

    base, path = UNet().double(), tmp_path / "lora.safetensors"
    weights, again = copy.deepcopy(base), copy.deepcopy(base)
    layers = [n for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if inputs:  # a kernel of several positions has more factors here
        layers = [n for n in layers if base.get_submodule(n).weight[0, 0].numel() == 1]
    cap = pc_path(*[f"{name}.weight" for name in layers]), pa_adapt("ia3", feedforward=inputs)
    enable_fine_tuning(weights, FineTuningStrategy((), [cap]))
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_kohya(weights, path)
    file, theirs = load_file(path), copy.deepcopy(base)
    modules = {}
    for name in layers:
        key = f"lora_unet_{name.replace('.', '_')}"
        own = IA3Module(key, theirs.get_submodule(name), train_on_input=inputs).double()
        own.load_state_dict({part: file.pop(f"{key}.{part}") for part in ("weight", "on_input")})
        own.apply_to()
        modules[name] = own
    assert not file
    assert_same(weights, theirs, base, 1e-9)
    load_kohya(again, path)
    assert_same(again, theirs, base, 1e-9)


def layer_file(path: Path, **tensors: Tensor) -> Path:
    """A file for the layer ``proj``; of names, ``__`` is a dot."""
    save_file({f"lora_unet_proj.{k.replace('__', '.')}": t for k, t in tensors.items()}, path)
    return path


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "1x1": lambda: nn.Conv2d(6, 5, 1),
}


@pytest.mark.parametrize("axes", [(), (1, 1)])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("alpha", [None, 0.5, [3.0]])
def test_linear_layers_and_1x1_convolutions_are_the_same(
    make: Callable[[], nn.Module], axes: tuple[int, ...], alpha: Any, tmp_path: Path
) -> None:
    """And a file without alpha has scale 1."""
    net = nn.ModuleDict({"proj": make().double()})
    up, down = torch.randn(5, 2).double(), torch.randn(2, 6).double()
    parts = {"lora_up__weight": up.reshape(5, 2, *axes), "lora_down__weight": down}
    if alpha is not None:
        parts["alpha"] = torch.tensor(alpha)
    frozen = net["proj"].weight.detach().clone()
    load_kohya(net, layer_file(tmp_path / "a.safetensors", **parts))
    scale = 1.0 if alpha is None else float(torch.tensor(alpha)) / 2
    wanted = frozen + scale * (up @ down).reshape(frozen.shape)
    torch.testing.assert_close(net["proj"].weight, wanted, rtol=1e-12, atol=1e-12)


def test_lokr_splits_rows_and_columns_by_factors_of_their_own(lycoris: Any, tmp_path: Path) -> None:
    """LyCORIS splits inputs, not columns: here 4 into 2 x 2, and with them 36 into 2 x 18."""
    base, path = nn.Sequential(nn.Conv2d(4, 320, 3)).double(), tmp_path / "lora.safetensors"
    theirs = trained_by(lycoris, base, path, network_module="lokr", factor=8)
    assert load_file(path)["lora_unet_0.lokr_w1"].shape == (8, 2)
    ours = copy.deepcopy(base)
    load_kohya(ours, path)
    assert_same(ours, theirs, base, 1e-9)


LOKR_FORMS: dict[str, tuple[dict[str, tuple[int, int]], float, set[str]]] = {
    "w1 w2": ({"w1": (2, 2), "w2": (2, 3)}, 1.0, {"w1", "w2"}),
    "pair w2": ({"w1_a": (2, 3), "w1_b": (3, 2), "w2": (2, 3)}, 9 / 3, {"w1", "w2"}),
    "w1 pair": ({"w1": (2, 2), "w2_a": (2, 2), "w2_b": (2, 3)}, 9 / 2, {"w1", "w2_a", "w2_b"}),
    "w1 big pair": (
        {"w1": (2, 2), "w2_a": (2, 5), "w2_b": (5, 3)},
        9 / 5,
        {"w1", "w2_a", "w2_b"},
    ),
    "pairs": (
        {"w1_a": (2, 1), "w1_b": (1, 2), "w2_a": (2, 1), "w2_b": (1, 3)},
        9.0,
        {"w1_a", "w1_b", "w2_a", "w2_b"},
    ),
    "large pairs": (
        {"w1_a": (2, 5), "w1_b": (5, 2), "w2_a": (2, 5), "w2_b": (5, 3)},
        9 / 5,
        {"w1", "w2_a", "w2_b"},
    ),
}


@pytest.mark.parametrize(("shapes", "scale", "kept"), LOKR_FORMS.values(), ids=LOKR_FORMS)
def test_forms_of_lokr(
    shapes: dict[str, tuple[int, int]], scale: float, kept: set[str], tmp_path: Path
) -> None:
    """Of two full matrices, alpha is that of nothing; otherwise it is relative to the rank."""
    net = nn.ModuleDict({"proj": nn.Linear(6, 4).double()})
    frozen = net["proj"].weight.detach().clone()
    parts = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    tensors = {f"lokr_{name}": tensor for name, tensor in parts.items()}
    load_kohya(net, layer_file(tmp_path / "a.safetensors", alpha=torch.tensor(9.0), **tensors))
    w1, w2 = (
        parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]
        for name in ("w1", "w2")
    )
    wanted = frozen + scale * torch.kron(w1, w2)
    torch.testing.assert_close(net["proj"].weight, wanted, rtol=1e-12, atol=1e-12)
    names = {name for name, p in net["proj"].named_parameters() if p.requires_grad}
    assert names == {f"lokr_{name}" for name in kept}


def test_a_pipeline_has_one_file(tmp_path: Path) -> None:
    unet, encoder = UNet().double(), nn.Sequential(nn.Linear(8, 8)).double()
    tuned = {"lora_unet_": adapted(unet, "lora"), "lora_te1_": adapted(encoder, "loha")}
    path = tmp_path / "lora.safetensors"
    save_kohya(tuned, path)
    first = load_kohya(unet, path)
    second = load_kohya(encoder, path, prefix="lora_te1_")
    assert first.left == {"lora_te1_": 5}
    assert second.left == {"lora_unet_": 27}
    assert "left in the file: 5 tensors of lora_te1_" in str(first)
    x = torch.randn(3, 8).double()
    torch.testing.assert_close(unet(X), tuned["lora_unet_"](X))
    torch.testing.assert_close(encoder(x), tuned["lora_te1_"](x))


def test_of_prefixes_that_overlap_the_longest_is_meant(tmp_path: Path) -> None:
    """`lora_te_` of the one encoder begins as an own prefix of the other does."""
    nets = {
        prefix: nn.Sequential(nn.Linear(8, 8)).double() for prefix in ("lora_te_", "lora_te_b_")
    }
    tuned = {prefix: adapted(net, "lora") for prefix, net in nets.items()}
    path, x = tmp_path / "lora.safetensors", torch.randn(3, 8).double()
    save_kohya(tuned, path)
    report = load_kohya(nets["lora_te_b_"], path, prefix="lora_te_b_")
    assert report.left == {"lora_te_": 3}
    torch.testing.assert_close(nets["lora_te_b_"](x), tuned["lora_te_b_"](x))


def test_layers_with_other_names_are_renamed(tmp_path: Path) -> None:
    """Dotted or not; without `rename`, names of the original layout are an error that says so."""
    base, path = UNet().double(), tmp_path / "lora.safetensors"
    tuned = adapted(base, "lora", families=["linear"])
    save_kohya(tuned, path)
    tensors = {k.replace("attn1", "input_blocks_4"): t for k, t in load_file(path).items()}
    path = tmp_path / "renamed.safetensors"
    save_file(tensors, path)
    before = full_state(base)
    with pytest.raises(ValueError, match=r"4 layers, the first is input_blocks_4.*rename="):
        load_kohya(base, path)
    assert full_state(base) == before
    load_kohya(base, path, rename=lambda name: name.replace("input_blocks_4_", "attn1."))
    torch.testing.assert_close(base(X), tuned(X))
    save_kohya(tuned, path, rename=lambda path: path.replace("attn1", "input_blocks.4"))
    assert load_file(path).keys() == tensors.keys()


def test_text_encoders_keep_the_names_that_files_have(double: None, tmp_path: Path) -> None:
    """``text_model``, which transformers has dropped; files without are read as well."""
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=50, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    base, path = CLIPTextModel(config).double().eval(), tmp_path / "lora.safetensors"
    tuned = adapted(base, "lora", families=["linear"])
    save_kohya(tuned, path, prefix="lora_te_")
    tensors = load_file(path)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    tokens = torch.arange(5)[None]
    for name in ("lora_te_text_model_", "lora_te_"):
        path = tmp_path / f"{name}.safetensors"  # the other one may still be mapped
        save_file({k.replace("lora_te_text_model_", name): t for k, t in tensors.items()}, path)
        again = copy.deepcopy(base)
        load_kohya(again, path, prefix="lora_te_")
        outputs = [net(tokens).last_hidden_state for net in (again, tuned, base)]
        torch.testing.assert_close(outputs[0], outputs[1])
        assert not torch.allclose(outputs[0], outputs[2], atol=1e-2)


def test_what_is_said_of_a_file(tmp_path: Path) -> None:
    base, path = UNet(), tmp_path / "lora.safetensors"

    def metadata(method: str, **settings: Any) -> dict[str, str]:
        more = {"ss_base_model_version": "sd_v1"}
        save_kohya(adapted(base, method, **settings), path, dtype=torch.float16, metadata=more)
        dtypes = {key.endswith("alpha"): tensor.dtype for key, tensor in load_file(path).items()}
        assert dtypes == {False: torch.float16, True: torch.float32}
        with safe_open(path, framework="pt") as file:
            return file.metadata()

    lora = metadata("lora", rank=2, lora_alpha=4, conv_layout="out_as_h")
    assert lora["ss_network_module"] == "networks.lora"
    assert (lora["ss_network_dim"], lora["ss_network_alpha"]) == ("2", "4.0")
    assert lora["ss_base_model_version"] == "sd_v1"
    loha = metadata("loha", rank=2)
    assert loha["ss_network_module"] == "lycoris.kohya"
    assert json.loads(loha["ss_network_args"]) == {"algo": "loha"}
    assert metadata("lora", rank=2)["ss_network_dim"] == "Dynamic", "balanced: ranks differ"


GOOD = {"lora_up__weight": torch.ones(4, 2), "lora_down__weight": torch.ones(2, 6)}
HADA = {
    "hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 6),
    "hada_w2_a": torch.ones(4, 2), "hada_w2_b": torch.ones(2, 6),
}  # fmt: skip
KRON = {"lokr_w1": torch.ones(2, 3), "lokr_w2": torch.ones(2, 2)}
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "half": ({"lora_up__weight": GOOD["lora_up__weight"]}, "lora_down.weight is missing"),
    "alpha alone": ({"alpha": torch.tensor(1.0)}, "tensors of no method"),
    "two methods": (GOOD | HADA, "tensors of LoRA and LoHa"),
    "unknown": (GOOD | {"w_norm": torch.ones(4)}, "it has w_norm, which gift does not read"),
    "up": (GOOD | {"lora_up__weight": torch.ones(5, 2)}, r"shape \[5, 2\], expected \[4, 2\]"),
    "down": (GOOD | {"lora_down__weight": torch.ones(2, 6, 3, 3)}, r"\[2, 6, 3, 3\], expected"),
    "ranks": (GOOD | {"lora_up__weight": torch.ones(4, 3)}, r"expected \[4, 2\]"),
    "one axis": (GOOD | {"lora_up__weight": torch.ones(8)}, "at least two axes"),
    "empty": (GOOD | {"lora_up__weight": torch.ones(4, 0)}, "none empty"),
    "infinite": (GOOD | {"lora_up__weight": torch.full((4, 2), torch.inf)}, "not finite"),
    "integers": (GOOD | {"lora_up__weight": torch.ones(4, 2).int()}, "is torch.int32"),
    "overflow": (GOOD | {"lora_up__weight": torch.ones(4, 2).double() * 1e300}, "overflow"),
    "alpha 0": (GOOD | {"alpha": torch.tensor(0.0)}, "alpha is 0"),
    "alphas": (GOOD | {"alpha": torch.ones(3)}, "expected one number"),
    "infinite alpha": (GOOD | {"alpha": torch.tensor(torch.nan)}, "alpha is not finite"),
    "mid": (GOOD | {"lora_mid__weight": torch.ones(3, 3)}, r"expected \[2, 2\]"),
    "DoRA of inputs": (GOOD | {"dora_scale": torch.ones(1, 6)}, "magnitudes of inputs"),
    "DoRA of LoHa": (HADA | {"dora_scale": torch.ones(4, 1)}, "no such method"),
    "half a core": (HADA | {"hada_t1": torch.ones(2, 2)}, "has hada_t1, but not all"),
    "LoHa": (HADA | {"hada_w2_a": torch.ones(2, 4)}, r"hada_w2_a has shape \[2, 4\]"),
    "LoKr twice": (KRON | {"lokr_w1_a": torch.ones(2, 1)}, "has lokr_w1_a, but not all"),
    "LoKr size": (KRON | {"lokr_w1": torch.ones(3, 3)}, "does not divide the layer's 4 outputs"),
    "LoKr split": (
        {"lokr_w1": torch.ones(4, 1), "lokr_w2": torch.ones(1, 6)},
        r"into \(4, 1\) x \(1, 6\); .*smaller parts first",
    ),
    "LoKr ranks": (
        {
            "lokr_w1_a": torch.ones(2, 1), "lokr_w1_b": torch.ones(1, 2), "alpha": torch.ones(()),
            "lokr_w2_a": torch.ones(2, 2), "lokr_w2_b": torch.ones(2, 3),
        },
        "relative to one rank",
    ),
}  # fmt: skip


def refused(net: nn.Module, path: Path, message: str, **options: Any) -> None:
    """Loading is an error that says so, and leaves the network as it is."""
    before = full_state(net)
    with pytest.raises(ValueError, match=message):
        load_kohya(net, path, **options)
    assert full_state(net) == before


@pytest.mark.parametrize(("parts", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_a_layer(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    net = nn.ModuleDict({"proj": nn.Linear(6, 4), "other": nn.Linear(6, 4)})
    refused(net, layer_file(tmp_path / "a.safetensors", **parts), message)


def tied() -> nn.Module:
    net = nn.ModuleDict({"proj": nn.Linear(6, 4), "other": nn.Linear(6, 4)})
    net["other"].weight = net["proj"].weight
    return net


def with_zeros() -> nn.Module:
    net = nn.ModuleDict({"proj": nn.Linear(6, 4)})
    net["proj"].weight.data[1] = 0
    return net


WITH_DORA = GOOD | {"dora_scale": torch.ones(4, 1)}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "tied": (tied, GOOD, "tied to another layer"),
    "zeros": (with_zeros, WITH_DORA, "rows of zeros"),
    "norm": (lambda: nn.ModuleDict({"proj": nn.LayerNorm(6)}), GOOD, "proj is a LayerNorm"),
    "table": (lambda: nn.ModuleDict({"proj": nn.Embedding(4, 6)}), GOOD, "proj is a Embedding"),
    "absent": (lambda: nn.ModuleDict({"pro": nn.Linear(6, 4)}), GOOD, "the network has no proj"),
    "lazy": (lambda: nn.ModuleDict({"proj": nn.LazyLinear(4)}), GOOD, "no values yet"),
    "meta": (lambda: nn.ModuleDict({"proj": nn.Linear(6, 4)}).to("meta"), GOOD, "no values yet"),
    "groups": (
        lambda: nn.ModuleDict({"proj": nn.Conv1d(4, 6, 1, groups=2)}),
        {"lokr_w1": torch.ones(3, 1), "lokr_w2": torch.ones(2, 2)},
        "3 rows, the convolution 2 groups",
    ),
    "no bias": (
        lambda: nn.ModuleDict({"proj": nn.Linear(6, 4, bias=False)}),
        {"diff": torch.ones(4, 6), "diff_b": torch.ones(4)}, "a bias that the layer does not have",
    ),
    "inputs of groups": (
        lambda: nn.ModuleDict({"proj": nn.Conv1d(12, 4, 1, groups=2)}),
        {"weight": torch.ones(12), "on_input": torch.tensor(1)}, r"no \(IA\)\^3 of the inputs",
    ),
    "GLoRA of groups": (
        lambda: nn.ModuleDict({"proj": nn.Conv1d(12, 4, 1, groups=2)}),
        {f"{name}__weight": torch.ones(1, 1) for name in ("a1", "a2", "b1", "b2")},
        "no GLoRA of a convolution with groups",
    ),
    "rotations": (
        lambda: nn.ModuleDict({"proj": nn.Linear(6, 4)}), {"oft_blocks": torch.zeros(2, 2, 2)},
        "rotate outputs, OFT and BOFT of gift rotate inputs",
    ),
    "flags": (
        lambda: nn.ModuleDict({"proj": nn.Linear(6, 4)}),
        {"weight": torch.ones(4), "on_input": torch.ones(2)}, "on_input has shape .*one number",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "parts", "message"), NETWORKS.values(), ids=NETWORKS)
def test_what_does_not_fit_a_network(
    make: Callable[[], nn.Module], parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(make(), layer_file(tmp_path / "a.safetensors", **parts), message)


def test_names_that_differ_by_dots_alone(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"b_c": nn.Linear(6, 4)})
    net = nn.ModuleDict({"a": outer, "a_b": nn.ModuleDict({"c": nn.Linear(6, 4)})})
    tensors = {f"lora_unet_a_b_c.{k.replace('__', '.')}": t for k, t in GOOD.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    refused(net, tmp_path / "a.safetensors", "may be a.b_c and a_b.c")
    with pytest.raises(ValueError, match="another layer has the key lora_unet_a_b_c"):
        save_kohya(adapted(net, "lora"), tmp_path / "b.safetensors")


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    net, path = UNet(), tmp_path / "lora.safetensors"
    save_kohya(adapted(net, "lora"), path)
    tensors = load_file(path)
    del tensors["lora_unet_proj_in.lora_up.weight"]
    tensors["lora_unet_proj_out.alpha"] = torch.tensor(torch.inf)
    tensors["lora_unet_nowhere.lora_up.weight"] = torch.ones(2, 2)
    tensors["unet.conv_in.lora.up.weight"] = torch.ones(2, 2)
    save_file(tensors, path)
    refused(
        net,
        path,
        r"(?s)unet.conv_in.*load_diffusers.*nowhere.*proj_in: .*missing.*proj_out: .*not finite",
    )
    refused(net, path, "no keys with prefix 'lora_te_'", prefix="lora_te_")


def test_two_names_for_one_layer(tmp_path: Path) -> None:
    layer = nn.Linear(6, 4)
    net = nn.ModuleDict({"proj": layer, "again": layer})
    parts = {k.replace("__", "."): t for k, t in GOOD.items()}
    both = {f"lora_unet_{name}.{k}": t for name in ("proj", "again") for k, t in parts.items()}
    save_file({key: tensor.clone() for key, tensor in both.items()}, tmp_path / "a.safetensors")
    refused(net, tmp_path / "a.safetensors", "are the same layer")


def test_a_network_that_is_being_fine_tuned(tmp_path: Path) -> None:
    net = adapted(nn.ModuleDict({"proj": nn.Linear(6, 4)}), "lora", rank=2)
    before = full_state(net)
    with pytest.raises(RuntimeError, match="already being fine-tuned"):
        load_kohya(net, layer_file(tmp_path / "a.safetensors", **GOOD))
    assert full_state(net) == before


def test_damaged_files(tmp_path: Path) -> None:
    """Cut anywhere, with a header of other bytes, or no such file at all."""
    net = nn.ModuleDict({"proj": nn.Linear(6, 4)})
    path = layer_file(tmp_path / "a.safetensors", **GOOD)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    broken = [whole[:size] for size in range(0, len(whole), 7)]
    broken += [b"\xff" * 7 + whole[7:], b"PK\x03\x04 a pickle", whole + b"more"]
    broken += [whole[:i] + bytes([whole[i] ^ 0x40]) + whole[i + 1 :] for i in range(8, header, 5)]
    for data in broken:
        path.write_bytes(data)
        refused(net, path, "cannot be read|does not fit")
    with pytest.raises(FileNotFoundError):
        load_kohya(net, tmp_path / "b.safetensors")


def tuned(
    *layers: nn.Module, caps: Any = None, keep_base: bool = True, **settings: Any
) -> nn.Module:
    net = nn.Sequential(*layers)
    caps = caps or [(mc_layer(), ma_adapt(settings.pop("method", "lora"), **settings))]
    strategy = FineTuningStrategy(caps, [(pc_name("bias"), pa_train())])
    enable_fine_tuning(net, strategy, keep_base=keep_base)
    return net


def with_running_statistics(keep_base: bool = True) -> nn.Module:
    net = tuned(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), keep_base=keep_base)
    net(torch.randn(8, 6))
    return net


def with_large_values(value: float) -> nn.Module:
    net = tuned(nn.Linear(6, 4))
    net[0].lora_B.data[0, 0] = value
    return net


def moved(net: nn.Module) -> nn.Module:
    randomise(net)
    return net


def sharing() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return tuned(first, second)


NOT_WRITTEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (lambda: nn.Linear(6, 4), "lora_unet_: .* is being fine-tuned, it is not"),
    "two": (
        lambda: nn.ModuleList([tuned(nn.Linear(6, 4)), tuned(nn.Linear(6, 4))]),
        r"several parts are: \['0', '1'\]",
    ),
    "alone": (lambda: adapted(nn.Linear(6, 4), "lora"), "inside a network"),
    "table": (lambda: tuned(nn.Embedding(6, 4)), "0.weight: such files are for linear layers"),
    "transposed": (lambda: tuned(nn.ConvTranspose2d(6, 4, 3)), "linear layers and convolutions"),
    "bias": (lambda: tuned(nn.Linear(6, 4), nn.LayerNorm(4)), "trained in place.*1.bias"),
    "whole": (
        lambda: tuned(nn.Linear(6, 4), nn.Linear(4, 4), caps=[
            (mc_name("0"), ma_adapt()), (mc_name("1"), ma_train())
        ]),
        "trained in place.*1.weight",
    ),
    "nothing": (lambda: tuned(nn.Linear(6, 4), caps=[(mc_path("0"), ma_train())]), "has no delta"),
    "method": (lambda: tuned(nn.Linear(6, 4), method="vera"), "no counterpart of 'vera'"),
    "call": (
        lambda: tuned(nn.Linear(6, 4), caps=[(mc_path("0"), ma_bottleneck())]),
        "wrapped forward passes",
    ),
    "tied": (sharing, "1.weight shares the delta"),
    "statistics": (with_running_statistics, r"buffers that changed.*: 1.running_mean"),
    "statistics of which no copy was kept": (
        lambda: with_running_statistics(keep_base=False), r"or may have.*: 1.running_mean",
    ),
    "nan": (lambda: with_large_values(torch.nan), "not finite: lora_unet_0.lora_up.weight"),
    "complex": (lambda: tuned(nn.Linear(6, 4, dtype=torch.complex64)), "complex"),
    "scaled biases": (lambda: tuned(nn.Linear(6, 4), method="ia3"), "does not scale biases"),
    "factors of positions": (
        lambda: moved(tuned(nn.Conv2d(6, 4, 3, bias=False), method="ia3", feedforward=True)),
        "positions in the kernel",
    ),
    "scaled inputs of groups": (
        lambda: tuned(nn.Conv1d(6, 4, 1, 1, 0, 1, 2, False), method="ia3", feedforward=True),
        "inputs of a convolution with groups",
    ),
    "biases without a copy": (
        lambda: tuned(
            nn.Linear(6, 4), caps=[(mc_layer(), ma_adapt("full_delta", train_bias=True))],
            keep_base=False,
        ),
        "trained in place.*0.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_such_files_cannot_hold(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    """An error that says so, and the file that was there stays."""
    net, path = make(), tmp_path / "lora.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        save_kohya(net, path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, nn.Sequential])
def test_a_network_inside_another_module(wrap: Any, tmp_path: Path) -> None:
    net, paths = adapted(UNet(), "lora"), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_kohya(net, paths[0])
    save_kohya({"lora_unet_": wrap(net)}, paths[1])
    tensors, wrapped = map(load_file, paths)
    assert all(torch.equal(wrapped.pop(key), tensor) for key, tensor in tensors.items())
    assert not wrapped


def test_buffers_that_are_only_converted_or_shared_did_not_change(tmp_path: Path) -> None:
    norms = nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, affine=False)
    norms[1].running_mean = norms[0].running_mean
    net = tuned(nn.Linear(4, 4, bias=False), *norms).to(torch.bfloat16)
    assert not list(moved_buffers(net))
    save_kohya(net, tmp_path / "a.safetensors")
    net[2].running_mean += 1
    assert list(moved_buffers(net)) == ["1.running_mean", "2.running_mean"]


def test_what_16_bits_cannot_hold(tmp_path: Path) -> None:
    net = with_large_values(1e6)
    with pytest.raises(ValueError, match=r"not finite in torch.float16: lora_unet_0.lora_up"):
        save_kohya(net, tmp_path / "a.safetensors", dtype=torch.float16)
    save_kohya(net, tmp_path / "a.safetensors", dtype=torch.bfloat16)


def test_alpha_of_zero_is_a_delta_of_zero_for_everybody(lycoris: Any, tmp_path: Path) -> None:
    """LyCORIS and sd-scripts take an alpha of zero for no scaling at all."""
    base, path = UNet().double(), tmp_path / "lora.safetensors"
    save_kohya(adapted(base, "lora", rank=2, lora_alpha=0.0), path)
    torch.testing.assert_close(through(lycoris, base, path)(X), base(X))


def test_alpha_may_be_an_integer(lycoris: Any, tmp_path: Path) -> None:
    base, path = UNet().double(), tmp_path / "lora.safetensors"
    ours = adapted(base, "lora", rank=2, lora_alpha=3.0)
    save_kohya(ours, path)
    tensors = load_file(path)
    for key in tensors:
        if key.endswith(".alpha"):
            tensors[key] = tensors[key].long()
    save_file(tensors, path)
    net = copy.deepcopy(base)
    load_kohya(net, path)
    assert_same(net, through(lycoris, base, path), base, 2e-5)


def test_rows_of_zeros_have_the_magnitude_of_their_update(lycoris: Any, tmp_path: Path) -> None:
    """Gift's DoRA trains them as LoRA does."""
    base, path = UNet().double(), tmp_path / "lora.safetensors"
    with torch.no_grad():
        base.proj_in.weight[3:7] = 0
    ours = adapted(base, "dora")
    save_kohya(ours, path)
    assert_same(ours, through(lycoris, base, path), base, 2e-5)


def test_gift_keeps_what_it_read(lycoris: Any, tmp_path: Path) -> None:
    """The strategy has registered parts only, so a file of gift's own can name it."""
    base, path = UNet(), tmp_path / "lora.safetensors"
    trained_by(lycoris, base, path, network_module="lokr", factor=4)
    net, again = copy.deepcopy(base), copy.deepcopy(base)
    load_kohya(net, path)
    gift.save(net, tmp_path / "delta.safetensors")
    gift.load(again, tmp_path / "delta.safetensors")
    x = X.float()
    assert torch.equal(net(x), again(x))
    assert not torch.allclose(net(x), base(x), atol=1e-2)


def test_diffusers_reads_what_gift_writes(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.loaders import lora_conversion_utils

    base = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12,
        attention_head_dim=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    path = tmp_path / "lora.safetensors"

    def call(net: Any) -> Tensor:
        with torch.no_grad():
            return net(X.float(), 3, torch.ones(2, 5, 12)).sample

    ours = adapted(base, "lora", rank=2, lora_alpha=4.0)
    if diffusers.__version__.startswith("0.33"):  # it reads nothing for layers outside of blocks
        for name, parameter in ours.named_parameters():
            if "block" not in name and name.endswith("lora_B"):
                nn.init.zeros_(parameter)
    save_kohya(ours, path)
    again = copy.deepcopy(base)
    load_kohya(again, path)
    theirs = copy.deepcopy(base)
    state, alphas = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(load_file(path))
    theirs.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    expected = call(ours)
    assert not torch.allclose(expected, call(base), atol=1e-2)
    torch.testing.assert_close(call(theirs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int32}, "expected a floating-point torch dtype"),
        ({"dtype": "float16"}, "expected a floating-point torch dtype"),
        ({"metadata": {"a": 1}}, "expected texts"),
        ({"rename": lambda path: None}, "0: rename gives None"),
    ],
)
def test_wrong_arguments_write_nothing(arguments: Any, message: str, tmp_path: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    enable_fine_tuning(net, gift.strategies.LoRALinearFineTuningStrategy(rank=2))
    with pytest.raises(gift.DeltaFileError, match=message):
        save_kohya(net, tmp_path / "x.safetensors", **arguments)
    with pytest.raises(gift.DeltaFileError, match="no network"):
        save_kohya({}, tmp_path / "x.safetensors", **arguments)
    assert not list(tmp_path.iterdir())
