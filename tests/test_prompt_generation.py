"""Prompted language models write: with caches and without, step by step, several beams.

Two references know nothing of virtual tokens: the plain model with more words, and a loop that puts
embeddings into the plain model. What cannot be right must be refused in words, so each test of many
models says which of the two it expects, and why.
"""

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gift import disable_fine_tuning
from gift.errors import AdaptationError
from tests.cases.prompts import (
    EACH_SEQUENCE,
    EACH_TOKEN,
    END,
    NEIGHBOURS,
    PAD,
    WORDS,
    N,
    batch,
    longer,
    made,
    prompted,
    tokens_of,
    with_more_words,
    words_of,
)
from tests.cases.selection import cells

pytestmark = [pytest.mark.usefixtures("double"),
              pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")]  # fmt: skip


WRITERS = [pair for pair in EACH_TOKEN[:6] + EACH_SEQUENCE[2:]]
QUIET = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": PAD}
OPTIONS: list[dict[str, Any]] = [
    {}, {"use_cache": False}, {"num_beams": 3},
    {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
]  # fmt: skip


def given_to(side: str) -> dict[str, Tensor]:
    given = batch(side)
    return {k: v[:1] for k, v in given.items()} if side == "none" else given


def writes(net: Any, given: dict[str, Any], **asked: Any) -> Tensor:
    torch.manual_seed(1)
    return net.generate(**given, **{"do_sample": False, **QUIET, **asked})


def without_end(logits: Tensor) -> Tensor:
    """Nor does `generate` end before it has written what it was asked for."""
    return logits.index_fill(-1, torch.tensor(END), -torch.inf)


def refusal(base: Any, asked: dict[str, Any]) -> str:
    """The words that a model is refused with, as it makes caches that have no room for a prompt."""
    if asked.get("use_cache", True) and getattr(base.config, "cache_implementation", None):
        return "given a HybridCache of fixed length.*use a dynamic cache"  # before 4.56
    if asked.get("use_cache", True) and not base.config.is_encoder_decoder:
        cache = getattr(base(torch.tensor([[3]])), "past_key_values", None)
        if isinstance(cache, tuple) and isinstance(cache[0], Tensor):  # CTRL in transformers 4
            return "a tuple, which gift does not know|nothing tells whether 3 are those of virtual"
    return ""


@cells(2, writer=WRITERS + NEIGHBOURS, asked=OPTIONS, side=["left", "none"])
def test_it_writes_what_the_model_with_more_words_writes(
    writer: tuple[str, str], asked: dict[str, Any], side: str
) -> None:
    base = made(*writer)
    net, given = prompted(base), given_to(side)
    words = refusal(base, asked)
    if words:
        with pytest.raises(ValueError, match=words):
            writes(net, given, **asked)
        return
    plain = with_more_words(base, tokens_of(net))
    written, expected = writes(net, given, **asked), writes(plain, longer(**given), **asked)
    start = 0 if base.config.is_encoder_decoder else 6
    assert torch.equal(written[:, start:], expected[:, start and start + N :])
    if start:
        rows = given["input_ids"].repeat_interleave(len(written) // len(given["input_ids"]), 0)
        assert torch.equal(written[:, :start], rows)


@pytest.mark.parametrize("side", ["left", "none"])
def test_a_model_whose_positions_begin_after_that_of_padding(side: str) -> None:
    """New versions of `generate` give it positions that begin at zero."""
    base = made("Roberta", "ForCausalLM", is_decoder=True)
    net, given = prompted(base), given_to(side)
    plain = with_more_words(base, tokens_of(net))
    for asked in ({}, {"use_cache": False}):
        expected = writes(plain, longer(**given), **asked)
        assert torch.equal(writes(net, given, **asked)[:, 6:], expected[:, 6 + N :])


def caches_are_right(base: Any) -> bool:
    """Whether the plain model computes the same with a cache; Mamba 2 in 4.48 does not."""
    asked = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids = torch.arange(3, 12)[None]
    done = [base.generate(ids, **asked, **QUIET, use_cache=use).logits for use in (True, False)]
    return all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*done, strict=True))


@pytest.mark.parametrize(("kind", "head"), [pair for pair in EACH_TOKEN[:6] + NEIGHBOURS
                                            if pair[1] != "ForConditionalGeneration"])  # fmt: skip
def test_it_writes_as_a_loop_made_by_hand(kind: str, head: str) -> None:
    """Step by step, embeddings of all tokens into the plain model, without any cache."""
    base = made(kind, head)
    net, ids = prompted(base), batch("none")["input_ids"][:1]
    words = words_of(base)
    x = torch.cat([tokens_of(net)[None], words(ids)], 1)
    written, logits = [], []
    for _ in range(8):
        mask = torch.ones(x.shape[:2]).long()
        given = x.clone()  # which CTRL scales in place
        logits.append(base(inputs_embeds=given, attention_mask=mask, use_cache=False).logits[:, -1])
        written.append(without_end(logits[-1]).argmax(-1))
        x = torch.cat([x, words(written[-1])[:, None]], 1)
    for asked in ({}, {"use_cache": False}):
        if not refusal(base, asked) and (asked or caches_are_right(base)):
            done = net.generate(ids, do_sample=False, **QUIET, **asked, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
            torch.testing.assert_close(done.logits, tuple(logits), rtol=1e-5, atol=1e-5,
                                       check_dtype=False)  # fmt: skip
            assert torch.equal(done.sequences[:, 6:], torch.stack(written, 1))


def test_it_writes_as_a_loop_with_padding() -> None:
    base = made("GPT2", "LMHeadModel")
    net, given = prompted(base), batch("left")
    mask = torch.cat([torch.ones(2, N).long(), given["attention_mask"]], 1)
    words = base.get_input_embeddings()
    x = torch.cat([tokens_of(net).expand(2, N, -1), words(given["input_ids"])], 1)
    positions = torch.cat([torch.arange(N).expand(2, N),
                           (mask[:, N:].cumsum(1) - 1).clamp(min=0) + N], 1)  # fmt: skip
    written = []
    for _ in range(8):
        logits = base(inputs_embeds=x, attention_mask=mask, position_ids=positions).logits
        written.append(without_end(logits[:, -1]).argmax(-1))
        x = torch.cat([x, words(written[-1])[:, None]], 1)
        mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    result = net.generate(**given, do_sample=False, **QUIET)
    assert torch.equal(result[:, 6:], torch.stack(written, 1))


# --- caches that do not fit ----------------------------------------------------------------------


def test_a_cache_of_fixed_length() -> None:
    net, given = prompted(made("Llama", "ForCausalLM")), batch("none")
    with pytest.raises(ValueError, match=r"StaticCache of fixed length.*use a dynamic cache"):
        net.generate(**given, cache_implementation="static", **QUIET)


@pytest.mark.parametrize("kind", ["Llama", "Bloom"])  # the second counts no positions
def test_generation_cannot_continue_a_cache(kind: str) -> None:
    net, given = prompted(made(kind, "ForCausalLM")), batch("none")
    for last in (None, torch.zeros(2, 3), torch.zeros(2, N + 1)):  # nothing, or so many new tokens
        done = net.generate(**given, return_dict_in_generate=True, **QUIET)
        cache, ids = done.past_key_values, done.sequences
        ids = ids if last is None else torch.cat([ids, last.long() + 5], 1)
        for mask in (torch.ones_like(ids), torch.ones_like(ids).index_fill(1, torch.tensor(0), 0)):
            with pytest.raises(ValueError, match=r"cache of 16 positions, 3 .* start over"):
                net.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(cache))


def begun(net: Any) -> tuple[Any, dict[str, Tensor]]:
    """A cache of the first four tokens, and all six."""
    given = {"input_ids": torch.randint(3, WORDS, (2, 6)), "attention_mask": torch.ones(2, 6)}
    with torch.no_grad():
        return net(given["input_ids"][:, :4], use_cache=True).past_key_values, given


def test_a_cache_that_somebody_else_filled() -> None:
    """Whatever its length, and whatever the argument is called that holds it."""
    base = made("Llama", "ForCausalLM")
    net, other = prompted(base), prompted(base, N + 1)
    ids = torch.full((2, 4 + N), 5)
    with torch.no_grad():
        plain = base(ids, use_cache=True).past_key_values  # as long as with virtual tokens
    for cache in (plain, begun(other)[0]):
        for mask in ({}, {"attention_mask": torch.ones(2, 6)}):
            with pytest.raises(ValueError, match=r"did not fill.*start over without "):
                net(ids[:, :2], past_key_values=copy.deepcopy(cache), **mask)


def shorter(cache: Any) -> Any:
    cache.crop(-1)
    return cache


FORWARD_METHODS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "a mask with virtual tokens": (
        lambda c: c, {"attention_mask": torch.ones(2, 6 + N)}, "but mask or positions for 9 tok"),
    "a mask of the new tokens": (
        lambda c: c, {"attention_mask": torch.ones(2, 2)}, "but mask or positions for 2 tokens"),
    "positions with virtual tokens": (
        lambda c: c, {"position_ids": torch.arange(4 + N, 6 + N)[None]}, "positions for 9 tokens"),
    "positions from the beginning": (
        lambda c: c, {"position_ids": torch.tensor([[6, 7]])}, "positions for 8 tokens"),
    "one token is gone": (shorter, {}, "nothing tells whether 3 are those of virtual tokens"),
    "one token is gone, and a mask": (
        shorter, {"attention_mask": torch.ones(2, 6)}, "mask or positions for 6 tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "more", "words"), FORWARD_METHODS.values(), ids=FORWARD_METHODS)
def test_a_cache_whose_length_does_not_agree(
    change: Callable[[Any], Any], more: dict[str, Any], words: str
) -> None:
    net = prompted(made("Llama", "ForCausalLM"))
    cache, given = begun(net)
    with pytest.raises(ValueError, match=words):
        net(given["input_ids"][:, 4:], past_key_values=change(cache), **more)


def test_what_was_cropped_agrees_with_a_mask() -> None:
    net = prompted(made("Llama", "ForCausalLM"))
    cache, given = begun(net)
    rest = net(given["input_ids"][:, 3:], past_key_values=shorter(cache),
               attention_mask=given["attention_mask"])  # fmt: skip
    torch.testing.assert_close(rest.logits, net(**given).logits[:, 3:])


def test_a_copy_and_a_cache_that_begins_again() -> None:
    net = prompted(made("Llama", "ForCausalLM"))
    cache, given = begun(net)
    expected = net(**given).logits
    twin = copy.deepcopy(cache)
    rest = net(given["input_ids"][:, 4:], past_key_values=twin).logits
    torch.testing.assert_close(rest, expected[:, 4:])
    fresh = transformers.DynamicCache()
    torch.testing.assert_close(net(**given, past_key_values=fresh).logits, expected)
    assert fresh.get_seq_length() == 6 + N


class Hybrid(transformers.DynamicCache):
    """One that holds states, and says nothing of its length."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(2, 4)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def test_a_cache_that_seems_empty() -> None:
    """Filled by somebody else: the states tell of it."""
    net, ids = prompted(made("Llama", "ForCausalLM")), torch.full((2, 6), 5)
    filled = Hybrid()
    net(ids, past_key_values=filled)  # zeros alone are an empty cache
    other = Hybrid()
    other.state += 1
    with pytest.raises(ValueError, match=r"a Hybrid that it did not fill.*start over"):
        net(ids, past_key_values=other)


class Memory:
    """States of earlier tokens in a form of somebody's own."""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"memory": Memory()}, r"memory, a Memory, which gift does not know: .*transformers \d"),
        ({"mems": [torch.zeros(1)]}, "mems, a list, which gift does not know"),
        ({"cu_seq_lens": torch.zeros(3)}, r"cu_seq_lens \(3,\), gift does not know.*transformers"),
        ({"start": 4}, "start, a int, which gift does not know"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "position_ids that begin again"),
        ({"position_ids": torch.arange(20, 26)[None]}, "positions for 26 tokens"),
        ({"attention_mask": torch.ones(2, 8)}, "mask or positions for 8 tokens"),
    ],
)
def test_what_is_not_understood(more: dict[str, Any], words: str) -> None:
    net = prompted(made("Llama", "ForCausalLM"))
    with pytest.raises(ValueError, match=words):
        net.model(batch("none")["input_ids"], **more)


def test_all_problems_of_a_call_are_named_at_once() -> None:
    net = prompted(made("Llama", "ForCausalLM"))
    with pytest.raises(ValueError, match=r"8 tokens.*; it was given memory.*; it was given cu_seq"):
        net.model(batch("none")["input_ids"], attention_mask=torch.ones(2, 8), memory=Memory(),
                  cu_seq_lens=torch.zeros(3))  # fmt: skip


def test_arguments_that_do_not_concern_tokens() -> None:
    net, given = prompted(made("Llama", "ForCausalLM")), batch("left")
    more = {"output_hidden_states": True, "return_dict": True, "use_cache": False}
    assert torch.equal(net.model(**given, **more)[0], net.model(**given)[0])


def test_several_tokens_after_a_cache() -> None:
    """As the model with more words reads them: the virtual tokens are in the cache already."""
    net = prompted(base := made("Llama", "ForCausalLM"))
    plain, given = with_more_words(base, tokens_of(net)), batch("left")
    more, whole = longer(**given), []
    for network, first in ((net, given), (plain, more)):
        cut = {k: v[:, :-2] for k, v in first.items()}
        before = network(**cut, use_cache=True)
        rest = network(first["input_ids"][:, -2:], attention_mask=first["attention_mask"],
                       past_key_values=before.past_key_values)  # fmt: skip
        whole.append(rest.logits)
    torch.testing.assert_close(*whole)
    torch.testing.assert_close(whole[0], plain(**more).logits[:, -2:])


# --- other ways to write -------------------------------------------------------------------------


WAYS: dict[str, Callable[[Any, Any], tuple[Any, dict[str, Any]]]] = {
    "prompt lookup": lambda net, base: (net, {"prompt_lookup_num_tokens": 2}),
    "an assistant": lambda net, base: (net, {"assistant_model": base}),
    "as an assistant": lambda net, base: (base, {"assistant_model": net}),
}


@pytest.mark.parametrize("kind", ["Llama", "Bloom"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_other_ways_are_right_or_refused(kind: str, way: Callable[[Any, Any], Any]) -> None:
    """Assisted decoding crops caches: by how many tokens, or in old versions to how many."""
    base = made(kind, "ForCausalLM")
    ids = torch.tensor([[5, 6, 7, 5, 6, 7]])
    writer, asked = way(prompted(base), base)
    few = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD}
    expected = writer.generate(ids, **few)
    try:
        written = writer.generate(ids, **few, **asked)
    except AdaptationError as problem:
        message = str(problem)
    else:
        message = "" if torch.equal(written, expected) else "it is wrong"
    assert message == "" or re.search("start over|give an attention_mask for all tokens", message)


def test_generate_keeps_its_signature_and_goes_back() -> None:
    base = made("Llama", "ForCausalLM")
    net = prompted(base)
    assert inspect.signature(net.generate) == inspect.signature(base.generate)
    disable_fine_tuning(net)
    assert type(net) is type(base)
