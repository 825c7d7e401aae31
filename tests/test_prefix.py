"""Prefix tuning, beside the plain model that has read the words of which the prefix is made.

The keys and values of a prefix are set to those of `N` words, so that the model must give for a
text what the plain model gives for it after these words.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Model

import gift
from gift import DeltaBank, disable_fine_tuning, enable_fine_tuning
from gift.core.undo.unload import disabled
from gift.strategies import (
    LoRALinearFineTuningStrategy,
    PrefixFineTuningStrategy,
    PromptFineTuningStrategy,
    load_strategy_from_config,
    merge_strategies,
)
from tests.cases.prompts import NEIGHBOURS, PAD, WORDS, N, batch, made
from tests.common import full_state, trainable

pytestmark = [pytest.mark.usefixtures("double"),
              pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")]  # fmt: skip

Prefixes = PrefixFineTuningStrategy
OLD = not hasattr(transformers.cache_utils, "DynamicLayer")  # caches are lists of keys and values
not_on_old = pytest.mark.skipif(
    OLD, reason="old transformers give these models no cache that grows"
)
STATES = ("Mamba2", "Jamba")
DECODERS = [("GPT2", "LMHeadModel"), ("Llama", "ForCausalLM"),
            pytest.param("Gemma2", "ForCausalLM", marks=not_on_old),
            ("OPT", "ForCausalLM"), ("Bloom", "ForCausalLM"),
            *(pair for pair in NEIGHBOURS if pair[0] not in STATES)]  # fmt: skip
PARTED = [("T5", "ForConditionalGeneration"), ("Bart", "ForConditionalGeneration"),
          ("Marian", "MTModel"),
          pytest.param("Pegasus", "ForConditionalGeneration", marks=not_on_old)]  # fmt: skip
FRONT = torch.arange(3, 3 + N)  # the words of which prefixes are made


def keys_of(base: Any, **given: Any) -> Tensor:
    """Keys and values that a plain model has for the words in front, in the order of a prefix."""
    cache = base(**given, use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    if OLD:
        in_tuples = isinstance(cache, tuple)
        layers = cache if in_tuples else zip(cache.key_cache, cache.value_cache, strict=True)
    else:
        layers = [(layer.keys, layer.values) for layer in cache.layers]
    pairs = [part[0] for keys, values, *_ in layers for part in (keys, values)]
    return torch.stack(pairs).permute(2, 0, 1, 3).flatten(1).detach()


def prefixed(base: Any, tokens: Tensor | None = None, **settings: Any) -> Any:
    """A copy with a prefix of the words in front, or of these keys and values."""
    net = copy.deepcopy(base)
    try:
        enable_fine_tuning(net, Prefixes(N, **settings))
    except gift.AdaptationError as error:
        if OLD and "are tuples, not a cache object" in str(error):
            pytest.skip(f"transformers {transformers.__version__} gives this model no cache object")
        raise
    if tokens is None:
        tokens = keys_of(base, input_ids=FRONT[None])
    own(net).data.copy_(tokens)
    return net


def own(net: nn.Module) -> nn.Parameter:
    (name,) = (name for name in trainable(net) if name.endswith("prefix_tokens"))
    return dict(net.named_parameters())[name]


def longer(**given: Tensor) -> dict[str, Tensor]:
    """The same with the words in front."""
    rows = len(given["input_ids"])
    front = {"input_ids": FRONT.expand(rows, N), "attention_mask": torch.ones(rows, N).long()}
    return {k: torch.cat([front[k], v], 1) for k, v in given.items()}


@pytest.mark.parametrize(("kind", "head"), DECODERS)
def test_a_text_is_read_as_after_the_words_of_the_prefix(kind: str, head: str) -> None:
    """Whatever a model does with positions, windows, groups of heads and padding."""
    base = made(kind, head)
    net = prefixed(base)
    for side in ("left", "right", "none"):
        given = batch(side)
        seen = given["attention_mask"].bool()
        if side == "none":
            del given["attention_mask"]
            given["input_ids"], seen = given["input_ids"].clamp(min=2), torch.ones(2, 6).bool()
        expected = base(**longer(**given)).logits[:, N:]
        for asked in ({}, {"use_cache": False}):
            output = net(**given, **asked)
            torch.testing.assert_close(output.logits[seen], expected[seen], rtol=1e-6, atol=1e-6)
            assert ("cache" in output or "past_key_values" in output) == (not asked)
            with_tuple = net(**given, **asked, return_dict=False)
            torch.testing.assert_close(with_tuple[0], output.logits)
            assert len(with_tuple) == 1 + (not asked)
    assert (output.logits - base(**given).logits).abs().max() > 1e-3


ASKED: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 3}]


@pytest.mark.parametrize(("kind", "head"), DECODERS)
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_it_writes_what_the_plain_model_writes_after_the_words(
    kind: str, head: str, asked: dict[str, Any]
) -> None:
    base = made(kind, head)
    net, few = prefixed(base), {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": PAD}
    for given in (batch("left"), {k: v[:1] for k, v in batch("none").items()}):
        written = net.generate(**given, do_sample=False, **few, **asked)
        expected = base.generate(**longer(**given), do_sample=False, **few, **asked)
        assert torch.equal(written, expected[:, N:])


@pytest.mark.parametrize(("kind", "head"), PARTED)
def test_the_decoder_of_two_parts_reads_on_after_the_words(kind: str, head: str) -> None:
    """The keys of the words depend on nothing that the encoder reads in the first layer only."""
    base = made(kind, head, **({"num_layers": 1} if kind == "T5" else {}))
    given, more = batch("left"), torch.randint(3, WORDS, (2, 4))
    words = FRONT.expand(2, N).clone()
    words[:, 0] = more[:, 0] = 0  # else `generate` puts the token in front with which texts start
    asked = {"input_ids": given["input_ids"][:1], "decoder_input_ids": words[:1]}
    net = prefixed(base, keys_of(base, **asked))
    long = torch.cat([words, more], 1)
    for asked in ({}, {"use_cache": False}):
        output = net(**given, decoder_input_ids=more, **asked).logits
        expected = base(**given, decoder_input_ids=long, **asked).logits[:, N:]
        torch.testing.assert_close(output, expected)
    few = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    for asked in ASKED:
        written = net.generate(**given, decoder_input_ids=more, **few, **asked)
        expected = base.generate(**given, decoder_input_ids=long, **few, **asked)
        assert torch.equal(written, expected[:, N:])


def test_steps_with_a_cache_are_the_whole_text() -> None:
    net, given = prefixed(made("Llama", "ForCausalLM")), batch("left")
    whole, mask = net(**given).logits, given["attention_mask"]
    step = net(given["input_ids"][:, :4], attention_mask=mask[:, :4])
    logits = [step.logits]
    for i in (4, 5):
        step = net(given["input_ids"][:, i : i + 1], attention_mask=mask[:, : i + 1],
                   past_key_values=step.past_key_values)  # fmt: skip
        logits.append(step.logits)
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[seen], whole[seen])


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_the_same_as_peft(kind: str) -> None:
    base = made(kind, {"GPT2": "LMHeadModel", "Llama": "ForCausalLM"}[kind])
    net, given = prefixed(base), batch("right")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data = own(net).detach().clone()
    seen = given["attention_mask"].bool()
    outputs = [model(**given).logits[seen] for model in (net, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    mine, peft = (
        torch.autograd.grad(logits.square().sum(), tokens)[0]
        for logits, tokens in zip(outputs, (own(net), weight), strict=True)
    )
    torch.testing.assert_close(mine, peft, rtol=1e-5, atol=1e-6)
    assert mine.abs().amin() > 0


@not_on_old
def test_an_encoder_is_that_of_peft() -> None:
    """``W_1 tanh(W_0 E + b_0) + b_1``, with the gradients of all its parameters."""
    net = copy.deepcopy(base := made("GPT2", "LMHeadModel"))
    report = enable_fine_tuning(net, Prefixes(N, encoder="mlp", encoder_size=5))
    width = 2 * 2 * 8
    assert report.trainable_after == N * 8 + (8 * 5 + 5) + (5 * width + width)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True,
                                encoder_hidden_size=5)  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(base), config).eval().double()
    trained = dict(theirs.prompt_encoder["default"].named_parameters())
    names = dict(zip(["tokens", "encoder_0_weight", "encoder_0_bias", "encoder_1_weight",
                      "encoder_1_bias"], trained, strict=True))  # fmt: skip
    mine = {name: net.get_parameter(f"transformer.prefix_{name}") for name in names}
    for name, parameter in mine.items():
        trained[names[name]].data = parameter.detach().clone()
    given = batch("right")
    seen = given["attention_mask"].bool()
    outputs = [model(**given).logits[seen] for model in (net, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, trained[names[name]].grad)
        assert parameter.grad.any()  # type: ignore[union-attr]


# --- what a strategy has to do ------------------------------------------------------------------


def test_it_is_trained_saved_loaded_and_taken_off(tmp_path: Any) -> None:
    base, given = made("Llama", "ForCausalLM").float(), batch("left")
    for settings in ({}, {"encoder": "mlp", "encoder_size": 4}):
        net = copy.deepcopy(base)
        before = full_state(net)
        enable_fine_tuning(net, Prefixes(N, **settings))
        optimizer = torch.optim.Adam(net.parameters(), 0.05)
        losses = []
        for _ in range(5):
            losses.append(net.train()(**given, labels=given["input_ids"]).loss)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        assert {n for n, p in net.named_parameters() if p.grad is not None} == set(trainable(net))
        expected = net.eval()(**given).logits
        gift.save(net, tmp_path / "delta.safetensors")
        loaded = copy.deepcopy(base)
        gift.load(loaded, tmp_path / "delta.safetensors")
        fresh = copy.deepcopy(base)
        enable_fine_tuning(fresh, Prefixes(N, **settings))
        fresh.load_state_dict(net.state_dict())
        for other in (loaded, fresh, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other.eval()(**given).logits, expected)
        with disabled(net):
            assert torch.equal(net(**given).logits, base(**given).logits)
        assert torch.equal(net(**given).logits, expected)
        net.zero_grad()
        disable_fine_tuning(net)
        assert full_state(net) == before


@not_on_old
def test_peft_reads_what_is_written_and_the_other_way(tmp_path: Any) -> None:
    from peft import PeftModel

    base, given = made("Llama", "ForCausalLM"), batch("none")
    for i, settings in enumerate(({}, {"encoder": "mlp"})):
        net = copy.deepcopy(base)
        enable_fine_tuning(net, Prefixes(N, **settings))
        gift.save_peft(net, tmp_path / f"{i}")
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / f"{i}")).eval()
        torch.testing.assert_close(theirs(**given).logits, net(**given).logits)
        loaded = copy.deepcopy(base)
        gift.load_peft(loaded, tmp_path / f"{i}")
        torch.testing.assert_close(loaded(**given).logits, net(**given).logits)
        assert trainable(loaded) == ["model.prefix_tokens"]
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True)
    theirs = get_peft_model(copy.deepcopy(base), config).eval().double()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded = copy.deepcopy(base)
    gift.load_peft(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(**given).logits, theirs(**given).logits)
    with pytest.raises(ValueError, match=r"prompt_embeddings is \(3, 16\), expected \(3, 32\)"):
        gift.load_peft(made("GPT2", "LMHeadModel"), tmp_path / "theirs")
    parted = made("T5", "ForConditionalGeneration")
    enable_fine_tuning(parted, Prefixes(N))
    with pytest.raises(ValueError, match="is not a causal language model"):
        gift.save_peft(parted, tmp_path / "parted")


@not_on_old
def test_with_lora_and_a_head() -> None:
    base, given = made("GPT2", "ForSequenceClassification"), batch("right")
    net = copy.deepcopy(base)
    both = merge_strategies([Prefixes(N, head=True), LoRALinearFineTuningStrategy(rank=2)])
    report = enable_fine_tuning(net, both)
    assert not report.unmatched
    alone = prefixed(base, own(net).detach())
    torch.testing.assert_close(net(**given).logits, alone(**given).logits)
    net(**given).logits.sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == set(trainable(net))
    assert "score.weight" in trainable(net)


@not_on_old
def test_a_base_in_bfloat16_and_autocast() -> None:
    """Both compute in 16 bits, and the prefix stays in 32."""
    for kind, head in DECODERS[:2]:
        base, given = made(kind, head).bfloat16(), batch("left")
        net = copy.deepcopy(base)
        enable_fine_tuning(net, Prefixes(N))
        assert own(net).dtype is torch.float32
        net(**given).logits.float().square().sum().backward()
        assert own(net).grad.isfinite().all()  # type: ignore[union-attr]
        wide = copy.deepcopy(base).float()
        enable_fine_tuning(wide, Prefixes(N))
        own(wide).data.copy_(own(net))
        seen = given["attention_mask"].bool()
        expected = wide(**given).logits[seen]
        with torch.autocast("cpu", torch.bfloat16):
            autocast = wide(**given).logits[seen]
        for output in (net(**given).logits[seen], autocast):
            torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


@not_on_old
def test_a_bank_switches() -> None:
    base, given = made("GPT2", "LMHeadModel"), batch("none")
    bank, expected = DeltaBank(copy.deepcopy(base)), {}
    strategies = {"prefix": Prefixes(N), "lora": LoRALinearFineTuningStrategy(rank=2)}
    for name, strategy in strategies.items():
        bank.add(name, strategy=strategy)
        bank.activate(name)
        for parameter in bank.net.parameters():
            nn.init.normal_(parameter)
        alone = copy.deepcopy(base)
        enable_fine_tuning(alone, strategies[name])
        alone.load_state_dict(bank.net.state_dict())
        expected[name] = alone(**given).logits
    for name in ("prefix", "lora", "prefix"):
        bank.activate(name)
        assert torch.equal(bank.net(**given).logits, expected[name])
    with pytest.raises(ValueError, match="is wrapped by prefix"), bank.rows(["prefix", "lora"]):
        pass


@not_on_old
def test_a_strategy_comes_back_from_its_description() -> None:
    for strategy in (Prefixes(at="part"), Prefixes(2, "mlp", head=True, at="part", encoder_size=3)):
        loaded = load_strategy_from_config(strategy.to_config())
        assert loaded.to_config() == strategy.to_config()
        nets = [nn.ModuleDict({"part": made("GPT2", "LMHeadModel"), "head": nn.Linear(8, 2)})
                for _ in range(2)]  # fmt: skip
        for net, one in zip(nets, (strategy, loaded), strict=True):
            enable_fine_tuning(net, one)
        assert trainable(nets[0]) == trainable(nets[1])


def test_a_reference() -> None:
    base, given = made("GPT2", "LMHeadModel"), batch("left")
    net = prefixed(base)
    expected = net(**given).logits
    seen = given["attention_mask"].bool()
    plain = gift.reference(net)(**given).logits
    torch.testing.assert_close(plain[seen], expected[seen])
    own(net).data.zero_()
    assert not torch.equal(net(**given).logits, expected)
    own(net).data.copy_(keys_of(base, input_ids=FRONT[None]))
    assert torch.equal(net(**given).logits, expected)


class OfTuples(GPT2Model):
    """As it was in transformers before 4.53."""

    def forward(
        self, input_ids: Tensor, past_key_values: tuple[Tensor, ...] | None = None, **more: Any
    ) -> Any:
        return super().forward(input_ids, **more)


def with_other_heads() -> nn.Module:
    """A model whose second layer has keys of its own width."""
    net = made("Llama", "ForCausalLM")
    net.model.layers[1].self_attn.k_proj = nn.Linear(8, 8)
    return net


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "tuples": (
        lambda: OfTuples(made("GPT2", "LMHeadModel").config),
        {},
        r"its past_key_values are tuples, not a cache object, in transformers \d",
    ),
    "an encoder": (lambda: made("Bert", "ForMaskedLM"), {}, "its attention is not causal"),
    "no cache": (lambda: made("Albert", "ForMaskedLM"), {}, "it takes no cache"),
    "states": (lambda: made("Mamba2", "ForCausalLM"), {}, "layers without keys and values"),
    "some states": (
        lambda: made("Jamba", "ForCausalLM"),
        {},
        "layers without keys|layers have keys",
    ),
    "no language model": (lambda: nn.Linear(3, 3), {}, "not a language model of transformers"),
    "too long": (lambda: made("GPT2", "LMHeadModel"), {"num_virtual_tokens": 24}, "leave no room"),
    "heads": (
        lambda: made("Llama", "ForCausalLM"),
        {"heads": 3},
        "heads is 3, its configuration says 1: leave heads= out",
    ),
    "heads of the same width": (
        lambda: made("GPT2", "LMHeadModel"),
        {"heads": 4, "head_dim": 2},
        r"heads is 4, its configuration says 2.*; head_dim is 2, its configuration says 4",
    ),
    "features": (lambda: made("T5", "ForConditionalGeneration"), {"head_dim": 3}, "head_dim is 3"),
    "layers": (
        lambda: made("Bart", "ForConditionalGeneration"),
        {"layers": 2},
        "configuration says 1",
    ),
    "heads of one layer": (lambda: with_other_heads(), {}, r"they have \[4, 8\] features"),
    "an LSTM": (lambda: made("GPT2", "LMHeadModel"), {"encoder": "lstm"}, "expected 'mlp' or None"),
}


@not_on_old
@pytest.mark.parametrize(("make", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Callable[[], nn.Module], settings: dict[str, Any], message: str) -> None:
    net = make()
    before = full_state(net)
    with pytest.raises(ValueError, match=message):
        enable_fine_tuning(net, Prefixes(**settings))
    assert full_state(net) == before


def test_calls_that_are_refused() -> None:
    net, given = prefixed(made("Llama", "ForCausalLM")), batch("none")
    with pytest.raises(ValueError, match=r"StaticCache of fixed length"):
        net.generate(**given, cache_implementation="static", max_new_tokens=4)
    done = net.generate(**given, return_dict_in_generate=True, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match=r"cache of \d+ positions, 3 .* start over"):
        net.generate(done.sequences, past_key_values=done.past_key_values)
    net.gradient_checkpointing_enable()
    net.eval()(**given)
    with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
        net.train()(**given)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_checkpointed_as_a_whole(reentrant: bool) -> None:
    """It makes its cache again, in which the prefix is."""
    net, ids = prefixed(made("Llama", "ForCausalLM")).train(), batch("none")["input_ids"]
    net(input_ids=ids).logits.square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    anchor = torch.zeros((), requires_grad=True)  # that kind asks for an input with a gradient
    found = checkpoint(
        lambda zero: net(input_ids=ids).logits + zero, anchor, use_reentrant=reentrant
    )
    found.square().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_sizes_that_the_configuration_has_wrong() -> None:
    base, given = made("Llama", "ForCausalLM"), batch("none")
    odd = copy.deepcopy(base)
    odd.config.num_key_value_heads = 7
    nets = [base, odd]
    for net, settings in zip(nets, ({}, {"heads": 1}), strict=True):
        torch.manual_seed(0)
        enable_fine_tuning(net, Prefixes(**settings))
    assert torch.equal(odd(**given).logits, base(**given).logits)


@pytest.mark.parametrize("strategy", [Prefixes, PromptFineTuningStrategy])
def test_padding_before_a_text_moves_it_out_of_a_window(strategy: Any) -> None:
    """Whoever pads there is warned; padding on the right changes nothing."""
    net = made("Mistral", "ForCausalLM")
    enable_fine_tuning(net, strategy(3))
    nn.init.normal_(next(net.parameters()))
    text = torch.randint(3, WORDS, (1, 7))
    padding = torch.full((1, 5), PAD)
    right, left = torch.cat([text, padding], 1), torch.cat([padding, text], 1)

    def logits(ids: Tensor) -> Tensor:
        mask = (ids != PAD).long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return net(input_ids=ids, attention_mask=mask, position_ids=places).logits[ids != PAD]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = logits(text)
        torch.testing.assert_close(logits(right), expected)
    with pytest.warns(gift.GiftWarning, match="sees the last 4 positions, and padding before"):
        assert not torch.allclose(logits(left), expected)
    net.config.sliding_window = 15  # as many as there are: then nothing is out of sight
    for module in net.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(logits(left), logits(text))


@not_on_old
def test_two_kinds_of_virtual_tokens_are_refused() -> None:
    for first, second in ((Prefixes(), PromptFineTuningStrategy()),) * 2:
        net = made("GPT2", "LMHeadModel")
        with pytest.raises(ValueError, match="also puts virtual tokens into the cache"):
            enable_fine_tuning(net, merge_strategies([first, second]))
        enable_fine_tuning(net, first)
        with pytest.raises(ValueError, match="also puts virtual tokens into the cache"):
            enable_fine_tuning(net, second, stack=True)
        with pytest.raises(ValueError, match="is wrapped by prefix"):
            gift.merge(net)


@not_on_old
def test_a_planned_one_and_the_meta_device() -> None:
    with torch.device("meta"):
        net = type(made("GPT2", "LMHeadModel"))(made("GPT2", "LMHeadModel").config)
    report = enable_fine_tuning(net, Prefixes(N))
    assert own(net).is_meta
    assert report.trainable_after == N * 2 * 2 * 8
    net.to_empty(device="cpu").load_state_dict(made("GPT2", "LMHeadModel").state_dict())
    assert 0.01 < own(net).std() < 0.03
