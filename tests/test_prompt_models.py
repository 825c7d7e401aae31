"""Prompt tuning of language models of transformers.

The reference is the plain model with a bigger vocabulary: the virtual tokens are its last entries,
and stand at the beginning of every sequence. It knows nothing of what is tested.
"""

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn

from gift import enable_fine_tuning
from gift.strategies import PromptFineTuningStrategy as Prompts
from tests.common import trainable

N, WORDS, PAD = 3, 20, 1
pytestmark = pytest.mark.filterwarnings("ignore::gift.enable.GiftWarning")

SIZES = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 12, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
         "max_position_embeddings": 24, "use_cache": True, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
PARTS = {"vocab_size": WORDS, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
         "decoder_ffn_dim": 12, "max_position_embeddings": 24, "pad_token_id": PAD,
         "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
         "forced_eos_token_id": None, "scale_embedding": True}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 24},
    "Llama": {"num_key_value_heads": 1},
    "Gemma2": {"num_key_value_heads": 1, "head_dim": 4, "sliding_window": 4},
    "OPT": {"ffn_dim": 12, "word_embed_proj_dim": 8},
    "Bloom": {"n_layer": 2, "n_head": 2},
    "Albert": {"embedding_size": 6, "inner_group_num": 1},
    "DistilBert": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
    "T5": {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
           "decoder_start_token_id": 0},
    "CLIPText": {"projection_dim": 8},
    "Mamba": {"state_size": 4, "pad_token_id": 0},
    **dict.fromkeys(("Bart", "Marian", "Pegasus"), PARTS),
}  # fmt: skip


def made(kind: str, head: str) -> Any:
    """A small model with values like those of a trained one."""
    settings = OWN[kind] if OWN.get(kind) is PARTS else SIZES | OWN.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**settings)
    net = getattr(transformers, f"{kind}{head}")(config).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def tokens_of(net: nn.Module) -> nn.Parameter:
    (name,) = trainable(net)
    assert name.endswith("prompt_tokens")
    return dict(net.named_parameters())[name]


def prompted(base: Any, n: int = N, **settings: Any) -> Any:
    """A copy with `n` virtual tokens, as after some training."""
    net = copy.deepcopy(base)
    enable_fine_tuning(net, Prompts(n, **settings))
    tokens_of(net).data.normal_()
    return net


def with_more_words(base: Any, tokens: Tensor) -> Any:
    """The plain model, whose last words are the virtual tokens."""
    plain = copy.deepcopy(base)
    parts = getattr(base.config, "is_encoder_decoder", False)
    words = (plain.get_encoder() if parts else plain).get_input_embeddings()
    # A virtual token is what the embedding gives, which some scale.
    tokens = tokens / getattr(words, "embed_scale", 1.0)
    words.weight = nn.Parameter(torch.cat([words.weight, tokens]).detach())
    words.num_embeddings += len(tokens)
    return plain


def longer(**given: Tensor) -> dict[str, Tensor]:
    """What the plain model is called with."""
    rows = len(given["input_ids"])
    front = {"input_ids": torch.arange(WORDS, WORDS + N).expand(rows, N),
             "attention_mask": torch.ones(rows, N).long(),
             "token_type_ids": torch.zeros(rows, N).long()}  # fmt: skip
    more = {k: torch.cat([front[k], v], 1) for k, v in given.items() if k in front}
    if "position_ids" in given:
        positions = torch.arange(N).expand(rows, N)
        more["position_ids"] = torch.cat([positions, given["position_ids"] + N], 1)
    return given | more


def batch(side: str, last: int = 2) -> dict[str, Tensor]:
    """Two sequences of 6 and 4 tokens."""
    ids, mask = torch.randint(3, WORDS, (2, 6)), torch.ones(2, 6).long()
    place = slice(4, 6) if side == "right" else slice(0, 2)
    ids[1, place], mask[1, place] = PAD, 0
    ids[0, -1] = last
    return {"input_ids": ids, "attention_mask": mask}


# --- what it computes ----------------------------------------------------------------------------

EACH_TOKEN = [
    ("GPT2", "LMHeadModel"), ("Llama", "ForCausalLM"), ("Gemma2", "ForCausalLM"),
    ("OPT", "ForCausalLM"), ("Bloom", "ForCausalLM"), ("Mamba", "ForCausalLM"),
    ("Bert", "ForMaskedLM"), ("Roberta", "ForMaskedLM"), ("Albert", "ForMaskedLM"),
    ("DistilBert", "ForTokenClassification"), ("Electra", "ForTokenClassification"),
]  # fmt: skip
EACH_SEQUENCE = [
    ("GPT2", "ForSequenceClassification"), ("Llama", "ForSequenceClassification"),
    ("T5", "ForConditionalGeneration"), ("Bart", "ForConditionalGeneration"),
    ("Marian", "MTModel"), ("Pegasus", "ForConditionalGeneration"),
]  # fmt: skip


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
    extra = {}
    if base.config.is_encoder_decoder:
        extra = {"decoder_input_ids": torch.randint(3, WORDS, (2, 4))}
    output, expected = net(**given, **extra).logits, plain(**longer(**given), **extra).logits
    if (kind, head) in EACH_TOKEN:
        expected = expected[:, N:]
    seen = given.get("attention_mask", torch.ones(2, 6)).bool()
    if output.shape[:2] != seen.shape:
        seen = torch.ones(output.shape[:-1]).bool()
    torch.testing.assert_close(output[seen], expected[seen], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output, base(**given, **extra).logits, atol=1e-3)
    words = (plain.get_encoder() if extra else plain).get_input_embeddings()
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
    base = made("CLIPText", "Model")
    base.eos_token_id = base.config.eos_token_id = 19
    net, given = prompted(base), batch("right", last=19)
    given["input_ids"][1, 3] = 19
    plain = with_more_words(base, tokens_of(net))
    output, expected = net(**given), plain(**longer(**given))
    torch.testing.assert_close(output.pooler_output, expected.pooler_output)
    torch.testing.assert_close(output[0], expected[0][:, N:])


def test_all_states_are_those_of_the_given_tokens() -> None:
    """But weights of attention are shown as they are, with those of virtual tokens."""
    base = made("Bert", "Model")
    base.set_attn_implementation("eager")
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
    logits = output.logits[:, :-1].flatten(0, 1).float()  # as transformers does
    own = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, own)


# --- generating ----------------------------------------------------------------------------------

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
