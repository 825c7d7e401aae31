"""Trainer of transformers over families of models, with images, sounds, and experts.

What its checkpoints restore is in `tests/test_saved_by_transformers.py`, which has the families.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers
from safetensors.torch import load_file

from gift import GiftWarning, enable_fine_tuning
from gift.strategies import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy
from tests.clients._properties import Client
from tests.test_saved_by_transformers import (
    FAMILIES,
    GROUPED,
    Family,
    base_of,
    logits,
    of_images,
    trainer_for,
)

MORE = {
    "gpt2": Family(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
        )
    ),
    "convnext": Family(
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(
                num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, image_size=16
            )
        ),
        of_images,
    ),
    "qwen3 with experts": Family(
        lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                head_dim=8,
            )
        ),
        needs="Qwen3MoeConfig",
    ),
}  # fmt: skip

# What a family does not use with these inputs.
STILL = {
    "gemma3 with images": ["*vision_tower*"],  # its projection starts at zero, and stays frozen
    "qwen2.5-vl": ["*visual*"],  # it is given no images
}
STRATEGIES: dict[str, Any] = {
    "gpt2": LoRAAllFineTuningStrategy,  # its output layer is tied to its embedding
    "convnext": LoRAAllFineTuningStrategy,
}


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_training_and_saving(name: str, tmp_path: Path) -> None:
    family = (FAMILIES | MORE)[name]
    if not hasattr(transformers, family.needs):
        pytest.skip(f"transformers {transformers.__version__} has no {family.needs}")
    strategy = STRATEGIES.get(name, LoRALinearFineTuningStrategy)(rank=1)
    net = base_of(family)
    client = Client(net, lambda: logits(net, family))
    client.enable(strategy)
    trainer, _ = trainer_for(
        net, family, tmp_path / "run", save_strategy="no", logging_steps=1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.args.max_steps = 8
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def reload() -> Tensor:
        with pytest.warns(GiftWarning, match="not the whole model"):
            trainer.save_model(str(tmp_path / "model"))
        fresh = base_of(family)
        enable_fine_tuning(fresh, strategy)
        fresh.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
        return logits(fresh, family)

    client.check(losses, reload, exact=True, still=STILL.get(name, []))
