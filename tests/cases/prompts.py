"""Small language models of transformers, and the reference for prompt tuning.

That is the plain model with a bigger vocabulary: the virtual tokens are its last entries, and stand
at the beginning of every sequence. It knows nothing of what is tested.
"""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gift import enable_fine_tuning
from gift.strategies import PromptFineTuningStrategy
from tests.common import trainable

N, WORDS, PAD, END = 3, 20, 1, 2

SIZES = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 12, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": END,
         "max_position_embeddings": 24, "use_cache": True, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
PARTS = {"vocab_size": WORDS, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
         "decoder_ffn_dim": 12, "max_position_embeddings": 24, "pad_token_id": PAD,
         "bos_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0,
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
    "Qwen2": {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 4,
              "max_window_layers": 1},
    "Gemma3": {"num_key_value_heads": 1, "head_dim": 4, "sliding_window": 4},
    "Mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "Mixtral": {"num_key_value_heads": 1, "num_local_experts": 2},
    "GPTNeoX": {"rotary_pct": 0.5},
    "Falcon": {"alibi": True, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "Phi": {"partial_rotary_factor": 0.5},
    "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4},
    "Jamba": {"num_key_value_heads": 1, "use_mamba_kernels": False, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
              "mamba_d_state": 4, "mamba_dt_rank": 2, "num_hidden_layers": 4},
    "CTRL": {"dff": 12},
    **dict.fromkeys(("Bart", "Marian", "Pegasus"), PARTS),
}  # fmt: skip


def config_of(kind: str) -> Any:
    """The class of a family's configuration, or None if transformers is older than the family."""
    return getattr(transformers, f"{kind}{'TextConfig' if kind == 'Gemma3' else 'Config'}", None)


def made(kind: str, head: str, **more: Any) -> Any:
    """A small model with values like those of a trained one; `more` settings."""
    settings = OWN[kind] if OWN.get(kind) is PARTS else SIZES | OWN.get(kind, {})
    if (config_class := config_of(kind)) is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = config_class(**settings | more)
    net = getattr(transformers, f"{kind}{head}")(config).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    if hasattr(net, "set_experts_implementation"):
        net.set_experts_implementation("eager")  # others know no float64
    return net


def tokens_of(net: nn.Module) -> nn.Parameter:
    (name,) = trainable(net)
    assert name.endswith("prompt_tokens")
    return dict(net.named_parameters())[name]


def prompted(base: Any, n: int = N, **settings: Any) -> Any:
    """A copy with `n` virtual tokens, as after some training."""
    net = copy.deepcopy(base)
    enable_fine_tuning(net, PromptFineTuningStrategy(n, **settings))
    tokens_of(net).data.normal_()
    return net


def words_of(model: Any) -> nn.Embedding:
    """The embedding of a model; encoders of old versions of transformers tell it so."""
    return getattr(model, "embed_tokens", None) or model.get_input_embeddings()


def with_more_words(base: Any, tokens: Tensor) -> Any:
    """The plain model, whose last words are the virtual tokens."""
    plain = copy.deepcopy(base)
    parts = getattr(base.config, "is_encoder_decoder", False)
    words = words_of(plain.get_encoder() if parts else plain)
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
# Other families, of which some keep windows of the last tokens, states, or both.
NEIGHBOURS = [(kind, "ForCausalLM") for kind in (
    "Qwen2", "Gemma3", "Mistral", "Mixtral", "GPTNeoX", "Falcon", "Phi", "Mamba2", "Jamba",
)] + [("CTRL", "LMHeadModel")]  # fmt: skip
