"""What a user has who installs gift with nothing more, or with one extra, and no source tree."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gift
from gift.support.optional import install
from noxfile import PROJECT, requirements
from tests.isolated import ROOT, build_wheel, closure, environment, python

EXTRAS = sorted({*PROJECT["optional-dependencies"]} - {"dev", "clients", "docs"})

QUICK_START = """
import sys
import torch
import gift
from gift import disable_fine_tuning, enable_fine_tuning, plan_fine_tuning
from gift.strategies import LoRAAllFineTuningStrategy
from gift.utils.info import collect_trainable_parameters, summary, table_info

def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))

net, strategy, inputs = base(), LoRAAllFineTuningStrategy(rank=4), torch.randn(5, 8)
before = net(inputs)
assert str(plan_fine_tuning(net, strategy))
enable_fine_tuning(net, strategy)
assert str(summary(net))
rows, total = collect_trainable_parameters(net)
assert table_info(rows, header=["index", "name", "shape", "count"])
optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    net(inputs).square().sum().backward()
    optimizer.step()
assert not torch.equal(net(inputs), before)
fresh = base()
enable_fine_tuning(fresh, LoRAAllFineTuningStrategy(rank=4))
fresh.load_state_dict(net.state_dict())
assert torch.equal(fresh(inputs), net(inputs))
gift.save(net, "task.safetensors")
fresh = base()
gift.load(fresh, "task.safetensors")
assert torch.equal(fresh(inputs), net(inputs))
assert gift.inspect("task.safetensors")
disable_fine_tuning(net)
assert torch.equal(net(inputs), before)
print(gift.__file__, *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def run(folder: Path, *arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of an environment, with nothing of this one; warnings are errors."""
    kept = {"PATH", "HOME", "LANG", "SYSTEMROOT", "TMPDIR", "LD_LIBRARY_PATH"}
    clean = {name: value for name, value in os.environ.items() if name in kept}
    clean |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [str(python(folder)), *arguments], cwd=where, env=clean, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="build makes the wheel")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_works_with_its_bare_dependencies(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    bare = closure(requirements())
    assert bare >= {"torch", "tabulate", "safetensors", "numpy"}
    assert not bare & {"torchvision", "transformers", "typer", "pyyaml", "matplotlib", "tqdm"}
    site = environment(home, bare)
    pip = [sys.executable, "-m", "pip", "--python", str(python(home)), "install"]
    made = subprocess.run(
        [*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr

    done = run(home, "-W", "error", "-c", QUICK_START, where=tmp_path)
    assert done.returncode == 0, done.stderr
    place, *modules = done.stdout.split()
    assert Path(place).is_relative_to(site)
    assert not {"transformers", "torchvision", "yaml", "sklearn"} & set(modules)

    for command in (["-m", "gift", "--help"], [str(python(home).with_name("gift")), "--help"]):
        refused = run(home, *command, where=tmp_path)
        assert refused.returncode == 1
        assert refused.stderr.strip().endswith(install("cli")), refused.stderr
        assert "Traceback" not in refused.stderr


def test_the_wheel_has_what_is_not_python_and_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(about).decode()
    tracked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "gift").rglob("*.*")
        if file.suffix != ".md"
    }
    code = {name for name in tracked if not name.endswith((".pyc", ".pyo"))}
    assert {name for name in names if name.startswith("gift/")} == code
    assert f"Name: {PROJECT['name']}\nVersion: {gift.__version__}\n" in text
    assert not re.findall(r"^(?:Project-URL|Home-page): .*", text, re.MULTILINE)


def needed_modules(extra: str) -> list[str]:
    """Every module that gift's code asks for with the extra."""
    asked = re.compile(r'require\(\s*"([\w.]+)",\s*"(\w+)"')
    found = set()
    for file in (ROOT / "gift").rglob("*.py"):
        found |= {module for module, of in asked.findall(file.read_text("utf-8")) if of == extra}
    return sorted(found)


# What is done with an extra: names of commands, of entry points, of documented parts.
DONE = {
    "cli": """
from gift.cli.app import app
for command in ("", "init", "finetune", "find-lr", "evaluate", "predict", "merge", "export", "push",
                "show", "suggest", "table"):
    try:
        app([*command.split(), "--help"], prog_name="gift")
    except SystemExit as done:
        assert not done.code, command
""",
    "train": """
import torch
from gift.strategies import LoRAAllFineTuningStrategy
from gift.training import evaluate, finetune
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
data = torch.randn(32, 4), torch.arange(32) % 2
print(finetune(net, data, data, strategy=LoRAAllFineTuningStrategy(), epochs=1, folder="run"))
""",
    "track": """
import torch
from accelerate.tracking import GeneralTracker
from gift.training import finetune
class Own(GeneralTracker):
    name, requires_logging_directory, tracker = "own", False, None
    def log(self, values, step=None, **more):
        print(step, values)
finetune(torch.nn.Linear(4, 2), (torch.randn(32, 4), torch.arange(32) % 2), epochs=1, track=[Own()])
""",
    "export": """
import torch
program = torch.export.export(torch.nn.Linear(2, 2), (torch.randn(3, 2),))
torch.onnx.export(program, dynamo=True).save("model.onnx")
""",
    "hub": """
from huggingface_hub import HfApi
assert HfApi(library_name="gift").upload_folder
""",
    "vision": """
from PIL import Image
from gift.zoo import load_network
loaded = load_network("torchvision:squeezenet1_1", weights=None, num_classes=3)
Image.new("RGB", (80, 60)).save("image.png")
assert loaded.net(loaded.reader("image.png")[None]).shape == (1, 3)
""",
    "detection": """
from gift.data.boxes import masks_of
from gift.zoo import load_network
loaded = load_network("torchvision:ssdlite320_mobilenet_v3_large", weights=None, num_classes=3)
assert masks_of([[[0, 0, 4, 0, 4, 4]]], 8, 8).any()
""",
    "text": """
import transformers
from gift import enable_fine_tuning
from gift.schedules import transformers as schedules
from gift.strategies import LoRALinearFineTuningStrategy
config = transformers.BertConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
enable_fine_tuning(transformers.BertModel(config), LoRALinearFineTuningStrategy())
""",
    "audio": """
import soundfile
from gift.data import AudioReader
soundfile.write("sound.wav", [0.0, 0.5] * 4000, 8000)
assert AudioReader(rate=16000, seconds=0.5)("sound.wav").shape == (1, 8000)
""",
    "tables": """
from pathlib import Path
from gift.data import tabular
Path("table.csv").write_text("size,colour,label\\n1,red,a\\n2,blue,b\\n")
assert len(tabular("table.csv").reader.features) == 3
""",
    "segmentation": """
import torch
from gift.zoo import load_network
loaded = load_network("smp:unet", weights=None, encoder_name="resnet18", classes=2)
assert loaded.net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 32, 32)
""",
    "contrastive": """
import torch
from gift.training.tasks.contrastive import metric_loss
assert metric_loss("NTXentLoss")(torch.eye(4), torch.tensor([0, 0, 1, 1])) > 0
""",
    "timm": """
from gift.zoo import load_network
load_network("timm:resnet10t", weights=None, num_classes=3)
""",
    "datasets": """
import datasets
from gift.data import hugging_face
data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
assert len(hugging_face(data.class_encode_column("label"), lambda text, train=False: text)) == 2
""",
    "yaml": """
from gift.strategies import LoRAAllFineTuningStrategy, load_strategy_from_config
LoRAAllFineTuningStrategy(rank=4).save_init_paras("strategy.yaml")
assert load_strategy_from_config("strategy.yaml").init_paras["rank"] == 4
""",
    "search": """
from pathlib import Path
from gift.many import Search
from gift.many.pages import write_search_report
from gift.many.study import Study
job = {"data": {"kind": "class_folders", "train": "train", "valid": "valid"}}
vary = {"lr": {"low": 1e-4, "high": 0.1}, "method": ["lora", "ia3"]}
search = Search(job=job, vary=vary, budget={"trials": 2}).anchored(Path.cwd())
study = Study(search, ["loss"])
for value in (0.5, 0.4):
    study.complete(study.asked(), [value], {})
print(write_search_report(study, study.best()))
""",
    "ray": """
from gift.many.engines.ray_cluster import Ray
print(Ray({"address": "http://127.0.0.1:9"}).problems([]))
""",
    "slurm": """
from gift.many.engines.slurm_cluster import Slurm
print(Slurm().problems([]))
""",
    "demo": """
from gift.demo.__main__ import main
main(["--steps", "2", "--out", "demo"])
""",
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_enough_for_what_asks_for_it(extra: str, tmp_path: Path) -> None:
    """In an environment that has the extra and nothing else, all modules are there and work."""
    home = tmp_path / "environment"
    site = environment(home, closure([*requirements(), *requirements(extra)]))
    (site / "gift").symlink_to(ROOT / "gift")
    modules = needed_modules(extra)
    assert modules, f"nothing asks for {extra}"
    code = f"import importlib\nfor name in {modules}:\n    importlib.import_module(name)\n"
    done = run(home, "-c", code + DONE[extra], where=tmp_path)
    assert done.returncode == 0, done.stderr
