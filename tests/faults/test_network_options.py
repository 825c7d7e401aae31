"""Options of networks from a stranger's job: none runs code, fetches it, or reads another file."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gift.jobs import Job, run_job
from gift.jobs.networks import job_network
from gift.zoo import NetworkError, load_network
from tests.test_zoo import model_folder

transformers = pytest.importorskip("transformers")


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return open, (str(self.flag), "w")


def trap(tmp_path: Path) -> str:
    """A folder of a model whose weights are a pickle that runs code."""
    model_folder(tmp_path, "bert")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    return f"transformers:{tmp_path}"


HOSTILE: dict[str, dict[str, Any]] = {
    "unpickling": {"weights_only": False},
    "code of the folder": {"trust_remote_code": True},
    "code, by a word": {"trust_remote_code": "yes"},
    "kernels": {"use_kernels": True},
    "all kernels": {"allow_all_kernels": True},
    "kernel": {"attn_implementation": "owner/kernel"},
    "kernel by another name": {"_attn_implementation": "owner/kernel"},
    "kernel inside": {"_attn_implementation_internal": "owner/kernel"},
    "kernel for parts": {"attn_implementation": {"": "owner/kernel"}},
    "kernel that is fetched": {"attn_implementation": "flash_attention_2"},
    "experts": {"experts_implementation": "owner/kernel"},
    "kernels by configuration": {"kernel_config": {"RMSNorm": "owner/kernel"}},
    "part": {"text_config": {"_attn_implementation": "owner/kernel"}},
    "pipeline": {"custom_pipeline": "owner/code"},
    "quantising": {"quantization_config": {"quant_method": "own", "modules": "os"}},
    "other code": {"code_revision": "main"},
    "automatic": {"auto_map": {"AutoModel": "x.Y"}},
    "configuration": {"config": "/etc/passwd"},
    "state": {"state_dict": {}},
    "generation": {"generation_config": "owner/x"},
    "file": {"gguf_file": "/etc/passwd"},
    "unsafe files": {"use_safetensors": False},
    "a folder above": {"subfolder": "../.."},
    "an absolute folder": {"subfolder": "/etc"},
    "a hidden folder": {"subfolder": "a/.git"},
    "a revision that is a path": {"revision": "../x"},
    "a type that is code": {"torch_dtype": "os.system"},
    "a type that is an attribute": {"dtype": "__class__"},
    "places": {"device_map": "auto"},
    "places by name": {"device_map": {"": "disk"}, "offload_folder": "/tmp/x"},
    "cache": {"cache_dir": "/tmp/x"},
    "token": {"token": "secret"},
    "proxies": {"proxies": {"https": "http://evil"}},
    "adapters": {"adapter_kwargs": {"weights_only": False}},
    "key mapping": {"key_mapping": {"(a+)+$": "x"}},
    "hooks": {"tqdm_class": "os.system"},
    "large": {"num_labels": 10**12},
    "larger": {"hidden_size": 10**30},
    "not a number": {"num_labels": "7"},
    "class": {"__class__": 3},
    "architectures": {"architectures": ["Evil"]},
    "what the file calls its own": {"evil_switch": True},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_option_of_transformers_runs_code(name: str, tmp_path: Path) -> None:
    network = trap(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"evil_switch": False, "weights_only": True}  # as if they were attributes
    (tmp_path / "config.json").write_text(json.dumps(config))
    for weights in ("default", None):
        with pytest.raises(NetworkError, match="cannot be made with these options"):
            load_network(network, weights, **HOSTILE[name])
    assert not (tmp_path / "ran").exists()


def test_the_trap_is_one(tmp_path: Path) -> None:
    """Without the refusal it would run; and what is unpickled safely says why it is refused."""
    trap(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"checkpoint_path": "x.pth"}, {"pretrained_cfg": {"file": "x.pth"}},
        {"pretrained_cfg": "http://evil"}, {"pretrained_cfg_overlay": {"custom_load": True}},
        {"cache_dir": "/tmp"}, {"block_args": {"layer": "os.system"}}, {"pretrained": True},
        {"act_layer": "os.system"}, {"norm_layer": {"x": 1}}, {"num_classes": 10**10},
        {"features_only": True},
    ],
)  # fmt: skip
def test_no_option_of_timm_reads_files(option: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    with pytest.raises(NetworkError, match="cannot be made with these options"):
        load_network("timm:test_vit", None, **option)


@pytest.mark.parametrize(
    "option",
    [
        {"weights_backbone": "../x.pth"}, {"norm_layer": "os.system"}, {"progress": "x"},
        {"num_classes": 0}, {"backbone": {"x": 1}}, {"min_size": [10**9] * 3},
    ],
)  # fmt: skip
def test_no_option_of_torchvision_is_more_than_numbers(option: dict[str, Any]) -> None:
    with pytest.raises(NetworkError, match="cannot be made with these options"):
        load_network("torchvision:fasterrcnn_resnet50_fpn", None, **option)


@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("hidden", ["", "_"])
def test_a_configuration_cannot_ask_for_kernels(name: str, hidden: str, tmp_path: Path) -> None:
    """That of the folder, rather than of the job."""
    model_folder(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    config[hidden + name] = "owner/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NetworkError, match="asks for 'owner/kernel'"):
        load_network(f"transformers:{tmp_path}")


def test_harmless_options_have_their_effect(tmp_path: Path) -> None:
    model_folder(tmp_path, "bert")
    name = f"transformers:{tmp_path}"
    net: Any = load_network(
        name, num_labels=5, dtype="bfloat16", attn_implementation="eager", hidden_dropout_prob=0.25,
        id2label={n: f"c{n}" for n in range(5)}, ignore_mismatched_sizes=True, use_safetensors=True,
        local_files_only=True, revision="main",
    ).net  # fmt: skip
    assert net.config.num_labels == 5
    assert net.config.id2label[3] == "c3"
    assert net.dtype is torch.bfloat16
    assert net.config._attn_implementation == "eager"
    assert {m.p for m in net.modules() if type(m).__name__ == "Dropout"} >= {0.25}
    shallow: Any = load_network(name, None, num_hidden_layers=3, hidden_act="relu").net
    assert len(shallow.bert.encoder.layer) == 3
    assert type(shallow.bert.encoder.layer[0].intermediate.intermediate_act_fn).__name__ == "ReLU"


def test_your_own_code_may_give_any_options(tmp_path: Path) -> None:
    """The error says how, and it is so."""
    model_folder(tmp_path, "bert")
    name = f"transformers:{tmp_path}"
    load_network(name, allow_import=True, output_loading_info=False)
    with pytest.raises(NetworkError, match="allow_import=True"):
        load_network(name, output_loading_info=False)


def hostile_job(tmp_path: Path, options: dict[str, Any]) -> Job:
    texts = tmp_path / "t.csv"
    texts.write_text("text,label\nwords,0\nmore,1\n")
    return Job.model_validate({
        "network": {"name": trap(tmp_path), "options": options},
        "data": {"kind": "text_table", "train": str(texts)},
        "folder": str(tmp_path / "run"),
    })  # fmt: skip


@pytest.mark.parametrize("options", [{"weights_only": False}, {"use_kernels": True}])
def test_no_job_unpickles_in_any_command(options: dict[str, Any], tmp_path: Path) -> None:
    job = hostile_job(tmp_path, options)
    for call in (run_job, job_network):
        with pytest.raises(NetworkError, match="cannot be made with these options"):
            call(job)
    from gift.cli.app import app
    from gift.jobs.reading import write_job
    from gift.support.atomic_files import write_text

    run = tmp_path / "run"
    write_job(job, run / "job.yaml")
    reader = {"kind": "text", "tokenizer": str(tmp_path), "max_length": 8}
    content = {"task": "classification", "classes": ["0", "1"], "reader": reader}
    write_text(run / "inputs.json", json.dumps(content))
    (run / "best.safetensors").write_bytes(b"")
    for command in (
        ["finetune", str(run / "job.yaml")],
        ["predict", str(run), "words"],
        ["evaluate", str(run), "--data", str(tmp_path / "t.csv")],
        ["merge", str(run), str(tmp_path / "out.pt")],
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 1, command
        assert "cannot be made with these options" in found.output, command
    assert not (tmp_path / "ran").exists()


def test_scripts_of_data_sets_are_not_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from gift.data import DataError, hugging_face

    script = tmp_path / tmp_path.name
    script = script.with_suffix(".py")
    script.write_text("raise SystemExit")
    before = set(sys.modules)
    for name in (str(tmp_path), str(script)):
        with pytest.raises(DataError, match="is a script, which is not run"):
            hugging_face(name, str.split)  # type: ignore[arg-type]
    assert not [name for name in set(sys.modules) - before if script.stem in name]
