"""Prompted language models, beside the plain model with more words, and beside PEFT."""

import copy
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import nn

from tests.cases.prompts import (
    EACH_SEQUENCE,
    EACH_TOKEN,
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

pytestmark = [pytest.mark.usefixtures("double"),
              pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")]  # fmt: skip

# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), EACH_TOKEN + EACH_SEQUENCE)
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_it_is_the_model_with_more_words(kind: str, head: str, side: str) -> None:
    """Values, and gradients of the virtual tokens, whatever the model does with ids and masks."""
    base = made(kind, head)
    net = prompted(base)
    plain = with_more_words(base, tokens_of(net))
    given = batch(side)
    if side == "none":
        del given["attention_mask"]
        given["input_ids"] = given["input_ids"].clamp(min=2)
    extra: dict[str, Any] = {}
    if getattr(base.config, "cache_implementation", None):
        extra = {"use_cache": False}  # Gemma 2 before 4.56, whose window has no room here
    if base.config.is_encoder_decoder:
        extra = {"decoder_input_ids": torch.randint(3, WORDS, (2, 4))}
    output, expected = net(**given, **extra).logits, plain(**longer(**given), **extra).logits
    if head == "ForSequenceClassification" and side == "left":
        # The last token counts. Old versions look for the first one of padding, in front of which
        # are the virtual tokens here.
        hidden = plain.base_model(**longer(**given)).last_hidden_state
        expected = plain.score(hidden[:, -1])
    if (kind, head) in EACH_TOKEN:
        expected = expected[:, N:]
    seen = given.get("attention_mask", torch.ones(2, 6)).bool()
    if output.shape[:2] != seen.shape:
        seen = torch.ones(output.shape[:-1]).bool()
    torch.testing.assert_close(output[seen], expected[seen], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output, base(**given, **extra).logits, atol=1e-3)
    words = words_of(plain.get_encoder() if base.config.is_encoder_decoder else plain)
    (mine,) = torch.autograd.grad(output[seen].square().sum(), tokens_of(net))
    (theirs,) = torch.autograd.grad(expected[seen].square().sum(), words.weight)
    theirs = theirs[-N:] / getattr(words, "embed_scale", 1.0)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_positions_and_types_of_tokens_are_shifted(kind: str) -> None:
    base = made(kind, {"GPT2": "LMHeadModel", "Bert": "ForTokenClassification"}[kind])
    net = prompted(base)
    plain = with_more_words(base, tokens_of(net))
    given = batch("left")
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given["token_type_ids"] = torch.randint(0, 2, (2, 6))
    more = longer(**given)
    torch.testing.assert_close(net(**given).logits, plain(**more).logits[:, N:])


def test_bert_pools_its_first_token() -> None:
    """The prompts stand in front of ``[CLS]``, whose position and meaning it keeps for the head."""
    for kind in ("Bert", "Albert", "Roberta"):
        base = made(kind, "ForSequenceClassification")
        net, given = prompted(base), batch("right")
        plain = with_more_words(base, tokens_of(net))
        hidden = plain.base_model(**longer(**given))[0][:, N:]
        if kind == "Bert":
            expected = plain.classifier(plain.bert.pooler(hidden))
        elif kind == "Albert":
            expected = plain.classifier(torch.tanh(plain.albert.pooler(hidden[:, 0])))
        else:
            expected = plain.classifier(hidden)  # which takes the first position
        torch.testing.assert_close(net(**given).logits, expected)
        as_tuple = net.base_model(**given, return_dict=False)
        assert torch.equal(as_tuple[0], net.base_model(**given)[0])


def test_clip_finds_the_end_of_its_text() -> None:
    """A model that takes no embeddings, and pools where the last token stands."""
    base = made("CLIPText", "Model", eos_token_id=19)
    net, given = prompted(base), batch("right", last=19)
    given["input_ids"][1, 3] = 19
    plain = with_more_words(base, tokens_of(net))
    output, expected = net(**given), plain(**longer(**given))
    torch.testing.assert_close(output.pooler_output, expected.pooler_output)
    torch.testing.assert_close(output[0], expected[0][:, N:])


def test_all_states_are_those_of_the_given_tokens() -> None:
    """But weights of attention are shown as they are, with those of virtual tokens."""
    base = made("Bert", "Model", attn_implementation="eager")
    net, given = prompted(base), batch("right")
    asked = {"output_hidden_states": True, "output_attentions": True}
    output = net(**given, **asked)
    plain = with_more_words(base, tokens_of(net))(**longer(**given), **asked)
    assert len(output.hidden_states) == 3
    for mine, theirs in zip(output.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs[:, N:])
    torch.testing.assert_close(output.attentions, plain.attentions)


def test_embeddings_in_the_place_of_ids() -> None:
    base = made("GPT2", "LMHeadModel")
    net, given = prompted(base), batch("left")
    expected = net(**given).logits
    words = base.get_input_embeddings()(given.pop("input_ids"))
    torch.testing.assert_close(net(inputs_embeds=words, **given).logits, expected)


def test_a_loss_is_that_of_a_loop_of_ones_own() -> None:
    net, given = prompted(made("GPT2", "LMHeadModel")), batch("right")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    output = net(**given, labels=labels)
    logits = output.logits[:, :-1].flatten(0, 1).to(output.loss.dtype)  # float32 in new versions
    own = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, own)


# --- beside PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [("GPT2", "LMHeadModel", TaskType.CAUSAL_LM), ("Llama", "ForCausalLM", TaskType.CAUSAL_LM),
     ("Bert", "ForTokenClassification", TaskType.TOKEN_CLS)],
)  # fmt: skip
def test_the_same_as_peft(kind: str, head: str, task: TaskType) -> None:
    """PEFT leaves the virtual positions in; the rest is the same, and so are the gradients."""
    base = made(kind, head)
    net, given = prompted(base), batch("right")
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=N)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    their_tokens = theirs.prompt_encoder["default"].embedding.weight
    their_tokens.data = tokens_of(net).detach().clone()
    outputs = net(**given).logits, theirs(**given).logits[:, N:]
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(*(logits[seen] for logits in outputs), rtol=1e-6, atol=1e-6)
    mine, peft = (
        torch.autograd.grad(logits[seen].square().sum(), tokens)[0]
        for logits, tokens in zip(outputs, (tokens_of(net), their_tokens), strict=True)
    )
    torch.testing.assert_close(mine, peft, rtol=1e-5, atol=1e-6)
