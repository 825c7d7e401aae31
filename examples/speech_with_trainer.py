"""Speech recognition by the Trainer of transformers: Wav2Vec2 with CTC, with LoRA of gift.

Recognition needs losses and decoding of its own (CTC here, sequences for Whisper), which the
library of the models has. gift changes the model in one line, the rest is the recipe of
transformers.

    pip install "gift-torch[text,audio]" accelerate
    python examples/speech_with_trainer.py --sounds clips.csv     # columns path and text
    python examples/speech_with_trainer.py --small    # a very small model, and letters as tones
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import gift
from gift import enable_fine_tuning, merge_strategies
from gift.data.readers.sounds import clip
from gift.data.tables import read_table
from gift.strategies import LoRALinearFineTuningStrategy, ModulesFineTuningStrategy

RATE = 16000


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Run the example; returns the character error rates before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sounds", type=Path, help="a table of sounds and their texts")
    parser.add_argument("--small", action="store_true", help="a model that is made on the spot")
    options = parser.parse_args(arguments)
    if not options.small and options.sounds is None:
        parser.error("give --sounds, or --small")
    model, processor, examples = made_here() if options.small else from_the_hub(options.sounds)

    # The head is for other letters than those of the pre-training, so it is trained whole.
    strategy = merge_strategies(
        [ModulesFineTuningStrategy("lm_head"), LoRALinearFineTuningStrategy(rank=8)]
    )
    enable_fine_tuning(model, strategy)

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = processor.feature_extractor.pad(
            [{"input_values": item["input_values"]} for item in items], return_tensors="pt"
        )
        labels = [torch.tensor(item["labels"]) for item in items]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, True, -100)
        return dict(batch)

    folder = Path(tempfile.mkdtemp())
    config = transformers.TrainingArguments(
        str(folder), max_steps=300 if options.small else 1000, per_device_train_batch_size=8,
        learning_rate=1e-2 if options.small else 3e-4, warmup_steps=10, report_to=[],
        save_strategy="no", disable_tqdm=options.small, logging_strategy="no", seed=0,
        use_cpu=not torch.cuda.is_available(), max_grad_norm=1.0,
    )  # fmt: skip
    before = error_rate(model, processor, examples)
    transformers.Trainer(model, config, train_dataset=examples, data_collator=collate).train()
    after = error_rate(model, processor, examples)
    print(f"character error rate: {before:.0%} before, {after:.0%} after")
    gift.save(model, folder / "speech.safetensors")
    return before, after


def error_rate(model: Any, processor: Any, examples: Sequence[dict[str, Any]]) -> float:
    """Return the edits that what was heard needs, as a share of the letters."""
    edits = total = 0
    model.eval()
    for item in examples:
        values = torch.as_tensor(item["input_values"])[None].to(model.device)
        with torch.no_grad():
            heard = processor.batch_decode(model(values).logits.argmax(-1))[0]
        edits, total = edits + distance(heard, item["text"]), total + len(item["text"])
    return edits / total


def distance(one: str, other: str) -> int:
    """Return the number of letters to insert, delete or replace."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def from_the_hub(table: Path) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return Wav2Vec2, which was trained on English, its processor, and your examples."""
    name = "facebook/wav2vec2-base-960h"
    processor = transformers.Wav2Vec2Processor.from_pretrained(name)
    model = transformers.Wav2Vec2ForCTC.from_pretrained(name, ctc_loss_reduction="mean")
    rows = read_table(table, ("path", "text")).values
    files = [(str(table.parent / path), text.upper()) for path, text in rows]
    return model, processor, [example(processor, clip(path, RATE, 30.0), text)
                              for path, text in files]  # fmt: skip


def example(processor: Any, wave: torch.Tensor, text: str) -> dict[str, Any]:
    """Return a sound and the numbers of its letters."""
    values = processor.feature_extractor(wave.numpy(), sampling_rate=RATE).input_values[0]
    return {"input_values": values, "labels": processor.tokenizer(text).input_ids, "text": text}


def made_here() -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return a very small Wav2Vec2 with random weights, and words whose letters are tones."""
    import json

    folder = Path(tempfile.mkdtemp())
    letters = ["<pad>", "<unk>", "|", "A", "B", "C"]
    (folder / "vocab.json").write_text(json.dumps({letter: n for n, letter in enumerate(letters)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), pad_token="<pad>", unk_token="<unk>", word_delimiter_token="|",
        bos_token=None, eos_token=None,
    )  # fmt: skip
    processor = transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, conv_dim=(32, 32), conv_stride=(20, 8), conv_kernel=(40, 8),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, ctc_loss_reduction="mean",
        pad_token_id=0, mask_time_prob=0.0, mask_feature_prob=0.0, hidden_dropout=0.0,
        layerdrop=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
    )  # fmt: skip
    time = torch.arange(RATE // 10) / RATE
    tones = {letter: 0.5 * torch.sin(2 * math.pi * hertz * time)
             for letter, hertz in zip("ABC", (300, 700, 1500), strict=True)}  # fmt: skip
    words = ["ABC", "CAB", "BCA", "ACB", "BAC", "CBA", "AB", "CA"]
    waves = [torch.cat([torch.cat([tones[c], torch.zeros(400)]) for c in word]) for word in words]
    model = transformers.Wav2Vec2ForCTC(config)
    return model, processor, [example(processor, w, t) for w, t in zip(waves, words, strict=True)]


if __name__ == "__main__":
    main()
