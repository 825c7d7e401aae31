"""Trainers of TRL: supervised, by preferences, by rewards, and of a reward model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gift
from gift import GiftWarning, enable_fine_tuning
from gift.strategies import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy
from tests.clients._properties import Client

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 19).reshape(2, 8)


def llama(kind: str = "ForCausalLM", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        **settings,
    )  # fmt: skip
    return getattr(transformers, f"Llama{kind}")(config)


def tokenizer() -> Any:
    words = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(61))]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def texts() -> Any:
    rows = [" ".join(f"w{(i + k) % 50}" for k in range(8)) for i in range(16)]
    return datasets.Dataset.from_list([{"text": row} for row in rows])


def preferences() -> Any:
    return datasets.Dataset.from_list(
        [
            {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 20}"}
            for i in range(8)
        ]
    )


def prompts() -> Any:
    return datasets.Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(16)])


def logits(net: Any) -> Tensor:
    with torch.no_grad():
        return net.eval()(IDS).logits


def settings(folder: Path, steps: int, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 8,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "bf16": False, "seed": 1,
        "gradient_checkpointing": False, **others,
    }  # fmt: skip


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def saved_whole(net: Any, folder: Path) -> Tensor:
    """What ``save_pretrained`` wrote, as a plain model."""
    net.save_pretrained(folder)
    return logits(type(net)._gift_plain.from_pretrained(folder))


def saved_deltas(trainer: Any, fresh: Any, strategy: Any, folder: Path) -> Tensor:
    """What ``save_model`` wrote, beside the base."""
    with pytest.warns(GiftWarning, match="not the whole model"):
        trainer.save_model(str(folder))
    enable_fine_tuning(fresh, strategy)
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    return logits(fresh)


@pytest.mark.parametrize(
    ("strategy", "others"),
    [
        (LoRALinearFineTuningStrategy, {}),
        (LoRALinearFineTuningStrategy, {"gradient_checkpointing": True}),
        (LoRAAllFineTuningStrategy, {"packing": True, "max_length": 16}),
        (gift.strategies.DoRALinearFineTuningStrategy, {"neftune_noise_alpha": 1.0}),
    ],
)
def test_supervised(strategy: Callable[..., Any], others: dict[str, Any], tmp_path: Path) -> None:
    net = llama()
    client = Client(net, lambda: logits(net))
    client.enable(strategy(rank=2))
    trainer = trl.SFTTrainer(
        net, args=trl.SFTConfig(**settings(tmp_path / "run", 6, **others)), train_dataset=texts(),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    client.check(logged(trainer), lambda: saved_whole(net, tmp_path / "model"))


def test_by_preferences(tmp_path: Path) -> None:
    net, strategy = llama(), LoRALinearFineTuningStrategy(rank=2)
    client = Client(net, lambda: logits(net))
    client.enable(strategy)
    trainer, losses = dpo(net, gift.reference(net), tmp_path / "run", steps=6)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    client.check(
        losses, lambda: saved_deltas(trainer, llama(), strategy, tmp_path / "model"), exact=True
    )


def test_by_rewards(tmp_path: Path) -> None:
    """The reward is the share of words below w30; at the start that is about a half."""

    def low(completions: list[str], **_: Any) -> list[float]:
        words = [[int(word[1:]) < 30 for word in text.split() if word[0] == "w"]
                 for text in completions]  # fmt: skip
        return [sum(row) / max(1, len(row)) for row in words]

    net, strategy = llama(), LoRALinearFineTuningStrategy(rank=2)
    client = Client(net, lambda: logits(net))
    client.enable(strategy)
    arguments = trl.GRPOConfig(
        **settings(tmp_path / "run", 16, learning_rate=3e-2), num_generations=8,
        max_completion_length=8,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        net, low, args=arguments, train_dataset=prompts(), processing_class=tokenizer()
    )
    trainer.train()
    client.check(
        [-reward for reward in logged(trainer, "reward")],
        lambda: saved_deltas(trainer, llama(), strategy, tmp_path / "model"),
        exact=True,
    )


def test_a_model_of_rewards(tmp_path: Path) -> None:
    net = llama("ForSequenceClassification", num_labels=1)
    client = Client(net, lambda: logits(net))
    client.enable(LoRALinearFineTuningStrategy(rank=1))
    rows = preferences().remove_columns("prompt")
    arguments = trl.RewardConfig(**settings(tmp_path / "run", 6))
    trainer = trl.RewardTrainer(
        net, args=arguments, train_dataset=rows, processing_class=tokenizer()
    )
    trainer.train()
    client.check(logged(trainer), lambda: saved_whole(net, tmp_path / "model"))


# --- references ----------------------------------------------------------------------------------


def policy(folder: Path) -> Any:
    """A language model on the disk, fine-tuned for a while as by supervised training."""
    llama().save_pretrained(folder / "base")
    net = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


def dpo(net: Any, ref_model: Any, folder: Path, steps: int = 1, **others: Any) -> Any:
    arguments = trl.DPOConfig(
        **settings(folder, steps, per_device_train_batch_size=4, lr_scheduler_type="linear"),
        **others,
    )
    trainer = trl.DPOTrainer(
        net, ref_model, args=arguments, train_dataset=preferences(), processing_class=tokenizer()
    )
    trainer.train()
    return trainer, logged(trainer)


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
