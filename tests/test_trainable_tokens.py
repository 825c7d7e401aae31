"""Chosen rows of an embedding, trained as they are."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gift
from gift.factories import ma_adapt, mc_path
from gift.methods import TrainableTokens
from gift.strategies import FineTuningStrategy

ROWS = [29, 3, 0]
IDS = torch.arange(30).reshape(3, 10)


def llama(tied: bool = True) -> Any:
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(rows: Any, *places: str, new: bool = False) -> FineTuningStrategy:
    places = places or ("model.embed_tokens",)
    adapt = ma_adapt("trainable_tokens", rows=rows, new=new)
    return FineTuningStrategy([(mc_path(place), adapt) for place in places])


def moved(net: Any) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_are_those_of_these_rows(tied: bool, new: bool) -> None:
    base = llama(tied)
    net, other = copy.deepcopy(base), copy.deepcopy(base)
    report = gift.enable_fine_tuning(net, tokens(ROWS, new=new))
    assert report.trainable_after == 3 * 16
    if new:  # a tied head computes these rows apart
        torch.testing.assert_close(net(IDS).logits, base(IDS).logits)
    else:
        assert torch.equal(net(IDS).logits, base(IDS).logits)
    moved(net)
    rows = sorted(ROWS)
    with torch.no_grad():
        other.model.embed_tokens.weight[rows] += net.model.embed_tokens.tokens_T
    torch.testing.assert_close(net(IDS).logits, other(IDS).logits)
    net(IDS, labels=IDS).loss.backward()
    other(IDS, labels=IDS).loss.backward()
    expected = other.model.embed_tokens.weight.grad[rows]
    torch.testing.assert_close(net.model.embed_tokens.tokens_T.grad, expected)
    merged = gift.merge(copy.deepcopy(net))
    torch.testing.assert_close(merged(IDS).logits, other(IDS).logits)
    gift.disable_fine_tuning(net)
    assert torch.equal(net(IDS).logits, base(IDS).logits)


def test_the_row_of_padding_gets_no_gradient() -> None:
    layer = nn.Embedding(6, 4, padding_idx=2)
    gift.enable_fine_tuning(
        layer, FineTuningStrategy([(mc_path(""), ma_adapt("trainable_tokens", rows=[1, 2]))])
    )
    layer(torch.tensor([[1, 2, 3]])).sum().backward()
    assert layer.tokens_T.grad.tolist() == [[1.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_come_with_the_delta(tied: bool, tmp_path: Path) -> None:
    base = llama(tied)
    places = ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head")
    nets = [copy.deepcopy(base) for _ in range(3)]
    for number, net in enumerate(nets):
        torch.manual_seed(number)
        net.resize_token_embeddings(33)
        with torch.no_grad():
            net.model.embed_tokens.weight[30:].normal_()
    one, other, wrong = nets
    ids = torch.arange(33)[None]
    assert not torch.allclose(one(ids).logits, other(ids).logits)
    gift.enable_fine_tuning(one, tokens([0, *range(30, 33)], *places, new=True))
    moved(one)
    gift.save(one, tmp_path / "new.safetensors")
    gift.load(other, tmp_path / "new.safetensors")
    assert torch.equal(one(ids).logits, other(ids).logits)
    gift.load(other, tmp_path / "new.safetensors")  # again, onto the fine-tuned network
    with torch.no_grad():
        wrong.model.embed_tokens.weight[5] += 1
    with pytest.raises(gift.DeltaFileError, match=r"other values.*embed_tokens"):
        gift.load(wrong, tmp_path / "new.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_peft_reads_and_writes_the_same(tied: bool, tmp_path: Path) -> None:
    base = llama(tied)
    net = copy.deepcopy(base)
    gift.enable_fine_tuning(net, tokens(ROWS))
    gift.save_peft(moved(net), tmp_path / "gift")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "gift"))
    torch.testing.assert_close(theirs(IDS).logits, net(IDS).logits)
    config = peft.TrainableTokensConfig(token_indices=[9, 2], target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.save_pretrained(str(tmp_path / "peft"))
    fresh = copy.deepcopy(base)
    gift.load_peft(fresh, tmp_path / "peft")
    torch.testing.assert_close(theirs(IDS).logits, fresh(IDS).logits)


def test_rows_are_numbers_ranges_or_text() -> None:
    assert TrainableTokens(rows=range(4, 7)).rows == "4-6"
    assert TrainableTokens(rows=[9, 1, 2, 3, 9]).rows == "1-3,9"
    assert TrainableTokens(rows="0,5-6").numbers == [0, 5, 6]
    assert TrainableTokens(rows=7).rows == "7"
    for wrong in ([], [-1], "3-1", "5,4", "a", [1.5]):
        with pytest.raises(ValueError, match="rows is"):
            TrainableTokens(rows=wrong)
    with pytest.raises(gift.AdaptationError, match="it has 30 rows, there is no row 30"):
        gift.enable_fine_tuning(llama(), tokens([30]))


def test_it_goes_with_a_delta_on_top_and_with_lora_elsewhere() -> None:
    net = llama()
    first = FineTuningStrategy(
        [*tokens(ROWS).module_caps, (mc_path(regex=".*q_proj"), ma_adapt("lora"))]
    )
    gift.enable_fine_tuning(net, first)
    moved(net)
    before = net(IDS).logits
    gift.enable_fine_tuning(net, tokens([5]), stack=True)
    torch.testing.assert_close(net(IDS).logits, before)
    moved(net)
    gift.disable_fine_tuning(net)
    assert torch.equal(net(IDS).logits, before)
