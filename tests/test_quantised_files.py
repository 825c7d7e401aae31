"""Deltas of quantised bases: files, merging for a while and for good, banks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift.errors import AdaptationError
from gift.factories import ma_adapt, mc_layer
from tests.test_quantised import (
    KINDS,
    Kind,
    adapt,
    assert_near,
    assert_same_bits,
    inputs,
    int4_matrix,
    of_every_kind,
    of_some_kinds,
    packed,
    train,
)


def tuned(kind: Kind, method: str = "lora") -> Any:
    torch.manual_seed(0)
    net = adapt(kind.network(), method)
    train(net)
    return net


def matrices(net: Any, kind: Kind) -> dict[str, Tensor]:
    """What the weights of a plain quantised network stand for, told by the package."""
    layers = net.named_children()
    return {n: matrix(m, kind).detach().double() for n, m in layers if hasattr(m, "weight")}


def matrix(layer: Any, kind: Kind) -> Tensor:
    if kind.dequantise is not int4_matrix:
        return kind.dequantise(layer)
    # That kind cannot be asked: its matrix is what the layer makes of unit vectors.
    return (layer(torch.eye(layer.in_features)) - layer.bias).T


def updates(net: Any) -> dict[str, Tensor]:
    """What LoRA adds, by its formula in float64."""
    layers = [(n, m) for n, m in net.named_children() if hasattr(m, "lora_B")]
    return {n: (m.lora_B.double() @ m.lora_A.double()).detach() for n, m in layers}


@of_every_kind
def test_a_file_has_the_delta_and_knows_the_quantised_base(kind: Kind, tmp_path: Path) -> None:
    net = tuned(kind)
    gift.save(net, tmp_path / "delta.safetensors")
    file = gift.inspect(tmp_path / "delta.safetensors")
    assert sorted(file.tensors) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    fresh = kind.network()
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(fresh(inputs()), net(inputs()))
    other = nn.Sequential(kind.linear(64, 128, seed=5), nn.Tanh(), kind.linear(128, 64, seed=1))
    before = packed(other)
    with pytest.raises(gift.DeltaFileError, match=r"other values.*0\.weight"):
        gift.load(other, tmp_path / "delta.safetensors")
    assert_same_bits(other, before)


@pytest.mark.parametrize("name", [name for name in KINDS if "scaled" not in name])
def test_merging_quantises_as_the_base_was_and_tells_the_error(name: str) -> None:
    kind = KINDS[name]
    net, fresh = tuned(kind), kind.network()
    change = updates(net)
    wanted = {key: value + change[key] for key, value in matrices(fresh, kind).items()}
    with pytest.warns(gift.GiftWarning, match="2 quantised weights") as caught:
        assert gift.merge(net) is net
    merged, missed = matrices(net, kind), []
    for key, value in wanted.items():
        layer, plain = net.get_submodule(key), nn.Linear(value.shape[1], value.shape[0])
        plain.load_state_dict({"weight": value.float(), "bias": layer.bias.float()})
        assert type(layer) is type(fresh.get_submodule(key))
        # As if the package had been given the merged values; a tie may be rounded the other way.
        at_once = matrix(kind.quantise(plain).train(kind.trains), kind)
        assert_near(merged[key], at_once.detach(), 1e-2, key)
        missed.append(float((merged[key] - value).norm() / change[key].norm()))
    percents = [float(number) for number in re.findall(r"([\d.]+)%", str(caught[0].message))]
    assert percents == pytest.approx([50 * sum(missed), 100 * max(missed)], abs=0.06)
    assert net.state_dict().keys() == fresh.state_dict().keys()
    assert not any(parameter.requires_grad for key, parameter in net.named_parameters()
                   if key.endswith("weight"))  # fmt: skip


def test_what_cannot_be_quantised_again_is_named_and_nothing_is_merged() -> None:
    kind = KINDS["torchao int8 scaled"]
    net = tuned(kind)
    before, expected = packed(net), net(inputs())
    with pytest.raises(AdaptationError) as error:
        gift.merge(net)
    assert "0.weight" in str(error.value)
    assert "2.weight" in str(error.value)
    assert_same_bits(net, before)
    assert torch.equal(net(inputs()), expected)


def test_a_warning_that_is_an_error_leaves_everything() -> None:
    net = tuned(KINDS["torchao int8"])
    before, expected = packed(net), net(inputs())
    with pytest.raises(gift.GiftWarning):  # as everywhere in these tests
        gift.merge(net)
    assert_same_bits(net, before)
    assert torch.equal(net(inputs()), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "shira"])
@of_some_kinds
def test_merged_and_disabled_for_a_while(kind: Kind, method: str) -> None:
    net = tuned(kind, method)
    before, expected, base = packed(net), net(inputs()), kind.network()(inputs())
    with gift.merged(net):
        assert torch.equal(net(inputs()), expected)
    with gift.disabled(net):
        assert torch.equal(net(inputs()), base)
    assert torch.equal(net(inputs()), expected)
    assert_same_bits(net, before)


@of_some_kinds
def test_many_deltas_on_a_quantised_base(kind: Kind) -> None:
    net = kind.network()
    base, bank, outputs = net(inputs()), gift.DeltaBank(net), {}
    for name, method in {"a": "lora", "b": "dora"}.items():
        bank.add(name, strategy=gift.FineTuningStrategy([(mc_layer(), ma_adapt(method))]))
        bank.activate(name)
        train(net)
        outputs[name] = net(inputs())
    for name, expected in reversed(outputs.items()):
        bank.activate(name)
        assert torch.equal(net(inputs()), expected)
    bank.activate(None)
    assert torch.equal(net(inputs()), base)
    with torch.no_grad(), bank.rows(["a", None] * 3):
        found = net(inputs())
    assert_near(found[0::2], outputs["a"][0::2], 1e-5)
    assert_near(found[1::2], base[1::2], 1e-5)


def test_inference_of_the_base_leaves_the_order_of_4_bits_as_it_was(tmp_path: Path) -> None:
    """On some CPUs, a layer of bitsandbytes packs its weight anew in its first inference."""
    kind = KINDS["bitsandbytes nf4"]
    net = tuned(kind).eval()
    with torch.no_grad():
        expected, before = net(inputs()), packed(net)
        with gift.disabled(net):
            net(inputs())
        assert torch.equal(net(inputs()), expected)
    assert_same_bits(net, before)
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = kind.network().eval()
    gift.load(fresh, tmp_path / "delta.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(inputs()), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes int8"])
def test_exchange_with_peft_on_a_quantised_base(name: str, method: str, tmp_path: Path) -> None:
    """PEFT adapts the same layers in its own way; both round in the same kernels."""
    from peft import PeftModel

    kind = KINDS[name]
    net = tuned(kind, method).eval()
    expected = net(inputs())
    gift.save_peft(net, tmp_path)
    model = PeftModel.from_pretrained(kind.network().eval(), str(tmp_path)).eval()
    assert_near(model(inputs()), expected, 1e-4)
    fresh = kind.network().eval()
    gift.load_peft(fresh, tmp_path)
    assert_near(fresh(inputs()), expected, 1e-6)


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes nf4", "bitsandbytes int8"])
def test_kohya_and_back_on_a_quantised_base(name: str, tmp_path: Path) -> None:
    net = tuned(KINDS[name]).eval()
    gift.save_kohya(net, tmp_path / "delta.safetensors")
    fresh = KINDS[name].network().eval()
    gift.load_kohya(fresh, tmp_path / "delta.safetensors")
    assert_near(fresh(inputs()), net(inputs()), 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_delta_of_a_quantised_base_fits_the_base_itself_and_back(
    bits: int, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    original = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    made = {
        4: lambda *sizes: bitsandbytes.nn.Linear4bit(*sizes, quant_type="nf4"),
        8: lambda *sizes: bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False),
    }[bits]
    packed_net = nn.Sequential(made(64, 32), nn.ReLU(), made(32, 64))
    packed_net.load_state_dict(original.state_dict())
    packed_net = packed_net.to("cpu")
    before = {name: p.detach().clone() for name, p in original.named_parameters()}
    adapt(packed_net, "lora")
    train(packed_net)
    gift.save(packed_net, tmp_path / "delta.safetensors")
    with pytest.raises(gift.DeltaFileError, match="base"):
        gift.load(original, tmp_path / "delta.safetensors")
    gift.load(original, tmp_path / "delta.safetensors", check_base=False)
    change = updates(packed_net)
    for name in ("0", "2"):
        weight = original.get_submodule(name).weight.double()
        torch.testing.assert_close(weight, before[f"{name}.weight"].double() + change[name])
    gift.save(original, tmp_path / "back.safetensors")
    gift.disable_fine_tuning(packed_net)
    gift.load(packed_net, tmp_path / "back.safetensors", check_base=False)
    assert updates(packed_net)["0"].equal(change["0"])
    gift.merge(original)
    assert type(original[0]) is nn.Linear
