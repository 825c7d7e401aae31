"""Prompted language models write: with caches and without, step by step, several beams."""

import copy
from typing import Any

import pytest
import torch

from tests.cases.prompts import (
    EACH_SEQUENCE,
    EACH_TOKEN,
    PAD,
    N,
    batch,
    longer,
    made,
    prompted,
    tokens_of,
    with_more_words,
)

pytestmark = pytest.mark.filterwarnings("ignore::gift.enable.GiftWarning")


WRITERS = [pair for pair in EACH_TOKEN[:6] + EACH_SEQUENCE[2:]]
QUIET = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": PAD}


@pytest.mark.parametrize(("kind", "head"), WRITERS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("side", ["left", "none"])
def test_it_writes_what_the_model_with_more_words_writes(
    kind: str, head: str, options: dict[str, Any], side: str
) -> None:
    base = made(kind, head)
    net, given = prompted(base), batch(side)
    if side == "none":
        given = {k: v[:1] for k, v in given.items()}
    plain = with_more_words(base, tokens_of(net))
    asked = {"do_sample": False, **QUIET, **options}
    written, expected = net.generate(**given, **asked), plain.generate(**longer(**given), **asked)
    start = 0 if base.config.is_encoder_decoder else 6
    assert torch.equal(written[:, start:], expected[:, start and start + N :])
    if start:
        assert torch.equal(written[:, :start], given["input_ids"])


@pytest.mark.parametrize("side", ["left", "none"])
def test_it_writes_as_a_loop_made_by_hand(side: str) -> None:
    """Step by step, embeddings into the plain model, without any cache."""
    base = made("GPT2", "LMHeadModel")
    net, given = prompted(base), batch(side)
    mask = torch.cat([torch.ones(2, N).long(), given["attention_mask"]], 1)
    words = base.get_input_embeddings()
    x = torch.cat([tokens_of(net).expand(2, N, -1), words(given["input_ids"])], 1)
    positions = torch.cat([torch.arange(N).expand(2, N),
                           (mask[:, N:].cumsum(1) - 1).clamp(min=0) + N], 1)  # fmt: skip
    written = []
    for _ in range(8):
        logits = base(inputs_embeds=x, attention_mask=mask, position_ids=positions).logits
        written.append(logits[:, -1].argmax(-1))
        x = torch.cat([x, words(written[-1])[:, None]], 1)
        mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    result = net.generate(**given, do_sample=False, **QUIET)
    assert torch.equal(result[:, 6:], torch.stack(written, 1))


def test_caches_that_do_not_fit() -> None:
    net, given = prompted(made("Llama", "ForCausalLM")), batch("none")
    with pytest.raises(ValueError, match=r"StaticCache of fixed length.*use a dynamic cache"):
        net.generate(**given, cache_implementation="static", **QUIET)
    for last in (None, torch.zeros(2, 3), torch.zeros(2, N + 1)):  # nothing, or so many new tokens
        done = net.generate(**given, return_dict_in_generate=True, **QUIET)
        cache, ids = done.past_key_values, done.sequences
        ids = ids if last is None else torch.cat([ids, last.long() + 5], 1)
        for mask in (torch.ones_like(ids), torch.ones_like(ids).index_fill(1, torch.tensor(0), 0)):
            with pytest.raises(ValueError, match=r"cache of 16 positions, 3 .* begin anew"):
                net.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(cache))


def test_several_tokens_after_a_cache() -> None:
    """As the model with more words reads them: the virtual tokens are in the cache already."""
    net = prompted(base := made("Llama", "ForCausalLM"))
    plain, given = with_more_words(base, tokens_of(net)), batch("left")
    more, whole = longer(**given), []
    for network, first in ((net, given), (plain, more)):
        cut = {k: v[:, :-2] for k, v in first.items()}
        begun = network(**cut, use_cache=True)
        rest = network(first["input_ids"][:, -2:], attention_mask=first["attention_mask"],
                       past_key_values=begun.past_key_values)  # fmt: skip
        whole.append(rest.logits)
    torch.testing.assert_close(*whole)
    torch.testing.assert_close(whole[0], plain(**more).logits[:, -2:])
