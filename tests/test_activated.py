"""Activated LoRA: beside PEFT on the same tensors, in calls and in generation with caches."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

import gift
from gift import FineTuningStrategy
from gift.factories import ma_activated_lora, ma_invocation, mc_path
from gift.interop import load_peft, save_peft
from gift.strategies import ActivatedLoRAFineTuningStrategy, LoRALinearFineTuningStrategy
from tests.common import all_bits, full_state

OLD = Version(transformers.__version__) < Version("4.52.1")
not_on_old = pytest.mark.skipif(OLD, reason="PEFT has no aLoRA there")
pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
TOKENS = [5, 6]


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, eos_token_id=29, initializer_range=0.3,
    )).double().eval()  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=30, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0,
        eos_token_id=29, bos_token_id=29, initializer_range=0.3,
    )).double().eval()  # fmt: skip


MODELS = {"llama": (llama, ["q_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "c_proj"])}
of_models = pytest.mark.parametrize("name", MODELS)


def texts(padded: bool = False) -> dict[str, Tensor]:
    """Three rows: invoked once, never, and twice; of the last one the second time counts."""
    ids = torch.randint(7, 28, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[0, 3:5] = ids[2, 1:3] = ids[2, 6:8] = torch.tensor(TOKENS)
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :2] = mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tuned(net: Any, layers: list[str], **settings: Any) -> Any:
    paths = [f"*{name}" for name in layers]
    settings = {"rank": 3, "lora_alpha": 7.0} | settings
    gift.enable_fine_tuning(net, ActivatedLoRAFineTuningStrategy(TOKENS, layers=paths, **settings))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


def by_peft(net: Any, layers: list[str], **settings: Any) -> Any:
    config = peft.LoraConfig(**{
        "r": 3, "lora_alpha": 7, "target_modules": layers, "alora_invocation_tokens": TOKENS,
        "task_type": "CAUSAL_LM",
    } | settings)  # fmt: skip
    theirs = peft.get_peft_model(net, config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
    return theirs


def logits(net: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return net(**given).logits


@of_models
def test_it_acts_from_the_last_invocation_on(name: str) -> None:
    """There it is a LoRA that acts everywhere, on keys and values of the base before."""
    make, layers = MODELS[name]
    base, given = make(), texts()
    net = tuned(copy.deepcopy(base), layers)
    change = (logits(net, **given) - logits(base, **given)).abs().amax(-1) > 1e-9
    places = torch.arange(9)
    starts = torch.tensor([3, 9, 6])
    assert torch.equal(change, places >= starts[:, None])
    plain = copy.deepcopy(base)  # all positions of a text that begins with the invocation
    gift.enable_fine_tuning(plain, FineTuningStrategy([
        (mc_path(glob=[f"*{layer}" for layer in layers]), gift.factories.ma_adapt(
            "lora", rank=3, lora_alpha=7.0)),
    ]))  # fmt: skip
    with torch.no_grad():
        for path, module in net.named_modules():
            if hasattr(module, "alora_A"):
                plain.get_submodule(path).lora_A.copy_(module.alora_A)
                plain.get_submodule(path).lora_B.copy_(module.alora_B)
    begun = given["input_ids"][:1, 3:]
    torch.testing.assert_close(logits(net, input_ids=begun), logits(plain, input_ids=begun))


@of_models
@not_on_old
def test_peft_computes_the_same_both_ways(name: str, tmp_path: Path) -> None:
    make, layers = MODELS[name]
    base = make()
    ours = tuned(copy.deepcopy(base), layers)
    save_peft(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == TOKENS
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    load_peft(again, tmp_path / "theirs")
    for given in (texts(), texts(padded=True)):
        expected = logits(ours, **given)
        torch.testing.assert_close(logits(theirs, **given), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logits(again, **given), expected, rtol=1e-10, atol=1e-10)
        options = {"max_new_tokens": 6, "do_sample": False}
        words = ours.generate(**given, **options)
        assert torch.equal(theirs.generate(**given, **options), words)
        assert torch.equal(again.generate(**given, **options), words)
        assert torch.equal(ours.generate(**given, **options, use_cache=False), words)
    assert not torch.equal(base.generate(**given, **options), words)


@not_on_old
def test_settings_of_peft(tmp_path: Path) -> None:
    base = llama()
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    theirs = by_peft(copy.deepcopy(base), MODELS["llama"][1], use_rslora=True, **patterns)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_peft(ours, tmp_path)
    expected = logits(theirs, **texts())
    torch.testing.assert_close(logits(ours, **texts()), expected, rtol=1e-10, atol=1e-10)


def test_a_cache_of_the_base_is_continued() -> None:
    """What the base read before the invocation need not be read again, nor what was activated."""
    base, given = llama(), texts()
    net = tuned(copy.deepcopy(base), MODELS["llama"][1])
    ids = given["input_ids"][:1]
    whole = logits(net, input_ids=ids)
    with torch.no_grad():
        cache = base(input_ids=ids[:, :3], use_cache=True).past_key_values
        first = net(input_ids=ids[:, 3:6], past_key_values=cache)
        second = net(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
    parts = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(parts, whole[:, 3:], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        cache = net(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-7)  # before the invocation
        cropped = net(input_ids=ids[:, 2:3], past_key_values=cache).logits
    torch.testing.assert_close(cropped, logits(base, input_ids=ids[:, :3])[:, 2:])
    with torch.no_grad():
        full = net(**texts(), use_cache=True).past_key_values
    with pytest.raises(gift.AdaptationError, match="gets 1 rows with a cache of 3"):
        net(input_ids=ids[:, :1], past_key_values=full)


def test_beams_continue_their_rows() -> None:
    net = tuned(llama(), MODELS["llama"][1])
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    words = net.generate(**texts(), **options)
    assert torch.equal(net.generate(**texts(), **options, use_cache=False), words)


@not_on_old
def test_what_is_written_invokes_nothing(tmp_path: Path) -> None:
    """As in PEFT. Beams that wrote the invocation change places in a cache, and others do not."""
    base, given = llama(), texts()
    for step in range(3):
        written = base.generate(**given, max_new_tokens=4, do_sample=False)[1, 9 + step].item()
        theirs = by_peft(copy.deepcopy(base), ["q_proj"], alora_invocation_tokens=[written])
        theirs.save_pretrained(tmp_path / str(step))
        load_peft(net := copy.deepcopy(base), tmp_path / str(step))
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(net.generate(**given, **options), theirs.generate(**given, **options))
        for more in ({}, {"num_beams": 4, "num_return_sequences": 2}):
            words = net.generate(**given, **options, **more)
            again = net.generate(given["input_ids"], **options, **more, use_cache=False)
            assert torch.equal(again, words)


def test_it_is_trained_saved_and_disabled(tmp_path: Path) -> None:
    base, given = llama(), texts()
    net = copy.deepcopy(base)
    strategy = ActivatedLoRAFineTuningStrategy(TOKENS, rank=2)
    gift.enable_fine_tuning(net, strategy)
    assert torch.equal(logits(net, **given), logits(base, **given))
    assert not hasattr(net.lm_head, "alora_A")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = net(**given, labels=given["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    row = {key: value[1:2] for key, value in given.items()}  # never invoked
    net(**row, labels=row["input_ids"]).loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in net.parameters())
    gift.save(net, tmp_path / "delta.safetensors")
    fresh = copy.deepcopy(base)
    gift.load(fresh, tmp_path / "delta.safetensors")
    assert torch.equal(logits(fresh, **given), logits(net, **given))
    again = gift.load_strategy_from_config(strategy.to_config())
    gift.enable_fine_tuning(other := copy.deepcopy(base), again)
    other.load_state_dict(net.state_dict())
    assert torch.equal(logits(other, **given), logits(net, **given))
    assert torch.equal(logits(copy.deepcopy(net), **given), logits(net, **given))
    gift.disable_fine_tuning(net)
    assert all_bits(net) == all_bits(base)


def ready(net: Any) -> Any:
    """Set a model to training mode, without dropout."""
    for module in net.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def gradients_of_two_calls(net: Any, order: list[list[int]]) -> list[Tensor]:
    """Of two texts that are invoked elsewhere, both pending; each list is one backward pass."""
    given = texts()["input_ids"], texts(padded=True)["input_ids"].roll(2, 1)
    losses = [net(input_ids=ids).logits.square().sum() for ids in given]
    net.zero_grad()
    for together in order:
        sum(losses[i] for i in together).backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@of_models
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """A block that is called again sees the positions of the call that it belongs to."""
    make, layers = MODELS[name]
    net = ready(tuned(make(), layers))
    calls: list[nn.Module] = []
    inside = next(m for m in net.modules() if hasattr(m, "alora_A"))
    inside.register_forward_pre_hook(lambda module, _: calls.append(module))
    expected = gradients_of_two_calls(net, [[0, 1]])
    assert len(calls) == 2
    if reentrant:
        net.enable_input_require_grads()  # as old versions of transformers need it
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for order in ([[0, 1]], [[0], [1]], [[1], [0]]):
        calls.clear()
        found = gradients_of_two_calls(net, order)
        assert len(calls) == 4, "each call once, and once again for its gradient"
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gift.disable_fine_tuning(net)
    assert {m._gradient_checkpointing_func.func for m in net.modules()
            if getattr(m, "gradient_checkpointing", False)} == {checkpoint}  # fmt: skip


class Own(nn.Module):
    """A language model that checkpoints its blocks itself."""

    def __init__(self, changed: Any, reentrant: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.changed, self.reentrant = changed, reentrant

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor) -> Any:
        x = self.words(input_ids).requires_grad_()
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(self.changed(block), x, use_reentrant=self.reentrant)
        return Output(x)


class Output(NamedTuple):
    logits: Tensor


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_ones_own(reentrant: bool) -> None:
    strategy = ActivatedLoRAFineTuningStrategy(TOKENS, rank=2, layers="blocks.*.0")
    net = Own(gift.wrappers.recomputable, None).double()
    gift.enable_fine_tuning(net, strategy)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    expected = gradients_of_two_calls(net, [[0, 1]])
    net.reentrant = reentrant
    for order in ([[0, 1]], [[0], [1]], [[1], [0]]):
        found = gradients_of_two_calls(net, order)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    net.changed = lambda block: block
    with pytest.raises(gift.AdaptationError, match=r"checkpoint gift.wrappers.recomputable\(block"):
        gradients_of_two_calls(net, [[0, 1]])


@pytest.mark.skipif(OLD, reason="models there call that function without gradients, too")
def test_a_model_that_checkpoints_in_an_unknown_way() -> None:
    """Such as one of a hub, of the time before transformers had a function for it."""
    net = ready(tuned(llama(), ["q_proj"]))
    net.model.gradient_checkpointing = True
    with pytest.raises(gift.AdaptationError, match=r"call gradient_checkpointing_disable\(\)"):
        net(**texts())
    assert torch.isfinite(logits(net, **texts())).all(), (
        "without gradients, nothing is called again"
    )


def test_what_is_refused(tmp_path: Path) -> None:
    net = tuned(llama(), ["q_proj"])
    with pytest.raises(gift.AdaptationError, match="outside of its language model"):
        net.model(**texts())
    with pytest.raises(gift.AdaptationError, match="called without input_ids"):
        net(inputs_embeds=torch.randn(1, 3, 16))
    with pytest.raises(gift.AdaptationError, match="is wrapped by alora"):
        gift.merge(net)
    for tokens in ([], [1.5], "5 6", [True], [-1], 5):
        with pytest.raises(ValueError, match="expected the ids of at least one token"):
            ma_invocation(tokens)
    cap = (mc_path(""), ma_invocation(TOKENS))
    for other, message in (
        ((mc_path("model.embed_tokens"), ma_activated_lora()), "for linear layers"),
        ((mc_path(glob="*q_proj"), ma_activated_lora(rank=40)), "expected 16 or less"),
    ):
        plain = llama()
        before = full_state(plain)
        with pytest.raises(gift.AdaptationError, match=message):
            gift.enable_fine_tuning(plain, FineTuningStrategy([cap, other]))
        assert full_state(plain) == before
    two = T5ForConditionalGeneration(T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))  # fmt: skip
    with pytest.raises(gift.AdaptationError, match=r"\[30\], ids beyond the 30 of its embedding"):
        gift.enable_fine_tuning(llama(), ActivatedLoRAFineTuningStrategy([5, 30]))
    with pytest.raises(gift.AdaptationError, match="reads two texts"):
        gift.enable_fine_tuning(two, ActivatedLoRAFineTuningStrategy(TOKENS))
    with pytest.raises(gift.AdaptationError, match="not a language model of transformers"):
        gift.enable_fine_tuning(nn.Linear(4, 4), FineTuningStrategy([cap]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"alora_invocation_tokens": "5"}, "expected a list of ids"),
    "task": ({"task_type": None}, "task_type is None"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_folders_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = llama()
    by_peft(copy.deepcopy(base), ["q_proj"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    before = full_state(base)
    with pytest.raises(gift.DeltaFileError, match=message):
        load_peft(base, tmp_path)
    assert full_state(base) == before


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    net = tuned(llama(), ["q_proj"])
    gift.enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=1), stack=True)
    with pytest.raises(gift.DeltaFileError):
        save_peft(net, tmp_path)
    with pytest.raises(gift.DeltaFileError, match="not activated LoRA"):
        gift.save_diffusers(tuned(llama(), ["q_proj"]), tmp_path / "a.safetensors", name="unet")
    assert not list(tmp_path.iterdir())
