"""Generating token by token: gift beside the plain network and PEFT.

A Llama of 12 layers with 512 features has read a prompt, and makes one token after the other for
one sequence, with a cache of keys and values. Deltas of rank 8 are on every linear layer: LoRA and
DoRA by gift and by PEFT, LoRA merged into the weights, and LoRA of a `DeltaBank` for the rows of a
batch, which is one row.

Contenders take turns, in another order each round, after two rounds that do not count. A round is
some tokens of each; ratios are those of the medians. With one thread, the time is that for which
the thread itself ran, so that other work on the machine counts less.

Predictions: what an adapted layer adds to a token is two products of one row, 7 us with all that
torch does for a call, and 10 us for Python's steps: LoRA 1.12 of the plain network. DoRA compares
its factors with those of the last token and multiplies the output: 1.20. Merged 1.00.

    python benchmarks/generation.py [--rounds 15] [--tokens 8] [--threads 2] [--out FILE]
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from _common import adaptable_pattern, machine, write_results
from _contenders import as_after_a_step
from _measuring import compared, in_turn, keep_memory
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import gift
from gift.strategies import DoRALinearFineTuningStrategy, LoRALinearFineTuningStrategy

RANK, PROMPT = 8, 32


def plain() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=8000,
    )
    return LlamaForCausalLM(config).eval()


def by_gift(strategy: type) -> nn.Module:
    network = plain()
    gift.enable_fine_tuning(network, strategy(rank=RANK))
    as_after_a_step(network)
    return network.eval()


def by_peft(use_dora: bool) -> nn.Module:
    network = plain()
    pattern = adaptable_pattern(network)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern, use_dora=use_dora)
    model = get_peft_model(network, config)
    as_after_a_step(model)
    return model.eval()


def in_a_bank() -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    """A network, and the context in which its only row has a delta."""
    network = plain()
    bank = gift.DeltaBank(network)
    bank.add("delta", strategy=LoRALinearFineTuningStrategy(rank=RANK))
    bank.activate("delta")
    as_after_a_step(network)
    bank.activate(None)
    return network.eval(), lambda: bank.rows(["delta"])


def generate(
    network: Any, tokens: int, within: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[[], None]:
    """Return what makes so many tokens after a prompt that the network has read already."""
    torch.manual_seed(1)
    prompt = torch.randint(0, 8000, (1, PROMPT))
    cache = DynamicCache(config=network.config)
    with torch.no_grad(), within():
        first = network(prompt, cache=cache).logits[:, -1:].argmax(-1)

    def more() -> None:
        token = first
        with torch.no_grad(), within():
            for _ in range(tokens):
                token = network(token, cache=cache).logits[:, -1:].argmax(-1)
        cache.crop(-tokens)

    return more


def contenders(tokens: int) -> dict[str, Callable[[], None]]:
    merged, (banked, rows) = by_gift(LoRALinearFineTuningStrategy), in_a_bank()
    gift.merge(merged)
    networks: dict[str, tuple[Any, ...]] = {
        "plain": (plain(),),
        "gift, LoRA": (by_gift(LoRALinearFineTuningStrategy),),
        "gift, DoRA": (by_gift(DoRALinearFineTuningStrategy),),
        "gift, LoRA merged": (merged,),
        "gift, rows of a bank": (banked, rows),
        "PEFT, LoRA": (by_peft(use_dora=False),),
        "PEFT, DoRA": (by_peft(use_dora=True),),
    }
    return {
        name: generate(network, tokens, *within) for name, (network, *within) in networks.items()
    }


def table(found: dict[str, Any], tokens: int) -> str:
    rows = [
        [name, found["ms"][name] / tokens, ratio, *found["quartiles"][name]]
        for name, ratio in found["ratio"].items()
    ]
    header = ["", "a token, ms", "of plain", "quartiles", ""]
    return tabulate(rows, header, floatfmt=("", ".2f", ".3f", ".3f", ".3f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/generation.json"
    )
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    found = compared(in_turn(contenders(args.tokens), args.rounds, clock), "plain")
    print(table(found, args.tokens))
    write_results(args.out, {"machine": machine(), "rank": RANK, "tokens": args.tokens} | found)


if __name__ == "__main__":
    main()
