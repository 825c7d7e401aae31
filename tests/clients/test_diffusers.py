"""diffusers: its models in its loop of training, pipelines that load what gift wrote, averages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gift
from gift import enable_fine_tuning
from gift.strategies import (
    DoRALinearFineTuningStrategy,
    LoRAAllFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)
from tests.clients._properties import Client
from tests.common import all_bits, enabled, full_state, unet

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
training = pytest.importorskip("diffusers.training_utils")

TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
POOLED = TEXT[:, 0]


class Model(NamedTuple):
    """A model, what it is called with, and a pipeline around it that loads deltas.

    Args:
        make: the base.
        latents: their shape.
        conditions: further arguments.
        pipeline: from the model.
        still: what these conditions do not use.
    """

    make: Callable[[], Any]
    latents: tuple[int, ...]
    conditions: dict[str, Any]
    pipeline: Callable[[Any], Any]
    still: tuple[str, ...] = ()


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    ).eval()  # fmt: skip


def sd3() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    ).eval()  # fmt: skip


def parts(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split())


def sd_pipeline(net: Any) -> Any:
    absent = parts("vae text_encoder tokenizer safety_checker feature_extractor")
    scheduler = diffusers.DDIMScheduler()
    return diffusers.StableDiffusionPipeline(
        unet=net, scheduler=scheduler, requires_safety_checker=False, **absent
    )


def flux_pipeline(net: Any) -> Any:
    absent = parts("vae text_encoder text_encoder_2 tokenizer tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(transformer=net, scheduler=scheduler, **absent)


def sd3_pipeline(net: Any) -> Any:
    encoders = "text_encoder text_encoder_2 text_encoder_3"
    absent = parts(f"vae {encoders} tokenizer tokenizer_2 tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.StableDiffusion3Pipeline(transformer=net, scheduler=scheduler, **absent)


MODELS = {
    "unet": Model(unet, (2, 4, 8, 8), {"encoder_hidden_states": TEXT}, sd_pipeline),
    "flux": Model(
        flux, (2, 6, 4),
        {
            "encoder_hidden_states": TEXT, "pooled_projections": POOLED,
            "txt_ids": torch.zeros(5, 3), "img_ids": torch.arange(18.0).reshape(6, 3) % 4,
        },
        flux_pipeline,
    ),
    "sd3": Model(
        sd3, (2, 4, 8, 8),
        {"encoder_hidden_states": TEXT, "pooled_projections": POOLED},
        sd3_pipeline,
        still=("*.1.attn.add_q_proj*",),  # the last block does not go on with the text
    ),
}  # fmt: skip


def noise(model: Model, seed: int) -> Tensor:
    return torch.randn(*model.latents, generator=torch.Generator().manual_seed(seed))


def predicted(net: Any, model: Model, latents: Tensor, step: Tensor) -> Tensor:
    moment = {"timestep": step} if model.make is not flux else {"timestep": step / 1000}
    found: Tensor = net(hidden := latents, **moment, **model.conditions).sample
    assert found.shape == hidden.shape
    return found


def denoised(net: Any, model: Model) -> Tensor:
    with torch.no_grad():
        return predicted(net.eval(), model, noise(model, 2), torch.tensor([300, 300]))


def train(net: Any, model: Model, steps: int, ema: Any = None) -> list[float]:
    """The loop of its examples: noise at random moments, which the model is to predict."""
    scheduler = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    clean, losses = noise(model, 3), []
    net.train()
    for i in range(steps):
        target, step = noise(model, 4 + i % 3), torch.tensor([600, 200 + 100 * (i % 3)])
        found = predicted(net, model, scheduler.add_noise(clean, target, step), step)
        loss = nn.functional.mse_loss(found, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if ema is not None:
            ema.step(net.parameters())
    return losses


def lora_of(net: Any, model: Model, folder: Path) -> Any:
    """A fresh base into which a pipeline has loaded what gift wrote."""
    fresh = model.make()
    pipeline = model.pipeline(fresh)
    if model.make is unet:
        gift.save_kohya(net, folder / "lora.safetensors")
        pipeline.load_lora_weights(folder / "lora.safetensors")
    else:
        gift.save_diffusers(net, folder)
        pipeline.load_lora_weights(folder)
    return fresh


@pytest.mark.parametrize("name", MODELS)
def test_training_and_saving(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    net = model.make()
    plain = type(net)
    client = Client(net, lambda: denoised(net, model))
    client.enable(LoRALinearFineTuningStrategy(rank=2, lora_alpha=3))
    losses = train(net, model, 12)

    def reload() -> Tensor:
        loaded = lora_of(net, model, tmp_path)
        expected = denoised(net, model)
        torch.testing.assert_close(denoised(loaded, model), expected, rtol=1e-4, atol=1e-5)
        net.save_pretrained(tmp_path / "model")
        return denoised(plain.from_pretrained(tmp_path / "model"), model)

    client.check(losses, reload, still=model.still)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", [LoRAAllFineTuningStrategy, DoRALinearFineTuningStrategy])
def test_other_strategies(
    strategy: Callable[..., Any], checkpointing: bool, tmp_path: Path
) -> None:
    model = MODELS["unet"]
    net = model.make()
    client = Client(net, lambda: denoised(net, model))
    client.enable(strategy(rank=1))
    if checkpointing:
        net.enable_gradient_checkpointing()
    losses = train(net, model, 9)

    def reload() -> Tensor:
        gift.save(net, tmp_path / "delta.safetensors")
        fresh = model.make()
        gift.load(fresh, tmp_path / "delta.safetensors")
        return denoised(fresh, model)

    client.check(losses, reload, exact=True)


def tokenizer(folder: Path) -> Any:
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{c}</w>" for c in "abcdefgh")]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )


def pipeline(folder: Path) -> Any:
    torch.manual_seed(0)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=18, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
    )
    made = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=encoder.eval(), tokenizer=tokenizer(folder), unet=unet(),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def painted(made: Any) -> Tensor:
    shown = made(
        "a b c", num_inference_steps=3, height=8, width=8, output_type="pt", guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return shown.images


def test_a_whole_pipeline(tmp_path: Path) -> None:
    """With deltas in two of its models: its folder is whole, and a fresh one loads one file."""
    made = pipeline(tmp_path)
    base = painted(made)
    bits = {name: all_bits(getattr(made, name)) for name in ("unet", "text_encoder")}
    for net in (made.unet, made.text_encoder):
        enabled(net, LoRALinearFineTuningStrategy(rank=2), std=0.2)
    expected = painted(made)
    assert not torch.allclose(expected, base, atol=1e-2)
    made.save_pretrained(tmp_path / "pipeline")
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(painted(loaded), expected, rtol=1e-4, atol=1e-4)
    gift.save_kohya(
        {"lora_unet_": made.unet, "lora_te_": made.text_encoder}, tmp_path / "lora.safetensors"
    )
    fresh = pipeline(tmp_path)
    fresh.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(painted(fresh), expected, rtol=1e-4, atol=1e-4)
    with gift.merged(made.unet), gift.merged(made.text_encoder):
        torch.testing.assert_close(painted(made), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(painted(made), expected)
    for name in bits:
        gift.disable_fine_tuning(getattr(made, name))
        assert all_bits(getattr(made, name)) == bits[name]
    assert torch.equal(painted(made), base)


def test_its_averages(tmp_path: Path) -> None:
    """`EMAModel` of the trained parameters: stored, copied, restored, and saved with the model."""
    model = MODELS["unet"]
    net = model.make()
    enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=1))
    ema = training.EMAModel(net.parameters(), decay=0.5, use_ema_warmup=False)
    assert len(ema.shadow_params) == len(list(net.parameters()))
    expected = [p.detach().clone() for p in net.parameters()]
    for i in range(4):
        train(net, model, 1, ema)
        decay = ema.get_decay(i + 1)
        expected = [
            value * decay + p.detach() * (1 - decay)
            for value, p in zip(expected, net.parameters(), strict=True)
        ]
    last = denoised(net, model)
    ema.store(net.parameters())
    ema.copy_to(net.parameters())
    for parameter, value in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    average = denoised(net, model)
    assert not torch.allclose(average, last, atol=1e-4)
    net.save_pretrained(tmp_path)
    ema.restore(net.parameters())
    assert torch.equal(denoised(net, model), last)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(denoised(loaded, model), average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_fused_projections(name: str) -> None:
    """Refused while the deltas are trained, right for a while or for good when merged."""
    model = MODELS[name]
    net = enabled(model.make(), LoRALinearFineTuningStrategy(rank=2))
    expected, before = denoised(net, model), list(net.state_dict())
    with pytest.raises(RuntimeError, match=r"is about to join.*gift.merge\(network\)"):
        net.fuse_qkv_projections()
    assert list(net.state_dict()) == before
    assert torch.equal(denoised(net, model), expected)
    held = full_state(net)
    with gift.merged(net):
        net.fuse_qkv_projections()
        torch.testing.assert_close(denoised(net, model), expected, rtol=1e-4, atol=1e-5)
    assert full_state(net) == held
    assert torch.equal(denoised(net, model), expected)
    gift.merge(net).fuse_qkv_projections()
    assert any("to_qkv" in path for path, _ in net.named_modules())
    torch.testing.assert_close(denoised(net, model), expected, rtol=1e-4, atol=1e-5)


def test_layers_of_an_adapter_for_images_join() -> None:
    """Processors with weights of their own are set on attentions whose projections are adapted."""
    model = MODELS["unet"]
    net = enabled(model.make(), LoRALinearFineTuningStrategy(rank=2))
    processors = {
        path: diffusers.models.attention_processor.IPAdapterAttnProcessor2_0(
            hidden_size=8, cross_attention_dim=16
        )
        if "attn2" in path
        else diffusers.models.attention_processor.AttnProcessor2_0()
        for path in net.attn_processors
    }
    net.set_attn_processor(processors)
    assert any("to_k_ip" in path for path, _ in net.named_parameters())
