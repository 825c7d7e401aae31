"""Files of diffusers: its own pipelines are the other side, in double precision, both ways."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import gift
from gift import FineTuningStrategy, enable_fine_tuning
from gift.factories import ma_adapt, ma_train, mc_layer, mc_name, mc_path, pa_adapt, pc_path
from gift.interop.diffusers import load_diffusers, save_diffusers
from tests.common import full_state, unet

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
base = pytest.importorskip("diffusers.loaders.lora_base", reason="diffusers is not installed")
if not hasattr(base, "LORA_ADAPTER_METADATA_KEY"):
    pytest.skip("diffusers reads no settings in headers", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def encoder() -> Any:
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=50, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    ).eval()  # fmt: skip


def flux_2() -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip


def parts(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split())


def sd_pipeline(**nets: Any) -> Any:
    """A pipeline of Stable Diffusion around a U-Net, and a text encoder or none."""
    absent = parts("vae text_encoder tokenizer safety_checker feature_extractor")
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPipeline(
        scheduler=scheduler, requires_safety_checker=False, **absent | nets
    )


def flux_pipeline(**nets: Any) -> Any:
    absent = parts("vae text_encoder text_encoder_2 tokenizer tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler=scheduler, **absent | nets)


def flux_2_pipeline(**nets: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.Flux2Pipeline(scheduler, None, None, None, **nets)


PIPELINES = {"unet": (unet, sd_pipeline), "transformer": (flux, flux_pipeline)}
both_pipelines = pytest.mark.parametrize("name", PIPELINES)


def output(net: Any) -> Tensor:
    """What a network of these kinds gives for fixed inputs."""
    text = torch.linspace(-1, 1, 80).reshape(1, 5, 16)
    with torch.no_grad():
        if isinstance(net, CLIPTextModel):
            return net(torch.arange(6)[None]).last_hidden_state
        if isinstance(net, diffusers.UNet2DConditionModel):
            return net(torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), 300, text).sample
        if isinstance(net, diffusers.Flux2Transformer2DModel):
            return net(
                torch.linspace(-1, 1, 24).reshape(1, 6, 4), text, torch.tensor([0.3]),
                img_ids=torch.arange(24.0).reshape(6, 4) % 4, txt_ids=torch.zeros(5, 4),
            ).sample  # fmt: skip
        places = torch.arange(18.0).reshape(6, 3) % 4
        return net(
            torch.linspace(-1, 1, 24).reshape(1, 6, 4), text, text[:, 0], torch.tensor([0.3]),
            img_ids=places, txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip


def assert_same(one: Any, other: Any, base: Any) -> None:
    expected = output(one)
    torch.testing.assert_close(output(other), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, output(base), rtol=1e-3, atol=1e-3), "it has no effect"


def randomised(net: Any) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return net


def adapted(base: Any, method: str = "lora", check: Any = None, **settings: Any) -> Any:
    """A copy of `base`, its layers adapted; the delta as after some training."""
    net, check = copy.deepcopy(base), mc_layer() if check is None else check
    enable_fine_tuning(net, FineTuningStrategy([(check, ma_adapt(method, **settings))]))
    return randomised(net)


def mixed(base: Any) -> Any:
    """A copy whose layers have ranks and alphas of their own."""
    net = copy.deepcopy(base)
    caps = [
        (mc_name("to_q"), ma_adapt("lora", rank=3, lora_alpha=-2.0)),
        (mc_name("to_k"), ma_adapt("lora", rank=2, lora_alpha=3.0)),
        (mc_layer(), ma_adapt("lora", rank=2)),
    ]
    enable_fine_tuning(net, FineTuningStrategy(caps))
    return randomised(net)


OURS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda base: adapted(base, rank=2, lora_alpha=3.0),
    "lora, several ranks": mixed,
    "lora, balanced": lambda base: adapted(base, rank=2, conv_layout="balanced"),
    "rslora": lambda base: adapted(base, "rslora", rank=2, lora_alpha=3.0),
    "pissa": lambda base: adapted(base, "pissa", rank=1),
    "dora": lambda base: adapted(base, "dora", rank=2, lora_alpha=3.0, conv_layout="out_as_h"),
}


CELLS = [("transformer", row) for row in OURS if row != "lora, balanced"]
CELLS += [("unet", row) for row in ("lora, several ranks", "lora, balanced", "dora")]


@pytest.mark.parametrize(("name", "row"), CELLS)
def test_a_pipeline_reads_what_gift_writes(name: str, row: str, tmp_path: Path) -> None:
    """And gift reads the same from it."""
    (create, pipeline), make = PIPELINES[name], OURS[row]
    base = create()
    ours, theirs, again = make(base), copy.deepcopy(base), copy.deepcopy(base)
    save_diffusers(ours, tmp_path)
    pipeline(**{name: theirs}).load_lora_weights(tmp_path)
    assert_same(ours, theirs, base)
    reports = load_diffusers(again, tmp_path)
    assert_same(ours, again, base)
    assert {key: report.left for key, report in reports.items()} == {name: {}}


def trained_by_peft(net: Any, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Adapters of PEFT on `net` itself; their tensors and settings as scripts of training save."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 3} | settings)
    randomised(inject_adapter_in_model(config, net))
    return get_peft_model_state_dict(net), config.to_dict()


THEIRS: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_k": 7}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
@both_pipelines
def test_gift_reads_what_a_pipeline_writes(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    create, pipeline = PIPELINES[name]
    base = create()
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    targets = ["to_q", "to_k", "to_out.0", "conv1", "proj_out"]
    state, config = trained_by_peft(theirs, target_modules=targets, **settings)
    pipeline(**{name: theirs}).save_lora_weights(
        tmp_path, **{f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": config}
    )
    load_diffusers(ours, tmp_path / FILE)
    assert_same(theirs, ours, base)


def test_one_file_for_a_pipeline(tmp_path: Path) -> None:
    """Written and read through a pipeline or a dict, with another rank in the text encoder."""
    bases = {"unet": unet(), "text_encoder": encoder()}
    ours = {
        "unet": adapted(bases["unet"], rank=2, lora_alpha=3.0),
        "text_encoder": adapted(bases["text_encoder"], rank=3, check=mc_layer("linear")),
    }
    save_diffusers(sd_pipeline(**ours), tmp_path / "whole.safetensors")
    save_diffusers(ours, tmp_path / "dict.safetensors")
    whole, one = (load_file(tmp_path / f"{kind}.safetensors") for kind in ("whole", "dict"))
    assert whole.keys() == one.keys()
    assert all(torch.equal(whole[key], one[key]) for key in one)
    theirs, mine, apart = (copy.deepcopy(bases) for _ in range(3))
    sd_pipeline(**theirs).load_lora_weights(tmp_path, weight_name="whole.safetensors")
    reports = load_diffusers(sd_pipeline(**mine), tmp_path / "whole.safetensors")
    assert set(reports) == {"unet", "text_encoder"}
    for name, net in apart.items():
        report = load_diffusers(net, tmp_path / "whole.safetensors", name=name)[name]
        (other,) = set(bases) - {name}
        assert report.left == {other: sum(key.startswith(f"{other}.") for key in whole)}
    for name, base in bases.items():
        for net in (theirs[name], mine[name], apart[name]):
            assert_same(ours[name], net, base)
    assert load_diffusers({"unet": copy.deepcopy(bases["unet"])}, tmp_path / "dict.safetensors")


def test_a_text_encoder_whose_attention_is_not_adapted(tmp_path: Path) -> None:
    """Diffusers knows a text encoder by names that only files with old ones have."""
    base = encoder()
    ours, theirs = adapted(base, check=mc_name("fc1"), rank=2), copy.deepcopy(base)
    save_diffusers({"unet": adapted(unet()), "text_encoder": ours}, tmp_path)
    sd_pipeline(unet=unet(), text_encoder=theirs).load_lora_weights(tmp_path)
    assert_same(ours, theirs, base)
    assert all(
        "text_encoder.text_model." in key for key in load_file(tmp_path / FILE) if "text" in key
    )


class Before5(nn.Module):
    """A text encoder as versions of transformers before 5 had it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.text_model = inner


Before5.__name__ = "CLIPTextModel"


@pytest.mark.parametrize("wraps", [(lambda net: net, Before5), (Before5, lambda net: net)])
def test_text_encoders_of_other_versions(wraps: Any, tmp_path: Path) -> None:
    """Both ways, with an alpha for some layers."""
    base = encoder()
    first, second = (wrap(copy.deepcopy(base)) for wrap in wraps)
    caps = [
        (mc_name("q_proj"), ma_adapt("lora", rank=2, lora_alpha=7.0)),
        (mc_name("*_proj", "fc1"), ma_adapt("lora", rank=2)),
    ]
    enable_fine_tuning(first, FineTuningStrategy(caps))
    randomised(first)
    save_diffusers(first, tmp_path, name="text_encoder")
    load_diffusers(second, tmp_path)
    one, other = (getattr(net, "text_model", net) for net in (first, second))
    assert_same(one, other, base)


def older(key: str, processors: bool) -> str:
    """The name that a tensor had when attention processors held the factors, or shortly after."""
    end = "up" if "lora_B" in key else "down"
    layer = key.rpartition(".lora_")[0]
    above, _, last = layer.removesuffix(".0").rpartition(".")
    if "self_attn" in key:
        last = f"to_{last[0]}" if last != "out_proj" else "to_out"
        return f"{above}.{last}_lora.{end}.weight" if processors else (
            f"{layer}.lora_linear_layer.{end}.weight"
        )  # fmt: skip
    inside = f"{above}.processor.{last}_lora" if processors else f"{layer}.lora"
    return f"{inside}.{end}.weight"


@pytest.mark.parametrize("processors", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_older_names(processors: bool, alone: bool, tmp_path: Path) -> None:
    """With those of text encoders; or of a U-Net alone, which had no prefix. The scaling is 1."""
    bases = {"unet": unet(), "text_encoder": encoder()}
    theirs, ours = copy.deepcopy(bases), copy.deepcopy(bases)
    tensors = {}
    for name, target in (("unet", "to_"), ("text_encoder", "_proj")):
        net = copy.deepcopy(bases[name])
        paths = [path for path, _ in net.named_modules() if target in path.rpartition("attn")[2]]
        targets = [path for path in paths if isinstance(net.get_submodule(path), nn.Linear)]
        state, _ = trained_by_peft(net, target_modules=targets)
        lead = "text_encoder.text_model." if name == "text_encoder" else "unet." * (not alone)
        if name == "unet" or not alone:
            tensors |= {lead + older(key, processors): tensor for key, tensor in state.items()}
    assert any(".processor.to_out_lora.up" in key for key in tensors) == processors
    save_file(tensors, tmp_path / FILE)
    if alone:
        theirs["unet"].load_lora_adapter(dict(tensors), prefix=None)
        load_diffusers(ours["unet"], tmp_path)
    else:
        sd_pipeline(**theirs).load_lora_weights(tmp_path)
        load_diffusers(ours, tmp_path)
    for name in ["unet"] if alone else bases:
        assert_same(theirs[name], ours[name], bases[name])


def test_alphas_beside_the_factors(tmp_path: Path) -> None:
    """Of some layers, as some programs of training write them."""
    base = flux()
    source, theirs, ours = (copy.deepcopy(base) for _ in range(3))
    state, _ = trained_by_peft(source, target_modules=["to_q", "to_k"])
    layers = sorted({key.rpartition(".lora_")[0] for key in state})
    tensors = {f"transformer.{key}": tensor for key, tensor in state.items()}
    tensors |= {f"transformer.{layer}.alpha": torch.tensor(3.0 + i)
                for i, layer in enumerate(layers)}  # fmt: skip
    save_file(tensors, tmp_path / FILE)
    flux_pipeline(transformer=theirs).load_lora_weights(tmp_path)
    load_diffusers(ours, tmp_path)
    assert_same(theirs, ours, base)


def test_a_file_of_one_network_has_no_names(tmp_path: Path) -> None:
    base = unet()
    theirs, ours, again = (copy.deepcopy(base) for _ in range(3))
    trained_by_peft(theirs, target_modules=["to_q", "conv1"])
    theirs.save_lora_adapter(tmp_path)
    load_diffusers(ours, tmp_path)
    assert_same(theirs, ours, base)
    save_diffusers(ours, tmp_path / "again.safetensors", name="")
    again.load_lora_adapter(
        tmp_path, weight_name="again.safetensors", prefix=None, use_safetensors=True
    )
    assert_same(theirs, again, base)


def test_lokr_with_settings(tmp_path: Path) -> None:
    base = unet()
    theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    config = LoKrConfig(r=2, alpha=3, decompose_factor=2, target_modules=["to_q", "proj_in"])
    inject_adapter_in_model(config, theirs)
    randomised(theirs)
    settings = {f"unet.{key}": sorted(value) if isinstance(value, set) else value
                for key, value in config.to_dict().items()}  # fmt: skip
    state = {f"unet.{key}": tensor for key, tensor in get_peft_model_state_dict(theirs).items()}
    save_file(state, tmp_path / FILE, {"lora_adapter_metadata": json.dumps(settings)})
    load_diffusers(ours, tmp_path)
    assert_same(theirs, ours, base)


LOKR: dict[str, dict[str, Any]] = {
    "factors": {"rank": 1, "alpha": 3.0, "factor": 2},
    "full": {"full_matrix": True, "factor": 4},
    "both": {"rank": 1, "alpha": -2.0, "factor": 4, "decompose_both": True},
}


@pytest.mark.parametrize("settings", LOKR.values(), ids=LOKR)
def test_lokr_is_written_for_a_pipeline_and_for_a_network(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = flux_2()
    ours, theirs, alone, again = (copy.deepcopy(base) for _ in range(4))
    check = mc_name("to_q", "to_k", "linear_in", "to_out")
    enable_fine_tuning(ours, FineTuningStrategy([(check, ma_adapt("lokr", **settings))]))
    randomised(ours)
    save_diffusers(ours, tmp_path)
    flux_2_pipeline(transformer=theirs).load_lora_weights(tmp_path)
    assert_same(ours, theirs, base)
    alone.load_lora_adapter(tmp_path, weight_name=FILE, prefix="transformer", use_safetensors=True)
    assert_same(ours, alone, base)
    load_diffusers(again, tmp_path)
    assert_same(ours, again, base)


def test_lokr_of_convolutions(tmp_path: Path) -> None:
    """For the network's own loader, as pipelines of U-Nets refuse LoKr."""
    base = unet()
    caps = mc_name("conv1", "to_q"), ma_adapt("lokr", rank=1, factor=2, conv_layout="out_as_h")
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    enable_fine_tuning(ours, FineTuningStrategy([caps]))
    randomised(ours)
    save_diffusers(ours, tmp_path)
    theirs.load_lora_adapter(tmp_path, weight_name=FILE, prefix="unet", use_safetensors=True)
    assert_same(ours, theirs, base)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        sd_pipeline(unet=copy.deepcopy(base)).load_lora_weights(tmp_path)


@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 99}, {"r": 1, "decompose_both": True}])
def test_lokr_without_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its scaling is 1, as diffusers infers."""
    base = flux_2()
    source, theirs, ours = (copy.deepcopy(base) for _ in range(3))
    config = LoKrConfig(
        alpha=1, decompose_factor=4, target_modules=["to_q", "linear_in"], **settings
    )
    randomised(inject_adapter_in_model(config, source))
    state = {f"transformer.{key}": tensor
             for key, tensor in get_peft_model_state_dict(source).items()}  # fmt: skip
    save_file(state, tmp_path / FILE)
    flux_2_pipeline(transformer=theirs).load_lora_weights(tmp_path)
    load_diffusers(ours, tmp_path)
    assert_same(theirs, ours, base)


def test_lokr_with_alphas_beside_the_factors(tmp_path: Path) -> None:
    """As programs of training write them; of two whole factors, alpha says nothing."""
    base = flux_2()
    source, theirs, ours = (copy.deepcopy(base) for _ in range(3))
    config = LoKrConfig(r=2, decompose_factor=4, target_modules=["to_q", "linear_in"],
                        rank_pattern={"to_q": 99})  # fmt: skip
    randomised(inject_adapter_in_model(config, source))
    mine, their = {}, {}
    for key, tensor in get_peft_model_state_dict(source).items():
        layer, _, end = key.partition(".lokr_")
        of_lycoris = "lycoris_" + layer.replace(".", "_")
        alpha = torch.tensor(3.0)
        mine |= {f"transformer.{key}": tensor, f"transformer.{layer}.alpha": alpha}
        their |= {f"{of_lycoris}.lokr_{end}": tensor, f"{of_lycoris}.alpha": alpha}
    save_file(mine, tmp_path / FILE)
    flux_2_pipeline(transformer=theirs).load_lora_weights(their)
    load_diffusers(ours, tmp_path)
    assert_same(theirs, ours, base)


def test_what_the_header_says(tmp_path: Path) -> None:
    ours = mixed(unet())
    save_diffusers(ours, tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {torch.bfloat16}
    assert all(key.startswith("unet.") for key in settings)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (2, 2)
    escaped = "^" + path.replace(".", r"\.")
    assert settings["unet.rank_pattern"][rf"{escaped}\.to_q"] == 3
    assert settings["unet.alpha_pattern"][rf"{escaped}\.to_q"] == -2
    assert settings["unet.alpha_pattern"][rf"{escaped}\.to_k"] == 3
    assert f"{path}.to_q" in settings["unet.target_modules"]


def two(**layers: Any) -> Any:
    return nn.ModuleDict({"proj": nn.Linear(6, 4), "other": nn.Conv2d(4, 4, 3), **layers})


GOOD = {"proj.lora_A.weight": torch.ones(2, 6), "proj.lora_B.weight": torch.ones(4, 2)}
UNET = {f"unet.{key}": tensor for key, tensor in GOOD.items()}
TEXT = {f"text_encoder.{key}": tensor.clone() for key, tensor in GOOD.items()}
BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any] | str | None, str]] = {
    "two networks": (UNET | TEXT, None, r"deltas of text_encoder, unet: name= says"),
    "half": ({"unet.proj.lora_A.weight": torch.ones(2, 6)}, None, "lora_B.weight is missing"),
    "shapes": (
        UNET | {"unet.proj.lora_B.weight": torch.ones(5, 2)}, None,
        r"unet: proj: lora_B is \(5, 2\), expected \(4, 2\)",
    ),
    "no layer": (UNET | {"unet.x.lora_A.weight": torch.ones(2, 6)}, None, "no such module"),
    "nan": (UNET | {"unet.proj.lora_B.weight": torch.full((4, 2), torch.nan)}, None, "not finite"),
    "kohya": (
        {"lora_unet_proj.lora_up.weight": torch.ones(4, 2)}, None,
        "1 keys are not of this format.*load_kohya reads",
    ),
    "beside others": (UNET | {"y.lora_A.weight": torch.ones(1)}, None, "name of a network first"),
    "twice": (
        UNET | {"unet.proj.lora.down.weight": torch.ones(2, 6)}, None, "is for the same tensor"
    ),
    "alphas twice": (UNET | {"unet.proj.alpha": torch.ones(1)}, {"unet.r": 2}, "alphas twice"),
    "alpha of nothing": (UNET | {"unet.other.alpha": torch.ones(1)}, None, "without factors"),
    "alphas": (UNET | {"unet.proj.alpha": torch.ones(2)}, None, r"has shape \[2\]"),
    "another rank": (UNET, {"unet.r": 3}, r"lora_A is \(2, 6\), expected \(3, 6\)"),
    "another method": (UNET, {"unet.peft_type": "IA3", "unet.r": 2}, "peft_type is 'IA3'"),
    "options": (UNET, {"unet.r": 2, "unet.lora_bias": True}, "lora_bias=True has no counterpart"),
    "no JSON": (UNET, "{", "lora_adapter_metadata is not JSON"),
    "no object": (UNET, "[]", "holds a list, expected an object"),
    "patterns": (
        UNET, {"unet.r": 2, "unet.rank_pattern": {"(a+)+$": 2}}, "may take too long to match"
    ),
}  # fmt: skip


def refused(net: Any, path: Path, message: str, name: str | None = None) -> None:
    """Loading is an error that says so, and leaves the networks as they are."""
    nets = net if isinstance(net, dict) else {"": net}
    before = {key: full_state(one) for key, one in nets.items()}
    with pytest.raises(gift.DeltaFileError, match=message):
        load_diffusers(net, path, name)
    assert {key: full_state(one) for key, one in nets.items()} == before


@pytest.mark.parametrize(("tensors", "settings", "message"), BAD.values(), ids=BAD)
def test_files_that_do_not_fit(
    tensors: dict[str, Tensor], settings: Any, message: str, tmp_path: Path
) -> None:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    metadata = {"lora_adapter_metadata": text} if settings is not None else None
    save_file(tensors, tmp_path / FILE, metadata)
    refused(two(), tmp_path, message)


def test_all_networks_or_none(tmp_path: Path) -> None:
    """All problems are named, and a network that fits stays as it is when another does not."""
    text = {"text_encoder.proj.lora_A.weight": torch.ones(2, 5)}
    save_file(UNET | TEXT | text, tmp_path / FILE)
    nets = {"unet": two(), "text_encoder": two()}
    refused(nets, tmp_path, "text_encoder: proj: lora_A")
    save_file(UNET | TEXT, tmp_path / FILE)
    refused({"unet": two(), "prior": two()}, tmp_path, "no tensors of prior")
    refused(two(), tmp_path, "tensors of text_encoder, unet, none of prior", name="prior")
    refused(nets, tmp_path, "name= is for a single network", name="unet")
    tuned = adapted(two())
    before = full_state(nets["unet"])
    with pytest.raises(RuntimeError, match="already being fine-tuned"):
        load_diffusers({"unet": nets["unet"], "text_encoder": tuned}, tmp_path)
    assert full_state(nets["unet"]) == before
    one = two()  # under two names: the second time it is being fine-tuned
    before = full_state(one)
    with pytest.raises(RuntimeError, match="already being fine-tuned"):
        load_diffusers({"unet": one, "text_encoder": one}, tmp_path)
    assert full_state(one) == before
    only = sd_pipeline(unet=unet())
    with pytest.raises(gift.DeltaFileError, match="text_encoder, which the pipeline does not have"):
        load_diffusers(only, tmp_path)
    with pytest.raises(TypeError, match="or a pipeline of diffusers, got int"):
        load_diffusers(3, tmp_path)
    with pytest.raises(TypeError, match="expected networks by their names"):
        load_diffusers({"unet": 3}, tmp_path)


def tuned(*caps: Any, parameters: Any = ()) -> Any:
    net = two(norm=nn.LayerNorm(4), table=nn.Embedding(5, 4))
    enable_fine_tuning(net, FineTuningStrategy(caps, parameters))
    return net


UNWRITTEN: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "name": (lambda: adapted(two()), {}, "what a ModuleDict is called in its pipeline"),
    "method": (lambda: adapted(two(), "loha"), {"name": "unet"}, "LoRA, DoRA and LoKr, not LOHA"),
    "text": (
        lambda: adapted(encoder(), "lokr", mc_name("q_proj")), {"name": "text_encoder"},
        "of text encoders only LoRA",
    ),
    "trained": (
        lambda: tuned((mc_name("proj"), ma_adapt()), (mc_name("norm"), ma_train())),
        {"name": "unet"}, "in place, which such files cannot hold: norm",
    ),
    "biases": (
        lambda: tuned((mc_path("proj"), ma_adapt(train_bias=True))), {"name": "unet"}, "biases are",
    ),
    "parameters": (
        lambda: tuned(parameters=[(pc_path("norm.weight"), pa_adapt("full_delta"))]),
        {"name": "unet"}, "full_delta",
    ),
    "table": (
        lambda: tuned((mc_name("table"), ma_adapt())), {"name": "unet"},
        "for linear layers and convolutions",
    ),
    "dtype": (
        lambda: adapted(two()), {"name": "unet", "dtype": torch.int8}, "expected a floating-point",
    ),
    "overflow": (
        lambda: randomised_by(1e6), {"name": "unet", "dtype": torch.float16},
        "not finite in torch.float16: unet.proj.lora_A.weight",
    ),
    "nobody": (lambda: {}, {}, "no network that is being fine-tuned"),
    "dots": (lambda: {"a.b": adapted(two())}, {}, "cannot contain dots"),
}  # fmt: skip


def randomised_by(factor: float) -> Any:
    net = adapted(two())
    with torch.no_grad():
        net["proj"].lora_A.fill_(factor)
    return net


@pytest.mark.parametrize(("make", "options", "message"), UNWRITTEN.values(), ids=UNWRITTEN)
def test_what_such_files_cannot_hold(
    make: Callable[[], Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """An error that says so, and the file that was there stays."""
    (tmp_path / FILE).write_bytes(b"before")
    with pytest.raises(gift.DeltaFileError, match=message):
        save_diffusers(make(), tmp_path, **options)
    assert (tmp_path / FILE).read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
