"""Answers by `finetune`, then preferences by TRL: what stays the reference, and what is saved.

Preference optimisation compares a model with a reference: the model as it was before. After
supervised fine-tuning by gift the model is base and delta, so the base from the hub would be the
wrong reference. `gift.reference(net)` is the right one: a frozen copy of both, which shares the
memory of the base.

    pip install "gift-torch[train,text]" trl
    python examples/preferences_with_trl.py            # SmolLM2 from the hub
    python examples/preferences_with_trl.py --small    # a very small Llama with random weights
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

import gift
from gift.data import TextReader, chats
from gift.strategies import LoRALinearFineTuningStrategy
from gift.training import finetune, predict

ANSWERS = [
    {"prompt": "one plus one is", "completion": " two"},
    {"prompt": "one plus two is", "completion": " three"},
    {"prompt": "two plus two is", "completion": " four"},
]
PREFERENCES = [
    {"prompt": "one plus one is", "chosen": " two indeed", "rejected": " two"},
    {"prompt": "one plus two is", "chosen": " three indeed", "rejected": " three"},
    {"prompt": "two plus two is", "chosen": " four indeed", "rejected": " four"},
]


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the example; returns the losses of the preferences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a model that is made on the spot")
    small = parser.parse_args(arguments).small
    net, tokenizer = made_here() if small else from_the_hub()
    folder = Path(tempfile.mkdtemp())

    # 1. Answers: the loss is that of the completions alone.
    finetune(
        net, chats(ANSWERS, TextReader(tokenizer), length=32),
        strategy=LoRALinearFineTuningStrategy(rank=4 if small else 8), epochs=3, batch_size=3,
        lr=1e-2 if small else 2e-4, progress=not small,
    )  # fmt: skip

    # 2. Preferences: the reference is the model as it is now, not the base.
    reference = gift.reference(net)
    config = trl.DPOConfig(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=3, beta=0.1,
        learning_rate=1e-2 if small else 5e-5, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=small, bf16=False,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        net, reference, args=config, train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"the loss starts at log 2 = {math.log(2):.3f}, as both agree: {losses[0]:.3f}")
    print(f"and ends at {losses[-1]:.3f}")

    # 3. One file has what both trainings changed.
    gift.save(net, folder / "answers_and_preferences.safetensors")
    for written in predict(net, ["one plus one is"], max_new_tokens=4):
        print(written)
    return losses


def from_the_hub() -> tuple[Any, Any]:
    """Return SmolLM2 and its tokenizer."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return transformers.AutoModelForCausalLM.from_pretrained(name), tokenizer


def made_here() -> tuple[Any, Any]:
    """Return a very small Llama with random weights, and a tokenizer of whole words."""
    import tokenizers

    words = ["<pad>", "<unk>", "<eos>", "one", "two", "three", "four", "plus", "is", "indeed"]
    model = tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), tokenizer


if __name__ == "__main__":
    main()
