"""P-tuning: virtual tokens through a prompt encoder, beside that of PEFT and plain layers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptEncoder, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import gift
from gift import disable_fine_tuning, enable_fine_tuning, plan_fine_tuning
from gift.strategies import PromptFineTuningStrategy, PTuningFineTuningStrategy
from tests.cases.prompts import N, batch, made
from tests.common import full_state, trainable

pytestmark = [pytest.mark.usefixtures("double"),
              pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")]  # fmt: skip

Tuning = PTuningFineTuningStrategy
ENCODERS: dict[str, dict[str, Any]] = {
    "mlp": {"encoder_size": 5},
    "lstm": {"encoder": "lstm", "encoder_size": 5, "encoder_layers": 3},
    "lstm as it is": {"encoder": "lstm"},
}
encoders = pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS)


def tuned(base: Any, **settings: Any) -> Any:
    net = copy.deepcopy(base)
    enable_fine_tuning(net, Tuning(N, **settings))
    return net


def of_peft(net: nn.Module, settings: dict[str, Any], dim: int = 8) -> PromptEncoder:
    """PEFT's encoder with the same values."""
    kind = settings.get("encoder", "mlp").upper()
    config = PromptEncoderConfig(
        num_virtual_tokens=N, token_dim=dim, num_transformer_submodules=1,
        encoder_reparameterization_type=kind, encoder_hidden_size=settings.get("encoder_size", dim),
        encoder_num_layers=settings.get("encoder_layers", 2),
    )  # fmt: skip
    encoder = PromptEncoder(config).double()
    own, theirs = (
        [dict(net.named_parameters())[name] for name in trainable(net)],
        encoder.parameters(),
    )
    for mine, other in zip(own, theirs, strict=True):
        other.data = mine.detach().clone()
    return encoder


@encoders
@pytest.mark.parametrize(("kind", "head"), [("GPT2", "LMHeadModel"), ("Bert", "ForMaskedLM"),
                                            ("T5", "ForConditionalGeneration")])  # fmt: skip
def test_it_is_a_prompt_of_what_the_encoder_gives(
    kind: str, head: str, settings: dict[str, Any]
) -> None:
    """Value and all gradients."""
    base, given = made(kind, head), batch("left")
    if kind == "T5":
        given["decoder_input_ids"] = torch.tensor([[0, 3]] * 2)
    net = tuned(base, **settings)
    encoder = of_peft(net, settings)
    tokens = encoder(torch.arange(N))
    plain = copy.deepcopy(base)
    enable_fine_tuning(plain, PromptFineTuningStrategy(N))
    (name,) = trainable(plain)
    put = {name: tokens}
    output = net(**given).logits
    expected = torch.func.functional_call(plain, put, (), given).logits
    seen = given["attention_mask"].bool() if output.shape[1] == 6 else torch.ones(2, 2).bool()
    torch.testing.assert_close(output[seen], expected[seen])
    for logits in (output, expected):
        logits[seen].square().sum().backward()
    own = [dict(net.named_parameters())[name] for name in trainable(net)]
    for mine, theirs in zip(own, encoder.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        assert mine.grad.any()  # type: ignore[union-attr]


@encoders
def test_in_front_of_embeddings(settings: dict[str, Any]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    base, x = nn.TransformerEncoder(layer, 2).double(), torch.randn(2, 5, 8)
    net = tuned(base, **settings)
    tokens: Tensor = of_peft(net, settings)(torch.arange(N)).detach()
    expected = base(torch.cat([tokens.expand(2, N, 8), x], 1))[:, N:]
    torch.testing.assert_close(net(x), expected)


def test_the_number_of_parameters_is_the_one_that_is_told() -> None:
    d, h = 8, 5
    mlp = d * h + h * h + h * d + 2 * h + d
    lstm = 8 * (d * h + h * h + 2 * h) + 2 * 8 * (3 * h * h + 2 * h)
    lstm += 4 * h * h + 2 * h * d + 2 * h + d
    for settings, size in zip(ENCODERS.values(), (mlp, lstm), strict=False):
        plan = plan_fine_tuning(made("GPT2", "LMHeadModel"), Tuning(N, **settings))
        assert plan.trainable_after == N * d + size


def test_dropout_is_that_of_training() -> None:
    net, given = tuned(made("GPT2", "LMHeadModel", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
                       encoder="lstm", encoder_dropout=0.5), batch("none")  # fmt: skip
    assert torch.equal(net(**given).logits, net(**given).logits)
    net.train()
    assert not torch.equal(net(**given).logits, net(**given).logits)


@encoders
def test_it_writes_what_it_reads(settings: dict[str, Any]) -> None:
    """Step by step with a cache, as without."""
    net, given = tuned(made("Llama", "ForCausalLM"), **settings), batch("left")
    few = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(net.generate(**given, **few), net.generate(**given, **few, use_cache=False))


@encoders
def test_states_files_and_copies_hold_what_training_needs(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base, given = made("GPT2", "LMHeadModel"), batch("left")
    net = tuned(base, **settings)
    expected = net(**given).logits
    gift.save(net, tmp_path / "delta.safetensors")
    loaded, fresh = copy.deepcopy(base), tuned(base, **settings)
    gift.load(loaded, tmp_path / "delta.safetensors")
    fresh.load_state_dict(net.state_dict())
    for other in (loaded, fresh, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(**given).logits, expected)
        assert trainable(other) == trainable(net)
    plain = copy.deepcopy(base)
    enable_fine_tuning(plain, PromptFineTuningStrategy(N))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(net.state_dict())
    before = full_state(loaded := copy.deepcopy(base))
    enable_fine_tuning(loaded, Tuning(N, **settings))
    disable_fine_tuning(loaded)
    assert full_state(loaded) == before


def test_peft_gets_the_virtual_tokens(tmp_path: Path) -> None:
    base, given = made("GPT2", "LMHeadModel"), batch("none")
    net = tuned(base, encoder="lstm")
    gift.save_peft(net, tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(**given).logits[:, N:], net(**given).logits)
    loaded = copy.deepcopy(base)
    gift.load_peft(loaded, tmp_path)
    torch.testing.assert_close(loaded(**given).logits, net(**given).logits)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_virtual_tokens_of_peft(kind: str, tmp_path: Path) -> None:
    base, given = made("GPT2", "LMHeadModel"), batch("none")
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=5,
                                 encoder_reparameterization_type=kind)  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(base), config).eval().double()
    theirs.save_pretrained(str(tmp_path))
    net = copy.deepcopy(base)
    gift.load_peft(net, tmp_path)
    torch.testing.assert_close(net(**given).logits, theirs(**given).logits[:, N:])
    assert trainable(net) == ["transformer.wte.prompt_tokens"]


def test_from_the_meta_device() -> None:
    base = made("GPT2", "LMHeadModel")
    with torch.device("meta"):
        net = type(base)(base.config)
    enable_fine_tuning(net, Tuning(20))
    net.to_empty(device="cpu").load_state_dict(base.state_dict())
    values = [dict(net.named_parameters())[name] for name in trainable(net)]
    assert 0.7 < values[0].std() < 1.3
    assert all(0 < value.abs().max() < 1 for value in values[1:])


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a size alone": ({"encoder": None, "encoder_size": 3}, "encoder_size=3 is that of an encoder"),
    "layers": ({"encoder_layers": 3}, "are those of encoder='lstm'"),
    "dropout": ({"encoder_dropout": 0.1}, "are those of encoder='lstm'"),
    "another encoder": ({"encoder": "gru"}, "expected 'mlp' or 'lstm' or None"),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tuning(**settings)
