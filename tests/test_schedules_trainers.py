"""Schedules in the Trainers of Lightning and transformers: equal to a plain loop, and resumed."""

import copy
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gift import disable_fine_tuning, enable_fine_tuning
from gift.schedules import UnfreezeMilestones
from gift.schedules import lightning as schedules_lightning
from gift.schedules.lightning import ScheduleCallback as LightningCallback
from gift.schedules.transformers import ScheduleCallback
from gift.strategies import HeadReplacementStrategy, LoRAAllFineTuningStrategy
from tests.common import all_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n|weights_only|LeafSpec).*"),
]
STRATEGIES = {
    "plain": None,
    "lora": LoRAAllFineTuningStrategy(rank=1),
    "head": HeadReplacementStrategy(3),
}
X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
BATCHES = DataLoader(list(zip(X.split(4), Y.split(4), strict=True)), batch_size=None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


def schedule() -> UnfreezeMilestones:
    return UnfreezeMilestones((1, 3), num_layers=1, train_bn=None)


def body() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


class Module(pl.LightningModule):
    """A network, fine-tuned or not, as users of Lightning have it."""

    def __init__(self, strategy: Any) -> None:
        super().__init__()
        self.net = body()
        if strategy is not None:
            enable_fine_tuning(self.net, strategy)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        return [optimizer], [StepLR(optimizer, 1, 0.5)]


def lightning_run(module: Module, epochs: int, resume: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[LightningCallback(schedule())], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, BATCHES, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_lightning_does_what_a_plain_loop_does(strategy: Any, tmp_path: Path) -> None:
    """Bit for bit, in one go or resumed between two milestones; and the base comes back."""
    start = Module(strategy)
    by_hand, whole, begun, resumed = (copy.deepcopy(start) for _ in range(4))
    plain = schedule()
    plain.attach(by_hand)
    (optimizer,), (scheduler,) = by_hand.configure_optimizers()
    for epoch in range(5):
        plain.step(epoch, optimizer)
        for batch in BATCHES:
            optimizer.zero_grad()
            by_hand.training_step(batch, 0).backward()
            optimizer.step()
        scheduler.step()
    one = lightning_run(whole, 5)
    lightning_run(begun, 3).save_checkpoint(tmp_path / "saved.ckpt")
    two = lightning_run(resumed, 5, tmp_path / "saved.ckpt")
    assert all_bits(by_hand) == all_bits(whole) == all_bits(resumed) != all_bits(start)
    rates = [
        [group["lr"] for group in o.param_groups]
        for o in (optimizer, one.optimizers[0], two.optimizers[0])
    ]
    assert rates[0] == rates[1] == rates[2]
    assert len(rates[0]) == 3
    if strategy is not None:
        assert all_bits(disable_fine_tuning(resumed.net)) == all_bits(body())


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
            vocab_size=9, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        )
    )  # fmt: skip


TOKENS = torch.randint(0, 9, (12, 5), generator=torch.Generator().manual_seed(1))
EXAMPLES = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(TOKENS)]


class InOrder(Trainer):
    """Gives the examples in their order, as the loop by hand does."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(EXAMPLES)


def trainer(net: nn.Module, folder: Path, callback: Any, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), num_train_epochs=5, per_device_train_batch_size=4, learning_rate=1e-2,
        weight_decay=0.1, save_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True,
        logging_strategy="no", optim="adamw_torch", lr_scheduler_type="constant", max_grad_norm=0,
        **settings,
    )  # fmt: skip
    return InOrder(
        net, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES, callbacks=[callback]
    )  # type: ignore[arg-type]


def fresh(strategy: Any) -> nn.Module:
    net = bert()
    if strategy is not None:
        enable_fine_tuning(net, strategy)
    return net


@pytest.mark.parametrize("strategy", [None, STRATEGIES["lora"]], ids=["plain", "lora"])
def test_transformers_does_what_a_plain_loop_does(strategy: Any, tmp_path: Path) -> None:
    """Its parameters without weight decay stay apart; resumed by its own checkpoints."""
    net, by_hand, plain = fresh(strategy), fresh(strategy), schedule()
    plain.attach(by_hand)
    callback = ScheduleCallback(schedule())
    run = trainer(net, tmp_path / "one", callback)
    run.train()
    named = dict(by_hand.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    decayed = {p for name, p in trained.items() if not name.endswith("bias")}
    groups = [
        {"params": [p for p in trained.values() if p in decayed], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    by_hand.train()
    for epoch in range(5):
        plain.step(epoch, optimizer)
        for rows in range(0, 12, 4):
            optimizer.zero_grad()
            by_hand(
                TOKENS[rows : rows + 4], labels=torch.arange(rows, rows + 4) % 3
            ).loss.backward()
            optimizer.step()
    for name, value in all_bits(by_hand).items():
        assert all_bits(net)[name] == value, name
    for restored in (False, True):  # whether the Trainer makes the callback anew
        resumed = fresh(strategy)
        callback = ScheduleCallback(schedule())
        again = trainer(
            resumed, tmp_path / f"two{restored}", callback,
            restore_callback_states_from_checkpoint=restored,
        )  # fmt: skip
        again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
        assert all_bits(resumed) == all_bits(net)
        if strategy is not None:
            assert all_bits(disable_fine_tuning(resumed)) == all_bits(bert())


def test_the_best_model_is_as_far_as_it_was(tmp_path: Path) -> None:
    """What was unfrozen after the best epoch has the values of the base again."""
    net, scores = fresh(STRATEGIES["lora"]), iter([1.0, 3.0, 2.0, 2.0, 2.0])
    settings = {"load_best_model_at_end": True, "eval_strategy": "epoch"}
    callback = ScheduleCallback(schedule())
    run = trainer(net, tmp_path, callback, metric_for_best_model="score", **settings)
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    expected = fresh(STRATEGIES["lora"])
    again = trainer(expected, tmp_path / "again", ScheduleCallback(schedule()), max_steps=6)
    again.train()
    assert callback.schedule.trained == ["bert.pooler"]
    assert all_bits(net) == all_bits(expected)
    assert all_bits(disable_fine_tuning(net)) == all_bits(bert())


def test_lightning_is_asked_for_under_both_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert schedules_lightning._lightning().__name__ in ("lightning.pytorch", "pytorch_lightning")
    monkeypatch.setattr(schedules_lightning, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="this needs Lightning: pip install lightning"):
        schedules_lightning._lightning()
    asked: list[str] = []
    monkeypatch.setattr(schedules_lightning, "find_spec", lambda name: asked.append(name))
    with pytest.raises(ImportError):
        schedules_lightning._lightning()
    assert sorted(asked) == ["lightning", "pytorch_lightning"]
