"""Hugging Face Trainer, accelerate and Lightning train a fine-tuned network unchanged, and their
checkpoints hold the deltas and buffers only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from gift import FineTuningStrategy, enable_fine_tuning
from gift.strategies import FreezeStrategy
from gift.strategies.lora import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy

Batch = dict[str, Tensor]
State = dict[str, Tensor]


# --- networks and data -------------------------------------------------------------------------


def bert(**extra: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0, **extra,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=0, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, loss_type="ForCausalLM",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        num_labels=8,
    )  # fmt: skip
    return transformers.ResNetForImageClassification(config)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)
    )


def examples(name: str, count: int = 24) -> list[Batch]:
    """Single examples; the label follows from the input, so that there is something to learn."""
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 40, (count, 8), generator=random)
    first = torch.tensor([0])  # it has no prediction; Trainer counts the labels that have one
    pixels = torch.randn(count, 3, 16, 16, generator=random, dtype=torch.float64)
    return {
        "bert": lambda: [{"input_ids": t, "labels": t[0] % 3} for t in tokens],
        "gpt2": lambda: [{"input_ids": t, "labels": t.index_fill(0, first, -100)} for t in tokens],
        "resnet": lambda: [{"pixel_values": p, "labels": torch.tensor(i % 8)}
                           for i, p in enumerate(pixels)],
    }[name]()  # fmt: skip


def batches_of(items: list[Batch], size: int) -> Iterator[Batch]:
    for start in range(0, len(items), size):
        part = items[start : start + size]
        yield {key: torch.stack([item[key] for item in part]) for key in part[0]}


NETS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert, "gpt2": gpt2, "resnet": resnet, "perceptron": perceptron,
}  # fmt: skip
STRATEGIES: dict[str, Callable[..., FineTuningStrategy]] = {
    "bert": LoRALinearFineTuningStrategy,
    "gpt2": LoRAAllFineTuningStrategy,  # its output layer is tied to its embedding
    "resnet": partial(LoRAAllFineTuningStrategy, conv_layout="out_as_h"),
    "perceptron": LoRAAllFineTuningStrategy,
}


def base_network(name: str) -> nn.Module:
    """The same base each time, in float64."""
    torch.manual_seed(0)
    return NETS[name]().double()


def tuned(name: str, seed: int = 1, **settings: Any) -> nn.Module:
    """The base with fresh deltas, which differ by the seed."""
    network = base_network(name)
    torch.manual_seed(seed)
    enable_fine_tuning(network, STRATEGIES[name](rank=2, **settings))
    return network


def snapshot(network: nn.Module) -> State:
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_same(state: State, other: State) -> None:
    """The same keys and, bit for bit, the same values."""
    assert_close(dict(state), dict(other), rtol=0, atol=0)


def logits(network: nn.Module, name: str) -> Tensor:
    (batch,) = batches_of(examples(name), 24)
    return network.eval()(**batch).logits


def is_delta_or_buffer(network: nn.Module, key: str) -> bool:
    return key.endswith(("lora_A", "lora_B")) or key in dict(network.named_buffers())


# --- the reference: no gift, no trainer ----------------------------------------------------------


def weight_change(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """``B A`` in the shape of the layer's weight, by the definition of each layout."""
    change = b @ a
    transposed = isinstance(layer, transformers.pytorch_utils.Conv1D)
    return change.T if transposed else change.reshape(layer.weight.shape)


def trained_by_hand(
    base: nn.Module,
    state: State,
    batches: Iterable[Batch],
    loss_of: Callable[[Callable[..., Any], Batch], Tensor],
    rate: float,
) -> State:
    """The state after gradient descent by plain autograd, on the base network at ``W + B A``."""
    deltas = {k: v.clone() for k, v in state.items() if k.endswith(("lora_A", "lora_B"))}
    layers = {key.rpartition(".")[0] for key in deltas}
    frozen = {path: base.get_parameter(f"{path}.weight").detach() for path in layers}
    base.train()
    for batch in batches:
        deltas = {key: value.detach().requires_grad_() for key, value in deltas.items()}
        weights = {
            f"{path}.weight": frozen[path]
            + weight_change(
                base.get_submodule(path), deltas[f"{path}.lora_A"], deltas[f"{path}.lora_B"]
            )
            for path in layers
        }
        loss = loss_of(partial(functional_call, base, weights, ()), batch)
        gradients = torch.autograd.grad(loss, list(deltas.values()))
        deltas = {k: v - rate * g for (k, v), g in zip(deltas.items(), gradients, strict=True)}
    buffers = {key: value for key, value in base.named_buffers() if key in state}
    return {key: value.detach() for key, value in (deltas | buffers).items()}


# --- Trainer of transformers ---------------------------------------------------------------------


def hugging_face(network: nn.Module, name: str, folder: Path, **settings: Any) -> Trainer:
    """A Trainer for 3 epochs of 3 steps."""
    defaults: dict[str, Any] = {
        "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "save_strategy": "epoch", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **defaults | settings)
    data = examples(name)
    return Trainer(network, arguments, train_dataset=data, eval_dataset=data)


hf_networks = pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("bert", False), ("bert", True), ("gpt2", False), ("gpt2", True), ("resnet", False)],
)
def test_trainer_does_what_plain_autograd_does(
    name: str, checkpointing: bool, tmp_path: Path
) -> None:
    network = tuned(name)
    before = snapshot(network)
    if checkpointing:
        # What is reentrant, as it was by default before transformers 5, sees no gradient behind
        # frozen embeddings.
        network.gradient_checkpointing_enable({"use_reentrant": False})
    hugging_face(
        network, name, tmp_path, save_strategy="no", per_device_train_batch_size=24,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
    ).train()  # fmt: skip
    batches = list(batches_of(examples(name), 24)) * 3
    by_hand = trained_by_hand(
        base_network(name), before, batches, lambda net, batch: net(batch).loss, 1e-2
    )
    # The causal loss of transformers is computed in float32, whatever the network is.
    accuracy = 1e-6 if name == "gpt2" else 1e-10
    assert_close(dict(network.state_dict()), by_hand, rtol=accuracy, atol=accuracy / 1000)


@hf_networks
def test_trainer_checkpoints_hold_deltas_and_buffers_and_restore_the_network(
    name: str, tmp_path: Path
) -> None:
    network = tuned(name)
    hugging_face(network, name, tmp_path).train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 3
    for checkpoint in checkpoints:
        state = load_file(checkpoint / "model.safetensors")
        assert set(state) == set(network.state_dict())
        assert all(is_delta_or_buffer(network, key) for key in state)
        optimizer = torch.load(checkpoint / "optimizer.pt")
        assert len(optimizer["state"]) == len(list(network.parameters()))

    state = load_file(tmp_path / "checkpoint-9" / "model.safetensors")
    fresh = tuned(name, seed=2)
    assert not torch.equal(logits(fresh, name), logits(network, name))
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh, name), logits(network, name))


@hf_networks
def test_trainer_resumes_as_if_never_interrupted(name: str, tmp_path: Path) -> None:
    network = tuned(name, lora_dropout=0.2)
    hugging_face(network, name, tmp_path / "whole").train()
    fresh = tuned(name, seed=2, lora_dropout=0.2)
    hugging_face(fresh, name, tmp_path / "rest").train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")
    )
    assert_same(fresh.state_dict(), network.state_dict())


@hf_networks
def test_trainer_loads_the_best_model_at_the_end(name: str, tmp_path: Path) -> None:
    network = tuned(name)
    trainer = hugging_face(
        network, name, tmp_path, eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="epoch_is_first", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"epoch_is_first": float(trainer.state.global_step == 3)}
    trainer.train()
    first, last = (load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (3, 9))
    assert not all(torch.equal(first[key], last[key]) for key in first)
    assert_same(network.state_dict(), first)


@pytest.mark.parametrize(
    "strategy",
    [LoRAAllFineTuningStrategy(rank=1), LoRALinearFineTuningStrategy(rank=1), FreezeStrategy()],
    ids=lambda strategy: type(strategy).__name__,
)
def test_bf16_model_of_transformers_keeps_its_dtype_and_device(
    strategy: FineTuningStrategy,
) -> None:
    network = bert().bfloat16().eval()
    (batch,) = batches_of(examples("bert"), 24)
    before = network(**batch).logits
    enable_fine_tuning(network, strategy)
    deltas = [p for name, p in network.named_parameters() if "lora" in name]
    assert all(delta.dtype == torch.float32 for delta in deltas)
    assert (network.dtype, network.device) == (torch.bfloat16, torch.device("cpu"))
    assert before.dtype == torch.bfloat16
    assert torch.equal(network(**batch).logits, before)
    network.to("meta")
    assert (network.dtype, network.device) == (torch.bfloat16, torch.device("meta"))


def test_trainer_trains_float32_deltas_of_a_bf16_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4.48 sets it for later
    network = bert().bfloat16()
    enable_fine_tuning(network, LoRALinearFineTuningStrategy(rank=2))
    before = snapshot(network)
    hugging_face(network, "bert", tmp_path, bf16=True).train()
    after = load_file(tmp_path / "checkpoint-9" / "model.safetensors")
    assert network.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not any(torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_sees_the_adapter(beams: int) -> None:
    network, base = tuned("gpt2").eval(), base_network("gpt2").eval()
    for name, parameter in network.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    prompt = torch.tensor([[3, 7, 11], [5, 5, 5]])
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    unadapted = base.generate(prompt, **settings)
    for path in [p.removesuffix(".lora_A") for p in network.state_dict() if "lora_A" in p]:
        layer, tuned_layer = base.get_submodule(path), network.get_submodule(path)
        layer.weight.data += weight_change(layer, tuned_layer.lora_A, tuned_layer.lora_B)
    generated = network.generate(prompt, **settings)
    assert torch.equal(generated, base.generate(prompt, **settings))
    assert not torch.equal(generated, unadapted)


# --- accelerate ----------------------------------------------------------------------------------


@pytest.fixture(params=["no", "bf16"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def image_batches() -> DataLoader:
    random = torch.Generator().manual_seed(5)
    images = torch.randn(24, 3, 4, 4, generator=random, dtype=torch.float64)
    labels = torch.arange(24) % 8
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def step(forward: Callable[..., Tensor], optimizer: Any, batch: Any, backward: Any) -> None:
    images, labels = batch
    loss = F.cross_entropy(forward(images.float()).float(), labels)
    optimizer.zero_grad()
    backward(loss)
    optimizer.step()


def adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)


def test_accelerate_does_what_a_plain_loop_does(accelerator: Accelerator) -> None:
    network, twin = tuned("perceptron").float(), tuned("perceptron").float()
    frozen = {k: p.clone() for k, p in network.named_parameters() if not p.requires_grad}
    model, optimizer, batches = accelerator.prepare(network, adam(network), image_batches())
    for batch in batches:
        step(model, optimizer, batch, accelerator.backward)

    autocast = torch.autocast("cpu", enabled=accelerator.mixed_precision == "bf16")
    optimizer = adam(twin)
    for batch in image_batches():
        with autocast if accelerator.mixed_precision == "bf16" else contextlib.nullcontext():
            step(twin, optimizer, batch, Tensor.backward)
    assert_same(network.state_dict(), twin.state_dict())
    assert_same({k: p.detach() for k, p in network.named_parameters() if k in frozen}, frozen)


def test_accelerate_saves_and_loads_deltas_and_buffers(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    network = tuned("perceptron").float()
    model, optimizer, batches = accelerator.prepare(network, adam(network), image_batches())

    def train() -> State:
        for batch in batches:
            step(model, optimizer, batch, accelerator.backward)
        return snapshot(network)

    train()
    saved = snapshot(network)
    accelerator.save_state(str(tmp_path))
    after = train()
    assert any(not torch.equal(saved[key], after[key]) for key in saved)

    assert_same(load_file(tmp_path / "model.safetensors"), saved)
    assert all(is_delta_or_buffer(network, key) for key in saved)
    accelerator.load_state(str(tmp_path))
    assert_same(accelerator.get_state_dict(model), saved)
    assert_same(train(), after)

    fresh = tuned("perceptron", seed=2).float()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(fresh.state_dict(), saved)
    assert accelerator.unwrap_model(model) is network


# --- Lightning -----------------------------------------------------------------------------------


class Task(lightning.LightningModule):
    """A task around a network, which may be fine-tuned, or which is fine-tuned as a whole."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.net, self.optimizer_for = net, optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return self.optimizer_for(self)


def task(kind: str, seed: int = 1, optimizer: Callable[[nn.Module], Any] = adam) -> Task:
    """A task around a fine-tuned network, or one that is fine-tuned itself."""
    if kind == "around":
        return Task(tuned("perceptron", seed), optimizer)
    itself = Task(base_network("perceptron"), optimizer)
    torch.manual_seed(seed)
    enable_fine_tuning(itself, LoRAAllFineTuningStrategy(rank=2))
    return itself


def fit(module: Task, epochs: int, folder: Path, **settings: Any) -> Path:
    """Train, with validations in between; gives the checkpoint of the last epoch."""
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, image_batches(), image_batches(), **settings)
    return Path(trainer.checkpoint_callback.best_model_path)


kinds = pytest.mark.parametrize("kind", ["around", "itself"])


@kinds
def test_lightning_does_what_plain_autograd_does(kind: str, tmp_path: Path) -> None:
    module = task(kind, optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=1e-2))
    before = snapshot(module)
    fit(module, 2, tmp_path)
    batches = [{"images": x, "labels": y} for _ in range(2) for x, y in image_batches()]
    by_hand = trained_by_hand(
        Task(base_network("perceptron"), adam),
        before,
        batches,
        lambda net, batch: F.cross_entropy(net({"images": batch["images"]}), batch["labels"]),
        1e-2,
    )
    assert_close(dict(module.state_dict()), by_hand, rtol=1e-10, atol=1e-13)


@kinds
def test_lightning_checkpoints_hold_deltas_and_buffers_and_restore_the_network(
    kind: str, tmp_path: Path
) -> None:
    module = task(kind)
    checkpoint = fit(module, 1, tmp_path)
    state = torch.load(checkpoint)["state_dict"]
    layers = [f"net.{i}.{name}" for i in (1, 4) for name in ("lora_B", "lora_A")]
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    assert set(state) == {*layers, *(f"net.2.{name}" for name in statistics)}
    frozen = {k: p.detach() for k, p in module.net.named_parameters() if "lora" not in k}
    assert_same(frozen, {k: p.detach() for k, p in base_network("perceptron").named_parameters()})

    fresh = task(kind, seed=2)
    fresh.load_state_dict(state)
    images = next(iter(image_batches()))[0]
    assert torch.equal(fresh.eval()(images), module.eval()(images))


@kinds
def test_lightning_resumes_as_if_never_interrupted(kind: str, tmp_path: Path) -> None:
    whole, fresh = task(kind), task(kind, seed=2)
    fit(whole, 2, tmp_path / "whole")
    checkpoint = fit(task(kind), 1, tmp_path / "half")
    fit(fresh, 2, tmp_path / "rest", ckpt_path=checkpoint)
    assert_same(fresh.state_dict(), whole.state_dict())


def test_lightning_loads_from_checkpoint_into_an_enabled_network(tmp_path: Path) -> None:
    module = task("around")
    checkpoint = fit(module, 1, tmp_path)
    net = tuned("perceptron", seed=2)
    loaded = Task.load_from_checkpoint(checkpoint, net=net, optimizer=adam)
    assert loaded.net is net
    assert_same(loaded.state_dict(), module.state_dict())


@kinds
@pytest.mark.parametrize("fault", ["missing", "unknown", "another shape"])
def test_faulty_state_is_refused_through_the_outer_module(kind: str, fault: str) -> None:
    module = task(kind)
    before = snapshot(module)
    state = {key: torch.ones_like(value) for key, value in before.items()}
    key = "net.4.lora_A"
    if fault == "missing":
        del state[key]
    elif fault == "unknown":
        state[key := "net.4.lora_C"] = torch.ones(1)
    else:
        state[key] = torch.ones(7, 7)
    with pytest.raises(RuntimeError, match=key):
        module.load_state_dict(state)
    if kind == "itself":
        assert_same(module.state_dict(), before)


def test_lightning_freeze_and_unfreeze_of_a_network_concern_its_deltas() -> None:
    module = task("itself")
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    before = snapshot(module)
    module.freeze()
    assert not any(p.requires_grad for p in module.parameters())
    assert_same(module.state_dict(), before)
    module.unfreeze()
    assert [name for name, p in module.named_parameters() if p.requires_grad] == trained
    assert_same(module.state_dict(), before)


def test_lightning_unfreeze_of_an_outer_module_trains_and_saves_everything() -> None:
    module = task("around")
    before = snapshot(module)
    module.freeze()
    assert_same(module.state_dict(), before)
    module.unfreeze()
    assert all(p.requires_grad for p in module.parameters())
    assert set(module.state_dict()) == set(before) | {n for n, _ in module.named_parameters()}
