"""What transformers saves of a fine-tuned network, and loads again, over its families of models.

Since version 5 it renames tensors where it saves and loads with ``strict=False``; experts are also
split and stacked.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

import gift  # noqa: E402
from gift import GiftWarning, enable_fine_tuning  # noqa: E402
from gift.strategies import LoRALinearFineTuningStrategy  # noqa: E402

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = TEXT | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 8}
IMAGE_TOKEN = 60


def ids(count: int, length: int = 8) -> Tensor:
    return torch.randint(3, 50, (count, length), generator=torch.Generator().manual_seed(0))


def of_texts(count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids(count)]


def of_classes(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids(count))]


def of_images(count: int) -> list[dict[str, Any]]:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def of_sounds(count: int) -> list[dict[str, Tensor]]:
    sounds = torch.randn(count, 8, 16, generator=torch.Generator().manual_seed(0))
    return [
        {"input_features": sound, "labels": row}
        for sound, row in zip(sounds, ids(count, 4), strict=True)
    ]


def of_gemma_images(count: int) -> list[dict[str, Tensor]]:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = ids(count)
    rows[:, 1:5] = IMAGE_TOKEN
    types = (rows == IMAGE_TOKEN).long()
    return [
        {"input_ids": row, "pixel_values": image, "token_type_ids": kind, "labels": row}
        for row, image, kind in zip(rows, images, types, strict=True)
    ]


def qwen2_5_vl() -> Any:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
        "out_hidden_size": 32, "spatial_merge_size": 2, "fullatt_block_indexes": [1],
        "window_size": 16,
    }  # fmt: skip
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    text = GROUPED | {"rope_scaling": rope, "rope_parameters": rope | {"rope_theta": 10000.0}}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma3(vision: bool) -> Any:
    if not vision:
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA))
    seen = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=GEMMA, vision_config=seen, mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN, image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def image_models(kind: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        image_size=16, patch_size=4, num_labels=3, **settings
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    data: Callable[[int], list[dict[str, Any]]] = of_texts
    needs: str = "Trainer"


FAMILIES = {
    "vit": Family(
        lambda: image_models(
            "ViT", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        ),
        of_images,
    ),
    "swin": Family(
        lambda: image_models("Swin", embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2),
        of_images,
    ),
    "gemma3": Family(lambda: gemma3(vision=False), needs="Gemma3Config"),
    "gemma3 with images": Family(
        lambda: gemma3(vision=True), of_gemma_images, needs="Gemma3Config"
    ),
    "qwen2.5-vl": Family(qwen2_5_vl, needs="Qwen2_5_VLConfig"),
    "mixtral": Family(
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**GROUPED, num_local_experts=4)
        )
    ),
    "bert": Family(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
        of_classes,
    ),
    "llama": Family(
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)
        )
    ),
    "t5": Family(
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        )
    ),
    "whisper": Family(
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=64,
                d_model=32,
                num_mel_bins=8,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=8,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
        of_sounds,
    ),
}


def base_of(family: Family) -> Any:
    torch.manual_seed(0)
    return family.make().eval()


def tuned(family: Family, seed: int) -> Any:
    """The base with fresh deltas, of settings that no shape shows."""
    net = base_of(family)
    torch.manual_seed(seed)
    enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=1, lora_alpha=4))
    return net


def copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(state), dict(other), rtol=0, atol=0)


def assert_base_is_unchanged(net: nn.Module, family: Family) -> None:
    now = dict(net.named_parameters())
    for name, value in base_of(family).named_parameters():
        assert torch.equal(now[name], value), name


class Watch(TrainerCallback):
    """Keeps the state after each step."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.states[state.global_step] = copied(others["model"])


def trainer_for(net: Any, family: Family, folder: Path, **settings: Any) -> tuple[Trainer, Watch]:
    watch, data = Watch(), family.data(8)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        seed=3, **settings,
    )  # fmt: skip
    trainer = Trainer(net, arguments, train_dataset=data, eval_dataset=data, callbacks=[watch])
    return trainer, watch


def logits(net: Any, family: Family) -> Tensor:
    with torch.no_grad():
        batch = torch.utils.data.default_collate(family.data(4))
        return net.eval()(**batch).logits


@dataclass
class Run:
    family: Family
    trainer: Trainer
    states: dict[int, dict[str, Tensor]]
    folder: Path


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run that went back to step 2, where the model was called the best."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("run")
    if not hasattr(transformers, family.needs):
        pytest.skip(f"transformers {transformers.__version__} has no {family.needs}")
    trainer, watch = trainer_for(
        tuned(family, 1), family, folder, eval_steps=2, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="is_second", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"is_second": float(trainer.state.global_step == 2)}
    trainer.train()
    return Run(family, trainer, watch.states, folder)


def test_the_best_model_comes_back(run: Run) -> None:
    net = run.trainer.model
    deltas = [name for name, p in net.named_parameters() if p.requires_grad]
    assert any(not torch.equal(run.states[2][name], run.states[4][name]) for name in deltas)
    assert_same(net.state_dict(), run.states[2])
    assert_base_is_unchanged(net, run.family)


def test_a_run_resumes_as_if_never_interrupted(run: Run, tmp_path: Path) -> None:
    fresh = tuned(run.family, seed=2)
    trainer, watch = trainer_for(fresh, run.family, tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-2"))
    assert sorted(watch.states) == [3, 4]
    assert_same(watch.states[4], run.states[4])
    assert_base_is_unchanged(fresh, run.family)


def test_checkpoints_are_small_and_have_the_names_of_the_network(run: Run) -> None:
    saved = load_file(run.folder / "checkpoint-2" / "model.safetensors")
    assert_same(saved, run.states[2])


def test_save_model_says_that_the_folder_is_no_whole_model(run: Run, tmp_path: Path) -> None:
    with pytest.warns(GiftWarning, match="not the whole model"):
        run.trainer.save_model(str(tmp_path / "model"))
    fresh = tuned(run.family, seed=2)
    fresh.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    assert_same(fresh.state_dict(), run.trainer.model.state_dict())


def test_save_pretrained_writes_the_whole_tuned_model(run: Run, tmp_path: Path) -> None:
    net = run.trainer.model
    before = copied(net)
    expected = logits(net, run.family)
    net.save_pretrained(tmp_path)
    assert_same(net.state_dict(), before)
    assert_base_is_unchanged(net, run.family)
    assert torch.equal(logits(net, run.family), expected)
    loaded = type(net)._gift_plain.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, run.family), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(base_of(run.family), run.family), atol=1e-3)


def test_renamed_deltas_are_refused(run: Run) -> None:
    """As checkpoints have them that were written by a bigger model around the network."""
    fresh = tuned(run.family, seed=2)
    before = copied(fresh)
    renamed = {
        key.replace("layer", "encoder.layer").replace("block", "stack"): value
        for key, value in run.states[2].items()
    }
    assert renamed.keys() != before.keys()
    outer = nn.ModuleDict({"inner": fresh})
    for net, state in (
        (fresh, renamed), (outer, {f"inner.{key}": value for key, value in renamed.items()})
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="other names"):
            net.load_state_dict(state, strict=False)
    assert_same(fresh.state_dict(), before)


def test_a_merged_copy_is_not_loaded_under_its_own_deltas(run: Run) -> None:
    net = run.trainer.model
    before = copied(net)
    with gift.merged(net):
        merged = copy.deepcopy(net).state_dict()
    with pytest.raises(RuntimeError, match="merged copy"):
        net.load_state_dict(merged)
    assert_same(net.state_dict(), before)
    assert_base_is_unchanged(net, run.family)
    outer = nn.ModuleDict({"inner": net})
    with pytest.raises(RuntimeError, match="merged copy"):
        outer.load_state_dict({f"inner.{key}": value for key, value in merged.items()})
    assert_same(net.state_dict(), before)
    assert_base_is_unchanged(net, run.family)
