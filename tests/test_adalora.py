"""The rank allocator of AdaLoRA beside PEFT's, step by step, and in the loops of others."""

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gift
from gift import disable_fine_tuning, enable_fine_tuning
from gift.interop import load_peft, save_peft
from gift.schedules import RankAllocator, orthogonality
from gift.schedules.lightning import RankAllocatorCallback as LightningCallback
from gift.schedules.transformers import RankAllocatorCallback
from gift.strategies import AdaLoRAAllFineTuningStrategy
from gift.training import TrainingError, finetune, loop
from tests.common import all_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.errors.GiftWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n|weights_only|LeafSpec).*"),
]
STEPS, WARMUP, FINAL = 14, 3, 4


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Judged(nn.Module):
    """A network that gives its loss, as PEFT needs it to add its own to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv = nn.Linear(12, 16), nn.Conv2d(1, 6, 3)
        self.last = nn.Linear(84, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        hidden = torch.tanh(self.first(x)).unflatten(1, (1, 4, 4))
        hidden = torch.tanh(self.conv(hidden)).flatten(1)
        hidden = torch.cat([hidden, torch.zeros(len(x), 84 - hidden.shape[1])], 1)
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.last(hidden), y))

    @property
    def config(self) -> dict[str, Any]:
        return {}


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(10, 12, generator=drawn, dtype=torch.get_default_dtype()),
            torch.randint(5, (10,), generator=drawn),
        )
        for _ in range(count)
    ]


def strategy(rank: int = 4, **more: Any) -> Any:
    return AdaLoRAAllFineTuningStrategy(rank=rank, **more)


def allocator(**more: Any) -> RankAllocator:
    settings = {
        "target_rank": 2, "total_steps": STEPS, "warmup_steps": WARMUP, "final_steps": FINAL,
        "every": 2, "penalty": 0.3,
    }  # fmt: skip
    return RankAllocator(**settings | more)  # type: ignore[arg-type]


def step(net: nn.Module, optimizer: Any, ranks: RankAllocator, batch: Any) -> float:
    optimizer.zero_grad()
    loss = net(*batch).loss + ranks.orthogonality()
    loss.backward()
    optimizer.step()
    ranks.step()
    return float(loss.detach())


def numbers(net: Any) -> dict[str, dict[str, Tensor]]:
    """What each layer of a network of gift has, by the names of PEFT."""
    return {
        name: {
            "lora_A": layer.adalora_Q,
            "lora_B": layer.adalora_P,
            "lora_E": (layer.adalora_lambda * layer.adalora_mask).unsqueeze(1),
        }
        for name, layer in net.named_children()
    }


@pytest.mark.usefixtures("double")
def test_every_step_is_that_of_peft(tmp_path: Path) -> None:
    """Losses, factors and ranks; then the files, which have the kept triplets only."""
    base = Judged()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, strategy(alpha=4 / (4 + 1e-5) * 3))
    config = AdaLoraConfig(
        target_modules=["first", "conv", "last"], init_r=4, target_r=2, tinit=WARMUP, tfinal=FINAL,
        total_step=STEPS, deltaT=2, orth_reg_weight=0.3, lora_alpha=3,
    )  # fmt: skip
    theirs: Any = get_peft_model(copy.deepcopy(base), config)
    tuner = theirs.base_model
    with torch.no_grad():
        for name, own in numbers(net).items():
            for key, value in own.items():
                getattr(tuner.model.get_submodule(name), key)["default"].copy_(value)
    ranks = allocator()
    ranks.attach(net)
    one = torch.optim.AdamW(net.parameters(), lr=0.02)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    seen = []
    for number, batch in enumerate(batches(), start=1):
        ours = step(net, one, ranks, batch)
        other.zero_grad()
        loss = tuner(*batch).loss
        loss.backward()
        other.step()
        tuner.update_and_allocate(number)
        assert math.isclose(ours, float(loss.detach()), rel_tol=1e-9)
        for name, own in numbers(net).items():
            for key, value in own.items():
                peft = getattr(tuner.model.get_submodule(name), key)["default"]
                torch.testing.assert_close(value, peft, rtol=1e-8, atol=1e-12)
        seen.append(sum(ranks.ranks.values()))
    assert seen[WARMUP - 1] == 12
    assert seen[-FINAL - 1 :] == [6] * (FINAL + 1)
    assert len(set(ranks.ranks.values())) > 1, "the test should prune unequally"

    batch = batches(1)[0]
    save_peft(net, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = float(net(*batch).loss.detach())
    for folder in ("ours", "theirs"):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        fresh = copy.deepcopy(base)
        load_peft(fresh, tmp_path / folder)
        for loaded in (again, fresh):
            loss = float(loaded.eval()(*batch).loss.detach())
            assert math.isclose(loss, expected, rel_tol=1e-10)
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(file.read_text().replace('"first.lora_E"', '"fist.lora_E"'))
    with pytest.raises(gift.DeltaFileError, match=r"first: lora_A is .* expected \(4, 12\)"):
        load_peft(copy.deepcopy(base), tmp_path / "theirs")


@pytest.mark.usefixtures("double")
def test_a_layer_without_triplets(tmp_path: Path) -> None:
    base = Judged()
    net = copy.deepcopy(base)
    enable_fine_tuning(net, strategy())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "adalora" in name:
                parameter.normal_()
        net.first.adalora_mask.zero_()
        net.conv.adalora_mask[1:3] = 0
    save_peft(net, tmp_path)
    batch = batches(1)[0]
    expected = float(net(*batch).loss.detach())
    fresh = copy.deepcopy(base)
    load_peft(fresh, tmp_path)
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert math.isclose(float(fresh(*batch).loss.detach()), expected, rel_tol=1e-12)
    assert math.isclose(float(theirs(*batch).loss.detach()), expected, rel_tol=1e-10)


def test_the_penalty_is_the_distance_from_orthogonal_factors() -> None:
    """Of grouped weights, for each group; its gradients can be added afterwards."""
    net = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.Linear(5, 7))
    enable_fine_tuning(net, strategy(rank=3))
    factors = [factor for layer in net for factor in (layer.adalora_P, layer.adalora_Q)]
    norms = []
    for factor in factors:
        for matrix in factor if factor.ndim == 3 else [factor]:
            gram = matrix @ matrix.T if len(matrix) == 3 else matrix.T @ matrix
            norms.append((gram - torch.eye(3)).square().sum().sqrt())
    assert len(norms) == 6
    expected = torch.stack(norms).mean()
    torch.testing.assert_close(orthogonality(net), expected)
    ranks = RankAllocator(target_rank=1, total_steps=2, penalty=0.7)
    ranks.attach(net)
    gradients = torch.autograd.grad(0.7 * expected, factors)
    factors[0].grad = torch.ones_like(factors[0])
    ranks.add_gradients()
    torch.testing.assert_close(factors[0].grad - 1, gradients[0], rtol=1e-5, atol=1e-6)
    for factor, gradient in zip(factors[1:], gradients[1:], strict=True):
        torch.testing.assert_close(factor.grad, gradient)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    """The mask is in the file of the delta, and pruned triplets stay pruned without allocator."""
    base, ends = Judged(), []
    for stop in (None, 5, STEPS - 1):
        net, ranks = copy.deepcopy(base), allocator()
        torch.manual_seed(2)
        enable_fine_tuning(net, strategy())
        ranks.attach(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
        for number, batch in enumerate(batches()):
            if number == stop:
                parts = net.state_dict(), optimizer.state_dict(), ranks.state_dict()
                torch.save(parts, tmp_path / "state.pt")
                parts = torch.load(tmp_path / "state.pt", weights_only=True)
                net, ranks = copy.deepcopy(base), allocator()
                enable_fine_tuning(net, strategy())
                ranks.attach(net)
                optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
                for part, state in zip((net, optimizer, ranks), parts, strict=True):
                    part.load_state_dict(state)
            step(net, optimizer, ranks, batch)
        ends.append(all_bits(net))
    assert ends[0] == ends[1] == ends[2]
    gift.save(net, tmp_path / "delta.safetensors")
    fresh: Any = copy.deepcopy(base)
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert all_bits(fresh) == ends[0]
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.02)
    fresh(*batches(1)[0]).loss.backward()
    optimizer.step()
    left = sum(int(torch.count_nonzero(layer.adalora_mask)) for layer in fresh.children())
    assert left == sum(ranks.ranks.values()) == 6
    assert all_bits(disable_fine_tuning(fresh)) == all_bits(base)


def test_steps_that_overflowed_are_left_out() -> None:
    net = Judged()
    enable_fine_tuning(net, strategy())
    ranks = allocator()
    ranks.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    step(net, optimizer, ranks, batches()[0])
    before = ranks.state_dict()
    net.first.adalora_P.grad.fill_(math.inf)
    net.last.adalora_P.grad = None
    ranks.step()
    after = ranks.state_dict()
    for part in ("sensitivity", "uncertainty"):
        name = "first.weight.adalora_P"
        assert torch.equal(before[part][name], after[part][name])
        torch.testing.assert_close(
            after["sensitivity"]["last.weight.adalora_P"],
            0.85 * before["sensitivity"]["last.weight.adalora_P"],
        )


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"target_rank is -1.*every is 0.*beta1 is 1.*penalty"):
        RankAllocator(target_rank=-1, every=0, beta1=1, penalty=math.nan)
    net = Judged()
    with pytest.raises(RuntimeError, match="not attached"):
        allocator().step()
    enable_fine_tuning(net, gift.strategies.LoRAAllFineTuningStrategy(rank=1))
    with pytest.raises(ValueError, match="no weight with AdaLoRA"):
        allocator().attach(net)
    disable_fine_tuning(net)
    enable_fine_tuning(net, strategy())
    with pytest.raises(ValueError, match=r"leave none to prune in; target_rank 4 is not below"):
        allocator(target_rank=4, total_steps=7).attach(net)
    with pytest.raises(ValueError, match="total_steps is None"):
        allocator(total_steps=None).attach(net)
    ranks = allocator()
    ranks.attach(net)
    with pytest.raises(RuntimeError, match="has a gradient"):
        ranks.step()
    other = allocator(every=3)
    other.attach(net)
    with pytest.raises(ValueError, match="it was made with"):
        other.load_state_dict(ranks.state_dict())
    broken = ranks.state_dict() | {"sensitivity": {"first.weight.adalora_P": torch.ones(2)}}
    with pytest.raises(ValueError, match="sensitivity"):
        ranks.load_state_dict(broken)
    disable_fine_tuning(net)
    with pytest.raises(RuntimeError, match="released"):
        ranks.step()


# In the loops of others


def body() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    enable_fine_tuning(net, strategy())
    return net


def by_hand(net: nn.Module, pairs: Any, ranks: RankAllocator) -> nn.Module:
    """A plain loop that adds the gradients, as the callbacks do."""
    ranks.attach(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    for x, y in pairs:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        ranks.add_gradients()
        optimizer.step()
        ranks.step()
    return net


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = body()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.02)


def test_lightning(tmp_path: Path) -> None:
    """Bit for bit what a plain loop does, in one go or resumed."""

    def fitted(epochs: int, resume: Path | None = None) -> pl.Trainer:
        module = Module()
        trainer = pl.Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[LightningCallback(allocator(total_steps=None if resume is None else 14))],
        )  # fmt: skip
        loader: Any = DataLoader(batches(7), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
        return trainer

    expected = by_hand(body(), batches(7) * 2, allocator())
    whole = fitted(2)
    assert all_bits(whole.lightning_module.net) == all_bits(expected)  # type: ignore[arg-type]
    module = Module()
    half = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LightningCallback(allocator(total_steps=14))],
    )  # fmt: skip
    half.fit(module, DataLoader(batches(7), batch_size=None))  # type: ignore[arg-type]
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(2, tmp_path / "half.ckpt")
    assert all_bits(resumed.lightning_module.net) == all_bits(expected)  # type: ignore[arg-type]


class Classified(nn.Module):
    """What the Trainer of transformers calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = body()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def test_transformers(tmp_path: Path) -> None:
    pairs = batches(7)
    rows = [{"x": a, "labels": b} for x, y in pairs for a, b in zip(x, y, strict=True)]

    def trainer(folder: str, ranks: RankAllocator, **more: Any) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), num_train_epochs=2, per_device_train_batch_size=10,
            learning_rate=0.02, weight_decay=0.01, save_strategy="epoch", report_to=[],
            disable_tqdm=True, use_cpu=True, logging_strategy="no", optim="adamw_torch",
            lr_scheduler_type="constant", max_grad_norm=0, **more,
        )  # fmt: skip
        return InOrder(
            Classified(), arguments, train_dataset=rows,  # type: ignore[arg-type]
            callbacks=[RankAllocatorCallback(ranks)],
        )  # fmt: skip

    expected = all_bits(by_hand(body(), pairs * 2, allocator()))
    ranks = allocator(total_steps=None)
    run = trainer("one", ranks)
    run.train()
    assert all_bits(run.model.net) == expected
    assert ranks.is_final
    again = trainer("two", allocator(total_steps=None))
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-7"))
    assert all_bits(again.model.net) == expected


def test_finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It prunes to the budget of its own steps, also when resumed, and keeps such an epoch."""
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    data, settings = (x, x[:, :3].argmax(1)), {"device": "cpu", "progress": False, "seed": 0}

    def run(folder: Path | None = None) -> nn.Module:
        net = body()
        ranks = allocator(total_steps=None, every=1, warmup_steps=2, final_steps=8)
        finetune(
            net, data, data, allocator=ranks, folder=folder, epochs=4, lr=0.02, batch_size=10,
            **settings,
        )  # fmt: skip
        assert sum(ranks.ranks.values()) == 4
        return net

    whole = all_bits(run())
    write, calls = loop.write_checkpoint, []

    def killed(given: Any) -> None:
        write(given)
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(loop, "write_checkpoint", write)
    assert all_bits(run(tmp_path)) == whole
    for wrong, reason in (
        (allocator(), "is for 14 steps, the run has 16"),
        (allocator(total_steps=None, target_rank=9), "nothing to prune"),
    ):
        with pytest.raises(TrainingError, match=reason):
            finetune(body(), data, allocator=wrong, epochs=4, batch_size=10, **settings)


def test_the_budget_is_the_cubic_schedule_of_the_paper() -> None:
    """Equation 12 of AdaLoRA, of all triplets of the network."""
    net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 5))
    enable_fine_tuning(net, strategy(rank=4))
    ranks = RankAllocator(target_rank=1, total_steps=20, warmup_steps=5, final_steps=3, penalty=0.0)
    ranks.attach(net)
    first, last, found, final = 2 * 4, 2 * 1, [], []
    for _ in range(20):
        net(torch.randn(3, 12)).square().sum().backward()
        before = [p.grad.clone() for p in net.parameters()]
        ranks.add_gradients()  # of a penalty of zero
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))
        ranks.step()
        found.append(ranks.budget)
        final.append(ranks.is_final)
        net.zero_grad()
    share = [min(max((t - 5) / (20 - 5 - 3), 0), 1) for t in range(1, 21)]
    assert found == [int(last + (first - last) * (1 - part) ** 3) for part in share]
    assert final == [t >= 17 for t in range(1, 21)]


def test_the_penalty_reaches_no_frozen_factors() -> None:
    net = nn.Linear(6, 5)
    enable_fine_tuning(net, strategy(rank=2))
    ranks = RankAllocator(target_rank=1, total_steps=9, warmup_steps=1, final_steps=1)
    ranks.attach(net)
    factors = [p for p in net.parameters() if p.ndim == 2 and min(p.shape) > 1]
    assert len(factors) == 2
    factors[0].requires_grad_(False)
    ranks.add_gradients()
    assert [one.grad is None for one in factors] == [True, False]
    net.zero_grad()
    factors[1].requires_grad_(False)
    ranks.add_gradients()
    assert [one.grad for one in factors] == [None, None]


@pytest.mark.parametrize(
    ("module", "trainer", "text"),
    [
        (SimpleNamespace(automatic_optimization=False), None, "the module optimises by hand: call"),
        (
            SimpleNamespace(automatic_optimization=True),
            SimpleNamespace(estimated_stepping_batches=math.inf),
            "the Trainer has no end: give the allocator its total_steps",
        ),
    ],
    ids=["by hand", "endless"],
)
def test_what_lightning_cannot_be_asked(module: Any, trainer: Any, text: str) -> None:
    callback = LightningCallback(RankAllocator(target_rank=1))
    with pytest.raises(ValueError, match=text):
        callback.on_fit_start(trainer, module)
    assert callback.state_dict() == {}
