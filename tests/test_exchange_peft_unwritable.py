"""What PEFT has no counterpart for: one error that names all of it, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import gift.files.container
from gift import DeltaFileError, FineTuningStrategy, enable_fine_tuning
from gift.factories import (
    ma_adapt,
    ma_bottleneck,
    ma_prompt,
    ma_train,
    mc_layer,
    mc_name,
    mc_path,
    pa_adapt,
    pa_train,
    pc_name,
    pc_path,
)
from gift.interop import load_peft, save_peft
from tests.cases.exchange import (
    Around,
    Attended,
    Experts,
    Scaled,
    Shared,
    Tied,
    randomised,
)  # fmt: skip
from tests.common import full_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def two_layers(first: int = 6, second: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(8, first), nn.Tanh(), nn.Linear(first, second))


def every(method: str, **settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_layer(), ma_adapt(method, **settings))])


def pruned() -> nn.Module:
    layer = nn.Linear(8, 6)
    layer.weight.data[2] = 0
    return layer


def each(*methods: tuple[str, dict[str, Any]]) -> FineTuningStrategy:
    paths = ("0", "2")
    caps = [(mc_path(p), ma_adapt(m, **s)) for p, (m, s) in zip(paths, methods, strict=True)]
    return FineTuningStrategy(caps)


def single(name: str, method: str = "lora", **settings: Any) -> FineTuningStrategy:
    return FineTuningStrategy(para_caps=[(pc_name(name), pa_adapt(method, **settings))])


UNWRITABLE: dict[str, tuple[Callable[[], nn.Module], FineTuningStrategy, str]] = {
    "a method without counterpart": (two_layers, every("svdiff"), "no counterpart for svdiff"),
    "two methods": (two_layers, each(("lora", {}), ("loha", {})), "PEFT has one method for all"),
    "LoRA and DoRA": (two_layers, each(("lora", {}), ("dora", {})), "use_dora is one for all"),
    "blocks of two ranks": (
        two_layers, each(("gralora", {"rank": 2}), ("gralora", {"rank": 4})),
        "the rank of GraLoRA is one for all layers",
    ),
    "shards of two ranks": (
        two_layers, each(("miss", {"rank": 2}), ("miss", {"rank": 4})), "the rank of MiSS is one",
    ),
    "blocks of many sizes": (
        lambda: nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 9), nn.Linear(9, 9)),
        every("boft", n_factors=1), r"block size, or number of blocks, .* sizes \[6, 8, 9\]",
    ),
    "a strided rotation": (
        lambda: Around(nn.Conv2d(4, 6, 3, (2, 1))), every("boft"), r"takes stride=\(2, 1\)",
    ),
    "a modulated convolution in the balanced layout": (
        lambda: Around(nn.Conv2d(4, 6, 3)), every("hira", conv_layout="balanced"),
        "as gift does under conv_layout='out_as_h'",
    ),
    "an odd number of rotated outputs": (
        lambda: Around(nn.Linear(8, 5)), every("road"), "PEFT pairs all outputs, and 5 is an odd",
    ),
    "rotated outputs without their bias": (
        two_layers, single("weight", "road"), "rotates what the layer gives, its bias included",
    ),
    "a bottleneck": (
        two_layers,
        FineTuningStrategy([(mc_path("0"), ma_bottleneck(2)), (mc_path("2"), ma_adapt())]),
        "0: PEFT has no counterpart for bottleneck",
    ),
    "the network itself": (lambda: nn.Linear(8, 6), every("lora"), "not the network itself"),
    "a forward of its own": (
        lambda: Around(Scaled(8, 6)), every("vera", rank=2), "single parameters by LoRA only",
    ),
    "a layer that PEFT does not know": (
        lambda: Around(nn.ConvTranspose2d(3, 4, 2)), every("lora"), r"not \(3, 4, 2, 2\)",
    ),
    "circular padding": (
        lambda: Around(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), every("lora"),
        "pads the input of the adapter with zeros, here it is 'circular'",
    ),
    "a dilated convolution": (
        lambda: Around(nn.Conv2d(3, 4, 3, dilation=2)), every("lora"), r"ignores dilation=\(2, 2\)",
    ),
    "groups": (lambda: Around(nn.Conv2d(4, 4, 3, groups=2)), every("loha"), "groups=2"),
    "a limited embedding": (
        lambda: Around(nn.Embedding(9, 6, max_norm=1.0)), every("lora"), "max_norm",
    ),
    "a layer under two names": (Shared, every("lora"), r"its first name only, not \['second'\]"),
    "a tied table that is read two ways": (Tied, every("dora"), "reads transposed"),
    "a parametrised weight": (
        lambda: Around(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))), every("lora"),
        "computed before it is used",
    ),
    "an encoder layer of torch": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2)),
        FineTuningStrategy([(mc_name("linear1"), ma_adapt("lora"))]),
        "TransformerEncoderLayer ignores adapters of PEFT",
    ),
    "an attention's out_proj": (Attended, every("lora"), "out_proj twice"),
    "DoRA of rows of zeros": (
        lambda: Around(pruned()), every("dora"), "rows of zeros, of which gift and PEFT make",
    ),
    "an attention by DoRA": (
        Attended, single("in_proj_weight", "dora"), "no DoRA for nn.MultiheadAttention",
    ),
    "a vector": (two_layers, single("bias"), r"matrices and batches of them, not \(6,\)"),
    "a single parameter by another method": (
        Experts, single("down", "loha"), "single parameters by LoRA only",
    ),
    "a parameter in a container": (
        lambda: Around(nn.ParameterDict({"w": torch.ones(3, 4)})), single("w"),
        "in calls of the ParameterDict, which has no forward",
    ),
    "a layer that torchvision never calls": (
        lambda: nn.Sequential(ShiftedWindowAttention(8, [2, 2], [0, 0], 2)),
        FineTuningStrategy([(mc_name("qkv"), ma_adapt("lora"))]),
        "ShiftedWindowAttention never calls it",
    ),
    "a recurrent layer": (
        lambda: Around(nn.LSTM(8, 6)), single("weight_ih_l0"), "weights of recurrent layers",
    ),
    "a Conv1D and a single parameter": (
        lambda: nn.Sequential(Experts(), Conv1D(4, 5)),
        FineTuningStrategy(
            [(mc_name("1"), ma_adapt())], [(pc_name("up"), pa_adapt("lora", rank=1))]
        ),
        "Conv1D layers and single parameters at once",
    ),
    "a bias beside an adapter": (
        two_layers,
        FineTuningStrategy([
            (mc_path("0"), ma_adapt("lora", train_bias=True)), (mc_path("2"), ma_adapt("lora")),
        ]),
        r"\['0.bias'\] are trained beside adapters: PEFT can train all biases or all of adapted",
    ),
    "a bias in a method that cannot": (
        two_layers, every("loha", train_bias=True), "all biases, but not in this method",
    ),
    "(IA)^3 without its bias": (
        two_layers, single("weight", "ia3"), "scales what the layer gives, its bias included",
    ),
    "(IA)^3 within a kernel": (
        lambda: Around(nn.Conv2d(3, 4, 3)), every("ia3", feedforward=True), "input channels as a",
    ),
    "OFT of a kernel": (lambda: Around(nn.Conv2d(3, 4, 3)), every("oft"), "overlapping patches"),
    "OFT of Conv1D": (lambda: Around(Conv1D(6, 8)), every("oft"), "OFT of PEFT has no adapter"),
    "two block sizes": (
        two_layers, each(("oft", {"block_size": 2}), ("oft", {"block_size": 6})), r"have \[2, 6\]",
    ),
    "shared and own blocks": (
        two_layers,
        each(("oft", {"block_size": 2, "block_share": True}), ("oft", {"block_size": 2})),
        "block_share is one for all layers",
    ),
    "two ranks of VeRA": (
        two_layers, each(("vera", {"rank": 3}), ("vera", {"rank": 4})), "rank of VeRA .*[3, 4]",
    ),
    "two random pairs": (
        two_layers, each(("vera", {"rank": 3, "seed": 1}), ("vera", {"rank": 3, "seed": 2})),
        "share one random pair, this one has another",
    ),
    "a kernel of LoKr": (
        lambda: Around(nn.Conv2d(4, 6, 3)), every("lokr", factor=9), "the channels alone",
    ),
    "a factor that PEFT turns round": (
        lambda: Around(nn.Linear(8, 12)), every("lokr", factor=4), "no factor gives the parts",
    ),
    "LoKr of a Conv1d that is not decomposed": (
        lambda: Around(nn.Conv1d(4, 6, 3)), every("lokr", full_matrix=True, factor=2), "wrong axes",
    ),
    "balanced LoHa": (
        lambda: Around(nn.Conv2d(4, 6, 3)), every("loha", conv_layout="balanced"), "out_as_h",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "strategy", "reason"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written(
    make: Callable[[], nn.Module], strategy: FineTuningStrategy, reason: str, tmp_path: Path
) -> None:
    net = make()
    enable_fine_tuning(net, strategy)
    randomised(net)
    with pytest.raises(DeltaFileError, match=reason):
        save_peft(net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_stands_on_the_network_itself_cannot_be_written(tmp_path: Path) -> None:
    net = two_layers()
    net.scale = nn.Parameter(torch.ones(6))
    caps = FineTuningStrategy([(mc_path("0"), ma_adapt())], [(pc_name("scale"), pa_train())])
    enable_fine_tuning(net, caps)
    with pytest.raises(DeltaFileError, match=r"\['scale'\] stand on the network itself"):
        save_peft(net, tmp_path)


def test_a_module_with_adapters_and_moved_statistics_cannot_be_written(tmp_path: Path) -> None:
    """PEFT saves modules whole, so their statistics would take the adapters with them."""
    net = nn.Sequential(two_layers())
    net[0].register_buffer("mean", torch.zeros(3))
    enable_fine_tuning(net, every("lora"))
    net[0].mean += 1
    with pytest.raises(
        DeltaFileError, match=r"0 is changed in place, and has adapted layers \['0.0'"
    ):
        save_peft(net, tmp_path)


def test_names_that_peft_takes_for_others_cannot_be_written(tmp_path: Path) -> None:
    """It saves what ends like a name, in the middle of a word too: here an adapted layer."""
    net = nn.ModuleDict({"fc": nn.Linear(4, 4), "xfc": nn.Linear(4, 4)})
    enable_fine_tuning(
        net, FineTuningStrategy([(mc_path("fc"), ma_train()), (mc_path("xfc"), ma_adapt("lora"))])
    )
    with pytest.raises(DeltaFileError, match=r"xfc is changed in place, and has adapted layers"):
        save_peft(net, tmp_path)


def test_virtual_tokens_cannot_be_written_for_other_models_or_beside_others(
    tmp_path: Path,
) -> None:
    """PEFT's pooler reads a virtual token where gift's reads the first given one."""
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    net = BertForSequenceClassification(config)
    caps = [(mc_path(""), ma_prompt(2)), (mc_name("classifier"), ma_train())]
    enable_fine_tuning(net, FineTuningStrategy(caps))
    with pytest.raises(DeltaFileError, match="not a causal language model") as caught:
        save_peft(net, tmp_path)
    assert "along with anything else" in str(caught.value)


PROMPTS: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "another task": ({"task_type": "SEQ_CLS"}, {}, "'CAUSAL_LM' only"),
    "another width": ({}, {"prompt_embeddings": torch.ones(3, 5)}, r"\(3, 5\), expected \(3, 8\)"),
    "another number": ({"num_virtual_tokens": 2}, {}, r"\(3, 8\), expected \(2, 8\)"),
    "more tensors": ({}, {"base_model.model.x": torch.ones(1)}, "not what prompt tuning has"),
}


@pytest.mark.parametrize(("options", "more", "reason"), PROMPTS.values(), ids=PROMPTS)
def test_virtual_tokens_that_cannot_be_read(
    options: dict[str, Any], more: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    (tmp_path / CONFIG).write_text(json.dumps(config | options))
    save_file({"prompt_embeddings": torch.ones(3, 8)} | more, tmp_path / WEIGHTS)
    shape = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=9, bos_token_id=0, eos_token_id=0, **shape))
    before = full_state(net)
    with pytest.raises(DeltaFileError, match=reason):
        load_peft(net, tmp_path)
    assert full_state(net) == before


def test_names_that_peft_leaves_out_cannot_be_written(tmp_path: Path) -> None:
    """It takes names of saved modules for regular expressions, and adapts nothing they match."""
    inner = nn.ModuleDict({"b": nn.Linear(4, 4)})
    net = nn.ModuleDict({"a": inner, "axb": nn.Linear(4, 4), "fc": nn.Linear(4, 4)})
    caps = [(mc_path("a.b"), ma_train()), (mc_path("axb", "fc"), ma_adapt("lora"))]
    enable_fine_tuning(net, FineTuningStrategy(caps))
    with pytest.raises(DeltaFileError, match=r"adapt \['fc'\] instead of \['axb', 'fc'\]"):
        save_peft(net, tmp_path)


def test_a_parameter_whose_name_is_the_end_of_another_cannot_be_written(tmp_path: Path) -> None:
    net = nn.ModuleDict({"inner": Experts().inner, "more": Experts()})
    caps = FineTuningStrategy(para_caps=[(pc_path("inner.up"), pa_adapt("lora", rank=2))])
    enable_fine_tuning(net, caps)
    with pytest.raises(DeltaFileError, match=r"adapt \['more.inner.up'\] as well"):
        save_peft(net, tmp_path)


def test_a_plain_network_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="enable_fine_tuning first"):
        save_peft(two_layers(), tmp_path)


def test_all_reasons_are_named_at_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding_mode="circular"), nn.ConvTranspose2d(4, 2, 2))
    enable_fine_tuning(net, every("lora"))
    with pytest.raises(DeltaFileError, match="circular") as caught:
        save_peft(net, tmp_path)
    assert "1.weight: " in str(caught.value)


def test_a_failure_while_writing_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and configuration are each replaced as a whole, the weights first."""
    net = two_layers()
    enable_fine_tuning(net, every("lora"))
    save_peft(net, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {WEIGHTS, CONFIG}
    randomised(net)

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(gift.files.container.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_peft(net, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
