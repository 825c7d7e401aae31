"""What is trained, and for how long, where nothing is chosen; what is left random is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import gift
from gift import GiftWarning, enable_fine_tuning, merge_strategies
from gift.jobs import read_job, run_job
from gift.strategies import HeadReplacementStrategy, RecommendedFineTuningStrategy
from gift.training.settings import Settings, settled
from gift.zoo import load_network
from tests.job_examples import CHEAP, WORDS, texts, written

SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip


def whole(net: nn.Module) -> set[str]:
    """Names of the parameters of the network itself that are trained."""
    return {name for name, p in net.named_parameters() if p.requires_grad and "lora" not in name}


def adapted(net: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in net.named_parameters() if "lora_A" in name}


def test_the_pooler_and_the_head_of_a_text_classifier_are_trained() -> None:
    net = BertForSequenceClassification(BertConfig(**SMALL))
    enable_fine_tuning(net, RecommendedFineTuningStrategy(rank=2))
    assert whole(net) == {f"{layer}.{kind}" for layer in ("bert.pooler.dense", "classifier")
                          for kind in ("weight", "bias")}  # fmt: skip
    assert len(adapted(net)) == 6
    assert all(".layer.0." in name for name in adapted(net))


def test_all_layers_of_a_head_are_trained_and_its_last_is_replaced() -> None:
    net = RobertaForSequenceClassification(RobertaConfig(**SMALL))
    strategy = merge_strategies([HeadReplacementStrategy(5), RecommendedFineTuningStrategy(rank=2)])
    enable_fine_tuning(net, strategy)
    assert whole(net) == {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj")
                          for kind in ("weight", "bias")}  # fmt: skip
    assert net.classifier.out_proj.out_features == 5


def test_the_head_of_a_language_model_belongs_to_its_vocabulary() -> None:
    net = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1))
    report = enable_fine_tuning(net, RecommendedFineTuningStrategy(rank=2))
    assert whole(net) == set()
    assert report.unmatched == ["module cap 0: mc_top() -> ma_train()"] or not report.unmatched


def test_networks_for_images() -> None:
    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    net = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    enable_fine_tuning(net, RecommendedFineTuningStrategy(rank=2))
    assert whole(net) == {"classifier.weight", "classifier.bias"}
    mobile = load_network("torchvision:mobilenet_v3_small", None).net
    enable_fine_tuning(mobile, RecommendedFineTuningStrategy(rank=1))
    assert whole(mobile) == {"classifier.3.weight", "classifier.3.bias"}
    layers = dict(mobile.named_modules())
    assert adapted(mobile)
    assert all(getattr(layers[name], "groups", 1) == 1 for name in adapted(mobile))


def test_a_file_names_the_strategy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(**SMALL))
    enable_fine_tuning(net, RecommendedFineTuningStrategy(rank=2))
    gift.save(net, tmp_path / "d.safetensors")
    torch.manual_seed(0)
    other = BertForSequenceClassification(BertConfig(**SMALL))
    gift.load(other, tmp_path / "d.safetensors")
    ids = torch.arange(8)[None]
    assert torch.equal(net.eval()(ids).logits, other.eval()(ids).logits)


@pytest.mark.parametrize(
    ("given", "task", "steps", "sizes", "is_transformer", "expected"),
    [
        ({}, "classification", 13, (9, 2_000_000), False, (5, 1e-3)),
        ({}, "classification", 1, (9, 2_000_000), True, (10, 5e-4)),
        ({}, "classification", 5000, (1_500_000, 2_000_000), False, (3, 1e-4)),
        ({}, "regression", 5000, (1_500_000, 2_000_000), True, (3, 5e-5)),
        ({}, "language", 5000, (9, 2_000_000), True, (1, 5e-4)),
        ({}, "language", 2, (9, 2_000_000), True, (5, 5e-4)),
        ({}, "classification", 0, (90, 100), False, (10, 1e-3)),
        ({"epochs": 7, "lr": 0.5}, "language", 2, (9, 9), True, (7, 0.5)),
    ],
)
def test_epochs_and_rates_by_the_size_of_the_data(
    given: Any, task: str, steps: int, sizes: Any, is_transformer: bool, expected: Any
) -> None:
    found = settled(Settings(**given, seed=3), task, steps, *sizes, is_transformer)
    assert (found.epochs, found.lr, found.seed) == (*expected, 3)


def body(folder: Path) -> Path:
    """The folder of a BERT without a pooler, as of sentence encoders."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(**SMALL | {"vocab_size": len(words)})
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_random_parameters_that_stay_untrained_are_told(tmp_path: Path) -> None:
    texts(tmp_path / "data")
    loaded = load_network(f"transformers:{body(tmp_path / 'model')}")
    assert {name for name in loaded.fresh if "pooler" in name} == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    job = {
        "network": {"name": "transformers:model"},
        "data": {"kind": "text_table", "train": "data/train.tsv"},
        "strategy": {"name": "LoRALinearFineTuningStrategy", "init_paras": {"rank": 1}},
        "training": CHEAP,
    }
    with pytest.warns(
        GiftWarning,
        match=r"bert.pooler.dense.bias, .*weight have random values, .*"
        "are not trained: RecommendedFineTuningStrategy",
    ):
        run_job(read_job(written(tmp_path, job)))
    del job["strategy"]
    result = run_job(read_job(written(tmp_path, job | {"folder": "other"})))  # without a warning
    assert "RecommendedFineTuningStrategy" in result.strategy
