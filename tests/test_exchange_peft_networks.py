"""Whole networks to PEFT and back: which modules are meant, what is trained in place or tied."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import resnet18
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from gift import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning
from gift.factories import (
    ma_adapt,
    ma_prompt,
    ma_replace_head,
    ma_train,
    mc_layer,
    mc_name,
    mc_path,
    pa_adapt,
    pc_name,
    pc_path,
)  # fmt: skip
from gift.interop import load_peft, save_peft
from gift.strategies import (
    BitFitFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    VeRALinearFineTuningStrategy,
    load_strategy_from_config,
    merge_strategies,
)
from tests.cases.exchange import (
    Around,
    Attended,
    Experts,
    Scaled,
    TransposedExperts,
    randomised,
    trained_by_peft,
)  # fmt: skip
from tests.common import all_bits, trainable

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding"),
]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Blocks(nn.Module):
    """Names that are endings of others: ``fc``, ``block.fc`` and ``xfc``."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6)})
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 6)}) for _ in range(3))
        self.xfc, self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block["norm"](self.block["fc"](x).tanh())
        for layer in self.layers:
            x = x + layer["up"](x).tanh()
        return self.head(self.fc(self.xfc(x).tanh()).tanh())


def bert() -> Any:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=5,
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double().eval()


def of_tokens(net: nn.Module) -> Tensor:
    return net(input_ids=torch.tensor([[1, 2, 3, 4, 2], [5, 0, 7, 7, 9]])).logits


def of_features(net: nn.Module) -> Tensor:
    return net(torch.linspace(-2, 2, 30).reshape(5, 6))


def of_sequences(net: nn.Module) -> Tensor:
    return net(torch.linspace(-2, 2, 80).reshape(2, 5, 8))


def of_vectors(net: nn.Module) -> Tensor:
    return net(torch.linspace(-2, 2, 24).reshape(3, 8))


def of_images(net: nn.Module) -> Tensor:
    return net(torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16))


Call = Callable[[nn.Module], Tensor]


def in_peft(base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # targets and tensors that do not fit
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def loaded(base: nn.Module, folder: Path) -> Any:
    net = copy.deepcopy(base)
    load_peft(net, folder)
    return net.eval()


def assert_there_and_back(net: Any, base: nn.Module, call: Call, folder: Path) -> Any:
    """PEFT and gift load what was written, both with the outputs of `net`; gives PEFT's model."""
    save_peft(net, folder)
    output = call(net.eval())
    assert (output - call(base)).abs().max() > 1e-4, "the delta of the test has no effect"
    theirs = in_peft(base, folder)
    for other in (theirs, loaded(base, folder)):
        torch.testing.assert_close(call(other), output, rtol=0, atol=1e-10)
    return theirs


def assert_back_and_there(theirs: Any, base: nn.Module, call: Call, folder: Path) -> Any:
    """What PEFT wrote gives the same outputs here, and in PEFT again; gives gift's network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder / "theirs")
    net = loaded(base, folder / "theirs")
    output = call(theirs)
    assert (output - call(base)).abs().max() > 1e-4, "the delta of the test has no effect"
    torch.testing.assert_close(call(net), output, rtol=0, atol=1e-10)
    save_peft(net, folder / "ours")
    torch.testing.assert_close(call(in_peft(base, folder / "ours")), output, rtol=0, atol=1e-10)
    return net


ADAPTED = (mc_path("fc", "layers.1.up"), ma_adapt("lora", rank=2))
HEAD = (mc_path("head"), ma_train())
OURS: dict[str, tuple[Callable[[], nn.Module], Call, Callable[[], Any]]] = {
    "endings of other names": (Blocks, of_features, lambda: FineTuningStrategy([ADAPTED])),
    "ranks and alphas by layer": (Blocks, of_features, lambda: FineTuningStrategy([
        (mc_path("fc"), ma_adapt("lora", rank=2, lora_alpha=5)),
        (mc_path("block.fc"), ma_adapt("rslora", rank=3)),
        (mc_path("xfc"), ma_adapt("pissa", rank=1, lora_alpha=0.3)), HEAD,
    ])),
    "rsLoRA of several ranks": (Blocks, of_features, lambda: FineTuningStrategy([
        (mc_path("fc"), ma_adapt("rslora", rank=2)), (mc_name("up"), ma_adapt("rslora", rank=3)),
    ])),
    "a head and statistics": (Blocks, of_features, lambda: FineTuningStrategy([ADAPTED, HEAD])),
    "only a head": (Blocks, of_features, lambda: FineTuningStrategy([HEAD])),
    "biases of adapted layers": (Blocks, of_features, lambda: FineTuningStrategy(
        [(mc_path("fc", "xfc"), ma_adapt("lora", train_bias=True))])),
    "all biases": (Blocks, of_features, lambda: merge_strategies([
        FineTuningStrategy([(mc_path("fc", "xfc"), ma_adapt("vera", rank=5, train_bias=True))]),
        BitFitFineTuningStrategy(),
    ])),
    "biases of other layers": (Blocks, of_features, lambda: merge_strategies([
        FineTuningStrategy([ADAPTED]), BitFitFineTuningStrategy(),
    ])),
    "(IA)^3 of outputs and inputs": (Blocks, of_features, lambda: FineTuningStrategy([
        (mc_path("fc"), ma_adapt("ia3")), (mc_path("block.fc"), ma_adapt("ia3", feedforward=True)),
    ])),
    "OFT of several widths": (Blocks, of_features, lambda: FineTuningStrategy(
        [(mc_layer(), ma_adapt("oft", block_size=3))])),
    "a whole BERT": (bert, of_tokens, lambda: LoRAAllFineTuningStrategy(rank=2)),
    "a whole BERT, by DoRA": (bert, of_tokens, lambda: FineTuningStrategy(
        [(mc_layer(), ma_adapt("dora", rank=2))])),
    "a GPT2": (gpt2, of_tokens, lambda: FineTuningStrategy(
        [(mc_name("c_attn", "c_proj"), ma_adapt("lora", rank=2))])),
    "a GPT2 with tied embeddings": (gpt2, of_tokens, lambda: FineTuningStrategy(
        [(mc_name("wte", "c_fc"), ma_adapt("lora", rank=2))])),
    "a GPT2 whose tied embeddings are trained": (gpt2, of_tokens, lambda: FineTuningStrategy(
        [(mc_name("wte"), ma_train()), (mc_name("c_fc"), ma_adapt("ia3"))])),
    "a batch of matrices and a matrix": (Experts, of_vectors, lambda: FineTuningStrategy(
        para_caps=[(pc_name("up", "down"), pa_adapt("lora", rank=2, lora_alpha=3))])),
    "a transposed batch": (TransposedExperts, of_vectors, lambda: FineTuningStrategy(
        para_caps=[(pc_name("up"), pa_adapt("lora", rank=2))])),
    "a layer with a forward of its own": (lambda: Around(Scaled(8, 3)), of_vectors,
        lambda: FineTuningStrategy([(mc_name("inner"), ma_adapt("lora", rank=2))])),
    "one batch of matrices": (Experts, of_vectors, lambda: FineTuningStrategy(
        para_caps=[(pc_path("inner.up"), pa_adapt("rslora", rank=2))])),
    "an attention's in_proj_weight": (Attended, of_sequences, lambda: FineTuningStrategy(
        para_caps=[(pc_name("in_proj_weight"), pa_adapt("lora", rank=2))])),
    "query, key and value apart": (Attended, of_sequences, lambda: FineTuningStrategy(
        para_caps=[(pc_name("in_proj_weight"), pa_adapt("lora", rank=2, split_qkv=True))])),
}  # fmt: skip


@pytest.mark.parametrize(("make", "call", "strategy"), OURS.values(), ids=OURS)
def test_a_network_of_gift(
    make: Callable[[], nn.Module], call: Call, strategy: Callable[[], Any], tmp_path: Path
) -> None:
    base = make().eval()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, strategy())
    if make is Blocks:
        call(net.train())  # which moves statistics
    randomised(net)
    assert_there_and_back(net, base, call, tmp_path)


def lora(**settings: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"r": 2, "lora_alpha": 5} | settings)


THEIRS: dict[str, tuple[Callable[[], nn.Module], Call, Callable[[], Any], list[str]]] = {
    "an ending": (Blocks, of_features, lora(target_modules=["fc"]), ["block.fc", "fc"]),
    "a whole name": (Blocks, of_features, lora(target_modules=["block.fc"]), ["block.fc"]),
    "a regular expression": (
        Blocks, of_features, lora(target_modules=r"fc|layers\.[02]\..*"),
        ["fc", "layers.0.up", "layers.2.up"],
    ),
    "all linear layers": (
        Blocks, of_features, lora(target_modules="all-linear", exclude_modules=["block.fc"]),
        ["fc", "head", "layers.0.up", "layers.1.up", "layers.2.up", "xfc"],
    ),
    "some layers": (
        Blocks, of_features,
        lora(target_modules=["up"], layers_to_transform=[0, 2], layers_pattern="layers"),
        ["layers.0.up", "layers.2.up"],
    ),
    "excluded modules": (
        Blocks, of_features, lora(target_modules=["fc", "up"], exclude_modules=r"layers\.1.*"),
        ["block.fc", "fc", "layers.0.up", "layers.2.up"],
    ),
    "patterns of ranks and alphas": (
        Blocks, of_features,
        lora(
            target_modules=["fc", "up", "xfc"], rank_pattern={"^fc": 3, r"layers\.\d.up": 1},
            alpha_pattern={"fc": 7, "^xfc": 0.5}, use_rslora=True,
        ),
        ["block.fc", "fc", "layers.0.up", "layers.1.up", "layers.2.up", "xfc"],
    ),
    "LoHa with patterns": (
        Blocks, of_features,
        lambda: LoHaConfig(
            r=2, target_modules=["fc", "up"], rank_pattern={"up": 1}, alpha_pattern={"block.fc": 1}
        ),
        ["block.fc", "fc", "layers.0.up", "layers.1.up", "layers.2.up"],
    ),
    "modules that are saved whole": (
        Blocks, of_features, lora(target_modules=["fc"], modules_to_save=["head", "norm"]),
        ["block.fc", "block.norm", "fc", "head"],
    ),
    "all biases, and modules": (
        Blocks, of_features, lora(target_modules=["fc"], modules_to_save=["head"], bias="all"),
        [
            "block.fc", "block.norm", "fc", "head", "layers.0.up", "layers.1.up", "layers.2.up",
            "xfc",
        ],
    ),
    "(IA)^3 by endings in words": (
        Blocks, of_features,
        lambda: IA3Config(target_modules=["fc", "xfc"], feedforward_modules=["fc"]),
        ["block.fc", "fc", "xfc"],
    ),
    "VeRA of a BERT": (
        bert, of_tokens,
        lambda: VeraConfig(r=7, target_modules=["query", "dense"], modules_to_save=["classifier"]),
        [
            "bert.encoder.layer.0.attention.output.dense",
            "bert.encoder.layer.0.attention.self.query",
            "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense",
            "bert.encoder.layer.1.attention.output.dense",
            "bert.encoder.layer.1.attention.self.query",
            "bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense",
            "bert.pooler.dense", "classifier",
        ],
    ),
    "a classifier of PEFT": (
        bert, of_tokens,
        lora(target_modules=["query"], use_dora=True, task_type="SEQ_CLS"),
        [
            "bert.encoder.layer.0.attention.self.query",
            "bert.encoder.layer.1.attention.self.query", "classifier",
        ],
    ),
    "DoRA of a GPT2": (
        gpt2, of_tokens, lora(target_modules=["c_fc", "wpe"], use_dora=True, fan_in_fan_out=True),
        ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc", "transformer.wpe"],
    ),
    "tied adapters of a GPT2": (
        gpt2, of_tokens, lora(target_modules=["wte", "lm_head"], ensure_weight_tying=True),
        ["transformer.wte"],
    ),
    "single parameters": (
        Experts, of_vectors, lora(target_modules=[], target_parameters=["up", "inner.down"]),
        ["inner"],
    ),
    "a single parameter": (
        Experts, of_vectors, lora(target_parameters=["inner.up"], target_modules=[]), ["inner"]
    ),
    "a transposed batch": (
        TransposedExperts, of_vectors, lora(target_parameters=["up"], target_modules=[]), ["inner"]
    ),
    "the weight of a layer as a single parameter": (
        Blocks, of_features,
        lora(target_parameters=["xfc.weight"], target_modules=[], alpha_pattern={"xfc.weight": 3}),
        ["xfc"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "call", "config", "where"), THEIRS.values(), ids=THEIRS)
def test_a_network_of_peft(
    make: Callable[[], nn.Module],
    call: Call,
    config: Callable[[], Any],
    where: list[str],
    tmp_path: Path,
) -> None:
    base = make().eval()
    theirs = trained_by_peft(copy.deepcopy(base), config())
    net = assert_back_and_there(theirs, base, call, tmp_path)
    assert sorted({name.rpartition(".")[0] for name in trainable(net)}) == where
    strategy = load_strategy_from_config(net._gift_network.recipe)
    again = copy.deepcopy(base)
    enable_fine_tuning(again, strategy)
    again.load_state_dict(net.state_dict())
    assert torch.equal(call(again), call(net)), "the strategy alone names all that is trained"


def test_a_resnet_with_a_new_head(tmp_path: Path) -> None:
    """Its statistics move; PEFT is given a base with a head of the new size."""
    base = resnet18(num_classes=7).eval()
    net = copy.deepcopy(base)
    caps = [(mc_name("fc"), ma_replace_head(4)), (mc_name("conv1"), ma_adapt("lora", rank=1))]
    enable_fine_tuning(net, FineTuningStrategy(caps))
    net.train()
    of_images(net)
    randomised(net, std=0.01).eval()
    save_peft(net, tmp_path)
    fresh = resnet18(num_classes=4)
    fresh.load_state_dict(
        {k: v for k, v in base.state_dict().items() if "fc" not in k}, strict=False
    )
    for other in (in_peft(fresh, tmp_path), loaded(fresh, tmp_path)):
        torch.testing.assert_close(of_images(other), of_images(net), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"fc.weight is \(4, 512\), here \(7, 512\)"):
        load_peft(base, tmp_path)


def test_what_is_loaded_trains_and_is_undone(tmp_path: Path) -> None:
    base = Blocks().eval()
    bits = all_bits(base)
    config = LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"])
    trained_by_peft(copy.deepcopy(base), config).save_pretrained(tmp_path)
    report = load_peft(base, tmp_path)
    assert {claim.name for claim in report.claims} == {"block.fc", "fc", "head"}
    of_features(base).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in base.parameters())
    assert all_bits(disable_fine_tuning(base)) == bits


def test_one_random_pair_serves_layers_of_all_sizes(tmp_path: Path) -> None:
    """Gift's own pair is scaled for each layer; `d` takes the scale, to the digits of float32."""
    base = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 4)).eval()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, VeRALinearFineTuningStrategy(rank=6))
    randomised(net)
    save_peft(net, tmp_path)
    shapes = {
        k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert (shapes["base_model.vera_A"], shapes["base_model.vera_B"]) == ((6, 20), (20, 6))
    for other in (in_peft(base, tmp_path), loaded(base, tmp_path)):
        torch.testing.assert_close(of_vectors(other), of_vectors(net), rtol=0, atol=1e-6)


def prompted(tokens: int) -> FineTuningStrategy:
    return FineTuningStrategy([(mc_path(""), ma_prompt(tokens))])


def after_prompt(net: Any, count: int) -> Tensor:
    """The logits for the given tokens: PEFT has those for the virtual ones in front."""
    return of_tokens(net)[:, count:]


def test_virtual_tokens_of_a_language_model(tmp_path: Path) -> None:
    base = gpt2()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, prompted(3))
    randomised(net)
    save_peft(net, tmp_path)
    theirs = in_peft(base, tmp_path)
    torch.testing.assert_close(after_prompt(theirs, 3), of_tokens(net), rtol=0, atol=1e-10)
    torch.testing.assert_close(of_tokens(loaded(base, tmp_path)), of_tokens(net))
    assert (of_tokens(net) - of_tokens(base)).abs().max() > 1e-4


def test_virtual_tokens_of_peft(tmp_path: Path) -> None:
    base = gpt2()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = trained_by_peft(copy.deepcopy(base), config).double()
    theirs.save_pretrained(tmp_path)
    net = loaded(base, tmp_path)
    torch.testing.assert_close(of_tokens(net), after_prompt(theirs, 4), rtol=0, atol=1e-10)
    assert (of_tokens(net) - of_tokens(base)).abs().max() > 1e-4


def test_names_that_are_endings_are_a_regular_expression(tmp_path: Path) -> None:
    net = Blocks()
    enable_fine_tuning(net, FineTuningStrategy([ADAPTED]))
    save_peft(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == r"fc|layers\.1\.up"
