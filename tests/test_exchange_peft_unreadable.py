"""Files of PEFT that do not fit: one error that names all of it, and the network as it was."""

import copy
import json
import math
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    GraloraConfig,
    HiraConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RoadConfig,
    UniLoraConfig,
    VeraConfig,
    WaveFTConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gift import DeltaFileError, FineTuningStrategy, enable_fine_tuning
from gift.factories import (
    ma_adapt,
    mc_layer,
)
from gift.interop import load_peft, save_peft
from tests.cases.exchange import (
    Around,
    Attended,
    Shared,
    Tied,
    trained_by_peft,
)  # fmt: skip
from tests.common import full_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def every(method: str, **settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))])


Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 4))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT wrote: layers 0 and 2 by LoRA, 3 whole."""
    folder = tmp_path_factory.mktemp("peft")
    config = LoraConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"])
    trained_by_peft(base(), config).save_pretrained(folder)
    return folder


def option(**values: Any) -> Edit:
    return lambda config, tensors: config.update(values)


def tensor(key: str, value: Any) -> Edit:
    """Change one tensor, by a value or a function; None takes it away."""

    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        own = f"base_model.model.{key}"
        old = tensors.pop(own, None)
        if value is not None:
            tensors[own] = value(old) if callable(value) else value

    return edit


UNREADABLE: dict[str, tuple[Edit, str]] = {
    "an unknown method": (option(peft_type="LILY"), "peft_type is 'LILY', known here are"),
    "no method": (option(peft_type=None), "peft_type is None"),
    **{
        name: (option(**{name: value}), f"{name}=.* has no counterpart")
        for name, value in {
            "layer_replication": [[0, 2]], "megatron_config": {"a": 1}, "lora_bias": True,
            "use_qalora": True, "arrow_config": {"top_k": 1},
            "use_bdlora": {"a": 1}, "trainable_token_indices": [3], "kasa_config": {"beta": 1},
            "velora_config": {"a": 1}, "monteclora_config": {"a": 1}, "corda_config": {"a": 1},
            "an_option_of_the_future": "on",
        }.items()
    },
    **{
        f"started as {start}": (option(init_lora_weights=start), "changed the base in PEFT")
        for start in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")
    },
    "a rank of zero": (option(r=0), "r is 0, expected an integer of at least 1"),
    "a rank that is a text": (option(r="2"), "r is '2'"),
    "an unknown word for biases": (option(bias="some"), "bias is 'some', expected one of"),
    "another rank": (option(r=3), r"lora_A is \(2, 8\), expected \(3, 8\)"),
    "an infinite alpha": (option(lora_alpha=math.inf), "lora_alpha is inf"),
    "an alpha that is none": (option(alpha_pattern={"0": math.nan}), "alpha_pattern is"),
    "a pattern that is none": (option(rank_pattern={"(": 2}), "rank_pattern is"),
    "targets that are no pattern": (option(target_modules="("), "target_modules is"),
    "targets that are numbers": (option(target_modules=[1]), "target_modules is"),
    "a dropout of one": (option(lora_dropout=1.0), "lora_dropout is 1.0"),
    "a target without tensors": (option(target_modules=["0", "2", "1"]), "1 is a target, and"),
    "tensors without a target": (option(target_modules=["2"]), "has tensors, and is not a target"),
    "a module that is not saved": (option(modules_to_save=["1", "3"]), "1.weight is missing"),
    "biases that are missing": (option(bias="all"), "0.bias is missing, as biases were trained"),
    "biases of layers that are missing": (option(bias="lora_only"), "0.bias is missing"),
    "a factor that is missing": (tensor("0.lora_B.weight", None), "0: lora_B.weight is missing"),
    "a layer that is missing": (
        lambda c, t: [t.pop(k) for k in list(t) if ".2." in k], "2 is a target, and has no tensors",
    ),
    "an unknown layer": (tensor("9.lora_A.weight", torch.ones(2, 8)), "9: there is no such module"),
    "a layer of another kind": (tensor("1.lora_A.weight", torch.ones(2, 6)), "no adapter for this"),
    "an unknown tensor": (tensor("0.extra", torch.ones(2)), "0.extra: there is no such tensor"),
    "a key of another form": (
        lambda c, t: t.update({"stray": torch.ones(2)}), "stray: PEFT has no such key",
    ),
    "a misshapen factor": (
        tensor("0.lora_A.weight", torch.ones(2, 7)), r"lora_A is \(2, 7\), expected \(2, 8\)",
    ),
    "a factor that is a number": (tensor("0.lora_B.weight", torch.tensor(1.0)), "0: "),
    "a misshapen module": (tensor("3.weight", torch.ones(5, 6)), r"3.weight is \(5, 6\), here"),
    "a part of a module that is missing": (tensor("3.bias", None), "3.bias is missing"),
    "NaN": (tensor("0.lora_A.weight", lambda t: t * math.nan), "not finite"),
    "an invocation without a language model": (
        option(alora_invocation_tokens=[1]), "task_type is None, expected 'CAUSAL_LM'",
    ),
    "infinity in a module": (tensor("3.weight", lambda t: t / 0), "3.weight has values"),
    "the weights of another base": (
        tensor("0.base_layer.weight", torch.zeros(6, 8)), "0.weight is not that of this network",
    ),
    "other statistics": (tensor("1.running_mean", torch.ones(6)), "1.running_mean is not that of"),
}  # fmt: skip


def edited(written: Path, folder: Path, edit: Edit) -> Path:
    """The same folder with other content."""
    config = json.loads((written / CONFIG).read_text())
    tensors = load_file(written / WEIGHTS)
    edit(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: value.clone() for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(("edit", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read(edit: Edit, reason: str, written: Path, tmp_path: Path) -> None:
    net = base()
    before = full_state(net)
    with pytest.raises(ValueError, match=reason):
        load_peft(net, edited(written, tmp_path, edit))
    assert full_state(net) == before


def test_a_network_without_values_takes_none(written: Path) -> None:
    with torch.device("meta"):
        net = base()
    with pytest.raises(ValueError, match="the network has no values yet"):
        load_peft(net, written)


def test_all_that_is_wrong_is_named_at_once(written: Path, tmp_path: Path) -> None:
    edits = [UNREADABLE[name][0] for name in ("a misshapen factor", "a misshapen module")]
    folder = edited(written, tmp_path, lambda c, t: [edit(c, t) for edit in edits])
    with pytest.raises(DeltaFileError, match="lora_A is") as caught:
        load_peft(base(), folder)
    assert [problem.partition(" (")[0] for problem in caught.value.problems] == [
        "0: lora_A is", "3.weight is"
    ]  # fmt: skip


FOREIGN: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "circular padding": (
        lambda: Around(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        LoraConfig(r=2, target_modules=["inner"]), "pads the input of the adapter with zeros",
    ),
    "a table whose twin is left out": (
        Tied, LoraConfig(r=2, target_modules=["table"]), "weight are one tensor",
    ),
    "a table whose twin is adapted otherwise": (
        Tied, LoraConfig(r=2, target_modules=["table", "head"]), "PEFT adapts them apart",
    ),
    "a table that is saved whole": (
        Tied, LoraConfig(r=2, target_modules=["table"], modules_to_save=["head"]), "are one tensor",
    ),
    "DoRA of rows of zeros": (
        lambda: Around(nn.Linear(8, 6).requires_grad_(False).apply(lambda m: m.weight[2].zero_())),
        LoraConfig(r=2, target_modules=["inner"], use_dora=True), "rows of zeros",
    ),
    "an attention": (Attended, LoraConfig(r=2, target_modules=["inner"]), "out_proj twice"),
    "a layer that is never called": (
        Attended, LoraConfig(r=2, target_modules=["out_proj"]), "never calls it",
    ),
    "a cut series": (
        lambda: Around(nn.Linear(8, 6)), OFTConfig(oft_block_size=4, target_modules=["inner"]),
        "cut series of 5 terms",
    ),
    "a limited rotation": (
        lambda: Around(nn.Linear(8, 6)),
        OFTConfig(oft_block_size=4, target_modules=["inner"], coft=True, use_cayley_neumann=False),
        "coft=True has no counterpart",
    ),
    "a pair that is not in the file": (
        lambda: Around(nn.Linear(8, 6)),
        VeraConfig(r=4, target_modules=["inner"], save_projection=False), "no vera_A and vera_B",
    ),
    "more terms than a matrix has elements": (
        lambda: Around(nn.Linear(8, 6)), VeraConfig(r=60, target_modules=["inner"]),
        "rank 60 is above 48",
    ),
    "a kernel that is decomposed": (
        lambda: Around(nn.Conv2d(4, 6, 3)),
        LoKrConfig(r=1, target_modules=["inner"], use_effective_conv2d=True), "lokr_t2",
    ),
    "parts that gift would split otherwise": (
        lambda: Around(nn.Linear(8, 12)),
        LoKrConfig(r=1, target_modules=["inner"], decompose_factor=4), "gift has no factor",
    ),
    "a shard of another function": (
        lambda: Around(nn.Linear(8, 6)),
        MissConfig(r=2, target_modules=["inner"], init_weights="bat"), "is another function",
    ),
    "a longer wavelet": (
        lambda: Around(nn.Linear(8, 6)),
        WaveFTConfig(n_frequency=5, target_modules=["inner"], wavelet_family="db2"),
        "wavelet_family='db2', use_idwt=True: gift has",
    ),
    "a hybrid of blocks": (
        lambda: Around(nn.Linear(8, 6)),
        GraloraConfig(r=4, target_modules=["inner"], hybrid_r=1), "hybrid_r=1 has no counterpart",
    ),
    "a rotated convolution with two strides": (
        lambda: Around(nn.Conv2d(4, 6, 3, (2, 1))),
        BOFTConfig(boft_block_size=4, target_modules=["inner"]), r"takes stride=\(2, 1\)",
    ),
    "a layer under two names": (
        Shared, LoraConfig(r=2, target_modules=["first"]), "it has several names",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize(("make", "config", "reason"), FOREIGN.values(), ids=FOREIGN)
def test_what_peft_does_otherwise(
    make: Callable[[], nn.Module], config: Any, reason: str, tmp_path: Path
) -> None:
    net = make()
    trained_by_peft(copy.deepcopy(net), config).save_pretrained(tmp_path)
    before = full_state(net)
    with pytest.raises(ValueError, match=reason):
        load_peft(net, tmp_path)
    assert full_state(net) == before


OTHERS: dict[str, tuple[Any, Edit, str]] = {
    "kernels without elements": (
        C3AConfig(block_size=2, target_modules=["inner"]),
        tensor("inner.c3a_kernel", torch.ones(4, 3, 0)), "c3a_kernel is",
    ),
    "blocks without elements": (
        BOFTConfig(boft_block_size=2, target_modules=["inner"]),
        tensor("inner.boft_R", torch.ones(1, 4, 0, 0)), "boft_R is",
    ),
    "factors of other blocks": (
        GraloraConfig(r=4, target_modules=["inner"]),
        tensor("inner.gralora_B", torch.ones(3, 4, 2)), "gralora_A is",
    ),
    "a scaling that is a text": (
        WaveFTConfig(n_frequency=5, target_modules=["inner"]), option(scaling="much"),
        "inner: WaveFT: scaling is 'much'",
    ),
    "a variant that nobody knows": (
        RoadConfig(group_size=2, target_modules=["inner"]), option(variant="road_9"),
        "inner: RoAd: variant is 'road_9'",
    ),
    "groups that do not divide the outputs": (
        RoadConfig(group_size=2, target_modules=["inner"]), option(group_size=4),
        "group_size 4 does not divide its 6 outputs",
    ),
    "norms of another base": (
        DeloraConfig(r=2, target_modules=["inner"]),
        tensor("inner.delora_w_norm", lambda norms: norms * 1.01), "another base",
    ),
    "a projection that PEFT would draw again": (
        UniLoraConfig(r=2, theta_d_length=9, target_modules=["inner"]), option(),
        "tensors are missing, which PEFT saves with save_indices=True",
    ),
    "coordinates of a longer vector": (
        UniLoraConfig(r=2, theta_d_length=9, target_modules=["inner"], save_indices=True),
        tensor("inner.unilora_indices_A", lambda places: places + 8),
        "unilora_indices_A are from 8 to 1[0-6], expected indices of a vector of 9 numbers",
    ),
    "coordinates that are not integers": (
        UniLoraConfig(r=2, theta_d_length=9, target_modules=["inner"], save_indices=True),
        tensor("inner.unilora_indices_B", lambda places: places.float()),
        "unilora_indices_B is float32, expected int32 or int64",
    ),
    "a factor of another rank": (
        HiraConfig(r=2, target_modules=["inner"]), tensor("inner.hira_A", torch.ones(3, 8)),
        r"is \(3, 8\), expected \(2, 8\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "edit", "reason"), OTHERS.values(), ids=OTHERS)
def test_files_of_other_methods_that_do_not_fit(
    config: Any, edit: Edit, reason: str, tmp_path: Path
) -> None:
    net = Around(nn.Linear(8, 6))
    trained_by_peft(copy.deepcopy(net), copy.deepcopy(config)).save_pretrained(tmp_path)
    edited(tmp_path, tmp_path, edit)
    before = full_state(net)
    with pytest.raises(DeltaFileError, match=reason):
        load_peft(net, tmp_path)
    assert full_state(net) == before


def test_a_network_that_is_fine_tuned_already_is_left_alone(written: Path) -> None:
    net = base()
    enable_fine_tuning(net, every("lora"))
    with pytest.raises(RuntimeError, match="already"):
        load_peft(net, written)


BROKEN: dict[str, tuple[str, bytes | None, str]] = {
    "no configuration": (CONFIG, None, "has no adapter_config.json"),
    "no weights": (WEIGHTS, None, "neither adapter_model.safetensors nor adapter_model.bin"),
    "no JSON": (CONFIG, b"{", "is not JSON"),
    "deep JSON": (CONFIG, b"[" * 100_000, "is not JSON"),
    "no object": (CONFIG, b"[]", "expected an object"),
    "no text": (CONFIG, b"\xff\xfe\x00", "is not JSON"),
    "an empty file": (WEIGHTS, b"", "cannot be read"),
    "a header of endless length": (WEIGHTS, b"\xff" * 8 + b"{}", "cannot be read"),
    "something else": (WEIGHTS, b"PK" * 50, "cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "reason"), BROKEN.values(), ids=BROKEN)
def test_files_that_are_none(
    name: str, content: bytes | None, reason: str, written: Path, tmp_path: Path
) -> None:
    folder = edited(written, tmp_path, option())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DeltaFileError, match=re.escape(reason)):
        load_peft(base(), folder)


def test_damaged_weights_never_load_by_half(written: Path, tmp_path: Path) -> None:
    """Truncated anywhere, or with any byte of the header changed."""
    folder = edited(written, tmp_path, option())
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    net, chance = base(), random.Random(0)
    before = full_state(net)
    cut = [whole[: chance.randrange(len(whole))] for _ in range(100)]
    changed = []
    for _ in range(200):
        place = chance.randrange(header)
        changed.append(
            whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
        )
    refused = 0
    for content in (*cut, *changed):
        (folder / WEIGHTS).write_bytes(content)
        try:
            load_peft(net, folder)
        except ValueError:
            refused += 1
            assert full_state(net) == before
        else:  # white space, or the metadata, which say nothing
            net = base()
            before = full_state(net)
    assert refused > 250


def test_old_files_are_read_without_running_code(written: Path, tmp_path: Path) -> None:
    tensors = load_file(written / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((written / CONFIG).read_bytes())
    torch.save(tensors, tmp_path / "adapter_model.bin")
    net, other = base(), base()
    load_peft(net, tmp_path)
    load_peft(other, written)
    x = torch.randn(3, 8)
    assert torch.equal(net.eval()(x), other.eval()(x))
    ran = tmp_path / "ran"
    torch.save({"a": _Hostile(ran)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        load_peft(base(), tmp_path)
    assert not ran.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_old_files_are_refused_or_hold_tensors(written: Path, tmp_path: Path) -> None:
    """Any byte changed, most of which are of a pickle: one kind of error, and nothing changed."""
    (tmp_path / CONFIG).write_bytes((written / CONFIG).read_bytes())
    path, chance = tmp_path / "adapter_model.bin", random.Random(0)
    torch.save(load_file(written / WEIGHTS), path)
    whole = path.read_bytes()
    pickled = whole.index(b"data.pkl"), whole.index(b"/byteorder")
    net, causes = base(), set()
    before = full_state(net)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 4])):
            content[chance.randrange(*pickled)] = chance.randrange(256)
        path.write_bytes(content)
        try:
            load_peft(net, tmp_path)
        except DeltaFileError as error:
            causes.add(type(error.__cause__))
            assert full_state(net) == before
        else:  # names in the archive, or of things that are not looked up
            net = base()
            before = full_state(net)
    assert {KeyError, IndexError, pickle.UnpicklingError} <= causes


def test_a_folder_below_the_home(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    net, again = base(), base()
    load_peft(net, written)
    save_peft(net, "~/delta")
    assert (tmp_path / "delta" / CONFIG).exists()
    load_peft(again, "~/delta")
    x = torch.randn(3, 8)
    assert torch.equal(again.eval()(x), net.eval()(x))


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
