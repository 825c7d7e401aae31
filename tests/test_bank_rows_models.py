"""`DeltaBank.rows` on families of transformers, where some layers are left out of the deltas.

Each row is what the network computes with that row's delta alone, in float64.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from gift import AdaptationError, DeltaBank, FineTuningStrategy, GiftWarning
from gift.factories import ma_adapt, mc_path

OLD = int(transformers.__version__.partition(".")[0]) < 5
ROWS = ["a", None, "b", "a"]
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = TEXT | WIDE | {"intermediate_size": 20, "max_position_embeddings": 12}
BOTH = TEXT | {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20,
    "decoder_start_token_id": 3,
}  # fmt: skip


def ids(length: int = 5) -> Tensor:
    return torch.randint(3, 50, (4, length))


def padded() -> dict[str, Tensor]:
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


class Family(NamedTuple):
    """A kind of network.

    Args:
        name: its class is ``transformers.<name><task>``.
        task: see above.
        settings: of its configuration.
        inputs: makes a batch of four rows.
        refused: layers that cannot differ between rows, by parts of their paths.
        why: what the error says of the first of them.
    """

    name: str
    task: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    refused: tuple[str, ...] = ()
    why: str = ""


FAMILIES = [
    Family(
        "Whisper",
        "ForConditionalGeneration",
        BOTH | {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 12},
        lambda: {"input_features": torch.randn(4, 8, 12), "decoder_input_ids": ids()},
        ("encoder.embed_positions", "decoder.embed_positions"),
        r"WhisperEncoder reads model.encoder.embed_positions.weight itself.*Leave this layer out"
        if OLD
        else r"model.encoder.embed_positions.weight gets \(6,\).*Leave this layer out",
    ),
    Family(
        "Bart",
        "ForConditionalGeneration",
        BOTH | {"max_position_embeddings": 12},
        lambda: {"input_ids": ids(6), "decoder_input_ids": ids()},
        ("shared", "embed_tokens", "lm_head", "embed_positions"),
        "BartScaledWordEmbedding, whose forward is its own",
    ),
    Family(
        "OPT",
        "ForCausalLM",
        TEXT | WIDE | {"ffn_dim": 20, "max_position_embeddings": 12, "word_embed_proj_dim": 8},
        padded,
        ("embed_positions",),
        "OPTLearnedPositionalEmbedding, whose forward is its own",
    ),
    Family(
        "MPNet",
        "ForSequenceClassification",
        SMALL,
        padded,
        ("relative_attention_bias",),
        r"relative_attention_bias.weight gets \(5, 5\)",
    ),
    Family(
        "Mamba",
        "ForCausalLM",
        TEXT | WIDE | {"state_size": 4},
        lambda: {"input_ids": ids()},
        ("dt_proj", "conv1d"),
        r"MambaMixer reads \S+weight itself.*Leave this layer out",
    ),
    Family(
        "DebertaV2",
        "ForSequenceClassification",
        SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        padded,
        ("rel_embeddings",),
        r"reads deberta.encoder.rel_embeddings.weight itself",
    ),
    Family("Albert", "ForSequenceClassification", SMALL | {"embedding_size": 8}, padded),
    Family(
        "Wav2Vec2",
        "ForCTC",
        SMALL
        | {"conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (5, 3)}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        lambda: {"input_values": torch.randn(4, 60)},
    ),
    Family(
        "Segformer",
        "ForImageClassification",
        {
            "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "strides": [2, 2],
            "hidden_sizes": [8, 16], "patch_sizes": [3, 3], "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2], "decoder_hidden_size": 8,
        },
        lambda: {"pixel_values": torch.randn(4, 3, 16, 16)},
    ),
]  # fmt: skip


def made(family: Family) -> Any:
    config = getattr(transformers, f"{family.name}Config")(**family.settings)
    return getattr(transformers, f"{family.name}{family.task}")(config).eval()


def layers_of(net: nn.Module) -> list[str]:
    kinds = nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d
    return [path for path, module in net.named_modules() if isinstance(module, kinds)]


def bank_of(net: nn.Module, layers: list[str]) -> DeltaBank:
    bank = DeltaBank(copy.deepcopy(net))
    for name in "ab":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GiftWarning)
            bank.add(name, strategy=FineTuningStrategy([
                (mc_path(*layers), ma_adapt("lora", rank=2, clip_rank=True))
            ]))  # fmt: skip
        bank.activate(name)
        with torch.no_grad():
            for parameter in bank.net.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        bank.activate(None)
    return bank


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_row_is_that_of_its_delta_alone(family: Family, double: None) -> None:
    net, inputs = made(family), family.inputs()
    able = [p for p in layers_of(net) if not any(part in p for part in family.refused)]
    if family.name == "DebertaV2":  # see below
        able = [path for path in able if "query_proj" not in path and "key_proj" not in path]
        if OLD:  # it computes with TorchScript there
            bank = bank_of(net, able)
            error = pytest.raises(ValueError, match=r"TorchScript.*Leave this layer out")
            with error, bank.rows(ROWS):
                bank.net(**inputs)
            return
    for layers in (able, able[::2], able[1::3]):
        bank = bank_of(net, layers)
        with torch.no_grad():
            with bank.rows(ROWS):
                found = bank.net(**inputs)[0]
            assert_rows(found, bank, inputs)


def assert_rows(found: Tensor, bank: DeltaBank, inputs: dict[str, Any]) -> None:
    """Each row is what its delta gives alone."""
    with torch.no_grad():
        for row, name in enumerate(ROWS):
            bank.activate(name)
            expected = bank.net(**inputs)[0][row]
            torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10, equal_nan=True)
            bank.activate(None)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.refused], ids=lambda family: family.name
)
def test_layers_that_cannot_differ_are_named(family: Family, double: None) -> None:
    net, inputs = made(family), family.inputs()
    layers = [path for path in layers_of(net) if family.refused[0] in path]
    bank = bank_of(net, layers)
    expected = bank.net(**inputs)[0]
    errors = AdaptationError, ValueError, RuntimeError
    if OLD and family.name == "Mamba":  # calls them
        with bank.rows(ROWS):
            found = bank.net(**inputs)[0]
        assert_rows(found, bank, inputs)
        return
    with pytest.raises(errors, match=family.why), bank.rows(ROWS):
        bank.net(**inputs)
    torch.testing.assert_close(bank.net(**inputs)[0], expected, equal_nan=True)


def test_a_network_that_does_not_expect_an_output_for_each_row_is_told_which_layers_gave_it(
    double: None,
) -> None:
    """DeBERTa repeats the projections of its relative positions for each row by itself."""
    (family,) = [family for family in FAMILIES if family.name == "DebertaV2"]
    net, inputs = made(family), family.inputs()
    bank = bank_of(net, [path for path in layers_of(net) if "query_proj" in path])
    with pytest.raises(RuntimeError, match="Expected size") as error, bank.rows(ROWS):
        bank.net(**inputs)
    (note,) = error.value.__notes__
    assert "query_proj.weight'] got one input for all rows" in note
