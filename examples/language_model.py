"""Fine-tune a language model on a text file in the Trainer of transformers.

    python language_model.py Qwen/Qwen3-0.6B notes.txt --rank 8 --epochs 3 --save tuned

Checkpoints hold the deltas; the folder at the end has the whole model, merged.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import gift
from gift.strategies import LoRALinearFineTuningStrategy


class Pieces(Dataset):
    """A text as pieces of the same number of tokens."""

    def __init__(self, text: str, tokenizer: AutoTokenizer, length: int) -> None:
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        self.pieces = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a causal language model: an id of the hub, or a folder")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens in a piece")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save", default="tuned", help="folder for the merged model")
    return parser.parse_args()


def main() -> None:
    """Run the example."""
    args = parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    report = gift.enable_fine_tuning(model, LoRALinearFineTuningStrategy(rank=args.rank))
    print(report.summary())

    settings = TrainingArguments(
        f"{args.save}_checkpoints",
        learning_rate=args.lr,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        report_to=[],
    )
    data = Pieces(args.text.read_text(encoding="utf-8"), tokenizer, args.length)
    trainer = Trainer(model, settings, train_dataset=data)
    trainer.train()

    gift.save(model, f"{args.save}.safetensors")  # the delta
    model.save_pretrained(args.save)  # the whole model, which from_pretrained loads
    tokenizer.save_pretrained(args.save)
    print(gift.inspect(f"{args.save}.safetensors").summary())


if __name__ == "__main__":
    main()
