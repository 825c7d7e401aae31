"""What says how a delta is to be read survives in a plain dictionary of tensors."""

import copy
import functools
import io
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gift
from gift import FineTuningStrategy, enable_fine_tuning, merge_strategies, strategies
from gift.core.delta import added_names, held
from gift.core.state_settings import KEY, decoded, encoded, is_settings
from gift.factories import ma_adapt, mc_any, mc_name
from gift.methods import METHODS
from gift.strategies import (
    BottleneckFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    PromptFineTuningStrategy,
    RsLoRAAllFineTuningStrategy,
)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def tuned(strategy: FineTuningStrategy, seed: int = 1, make: Callable[[], Any] = base) -> nn.Module:
    """The base with a delta of random values."""
    net = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gift.GiftWarning)  # of small layers
        enable_fine_tuning(net, strategy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def lora(alpha: float | None = None, rank: int = 2, **options: Any) -> FineTuningStrategy:
    return LoRAAllFineTuningStrategy(rank=rank, lora_alpha=alpha, **options)


def through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: Any, folder: Path) -> Any:
    save_file(dict(state), folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


def averaged(state: Any) -> Any:
    """An exponential average that never heard of integers, from 50 equal states."""
    mean = {key: value.clone() for key, value in state.items()}
    for _ in range(50):
        for key, value in state.items():
            mean[key].mul_(0.9).add_(value, alpha=0.1)
    return mean


PLAIN: dict[str, Callable[[Any, Path], Any]] = {
    "on the processor": lambda state, _: {k: v.cpu() for k, v in state.items()},
    "copied": lambda state, _: {k: v.clone() for k, v in state.items()},
    "an OrderedDict": lambda state, _: OrderedDict(state),
    "a copy": lambda state, _: state.copy(),
    "a dict": lambda state, _: dict(state),
    "merged dicts": lambda state, _: {**state},
    "in a file of torch": lambda state, _: through_torch(state),
    "in a safetensors file": through_safetensors,
    "averaged": lambda state, _: averaged(state),
    "in half precision": lambda state, _: {k: v.half() for k, v in state.items()},
    "in bfloat16": lambda state, _: {k: v.bfloat16() for k, v in state.items()},
    "in double precision": lambda state, _: {k: v.double() for k, v in state.items()},
}
ROUNDED = {"averaged", "in half precision", "in bfloat16"}


class Outer(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.wrap = nn.ModuleDict({"inner": net})
        self.last = nn.Linear(16, 2)


def around(net: nn.Module, inside: bool) -> nn.Module:
    torch.manual_seed(3)
    return Outer(net) if inside else net


ALPHAS = list(itertools.permutations([None, 4.0, 32.0], 2))


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("through", PLAIN)
@pytest.mark.parametrize(("there", "here"), ALPHAS)
def test_another_alpha_is_refused_whatever_became_of_the_state(
    there: float | None, here: float | None, through: str, inside: bool, tmp_path: Path
) -> None:
    net, other = tuned(lora(there)), tuned(lora(here), seed=2)
    held_before = {k: v.clone() for k, v in other.state_dict().items()}
    state = PLAIN[through](around(net, inside).state_dict(), tmp_path)
    assert not hasattr(state, "_metadata")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"(?s)0 was trained with.*2 was trained with"):
            around(other, inside).load_state_dict(state, strict=strict)
    assert all(torch.equal(v, held_before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("through", PLAIN)
@pytest.mark.parametrize("alpha", [None, 4.0])
def test_the_same_alpha_loads(
    alpha: float | None, through: str, inside: bool, tmp_path: Path
) -> None:
    net, other, x = tuned(lora(alpha)), tuned(lora(alpha), seed=2), torch.randn(3, 16)
    state = PLAIN[through](around(net, inside).state_dict(), tmp_path)
    assert around(other, inside).load_state_dict(state) == ([], [])
    tolerance = 0.1 if through in ROUNDED else 0
    torch.testing.assert_close(other(x), net(x), rtol=tolerance, atol=tolerance)


def test_the_effect_of_a_wrong_alpha_is_what_is_prevented() -> None:
    """By the formula, the outputs would differ by the ratio of the alphas."""
    net, other, x = tuned(lora(4.0)), base(), torch.randn(3, 16)
    layer: Any = net[0]
    delta = layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x) - other[0](x), x @ delta.T * 4 / 2)


def test_default_settings_add_no_key() -> None:
    keys = [f"{i}.{name}" for i in (0, 2) for name in ("lora_B", "lora_A")]
    assert list(tuned(lora()).state_dict()) == keys
    assert list(tuned(lora(2.0)).state_dict()) == keys  # alpha = rank is the default's meaning
    assert list(tuned(lora(rank=4)).state_dict()) == keys  # shapes show it
    assert list(tuned(lora(lora_dropout=0.5)).state_dict()) == keys  # changes no result
    others = [key for key in tuned(lora(4.0)).state_dict() if key not in keys]
    assert others == [f"0.{KEY}", f"2.{KEY}"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_told_apart_by_names_shapes_or_settings(name: str) -> None:
    """Of two methods with the same parameters, one at least says which it is."""
    nets = dict(_by_method())
    mine = nets.pop(name)
    for net in nets.values():
        same = {k: v.shape for k, v in mine.state_dict().items() if not is_settings(k)} == {
            k: v.shape for k, v in net.state_dict().items() if not is_settings(k)
        }
        if not same:
            continue
        one, two = (dict(n.state_dict()) for n in (mine, net))
        if one.keys() == two.keys() and all(
            torch.equal(one[k], two[k]) for k in one if is_settings(k)
        ):
            # Then the same tensors mean the same weight.
            with torch.no_grad():
                for parameter in (*mine.parameters(), *(held_buffers(mine))):
                    parameter.normal_()
            net = copy.deepcopy(net)
            net.load_state_dict(dict(mine.state_dict()))
            torch.testing.assert_close(net[0].weight, mine[0].weight)  # type: ignore[union-attr]


@functools.cache
def _by_method() -> dict[str, nn.Module]:
    return {name: tuned(FineTuningStrategy([(mc_any(), ma_adapt(name))])) for name in METHODS}


def held_buffers(net: nn.Module) -> list[Tensor]:
    found = [held(m, n)[n] for m in net.modules() for n in added_names(m)]
    return [t for t in found if not isinstance(t, nn.Parameter) and t.is_floating_point()]


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"lora_alpha": 5.0}, {"use_rslora": True}),
    "rslora": ({}, {"lora_alpha": 5.0}),
    "dora": ({"lora_alpha": 5.0}, {}),
    "loha": ({"alpha": 5.0}, {"alpha": 6.0}),
    "lokr": ({"alpha": 5.0}, {}),
    "fourierft": ({"seed": 1}, {"scaling": 10.0}),
    "vera": ({"seed": 1}, {}),
    "shira": ({"seed": 1}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_methods(name: str) -> None:
    def made(settings: dict[str, Any]) -> nn.Module:
        return tuned(FineTuningStrategy([(mc_any(), ma_adapt(name, **settings))]))

    one, two = map(made, SETTINGS[name])
    for net, other in ((one, two), (two, one)):
        with pytest.raises(RuntimeError, match="trained with"):
            other.load_state_dict(dict(net.state_dict()))
        copy.deepcopy(net).load_state_dict(dict(net.state_dict()))


def test_layouts_that_no_shape_shows() -> None:
    """Coefficients of FourierFT are as many in either layout."""

    def made(layout: str | None) -> nn.Module:
        strategy = strategies.FourierFTAllFineTuningStrategy(conv_layout=layout)  # type: ignore[attr-defined]
        return tuned(strategy, make=lambda: nn.Sequential(nn.Conv2d(4, 6, 3)))

    balanced, whole = made(None), made("out_as_h")
    with pytest.raises(RuntimeError, match="matrix"):
        whole.load_state_dict(dict(balanced.state_dict()))
    with pytest.raises(RuntimeError, match="matrix"):
        balanced.load_state_dict(dict(whole.state_dict()))
    made("out_as_h").load_state_dict(dict(whole.state_dict()))


CHOOSING = [name for name, method in METHODS.items() if len(method.conv_layouts) > 1]


@pytest.mark.parametrize("name", CHOOSING)
def test_layouts_of_convolutions_are_shown_by_shapes_or_settings(name: str) -> None:
    """The method's own choice adds no key; another one is told where shapes may agree."""
    own, other = METHODS[name].conv_layouts[:2]
    confused = nn.Conv2d(2, 6, 3)  # 18 x 6 or 6 x 18
    for conv in (nn.Conv2d(4, 6, 3), confused):
        states = []
        for layout in (own, other):
            caps = [(mc_any(), ma_adapt(name, conv_layout=layout))]
            net = tuned(FineTuningStrategy(caps), make=lambda conv=conv: copy.deepcopy(conv))
            state = net.state_dict()
            states.append({k: v.tolist() if is_settings(k) else v.shape for k, v in state.items()})
        assert states[0] != states[1]
        if not METHODS[name].shares_names:
            assert KEY not in states[0]
            assert METHODS[name].shows_matrix == (KEY not in states[1])


def test_bottlenecks_and_prompts() -> None:
    one = tuned(BottleneckFineTuningStrategy(size=4, scaling=2.0))
    two = tuned(BottleneckFineTuningStrategy(size=4))
    assert not any(map(is_settings, two.state_dict()))
    for net, other in ((one, two), (two, one)):
        with pytest.raises(RuntimeError, match="bottleneck"):
            other.load_state_dict(dict(net.state_dict()))
        copy.deepcopy(net).load_state_dict(dict(net.state_dict()))

    def encoder(strip: bool) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        enable_fine_tuning(net, PromptFineTuningStrategy(num_virtual_tokens=3, strip=strip))
        return net

    with pytest.raises(RuntimeError, match="prompt"):
        encoder(True).load_state_dict(dict(encoder(False).state_dict()))
    assert not any(map(is_settings, encoder(True).state_dict()))


def test_a_state_without_settings_loads_if_the_user_vouches_for_it() -> None:
    """As one that an earlier version wrote into a safetensors file."""
    net, other = tuned(lora(4.0)), tuned(lora(4.0), seed=2)
    old = {key: value for key, value in net.state_dict().items() if not is_settings(key)}
    with pytest.raises(RuntimeError, match=r"net\.load_state_dict\(net\.state_dict\(\) \| state\)"):
        other.load_state_dict(old)
    other.load_state_dict(other.state_dict() | old)
    assert torch.equal(other[0].weight, net[0].weight)  # type: ignore[arg-type, union-attr]


def test_metadata_of_earlier_versions_is_enough() -> None:
    net, other = tuned(lora(4.0)), tuned(lora(4.0), seed=2)
    old = net.state_dict()
    for key in [key for key in old if is_settings(key)]:
        del old[key]
    other.load_state_dict(old)
    assert torch.equal(other[0].weight, net[0].weight)  # type: ignore[arg-type, union-attr]
    with pytest.raises(RuntimeError, match="trained with"):
        tuned(lora(32.0)).load_state_dict(old)


def test_a_damaged_entry_is_refused() -> None:
    net = tuned(lora(4.0))
    for value in (torch.full((5,), float("nan")), torch.zeros(4), torch.tensor([300.0]), "text"):
        state = dict(net.state_dict()) | {f"0.{KEY}": value}
        with pytest.raises(RuntimeError, match="damaged"):
            net.load_state_dict(state)


def test_parts_of_a_network_say_it_too() -> None:
    net, other = tuned(lora(4.0)), tuned(lora(32.0), seed=2)
    state = dict(net[0].state_dict())  # type: ignore[index]
    net[0].load_state_dict(state)  # type: ignore[index]
    with pytest.raises(RuntimeError, match="trained with"):
        other[0].load_state_dict(state)  # type: ignore[index]


def test_mixed_settings_are_compared_layer_by_layer() -> None:
    def mixed(first: float | None, second: float | None) -> nn.Module:
        caps = [
            (mc_name(n), ma_adapt("lora", lora_alpha=a))
            for n, a in zip("02", (first, second), strict=True)
        ]
        return tuned(FineTuningStrategy(caps))

    state = dict(mixed(9.0, None).state_dict())
    mixed(9.0, None).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0 was trained") as caught:
        mixed(None, 9.0).load_state_dict(state)
    assert "2 was trained" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"2 was trained"):
        mixed(9.0, 8.0).load_state_dict(state)


def test_a_whole_state_says_it_too() -> None:
    """``trainable_state_dict=False``."""
    net = base()
    enable_fine_tuning(net, lora(4.0), trainable_state_dict=False)
    other = base()
    enable_fine_tuning(other, lora(32.0), trainable_state_dict=False)
    with pytest.raises(RuntimeError, match="trained with"):
        other.load_state_dict(dict(net.state_dict()))
    with pytest.raises(RuntimeError, match="trained with"):
        other.load_state_dict(net.state_dict())


def test_neither_files_of_gift_nor_merged_networks_have_the_entries(tmp_path: Path) -> None:
    net = tuned(lora(4.0))
    gift.save(net, tmp_path / "task.safetensors")
    assert not any(map(is_settings, load_file(tmp_path / "task.safetensors")))
    fresh = base()
    gift.load(fresh, tmp_path / "task.safetensors")
    assert torch.equal(fresh[0].weight, net[0].weight)  # type: ignore[arg-type, index, union-attr]
    gift.merge(net)
    assert net.state_dict().keys() == base().state_dict().keys()


def test_a_bank_takes_states_with_settings() -> None:
    net = tuned(merge_strategies([lora(4.0)]))
    bank = gift.DeltaBank(base())
    bank.add("one", dict(net.state_dict()), strategy=lora(4.0))
    with pytest.raises(RuntimeError, match="trained with"):
        bank.add("two", dict(net.state_dict()), strategy=lora(32.0))
    bank.activate("one")
    assert torch.equal(bank.net[0].weight, net[0].weight)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("settings", [{}, {"a": {"method": "lora", "scaling": 0.1}}])
def test_settings_as_tensors(settings: Mapping[str, Any]) -> None:
    tensor = encoded(settings)
    assert tensor.dtype == torch.float32
    assert tensor.ndim == 1
    assert decoded(tensor) == settings
    assert decoded(tensor.to(torch.bfloat16)) == settings


def test_rslora_is_told_from_lora() -> None:
    net, other = tuned(RsLoRAAllFineTuningStrategy(rank=2)), tuned(lora())
    for one, two in ((net, other), (other, net)):
        with pytest.raises(RuntimeError, match="trained with"):
            two.load_state_dict(dict(one.state_dict()))
