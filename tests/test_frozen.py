"""The frozen base stays frozen, whoever unfreezes whichever part, and in whichever way."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import (
    FineTuningStrategy,
    GiftWarning,
    disable_fine_tuning,
    enable_fine_tuning,
    merge_strategies,
)
from gift.factories import pa_train, pc_path
from gift.schedules import FreezeUnfreeze
from gift.strategies import (
    BitFitFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    ModulesFineTuningStrategy,
)
from tests.common import enabled, full_state, trainable

pytestmark = pytest.mark.filterwarnings("ignore:the delta has more parameters:gift.GiftWarning")


class Own(nn.Sequential):
    """With a `requires_grad_` of its author's, who counts the calls."""

    calls = 0

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.calls += 1
        return super().requires_grad_(requires_grad)


def network() -> Any:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    return nn.ModuleDict({
        "enc": nn.Sequential(block, nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])),
        "own": Own(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        "head": nn.Linear(8, 2),
    })  # fmt: skip


def lora() -> Any:
    return LoRALinearFineTuningStrategy(rank=1)


def with_norms() -> Any:
    return merge_strategies([lora(), ModulesFineTuningStrategy("enc.0.1")])


def tuned(strategy: Any, how: Callable[[Any], Any] = lambda net: net) -> Any:
    net = network()
    enable_fine_tuning(net, strategy())
    return how(net)


HOW: dict[str, Callable[[Any], Any]] = {
    "itself": lambda net: net,
    "a copy": copy.deepcopy,
    "a pickle": lambda net: pickle.loads(pickle.dumps(net)),
}
PARTS = ["", "enc", "enc.0", "enc.0.0", "enc.1", "enc.1.0", "own", "head"]


@pytest.mark.parametrize("strategy", [lora, with_norms, BitFitFineTuningStrategy])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", HOW)
def test_a_part_is_frozen_and_unfrozen(how: str, part: str, strategy: Any) -> None:
    net = tuned(strategy, HOW[how])
    chosen = trainable(net)
    module = net.get_submodule(part)
    assert module.requires_grad_(False) is module
    assert trainable(net) == [n for n in chosen if part and not n.startswith(f"{part}.")]
    assert module.requires_grad_() is module
    assert trainable(net) == chosen
    module.requires_grad_(True)
    assert trainable(net) == chosen


@pytest.mark.parametrize("part", ["enc.0.1", "enc.1.1", "own.1"])
def test_a_part_in_which_nothing_is_trained_says_so(part: str) -> None:
    net = tuned(lora)
    chosen = trainable(net)
    with pytest.warns(GiftWarning, match=r"nothing in this (Layer|Batch)Norm.*stays frozen"):
        net.get_submodule(part).requires_grad_(True)
    assert trainable(net) == chosen


def test_a_method_of_the_author_is_called() -> None:
    net = tuned(lora)
    chosen = trainable(net)
    net.own.requires_grad_(False)
    net.own.requires_grad_(True)
    assert net.own.calls == 2
    assert trainable(net) == chosen


def test_classes_of_parts_stay_and_disabling_leaves_no_trace() -> None:
    base = network()
    before = full_state(base)
    enable_fine_tuning(base, lora())
    assert type(base.enc) is nn.Sequential
    assert type(base.enc[1]) is nn.ModuleList
    base.enc.requires_grad_(False)
    disable_fine_tuning(base)
    assert full_state(base) == before
    base.enc.requires_grad_(False)
    assert trainable(base) == [n for n, _ in base.named_parameters() if not n.startswith("enc")]


def test_a_disabled_network_is_the_users_and_a_merged_one_too() -> None:
    net = tuned(lora)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    with gift.disabled(net):
        net.enc.requires_grad_(True)
        assert all(p.requires_grad for p in net.enc.parameters())
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    net.enc.requires_grad_(True)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    gift.merge(net)
    net.enc.requires_grad_(True)
    assert all(p.requires_grad for p in net.enc.parameters())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(4, 4),
    "linear": lambda: nn.Linear(4, 4),
    "conv": lambda: nn.Conv1d(4, 4, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "grucell": lambda: nn.GRUCell(4, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_network_that_is_a_layer(name: str) -> None:
    net = LAYERS[name]()
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    chosen = trainable(net)
    net.requires_grad_(False)
    assert trainable(net) == []
    net.requires_grad_(True)
    assert trainable(net) == chosen
    assert all("lora_" in name for name in chosen)


def test_what_a_schedule_lets_wait_is_not_trained_by_others() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    schedule = FreezeUnfreeze(2, unfreezes="all")
    schedule.attach(net)
    for epoch in range(3):
        schedule.step(epoch)
        flags = {name: p.requires_grad for name, p in net.named_parameters()}
        for layer in net:
            if any(p.requires_grad for p in layer.parameters()):
                layer.requires_grad_(False)
                layer.requires_grad_(True)
        assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert flags["0.weight"], "the schedule may train the base"


# --- flags that are set one by one -------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enc(x))


def set_each(net: nn.Module) -> None:
    for _, parameter in net.named_parameters():
        if not parameter.requires_grad and parameter.dtype.is_floating_point:
            parameter.requires_grad = True


def warnings_of(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if issubclass(w.category, GiftWarning)]


@pytest.mark.parametrize("part", ["", "enc"])
def test_flags_that_a_loop_sets_are_reported_before_a_step(part: str) -> None:
    """By the network's ``parameters()``, or where those are not asked for, by its next call."""
    for optimised in (lambda net: list(net.parameters()), lambda net: [*net.enc[0].parameters()]):
        net = Net()
        enable_fine_tuning(net, lora())
        set_each(net.get_submodule(part))

        def until_the_step(net: Any = net, optimised: Any = optimised) -> None:
            torch.optim.SGD(optimised(net), 0.1)
            net(torch.randn(3, 8)).square().sum().backward()

        (text,) = warnings_of(until_the_step)
        assert "enc.0.weight" in text
        assert "requires_grad = False" in text
        assert warnings_of(lambda net=net: net(torch.randn(3, 8)).sum().backward()) == []


def test_flags_are_reported_before_a_step_where_the_network_is_never_called() -> None:
    """As by sentence-transformers, which calls ``net.forward``, or by loops that call parts."""
    net = Net()
    enable_fine_tuning(net, lora())
    for copied in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        set_each(copied)
        before = {name: p.detach().clone() for name, p in copied.named_parameters()}
        other = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
        optimizer = torch.optim.SGD([p for _, p in copied.named_parameters()], 0.1)
        assert (
            warnings_of(lambda c=copied: c.forward(torch.randn(3, 8)).square().sum().backward())
            == []
        )
        assert warnings_of(other.step) == []
        with pytest.raises(GiftWarning, match=r"enc\.0\.weight"):
            optimizer.step()
        assert all(torch.equal(p, before[name]) for name, p in copied.named_parameters())
        assert warnings_of(optimizer.step) == []
    net = Net()
    enable_fine_tuning(net, lora())
    disable_fine_tuning(net)
    assert warnings_of(lambda: torch.optim.SGD(net.parameters(), 0.1).step()) == []


def test_flags_in_inference_are_nobodys_business() -> None:
    net = Net()
    enable_fine_tuning(net, lora())
    assert warnings_of(lambda: net(torch.randn(3, 8))) == []
    set_each(net)
    with torch.no_grad():
        assert warnings_of(lambda: net(torch.randn(3, 8))) == []


def test_what_a_loop_trains_is_saved_and_loaded(tmp_path: Path) -> None:
    net = Net()
    base = copy.deepcopy(net)
    enable_fine_tuning(net, lora())
    set_each(net)
    assert warnings_of(net.parameters)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    gift.save(net, tmp_path / "delta.safetensors")
    gift.load(base, tmp_path / "delta.safetensors")
    x = torch.randn(3, 8)
    assert torch.equal(base(x), net(x))


# --- libraries that freeze and unfreeze --------------------------------------------------------


def base_of(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in net.named_parameters() if "lora_" not in n}


def moved(net: nn.Module, base: dict[str, Tensor]) -> list[str]:
    now = dict(net.named_parameters())
    return [name for name, value in base.items() if not torch.equal(value, now[name])]


def test_fastai_freezes_and_unfreezes(tmp_path: Path) -> None:
    """By a splitter over trained parameters, which is fastai's default, the base stands still."""
    basics = pytest.importorskip("fastai.basics")
    pytest.importorskip("fastai.callback.all")  # gives learners more methods
    net = Net()
    enable_fine_tuning(net, lora())
    base = base_of(net)
    x, y = torch.randn(16, 8), torch.randn(16, 2)
    batches = basics.DataLoader(list(zip(x, y, strict=True)), bs=4)
    learner = basics.Learner(
        basics.DataLoaders(batches, batches), net, loss_func=nn.functional.mse_loss,
        path=tmp_path, opt_func=basics.SGD,
    )  # fmt: skip
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(1, base_lr=0.1)
    assert moved(net, base) == []
    assert not torch.equal(net.head.lora_B, torch.zeros(2, 1))


def test_lightning_finetunes_a_backbone() -> None:
    """It sets flags one by one, so it is told before the step that would move the base."""
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Net()
            enable_fine_tuning(self.backbone, lora())
            self.last = nn.Linear(2, 2)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.last(self.backbone(batch)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    def fit() -> None:
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
        )  # fmt: skip
        trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4))

    (text,) = warnings_of(fit)
    assert "enc.0.weight" in text


def test_asking_for_the_parameters_tells_of_a_flag_that_somebody_set() -> None:
    """An optimizer that is made of them would train the base."""
    net = enabled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    net[0].bias.requires_grad = True
    with pytest.warns(GiftWarning, match=r"1 parameters were frozen by fine-tuning.*0\.bias"):
        net.parameters()


def test_the_report_names_what_is_frozen_and_nothing_else() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net.add_module("same", net[0])  # a tied parameter is named once
    strategy = FineTuningStrategy([], [(pc_path("1.bias"), pa_train())])
    report = enable_fine_tuning(net, strategy)
    assert report.frozen == ["0.weight", "0.bias", "1.weight"]
