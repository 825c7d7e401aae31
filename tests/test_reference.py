"""`gift.reference`: a frozen copy that shares the base, alone and as the reference model of TRL."""

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import FineTuningStrategy, enable_fine_tuning, merge_strategies
from gift.factories import ma_bottleneck, mc_name
from gift.strategies import (
    DoRAAllFineTuningStrategy,
    FullFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    ModulesFineTuningStrategy,
    VeRAAllFineTuningStrategy,
)
from tests.common import picture


class Net(nn.Module):
    """Layers with buffers, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.down(self.up(x).relu()))


STRATEGIES: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoRAAllFineTuningStrategy(rank=2, lora_dropout=0.3),
    "dora": lambda: DoRAAllFineTuningStrategy(rank=2),
    "vera": lambda: VeRAAllFineTuningStrategy(rank=4),
    "bottleneck": lambda: FineTuningStrategy([(mc_name("down"), ma_bottleneck(4))]),
    "lora and a trained layer": lambda: merge_strategies(
        [ModulesFineTuningStrategy("down"), LoRALinearFineTuningStrategy(rank=2)]
    ),
    "full": FullFineTuningStrategy,
}


def tuned(strategy: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    enable_fine_tuning(net, STRATEGIES[strategy]())
    train(net)
    return net


def train(net: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    net.train()
    for _ in range(steps):
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_stays_what_the_network_was(strategy: str) -> None:
    net, x = tuned(strategy), torch.randn(4, 3, 8, 8)
    before = picture(net)
    reference = gift.reference(net)
    assert picture(net) == before
    assert net.training
    expected = copy.deepcopy(net).eval()(x)
    assert torch.equal(reference(x), expected)
    train(net)
    assert torch.equal(reference(x), expected)
    assert not torch.equal(net.eval()(x), expected)
    assert not reference.training
    assert not any(p.requires_grad for p in nn.Module.parameters(reference))
    assert not reference(x).requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_training_changes_is_copied(strategy: str) -> None:
    net = tuned(strategy)
    reference = gift.reference(net)
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in net.named_parameters(remove_duplicate=False):
        shared = parameter.data_ptr() == theirs[name].data_ptr()
        assert shared != parameter.requires_grad, name
        assert theirs[name] is not parameter
    assert theirs["head.weight"] is theirs["up.weight"]
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    assert [id(p) for p in reference.parameters()] == [id(theirs[name]) for name in names]


def test_moving_the_copy_leaves_the_network_alone() -> None:
    net, x = tuned("lora"), torch.randn(4, 3, 8, 8)
    before, reference = picture(net), gift.reference(net)
    expected = reference(x)
    reference.double()
    torch.testing.assert_close(reference(x.double()).float(), expected)
    reference.to("meta")
    assert picture(net) == before


def test_it_can_be_saved_merged_and_disabled(tmp_path: Path) -> None:
    net, x = tuned("lora"), torch.randn(4, 3, 8, 8)
    reference = gift.reference(net)
    expected, before = reference(x), picture(net)
    gift.save(reference, tmp_path / "task.safetensors")
    torch.manual_seed(0)
    fresh = Net()
    gift.load(fresh, tmp_path / "task.safetensors")
    torch.testing.assert_close(fresh.eval()(x), expected)
    torch.testing.assert_close(gift.merge(copy.deepcopy(reference)).eval()(x), expected)
    gift.disable_fine_tuning(reference)
    assert picture(net) == before


def test_inside_a_bigger_module() -> None:
    outer = nn.Sequential(tuned("lora"), nn.Linear(64, 2))
    reference = gift.reference(outer)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(reference(x), outer.eval()(x))
    assert not any(p.requires_grad for p in reference.parameters())


def test_what_has_no_reference() -> None:
    with pytest.raises(RuntimeError, match="being fine-tuned"):
        gift.reference(Net())
    net = tuned("lora")
    with gift.disabled(net), pytest.raises(RuntimeError, match="disabled"):
        gift.reference(net)


def hashed(module: nn.Module) -> str:
    """As TRL does for `precompute_ref_log_probs`."""
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_its_digest_tells_one_base_from_another() -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = Net()
        torch.manual_seed(5)
        enable_fine_tuning(net, STRATEGIES["lora"]())
        return net

    one, same, other = made(0), made(0), made(1)
    for module in (one, same, other):  # buffers are equal, deltas are equal
        assert hashed(module) == hashed(one)
    assert hashed(gift.reference(one)) == hashed(gift.reference(same))
    assert hashed(gift.reference(one)) != hashed(gift.reference(other))


# --- TRL -----------------------------------------------------------------------------------------


def policy(folder: Path) -> Any:
    """A language model on the disk, fine-tuned for a while as by supervised training."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    net = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(61))]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def preferences() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(
        [
            {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 20}"}
            for i in range(8)
        ]
    )


def dpo(net: Any, ref_model: Any, folder: Path, steps: int = 1, **settings: Any) -> Any:
    trl = pytest.importorskip("trl")
    arguments = trl.DPOConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
        gradient_checkpointing=False, bf16=False, seed=1, **settings,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        net, ref_model, args=arguments, train_dataset=preferences(), processing_class=tokenizer()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_starts_at_log_2_after_supervised_fine_tuning(
    precomputed: bool, tmp_path: Path
) -> None:
    """Policy and reference are equal, so each preference has the probability one half."""
    net = policy(tmp_path)
    base = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    reference = gift.reference(net)
    _, losses = dpo(net, reference, tmp_path / "run", steps=3, precompute_ref_log_probs=precomputed)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 1e-3
    now = dict(net.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())


def test_without_a_reference_trl_takes_the_base_from_the_disk(tmp_path: Path) -> None:
    """That is what the recipe is for: the delta of the supervised training is not in it."""
    net = policy(tmp_path)
    _, losses = dpo(net, None, tmp_path / "run")
    assert abs(losses[0] - math.log(2)) > 1e-3


def test_trl_keeps_a_reference_in_step(tmp_path: Path) -> None:
    """`sync_ref_model` pairs ``parameters()`` of both, and moves the reference towards the net."""
    net = policy(tmp_path)
    reference = gift.reference(net)
    start = [p.clone() for p in reference.parameters()]
    dpo(
        net, reference, tmp_path / "run", steps=1,
        sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.25,
    )  # fmt: skip
    for now, before, trained in zip(reference.parameters(), start, net.parameters(), strict=True):
        torch.testing.assert_close(now, before * 0.75 + trained.detach() * 0.25)


def test_ema_of_diffusers_pairs_deltas() -> None:
    """Made from the ``parameters()`` of the fine-tuned network, as its loop does."""
    diffusers = pytest.importorskip("diffusers.training_utils")
    net = tuned("lora")
    ema = diffusers.EMAModel(net.parameters(), decay=0.5, min_decay=0.5, use_ema_warmup=False)
    expected = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        train(net, 1)
        ema.step(net.parameters())
        decay = ema.cur_decay_value
        expected = [
            e * decay + p.detach() * (1 - decay)
            for e, p in zip(expected, net.parameters(), strict=True)
        ]
    ema.copy_to(net.parameters())
    for parameter, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
