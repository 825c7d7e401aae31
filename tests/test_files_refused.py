"""What `gift.load` refuses: one error that lists everything, and a network that is untouched."""

import copy
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gift
from gift import DeltaFileError, FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, mc_layer
from gift.files import container
from gift.strategies import (
    DebugStrategy,
    HeadReplacementStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    VeRALinearFineTuningStrategy,
)
from gift.strategies.resolved import ResolvedStrategy
from tests.common import enabled, full_state
from tests.hostile_files import damaged, rewritten

LORA = LoRAAllFineTuningStrategy


def make(*more: nn.Module) -> nn.Module:
    """The base, the same each time."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, (2, 3)), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 6)]
    return nn.Sequential(*layers, *more)


def images() -> Tensor:
    return torch.randn(4, 3, 3, 4, generator=torch.Generator().manual_seed(2))


def used(net: nn.Module) -> nn.Module:
    """With gradients, and statistics that moved."""
    net.train()(images()).square().sum().backward()
    return net


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good file."""
    net = used(enabled(make(), LORA(rank=2)))
    gift.save(net, tmp_path / "good.safetensors")
    gift.load(make(), tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def refused(net: nn.Module, path: Path, *reasons: str, **options: Any) -> DeltaFileError:
    """Loading is refused for these reasons, and nothing of the network changes."""
    before = full_state(net)
    with pytest.raises(DeltaFileError) as caught:
        gift.load(net, path, **options)
    assert full_state(net) == before
    for reason in reasons:
        assert re.search(reason, str(caught.value)), f"{reason!r} not in: {caught.value}"
    assert path.name in str(caught.value)
    return caught.value


def refused_everywhere(path: Path, *reasons: str) -> None:
    """By the plain base and by an enabled network, whatever the base is."""
    for check_base in (True, False):
        refused(used(make()), path, *reasons, check_base=check_base)
        refused(used(enabled(make(), LORA(rank=2))), path, *reasons, check_base=check_base)


# --- files that are not whole, or not gift's -----------------------------------------------------


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def header_end(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "length alone": lambda data: data[:8],
    "header cut": lambda data: data[:200],
    "payload cut": lambda data: data[:-1],
    "payload missing": lambda data: data[: header_end(data)],
    "byte too many": lambda data: data + b"\0",
    "first byte": lambda data: flip(data, 0),
    "last byte": lambda data: flip(data, len(data) - 1),
    "payload": lambda data: flip(data, (header_end(data) + len(data)) // 2),
    "a digest in the header": lambda data: flip(data, data.index(b"lora_A") - 3),
    "a digit in the header": lambda data: data.replace(b'rank\\":2', b'rank\\":3', 1),
    "a name in the header": lambda data: data.replace(b'"0.lora_A"', b'"1.lora_A"', 1),
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"To whom it may concern",
    "a huge header": lambda data: struct.pack("<Q", 2**63) + data[8:],
}


def test_a_shape_in_the_header_is_part_of_what_is_checked(path: Path) -> None:
    """The same numbers in another shape are another tensor, though the file is well-formed."""
    data = path.read_bytes()
    end = header_end(data)
    header = json.loads(data[8:end])
    name, shape = next((k, v["shape"]) for k, v in header.items() if k.endswith("3.lora_A"))
    text = json.dumps(shape, separators=(",", ":")).encode()
    place = data.index(text, data.index(f'"{name}":{{"dtype"'.encode()))
    assert place < end
    turned = json.dumps(shape[::-1], separators=(",", ":")).encode()
    path.write_bytes(data[:place] + turned + data[place + len(text) :])
    refused_everywhere(path, "cannot be read")


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_damage_is_found(broken: Callable[[bytes], bytes], path: Path) -> None:
    data = path.read_bytes()
    assert broken(data) != data
    path.write_bytes(broken(data))
    refused_everywhere(path, "cannot be read")
    with pytest.raises(DeltaFileError, match="cannot be read"):
        gift.inspect(path)


def test_every_flipped_bit_of_a_byte_and_every_length_is_found(path: Path) -> None:
    data, reader = path.read_bytes(), path.with_name("broken")
    for place in range(0, len(data), 41):
        for spoiled in (flip(data, place), data[:place]):
            reader.write_bytes(spoiled)
            if damaged(data, spoiled):
                with pytest.raises(DeltaFileError, match="cannot be read"):
                    container.read(reader)


def test_what_is_no_file(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing", tmp_path / "no" / "folder"):
        for call in (lambda place: gift.load(make(), place), gift.inspect):
            with pytest.raises(FileNotFoundError, match="there is no file"):
                call(place)


class Danger:
    """What runs where it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return exec, ("import tests.test_files_refused as t; t.Danger.ran = True",)


def test_files_of_others_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    pickle.loads(pickle.dumps(Danger()))
    assert Danger.ran, "the danger is real"
    Danger.ran = False
    torch.save({"weight": Danger()}, path)
    refused(make(), path, "not a complete safetensors file")
    path.write_bytes(pickle.dumps(Danger()))
    refused(make(), path, "not a complete safetensors file")
    assert not Danger.ran
    save_file(make().state_dict(), path)
    refused(make(), path, "that gift did not write.*load_peft")
    config = peft.LoraConfig(target_modules=["3"])
    peft.get_peft_model(make(), config).save_pretrained(tmp_path / "peft")
    refused(
        make(), tmp_path / "peft" / "adapter_model.safetensors", "gift did not write.*load_peft"
    )


# --- files with right digests that do not fit ----------------------------------------------------

Tensors = dict[str, Tensor]


def longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def with_value(number: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = number
        return tensor

    return spoil


CONTENTS: dict[str, tuple[Callable[[dict[str, Any], Tensors], Any], str]] = {
    "missing": (
        lambda head, t: t.pop("3.lora_A"), r"lacks 1 tensors .*: \['3.lora_A'\]"),
    "statistics missing": (lambda head, t: t.pop("1.running_var"), r"lacks 1.*running_var"),
    "unexpected": (
        lambda head, t: t.update({"3.lora_C": torch.ones(2)}),
        r"has 1 tensors that are not trained here: \['3.lora_C'\]"),
    "of the base": (
        lambda head, t: t.update({"3.weight": torch.ones(6, 32)}), r"has 1 .*\['3.weight'\]"),
    "misshapen": (
        lambda head, t: t.update({"3.lora_B": longer(t["3.lora_B"])}),
        r"3.lora_B is \(12, 2\), here it is \(6, 2\)"),
    "flattened": (
        lambda head, t: t.update({"3.lora_B": t["3.lora_B"].flatten()}), r"3.lora_B is \(12,\)"),
    "integers": (
        lambda head, t: t.update({"1.num_batches_tracked": torch.ones(2, dtype=torch.long)}),
        r"1.num_batches_tracked is \(2,\)"),
    "nan": (
        lambda head, t: t.update({"3.lora_B": with_value(torch.nan)(t["3.lora_B"])}),
        "3.lora_B has numbers that are not finite"),
    "infinite": (
        lambda head, t: t.update({"1.running_var": with_value(torch.inf)(t["1.running_var"])}),
        "1.running_var has numbers that are not finite"),
    "complex": (
        lambda head, t: t.update({"3.lora_B": t["3.lora_B"].to(torch.complex64)}),
        r"3.lora_B is torch.complex64, here it is torch.float32"),
    "an alias of nothing": (
        lambda head, t: (t.pop("3.lora_A"), head["aliases"].update({"3.lora_A": "3.lora_C"})),
        "3.lora_A is tied to 3.lora_C, which it lacks"),
    "newer format": (
        lambda head, t: head.update(format_version=2), "version 2, this gift knows 1: update"),
    "no version": (lambda head, t: head.pop("format_version"), "header makes no sense"),
    "a version of none": (lambda head, t: head.update(format_version=True), "makes no sense"),
    "unknown method": (
        lambda head, t: head["deltas"][0].update(method="lore"), "unknown method 'lore'.*lora"),
    "another method": (
        lambda head, t: head["deltas"][0].update(method="loha", settings={"rank": 2}),
        r"it changes 0.weight by \{'method': 'loha'.*here by \{'method': 'lora'"),
    "another alpha": (
        lambda head, t: head["deltas"][0]["settings"].update(lora_alpha=5), "'scaling': 2.5.*1.0"),
    "another matrix": (
        lambda head, t: head["deltas"][0]["tensors"].update({"3.weight": [32, 6]}),
        r"\[32, 6\].*\[6, 32\]"),
    "unknown setting": (
        lambda head, t: head["deltas"][0]["settings"].update(code="import os"), "no setting"),
    "an unknown layer": (
        lambda head, t: head["deltas"][0]["tensors"].update({"7.weight": [6, 32]}),
        r"it changes 7.weight by .*, here that is not fine-tuned"),
    "settings that are none": (
        lambda head, t: head["deltas"][0].update(settings=["rank"]), "'deltas' that"),
    "a delta that is none": (
        lambda head, t: head["deltas"].append("lora"), "'deltas' that"),
    "a layer less": (
        lambda head, t: head["deltas"][0]["tensors"].pop("3.weight"),
        "does not change 3.weight, which is fine-tuned here by"),
    "a field less": (lambda head, t: head.pop("base"), "does not say 'base'"),
    "a strategy of nonsense": (
        lambda head, t: head.update(strategy=["LoRA"]), "'strategy' that makes no sense"),
    "a field of nonsense": (lambda head, t: head.update(trained={"a": 1}), "'trained' that"),
    "a note without a task": (
        lambda head, t: head.update(inputs={"task": 3, "classes": None, "reader": None}),
        "'inputs' that"),
    "a note without classes": (
        lambda head, t: head.update(inputs={"task": "t", "reader": None}), "'inputs' that"),
    "a note with more": (
        lambda head, t: head["inputs"].update(more=1), "'inputs' that makes no sense"),
    "details that are none": (
        lambda head, t: head["inputs"].update(details=[1]), "'inputs' that makes no sense"),
    "classes that are no texts": (
        lambda head, t: head["inputs"].update(classes=[1]), "'inputs' that makes no sense"),
    "a reader that is a list": (
        lambda head, t: head.update(inputs={"task": "t", "classes": None, "reader": ["a"]}),
        "'inputs' that"),
    "a shape of the base": (
        lambda head, t: head["base"]["3.weight"].__setitem__(1, [6, 33]),
        r"3.weight of its base is \(6, 33\), here it is \(6, 32\)"),
    "a tensor of the base": (
        lambda head, t: head["base"].update({"5.weight": ["float32", [2], None]}),
        r"its base has 1 tensors that this one lacks: \['5.weight'\]"),
    "a tensor more than the base": (
        lambda head, t: head["base"].pop("3.weight"), r"does not have: \['3.weight'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_content_that_does_not_fit(name: str, path: Path) -> None:
    change, reason = CONTENTS[name]
    rewritten(path, change)
    refused_everywhere(path, reason)


def test_several_problems_are_reported_together(path: Path) -> None:
    for name in ("missing", "unexpected", "misshapen", "infinite", "another alpha",
                 "another matrix", "a shape of the base", "a tensor of the base"):  # fmt: skip
        rewritten(path, CONTENTS[name][0])
    reasons = ["3.lora_A", "3.lora_C", "3.lora_B is", "running_var", "scaling", r"\[32, 6\]",
               r"\(6, 33\)", "5.weight"]  # fmt: skip
    for net in (make(), enabled(make(), LORA(rank=2))):
        error = refused(net, path, *reasons)
        assert len(error.problems) >= len(reasons)


LONG = "a" * 40
STRATEGIES: dict[str, tuple[Any, str]] = {
    "unknown": ({"name": "os.system", "init_paras": {"*": ["id"]}}, "os.system.*is not registered"),
    "a check": ({"name": "mc_any", "init_paras": {}}, "'mc_any' is a Check, expected a strategy"),
    "wrong arguments": ({"name": "FreezeStrategy", "init_paras": {"speed": 1}}, "do not fit"),
    "wrong values": (LORA().to_config() | {"init_paras": {"rank": -1}}, "rank is -1"),
    "of another rank": (LORA(rank=1).to_config(), r"0.lora_B is .*here it is"),
    "that changes less": (LoRALinearFineTuningStrategy(2).to_config(), "0.weight.*not fine-tuned"),
    "that cannot be applied": (LORA(rank=10).to_config(), "rank 10 is above 6"),
    "that changes nothing": (DebugStrategy(LORA(rank=2)).to_config(), "DebugStrategy, changes"),
    "of nothing": (FineTuningStrategy().to_config(), "has no caps"),
    "a huge head": (HeadReplacementStrategy(10**12).to_config(), f"a head of {10**12} classes"),
    "a head above all sizes": (HeadReplacementStrategy(2**16 + 1).to_config(), "none so large"),
    "a huge head by position": (
        {"name": "HeadReplacementStrategy", "init_paras": {"*": [10**12]}}, "a head of 100000"),
    "a huge head of a list": (ResolvedStrategy(heads={"3": 10**12}).to_config(), "a head of"),
    "a huge rank": (LORA(rank=10**9).to_config(), "above"),
    "a regular expression": (
        {"name": "FineTuningStrategy", "init_paras": {"module_caps": [[
            {"name": "mc_path", "init_paras": {"regex": "a+"}},
            {"name": "ma_train", "init_paras": {}}]]}},
        "has regular expressions, which are not run"),
    "a huge bottleneck": (
        {"name": "BottleneckFineTuningStrategy", "init_paras": {"size": 10**12, "after": "3"}},
        "not fine-tuned"),
    "none": (None, "enable it in your code"),
}  # fmt: skip


@pytest.mark.parametrize(("strategy", "reason"), STRATEGIES.values(), ids=STRATEGIES)
def test_strategies_that_do_not_fit(strategy: Any, reason: str, path: Path) -> None:
    rewritten(path, lambda head, tensors: head.update(strategy=strategy))
    refused(used(make()), path, reason)
    gift.load(enabled(make(), LORA(rank=2)), path)  # which was enabled by code


def test_random_matrices_of_any_size_are_refused(path: Path) -> None:
    """A rank that VeRA allows, in a file of four megabytes: its pair would have eight gigabytes."""
    net = nn.Linear(1024, 1024)
    base = copy.deepcopy(net)
    enable_fine_tuning(net, VeRALinearFineTuningStrategy(rank=2))
    gift.save(net, path)

    def grow(head: dict[str, Any], tensors: Tensors) -> None:
        head["strategy"]["init_paras"]["rank"] = 2**20
        head["deltas"][0]["settings"]["rank"] = 2**20
        tensors["vera_d"] = torch.ones(2**20)

    rewritten(path, grow)
    error = refused(base, path, "need 2,147,483,648 more numbers")
    assert len(error.problems) == 1


def test_nesting_without_end_is_refused(path: Path) -> None:
    """Deep enough for the parser, or for what decodes, describes or prints; in every field."""
    for depth in (*range(100, 1000, 60), 100_000):
        for key in ("strategy", "deltas", "base", "trained", "reason"):
            nested = '{"name":' * depth + "1" + "}" * depth
            text = container.read(path)[0]
            raw = json.dumps(text | {key: "HERE"}).replace('"HERE"', nested)
            tensors = container.read(path)[1]
            bad = path.with_name("bad")
            metadata = {"gift": raw, "sha256": sha256(raw.encode()).hexdigest()}
            save_file({n: t.clone() for n, t in tensors.items()}, bad, metadata)
            with pytest.raises(DeltaFileError):
                gift.load(make(), bad)


# --- networks that do not fit --------------------------------------------------------------------


def other_weights() -> nn.Module:
    net = make()
    for parameter in net.parameters():
        parameter.data.normal_()
    return net


def one_bit() -> nn.Module:
    net = make()
    weight = net[3].weight.data
    weight.view(torch.int32)[0, 0] ^= 1
    return net


def renamed() -> nn.Module:
    net = make()
    net._modules["last"] = net._modules.pop("3")
    return net


def wider() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, (2, 3)), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 6)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another base": (other_weights, r"another base: 0.weight, 0.bias.*check_base=False"),
    "one bit of one weight": (one_bit, r"1 of 6 tensors .* have other values.*: 3.weight"),
    "another dtype": (lambda: make().double(), r"another dtype: 0.weight \(float32, here float64"),
    "another architecture": (wider, r"0.weight .*\(8, 3, 2, 3\), here it is \(16, 3, "),
    "a renamed layer": (renamed, r"that this one lacks: \['3.weight', '3.bias'\]"),
    "a layer more": (lambda: make(nn.LayerNorm(6)), r"does not have: \['4.bias', '4.weight'\]"),
    "a layer less": (lambda: make()[:3], r"that this one lacks: \['3.weight', '3.bias'\]"),
    "a container": (lambda: nn.Sequential(make()), r"this one lacks: \['0.weight'"),
    "something else": (lambda: nn.Linear(3, 3), "this one lacks"),
}  # fmt: skip


@pytest.mark.parametrize(("network", "reason"), NETWORKS.values(), ids=NETWORKS)
def test_bases_that_do_not_fit(
    network: Callable[[], nn.Module], reason: str, path: Path
) -> None:  # fmt: skip
    refused(network(), path, reason)
    refused(enabled(network(), LORA(clip_rank=True)), path, reason)


@pytest.mark.parametrize("name", ["another base", "one bit of one weight", "another dtype"])
def test_a_base_of_the_same_architecture_is_taken_by_those_who_ask_for_it(
    name: str, path: Path
) -> None:
    gift.load(NETWORKS[name][0](), path, check_base=False)
    for other in NETWORKS.keys() - {"another base", "one bit of one weight", "another dtype"}:
        refused(NETWORKS[other][0](), path, check_base=False)


ENABLED: dict[str, tuple[FineTuningStrategy, str]] = {
    "another rank": (LORA(rank=3), "'rank': 2.*here by.*'rank': 3"),
    "another alpha": (LORA(rank=2, lora_alpha=1), r"'scaling': 1\.0.*here by.*'scaling': 0\.5"),
    "another scaling": (LORA(rank=2, use_rslora=True), "here by.*'scaling': 1.414"),
    "another method": (FineTuningStrategy([(mc_layer(), ma_adapt("dora", rank=2))]), "'dora'"),
    "another layout": (LORA(rank=2, conv_layout="out_as_h"), r"'matrix': \[16, 9\].*\[8, 18\]"),
    "fewer layers": (LoRALinearFineTuningStrategy(rank=2), "changes 0.weight.*not fine-tuned"),
    "more that is trained": (LORA(rank=2, train_bias=True), r"lacks 2.*\['0.bias', '3.bias'\]"),
}  # fmt: skip


@pytest.mark.parametrize(("strategy", "reason"), ENABLED.values(), ids=ENABLED)
def test_settings_that_do_not_fit(strategy: FineTuningStrategy, reason: str, path: Path) -> None:
    refused(used(enabled(make(), strategy)), path, reason)
    refused(enabled(make(), strategy), path, reason, check_base=False)


def test_less_that_is_trained(path: Path) -> None:
    net = used(enabled(make(), LORA(rank=2, train_bias=True)))
    gift.save(net, path)
    refused(enabled(make(), LORA(rank=2)), path, r"not trained here: \['0.bias', '3.bias'\]")


def test_moved_statistics_are_no_other_base_but_without_a_kept_one(path: Path) -> None:
    """A file of before they moved tells their digests only."""
    still = path.with_name("still")
    gift.save(enabled(make(), LORA(rank=2)), still)
    gift.load(used(enabled(make(), LORA(rank=2))), still)
    net = make()
    enable_fine_tuning(net, LORA(rank=2), keep_base=False)
    refused(used(net), still, r"other values.*: 1.running_mean")


def test_a_wrapped_base_is_refused_with_what_to_do(path: Path) -> None:
    refused(nn.DataParallel(make()), path, "on the network inside first")


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return make()


def lazy() -> nn.Module:
    net = make()
    net[3] = nn.LazyLinear(6)
    return net


@pytest.mark.parametrize("network", [on_meta, lazy])
def test_a_network_without_values_takes_none(network: Callable[[], nn.Module], path: Path) -> None:
    """They would be lost, silently."""
    refused(network(), path, "tensors have no values here yet", check_base=False)
    net = network()
    enable_fine_tuning(net, LORA(rank=2))
    refused(net, path, "have no values here yet", check_base=False)


def test_what_is_no_network(path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        gift.load({}, path)


def test_a_file_that_was_loaded_can_be_removed_or_overwritten(path: Path) -> None:
    """The network has values of its own, not those of the file's memory."""
    net = make()
    gift.load(net, path)
    state = copy.deepcopy(net.state_dict())
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    shutil.rmtree(path.parent)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
