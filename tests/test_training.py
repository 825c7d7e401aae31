"""`finetune` beside loops written by hand, and what it measures beside scikit-learn."""

import math
from pathlib import Path
from typing import Any

import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import gift
from gift import GiftWarning
from gift.data.examples import Examples
from gift.schedules import Freeze, FreezeUnfreeze
from gift.strategies import (
    FullFineTuningStrategy,
    HeadReplacementStrategy,
    merge_strategies,
)
from gift.strategies.lora import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy
from gift.training import evaluate, finetune
from gift.training.optimizers import parameter_groups

QUIET: dict[str, Any] = {"device": "cpu", "progress": False, "tensorboard": False}


def net(classes: int = 3) -> nn.Module:
    """The same network each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def data(number: int = 50, classes: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 6, dtype=torch.float64, generator=random)
    return inputs, inputs[:, :classes].argmax(1)


def lora(**settings: Any) -> LoRAAllFineTuningStrategy:
    return LoRAAllFineTuningStrategy(**{"rank": 2} | settings)


def assert_same(net: nn.Module, other: nn.Module, **tolerance: Any) -> None:
    assert_close(dict(net.state_dict()), dict(other.state_dict()), **tolerance)


# --- the loop ------------------------------------------------------------------------------------


def cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def one_cycle(step: int) -> float:
    """Half of 20 steps up to `lr` from a 25th of it, then down to a ten thousandth of that."""
    low, end, turn, last = 1 / 25, 1 / 25 / 1e4, 9, 19
    if step <= turn:
        return low + (1 - low) * (1 - math.cos(math.pi * step / turn)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * (step - turn) / (last - turn))) / 2


LOOPS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "adamw, cosine": (
        {"lr": 0.02, "warmup": 0.25},
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.01),
        lambda step: cosine(step, 5, 20),
    ),
    "sgd, linear, no clipping": (
        {"lr": 0.1, "optimizer": "SGD", "optimizer_options": {"momentum": 0.9}, "clip": None,
         "lr_schedule": "linear", "warmup": 0.0, "weight_decay": 0.0},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda step: 1 - step / 20,
    ),
    "one cycle": (
        {"lr": 0.05, "optimizer": "SGD", "lr_schedule": "onecycle", "warmup": 0.5},
        lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
        one_cycle,
    ),
    "a schedule that changes the rate at once": (
        {"lr": 0.05, "optimizer": "SGD", "weight_decay": 0.0,
         "lr_schedule": lambda o, n: torch.optim.lr_scheduler.LinearLR(o, 0.5, 1.0, n)},
        lambda p: torch.optim.SGD(p, lr=0.05),
        lambda step: 0.5 + 0.5 * step / 20,
    ),
    "own optimizer, own schedule": (
        {"lr": 0.05, "optimizer": torch.optim.RMSprop, "weight_decay": 0.1,
         "lr_schedule": lambda o, n: torch.optim.lr_scheduler.StepLR(o, n // 2, 0.1)},
        lambda p: torch.optim.RMSprop(p, lr=0.05, weight_decay=0.1),
        lambda step: 1 if step < 10 else 0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_it_trains_as_a_loop_written_by_hand(name: str) -> None:
    settings, make, rate = LOOPS[name]
    tuned, (inputs, labels) = net(), data()
    result = finetune(
        tuned,
        (inputs, labels),
        strategy=lora(),
        epochs=4,
        batch_size=12,
        seed=3,
        **settings,
        **QUIET,
    )

    byhand = net()
    torch.manual_seed(3)
    gift.enable_fine_tuning(byhand, lora())
    optimizer = make(byhand.parameters())
    [highest] = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for epoch in range(4):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3 + epoch))
        for places in order.split(12):
            for group in optimizer.param_groups:
                group["lr"] = highest * rate(len(losses))
            loss = F.cross_entropy(byhand(inputs[places]), labels[places])
            optimizer.zero_grad()
            loss.backward()
            if settings.get("clip", 1.0):
                nn.utils.clip_grad_norm_(byhand.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    assert_same(tuned, byhand, rtol=1e-10, atol=1e-12)
    assert_close([row["loss"] for row in result.steps], losses)
    assert_close([row["lr"] for row in result.steps], [highest * rate(i) for i in range(20)])


def test_batches_that_one_step_takes_together_are_one_batch() -> None:
    """Also where the last ones are smaller, as 50 is not a multiple of 8 or 24."""
    runs = []
    for size, together in ((24, 1), (8, 3)):
        tuned = net()
        finetune(
            tuned, data(), strategy=lora(), epochs=3, batch_size=size, accumulate=together, **QUIET
        )
        runs.append(tuned)
    assert_same(*runs, rtol=1e-9, atol=1e-12)


def test_all_ways_to_give_examples_train_the_same() -> None:
    inputs, labels = data()
    dataset = TensorDataset(inputs, labels)

    class Rows(torch.utils.data.Dataset):
        """Dictionaries, as transformers takes them, with a column that no network wants."""

        def __len__(self) -> int:
            return len(inputs)

        def __getitem__(self, place: int) -> dict[str, Any]:
            return {"input": inputs[place], "labels": labels[place], "idx": place}

    ways = [(inputs, labels), dataset, Examples(dataset), Rows(), Examples(Rows())]
    runs = []
    for way in ways:
        tuned = net()
        finetune(tuned, way, strategy=lora(), epochs=2, **QUIET)
        runs.append(tuned)
    for other in runs[1:]:
        assert_same(runs[0], other, rtol=0, atol=0)


def test_an_example_that_is_left_alone_joins_the_last_batch() -> None:
    """Norm layers cannot learn from one example."""
    tuned = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).double()
    seen = []
    tuned[1].register_forward_hook(
        lambda module, inputs, out: seen.append(len(out)) if module.training else None
    )
    result = finetune(tuned, data(25), strategy=lora(), epochs=1, batch_size=8, **QUIET)
    assert (seen, len(result.steps)) == ([8, 8, 9], 3)


def test_a_data_loader_keeps_its_own_batches() -> None:
    inputs, labels = data()
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=10, drop_last=True)
    result = finetune(net(), loader, strategy=lora(), epochs=2, **QUIET)
    assert len(result.steps) == 10


def test_a_plain_network_is_trained_as_its_flags_say() -> None:
    tuned = net()
    tuned[0].requires_grad_(False)
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    finetune(tuned, data(), epochs=1, **QUIET)
    assert [name for name, _ in tuned.named_parameters() if name in tuned.state_dict()] == [
        "2.weight", "2.bias"]  # fmt: skip
    assert torch.equal(tuned[0].weight, before["0.weight"])
    assert not torch.equal(tuned[2].weight, before["2.weight"])


def test_loraplus_gives_outer_factors_a_higher_rate() -> None:
    tuned = net()
    gift.enable_fine_tuning(tuned, lora(train_bias=True))
    low, high = parameter_groups(tuned, 0.01, 16.0)
    names = {id(p): name for name, p in tuned.named_parameters()}
    assert [names[id(p)] for p in high["params"]] == ["0.lora_B", "2.lora_B"]
    assert {names[id(p)] for p in low["params"]} == {"0.lora_A", "2.lora_A", "0.bias", "2.bias"}
    assert (low["lr"], high["lr"]) == (0.01, 0.16)
    result = finetune(tuned, data(), epochs=1, lr=0.01, loraplus_ratio=16.0, **QUIET)
    assert all(row["lr_1"] == pytest.approx(16 * row["lr"]) for row in result.steps)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_computes_in_the_precision_that_was_asked_for(precision: str) -> None:
    tuned = net().float()
    seen = set()
    tuned[2].register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    inputs, labels = data()
    result = finetune(
        tuned,
        (inputs.float(), labels),
        strategy=lora(),
        epochs=8,
        lr=0.05,
        precision=precision,
        **QUIET,
    )
    assert getattr(torch, precision) in seen
    assert all(p.dtype is torch.float32 for p in tuned.parameters())
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] * 0.8


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_gradients_are_clipped_in_their_own_scale(precision: str) -> None:
    """A step of plain SGD then moves all parameters together by ``lr * clip``."""
    tuned, lr, clip = net().float(), 0.5, 1e-2
    inputs, labels = data(16)
    start = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    finetune(
        tuned, (inputs.float(), labels), strategy=FullFineTuningStrategy(), epochs=1, batch_size=16,
        optimizer="SGD", weight_decay=0.0, lr=lr, lr_schedule="constant", warmup=0.0, clip=clip,
        precision=precision, **QUIET,
    )  # fmt: skip
    moved = torch.stack([(p - start[name]).norm() for name, p in tuned.named_parameters()]).norm()
    assert moved.item() == pytest.approx(lr * clip, rel=1e-3)


def test_a_compiled_network_trains_the_same() -> None:
    runs = []
    for compile in (False, True):
        tuned = net()
        finetune(
            tuned, data(48), strategy=lora(), epochs=2, batch_size=16, compile=compile, **QUIET
        )
        runs.append(tuned)
    assert_same(*runs, rtol=1e-8, atol=1e-10)


# --- what it measures ----------------------------------------------------------------------------


def test_metrics_are_those_of_scikit_learn() -> None:
    tuned, (inputs, labels) = net(), data(200)
    result = finetune(tuned, data(), (inputs, labels), strategy=lora(), epochs=2, **QUIET)
    with torch.no_grad():
        logits = tuned.eval()(inputs)
    predicted = logits.argmax(1)
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    expected = {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (predicted == labels).double().mean().item(),
        "f1": f1, "precision": precision, "recall": recall,
    }  # fmt: skip
    assert result.after == pytest.approx(expected, abs=1e-6)
    assert result.confusion == sklearn.metrics.confusion_matrix(labels, predicted).tolist()
    assert evaluate(tuned, (inputs, labels), device="cpu") == pytest.approx(result.after)
    assert result.before == pytest.approx(evaluate(net(), (inputs, labels), device="cpu"))


@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 5.0}], ids=["defaults", "settings"])
def test_the_best_epoch_is_kept_and_its_file_gives_the_same_network(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """A rate that is much too high at the end makes the last epoch a bad one."""

    def rates(optimizer: Any, steps: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 if s < steps // 2 else 2000)

    tuned, valid = net(), data(80)
    result = finetune(
        tuned, data(), valid, strategy=lora(**settings), epochs=6, lr=0.02, lr_schedule=rates,
        folder=tmp_path, **QUIET,
    )  # fmt: skip
    best = min(row["valid_loss"] for row in result.history)
    assert result.after["loss"] == pytest.approx(best, rel=1e-12)
    assert result.history[result.best_epoch - 1]["valid_loss"] == best
    assert result.history[-1]["valid_loss"] > best
    fresh = net()
    gift.load(fresh, tmp_path / "best.safetensors")
    assert torch.equal(fresh(valid[0]), tuned(valid[0]))
    last = net()
    gift.load(last, tmp_path / "last.safetensors")
    ended = evaluate(last, valid, device="cpu")
    assert ended["loss"] == pytest.approx(result.history[-1]["valid_loss"], rel=1e-12)


def test_a_block_that_is_unfrozen_after_the_best_epoch_is_that_of_the_base() -> None:
    """Nobody had trained it when the network was at its best: the first epoch is all there is."""
    inputs, labels = data()
    worse = (inputs, (labels + 1) % 3)  # the more is learnt, the more of it is wrong
    runs = []
    for epochs, schedule in ((1, Freeze(head="2")), (4, FreezeUnfreeze(2, head="2"))):
        tuned = net()
        result = finetune(
            tuned, (inputs, labels), worse, strategy=lora(), epochs=epochs, lr=0.05,
            lr_schedule="constant", warmup=0.0, schedule=schedule, **QUIET,
        )  # fmt: skip
        assert result.best_epoch == 1
        runs.append(tuned)
    assert result.unfrozen == {3: ["0"]}
    for name, parameter in runs[0].named_parameters():
        assert torch.equal(parameter, dict(runs[1].named_parameters())[name]), name


def test_a_value_that_is_not_a_number_is_never_the_best() -> None:
    """Neither the first one, nor one after others."""
    inputs, labels = data()

    class Breaks(nn.Module):
        """Gives numbers while it is trained; when it is judged, in one of four epochs."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.steps = net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += self.training  # one in each epoch
            y = self.body(x)
            return y * torch.nan if not self.training and self.steps in (1, 3, 4) else y

    data_of_one_batch = (inputs[:32], labels[:32])
    with pytest.warns(GiftWarning, match="loss on the validation examples is not finite"):
        result = finetune(
            Breaks(), data_of_one_batch, data_of_one_batch, strategy=lora(), epochs=4, **QUIET
        )
    finite = [math.isfinite(row["valid_loss"]) for row in result.history]
    assert (finite, result.best_epoch) == ([False, True, False, False], 2)


def test_training_stops_when_nothing_gets_better() -> None:
    inputs, labels = data()
    result = finetune(
        net(), (inputs, labels), (inputs, (labels + 1) % 3), strategy=lora(), lr=0.05, epochs=50,
        patience=2, **QUIET,
    )  # fmt: skip
    best = min(range(len(result.history)), key=lambda i: result.history[i]["valid_loss"])
    assert len(result.history) == best + 3 < 50
    assert "2 epochs" in result.stopped


def test_forgetting_is_reported_with_the_old_head() -> None:
    """The old metrics are those of the adapted network with the layer that was replaced."""
    base, old = net(3), data(60)
    expected = evaluate(base, old, device="cpu")
    tuned = net(3)
    head = tuned[2]
    new_task = (data(60)[0], (data(60)[0][:, 4] > 0).long())
    strategy = merge_strategies([HeadReplacementStrategy(num_classes=2), lora()])
    result = finetune(tuned, new_task, strategy=strategy, old=old, epochs=3, lr=0.05, **QUIET)
    assert result.old_before == pytest.approx(expected)
    with_old_head = nn.Sequential(tuned[0], tuned[1], head)
    assert result.old_after == pytest.approx(evaluate(with_old_head, old, device="cpu"))
    assert result.old_after["loss"] != result.old_before["loss"]
    assert tuned[2].out_features == 2


# --- other tasks ---------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=0,
        eos_token_id=0, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, loss_type="ForCausalLM",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def test_a_language_model_learns_from_the_loss_of_transformers() -> None:
    """Rows of different lengths: the mean is over all tokens of a batch."""
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 30, (8, 10), generator=random)
    mask = torch.ones(8, 10, dtype=torch.long)
    mask[::2, 7:] = 0
    rows = [{"input_ids": t, "attention_mask": m} for t, m in zip(tokens, mask, strict=True)]
    tuned = gpt2()
    result = finetune(
        tuned, Examples(rows, task="language"), Examples(rows, task="language"), epochs=1,
        strategy=LoRALinearFineTuningStrategy(rank=2), optimizer="SGD", weight_decay=0.0, lr=0.1,
        lr_schedule="constant", warmup=0.0, clip=None, batch_size=8, keep="last", **QUIET,
    )  # fmt: skip
    byhand = gpt2()
    torch.manual_seed(0)
    gift.enable_fine_tuning(byhand, LoRALinearFineTuningStrategy(rank=2))
    labels = tokens.masked_fill(mask == 0, -100)
    loss = byhand(input_ids=tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert result.before["loss"] == pytest.approx(loss.item())
    assert result.before["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    with torch.no_grad():
        for parameter in byhand.parameters():
            parameter -= 0.1 * parameter.grad
    assert_same(tuned, byhand, rtol=1e-4, atol=1e-8)  # its loss is computed in float32


@pytest.mark.parametrize("single", [False, True])
def test_regression_has_the_mean_squared_error(single: bool) -> None:
    inputs, _ = data()
    targets = inputs[:, 0] * 2 + 1 if single else inputs[:, :3] * 2 + 1
    tuned = nn.Sequential(*net(), nn.Flatten(0)) if single else net()
    if single:
        tuned[2] = nn.Linear(16, 1).double()
    result = finetune(
        tuned, (inputs, targets), (inputs, targets), task="regression",
        strategy=FullFineTuningStrategy(),
        epochs=60, lr=0.05, **QUIET,
    )  # fmt: skip
    left = tuned(inputs).detach() - targets
    assert result.after["loss"] == pytest.approx(left.square().mean().item())
    assert result.after["mae"] == pytest.approx(left.abs().mean().item(), abs=1e-6)
    assert result.after["rmse"] == pytest.approx(left.square().mean().sqrt().item(), abs=1e-6)
    assert result.after["rmse"] < result.before["rmse"] / 2


def test_the_old_task_is_of_the_same_kind() -> None:
    inputs, _ = data()
    old = (inputs, inputs.sum(1, keepdim=True))
    tuned = nn.Linear(6, 1).double()
    expected = evaluate(tuned, old, task="regression", device="cpu")
    result = finetune(
        tuned, (inputs, inputs[:, :1]), task="regression", old=old, epochs=1, **QUIET,
        strategy=FullFineTuningStrategy(),
    )  # fmt: skip
    assert result.old_before == expected
    predicted = finetune(net(), data(), old=lambda net: {"any": 1.5}, epochs=1, **QUIET)
    assert predicted.old_after == {"any": 1.5}


def test_small_types_of_labels_mean_what_they_say() -> None:
    """156 is -100 in eight bits."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 200), torch.randn(8, 4)
    labels = torch.full((8,), 156)
    small = evaluate(layer, (inputs, labels.to(torch.uint8)), device="cpu")
    assert small == evaluate(layer, (inputs, labels), device="cpu")
    assert small["loss"] == pytest.approx(F.cross_entropy(layer(inputs), labels).item(), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_one_cycle_of_few_steps(steps: int) -> None:
    """A warm-up of a tenth of ten steps is a single one."""
    result = finetune(
        net(), data(), strategy=lora(), epochs=steps, batch_size=50, lr_schedule="onecycle",
        lr=0.01, **QUIET,
    )  # fmt: skip
    assert max(row["lr"] for row in result.steps) <= 0.01 * (1 + 1e-9)


def test_small_errors_are_not_rounded_away() -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    inputs = torch.ones(4, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(1 + 3e-9)
    found = evaluate(layer, (inputs, inputs * (1 + 5e-9)), task="regression", device="cpu")
    assert found["loss"] == pytest.approx(4e-18, rel=1e-6)


def test_an_own_loss_and_pixels_with_classes() -> None:
    """A class for each pixel; one more of those that are ignored changes nothing."""
    torch.manual_seed(0)
    images, labels = torch.randn(6, 2, 4, 4), torch.randint(0, 3, (6, 4, 4))
    labels[:, 0] = -100
    tuned = nn.Conv2d(2, 3, 1)
    result = finetune(
        tuned, (images, labels), (images, labels), strategy=FullFineTuningStrategy(), epochs=1,
        loss=lambda out, target: 2 * F.cross_entropy(out, target), keep="last", **QUIET,
    )  # fmt: skip
    out = tuned(images).detach()
    assert result.after["loss"] == pytest.approx(2 * F.cross_entropy(out, labels).item(), rel=1e-5)
    seen = labels != -100
    right = (out.argmax(1) == labels)[seen].double().mean().item()
    assert result.after["accuracy"] == pytest.approx(right, abs=1e-6)
