"""Networks by name, with their readers; new heads for detectors."""

import copy
import json
import os
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models
from transformers import AutoImageProcessor

import gift
from gift import GiftWarning, disable_fine_tuning, enable_fine_tuning, merge_strategies
from gift.data import DetectorReader, PictureReader, TextReader, coco
from gift.strategies import (
    DetectionHeadStrategy,
    LoRAAllFineTuningStrategy,
    load_strategy_from_config,
)
from gift.zoo import LoadedNetwork, NetworkError, load_network
from tests.common import all_bits, trainable
from tests.small_files import WORDS, box, coco_files, image, word_tokenizer

TINY = "timm:test_resnet"


def same(net: nn.Module, other: nn.Module) -> bool:
    return all_bits(net) == all_bits(other)


# torchvision


def test_a_network_of_torchvision_reads_as_its_weights_do() -> None:
    loaded = load_network("torchvision:squeezenet1_1", weights=None, num_classes=5)
    its = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    assert isinstance(loaded, LoadedNetwork)
    assert type(loaded.net) is models.SqueezeNet
    assert (loaded.task, loaded.classes) == ("classification", None)
    assert loaded.reader is not None
    assert torch.equal(loaded.reader(image(300, 200)), its(image(300, 200)))
    assert loaded.net(loaded.reader(image())[None]).shape == (1, 5)


def fetched_from(state: dict[str, Any], monkeypatch: Any) -> list[str]:
    """Make torchvision's downloads give this state; gives where from."""
    asked: list[str] = []

    def fetch(url: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    return asked


@pytest.mark.parametrize("weights", ["default", "IMAGENET1K_V1"])
def test_weights_of_torchvision_bring_their_classes(weights: str, monkeypatch: Any) -> None:
    own = models.squeezenet1_1()
    asked = fetched_from(own.state_dict(), monkeypatch)
    loaded = load_network("torchvision:squeezenet1_1", weights)
    assert asked == [models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url]
    assert same(loaded.net, own)
    assert loaded.classes is not None
    assert loaded.classes[:2] == ("tench", "goldfish")
    assert len(set(loaded.classes)) == 1000  # there are two kinds of cranes


def test_a_detector_of_torchvision(monkeypatch: Any) -> None:
    asked = fetched_from({}, monkeypatch)
    loaded = load_network("torchvision:ssdlite320_mobilenet_v3_large", weights=None, num_classes=3)
    assert (loaded.task, loaded.reader, asked) == ("detection", DetectorReader(), [])
    assert loaded.reader is not None
    [found] = loaded.net.eval()([loaded.reader(image())])
    assert {"boxes", "labels", "scores"} <= set(found)


# Files of weights

WRAPPED: dict[str, Callable[[Any], Any]] = {
    "x.pt": lambda state: state,
    "wrapped.pth": lambda state: {"state_dict": state, "epoch": 3},
    "ddp.tar": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "compiled.pt": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "x.safetensors": lambda state: state,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_from_a_file(name: str, tmp_path: Path) -> None:
    own = timm.create_model("test_resnet", num_classes=3)
    save: Any = save_file if name.endswith(".safetensors") else torch.save
    save(WRAPPED[name](own.state_dict()), tmp_path / name)
    loaded = load_network(TINY, tmp_path / name, num_classes=3)
    assert same(loaded.net, own)


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harm",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"weights", "no weights that can be read"),
        (b"", "no weights that can be read"),
        (
            {"bn1.weight": torch.zeros(3)},
            r"missing: .* and \d+ more; .*bn1.weight \[3\] instead",
        ),
        ({"strange": torch.zeros(3)}, "unknown: strange"),
        ([1, 2], "but a list"),
        ({"epoch": 3}, "no state of a network"),
        (Harmful(), "no weights that can be read"),
    ],
)
@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_what_are_no_weights_is_refused(
    content: Any, message: str, end: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x.{end}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
        message = "no weights that can be read" if end == "safetensors" else message
    with pytest.raises(NetworkError, match=message):
        load_network(TINY, path)
    assert not (tmp_path / "harm").exists()


def test_weights_for_other_classes_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "x.pt")
    with pytest.raises(NetworkError, match=r"fc.weight .* instead of .*other options.*of classes"):
        load_network(TINY, tmp_path / "x.pt")


# timm

TIMM = [
    "test_resnet",
    "test_vit",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "edgenext_xx_small",
]


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_reads_as_timm_does(name: str) -> None:
    loaded = load_network(f"timm:{name}", weights=None)
    config = timm.data.resolve_data_config({}, model=loaded.net)
    its = timm.data.create_transform(**config)
    assert loaded.reader is not None
    for width, height in ((300, 400), (91, 64)):
        shown = image(width, height)
        assert torch.equal(loaded.reader(shown), its(shown))


def test_options_and_settings_of_the_reader_reach_timm() -> None:
    loaded = load_network(TINY, None, num_classes=4, in_chans=1, reader={"flip": False})
    assert isinstance(loaded.reader, PictureReader)
    assert not loaded.reader.flip
    assert loaded.net(loaded.reader(image())[None]).shape == (1, 4)
    with pytest.warns(GiftWarning, match="expected 3 of each, or 1 for grey"):
        assert load_network(TINY, None, in_chans=4).reader is None


# transformers

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(
        vocab_size=len(WORDS), max_position_embeddings=20, num_labels=3, **SIZES
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2
    ),
    "vit": lambda: transformers.ViTConfig(
        image_size=32, patch_size=8, id2label={0: "ant", 1: "bee"}, **SIZES
    ),
}
MAKERS = {
    ("bert", None): transformers.BertForSequenceClassification,
    ("gpt2", "classification"): transformers.GPT2ForSequenceClassification,
    ("gpt2", None): transformers.GPT2LMHeadModel,
    ("vit", None): transformers.ViTForImageClassification,
}


def model_folder(folder: Path, kind: str, task: str | None = None) -> Any:
    """Write the folder of a model as ``save_pretrained`` does; gives the model."""
    net = MAKERS[kind, task](CONFIGS[kind]())
    net.save_pretrained(folder)
    if kind == "vit":
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        word_tokenizer(pad=kind == "bert").save_pretrained(folder)
    return net


@pytest.mark.parametrize(("kind", "task"), MAKERS)
def test_a_folder_of_transformers(kind: str, task: str | None, tmp_path: Path) -> None:
    own = model_folder(tmp_path, kind, task)
    loaded = load_network(f"transformers:{tmp_path}")
    assert type(loaded.net) is type(own)
    assert same(loaded.net, own)
    assert loaded.task == ("language" if (kind, task) == ("gpt2", None) else "classification")
    assert loaded.classes == (("ant", "bee") if kind == "vit" else None)
    reader: Any = loaded.reader
    if kind == "vit":
        its = AutoImageProcessor.from_pretrained(tmp_path)(image(80, 60), return_tensors="pt")
        difference = reader(image(80, 60)) - its["pixel_values"][0]
        assert difference.abs().max() < 2.01 * 2 / 255  # two steps of a colour: it rounds otherwise
        assert loaded.net(reader(image())[None]).logits.shape == (1, 2)
        return
    assert isinstance(reader, TextReader)
    assert reader.max_length == (20 if kind == "bert" else 64)
    batch = reader.collate([reader("a good film"), reader("bad")])
    takes = {k: v for k, v in batch.items() if k != "token_type_ids"}
    loaded.net.eval()
    alone = loaded.net(**{k: v[1:, :1] for k, v in takes.items()}).logits
    together = loaded.net(**takes).logits[1:]
    torch.testing.assert_close(together[:, :1] if loaded.task == "language" else together, alone)


def test_a_file_may_have_tied_weights_once(tmp_path: Path) -> None:
    own = model_folder(tmp_path, "gpt2")
    weights = tmp_path / "model.safetensors"
    assert "lm_head.weight" not in load_file(weights)
    loaded = load_network(f"transformers:{tmp_path}", weights)
    assert same(loaded.net, own)
    assert loaded.net.lm_head.weight is loaded.net.transformer.wte.weight  # type: ignore[union-attr]


def test_a_file_need_not_know_how_many_batches_there_were(tmp_path: Path) -> None:
    own = timm.create_model("test_resnet")
    state = {k: v for k, v in own.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "x.pt")
    assert same(load_network(TINY, tmp_path / "x.pt").net, own)


def test_random_weights_and_weights_of_a_file_for_transformers(tmp_path: Path) -> None:
    own = model_folder(tmp_path, "bert")
    folder, name = tmp_path / "x.pt", f"transformers:{tmp_path}"
    torch.save(own.state_dict(), folder)
    assert same(load_network(name, folder).net, own)
    assert not same(load_network(name, None).net, own)
    other = load_network(name, None, num_labels=7, reader={"max_length": 5})
    assert isinstance(other.reader, TextReader)
    assert (other.net.config.num_labels, other.reader.max_length) == (7, 5)  # type: ignore[union-attr]


def test_a_language_model_may_learn_classes(tmp_path: Path) -> None:
    model_folder(tmp_path, "gpt2")
    loaded = load_network(f"transformers:{tmp_path}", task="classification")
    assert type(loaded.net) is transformers.GPT2ForSequenceClassification
    assert loaded.task == "classification"


PROCESSORS = {
    "ViT": {"size": {"height": 20, "width": 30}},
    "CLIP": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    "DeiT": {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
    "ConvNext": {"size": {"shortest_edge": 28}, "crop_pct": 0.875},
    "MobileNetV2": {"do_normalize": False},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_reader_does_what_the_processor_of_transformers_does(kind: str, tmp_path: Path) -> None:
    model_folder(tmp_path, "vit")
    processor = getattr(transformers, f"{kind}ImageProcessor")(**PROCESSORS[kind])
    processor.save_pretrained(tmp_path)
    reader = load_network(f"transformers:{tmp_path}").reader
    assert reader is not None
    for width, height in ((300, 400), (91, 64)):
        shown = image(width, height)
        its = processor(shown, return_tensors="pt")["pixel_values"][0]
        assert reader(shown).shape == its.shape
        assert (reader(shown) - its).abs().max() < 4 * 2 / 255  # tensors are scaled otherwise


def test_what_no_reader_does_is_reported(tmp_path: Path) -> None:
    model_folder(tmp_path, "vit")
    processor = transformers.MobileViTImageProcessor(  # blue, green, red
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(tmp_path)
    with pytest.warns(GiftWarning, match="in a way of its own"):
        assert load_network(f"transformers:{tmp_path}").reader is None
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(GiftWarning, match="nothing says how .* reads"):
        loaded = load_network(f"transformers:{tmp_path}", reader=PictureReader(32))
    assert loaded.reader == PictureReader(32)


def test_a_folder_without_a_tokenizer_has_no_reader(tmp_path: Path) -> None:
    model_folder(tmp_path, "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.warns(GiftWarning, match="no tokenizer with a vocabulary"):
        assert load_network(f"transformers:{tmp_path}").reader is None


# What is refused


def folder_with_code(tmp_path: Path) -> str:
    """A model whose configuration asks for a file of code next to it."""
    model_folder(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    return f"transformers:{tmp_path}"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "resnet18": ({}, "'torchvision:resnet18', 'timm:resnet18'"),
    "torch:resnet18": ({}, "no library 'torch', closest: .*torchvision"),
    "torchvision:resnet17": ({}, "closest: .*resnet18"),
    "torchvision:resnet18": ({"weights": None, "task": "language"}, "is for classification, not"),
    "torchvision:alexnet": ({"weights": None, "classes": 3}, "cannot be made with .*classes"),
    "torchvision:lraspp_mobilenet_v3_large": (
        {"weights": None, "task": "classification"},
        "is for segmentation, not for",
    ),
    "torchvision:r2plus1d_18": ({}, "no classifier, detector or segmentation network"),
    "timm:resnett18": ({}, "closest: .*resnet18"),
    "timm:resnet18.a9_in1k": ({}, "closest: .*resnet18.a1_in1k"),
    "timm:resnet18": ({"weights": None, "no_such": 3}, "cannot be made with .*no_such"),
    "timm:resnet10t": ({"task": "detection"}, "not for 'detection'"),
    "timm:test_vit": ({"weights": None, "reader": {"sizes": 3}}, "reader=.*does not fit"),
    "transformers:no/such-model": (
        {},
        "no folder 'no/such-model'.*cannot be fetched.*weights=FILE",
    ),
    "transformers:x": ({"trust_remote_code": True}, "may run foreign code"),
    "transformers:y": ({"attn_implementation": "some/kernel"}, "may run foreign code"),
    "import:timm:create_model": ({}, "only allow_import=True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_loaded_is_reported(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(NetworkError, match=f"(?s){message}"):
        load_network(name, **options)


def test_a_folder_cannot_bring_code(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="cannot be made"):
        load_network(folder_with_code(tmp_path))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(("kind", "task"), [("vit", "language"), ("bert", "detection")])
def test_a_task_that_transformers_has_not_is_refused(kind: str, task: str, tmp_path: Path) -> None:
    model_folder(tmp_path, kind)
    with pytest.raises(NetworkError, match=r"transformers has no 'vit' for language|the task is"):
        load_network(f"transformers:{tmp_path}", task=task)


def test_without_a_connection_it_says_what_to_do(monkeypatch: Any) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    for name in ("torchvision:alexnet", "timm:test_resnet.r160_in1k"):
        with pytest.raises(NetworkError, match=r"cannot be fetched: check .*weights=FILE.*None"):
            load_network(name)


# Code of the caller


def own_network(width: int = 3) -> nn.Module:
    return nn.Linear(width, 2)


def test_own_code_makes_a_network_where_the_caller_says_so(tmp_path: Path) -> None:
    state = own_network(5).state_dict()
    torch.save(state, tmp_path / "x.pt")
    loaded = load_network(
        "import:tests.test_zoo:own_network", tmp_path / "x.pt", allow_import=True, width=5
    )
    assert torch.equal(loaded.net.weight, state["weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.test_zoo:own_net", r"closest: .*own_network"),
        ("os:getcwd", "gives a str"),
        ("no.such:thing", "No module named"),
        ("tests", "no function"),
    ],
)
def test_own_code_that_makes_no_network_is_refused(name: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        load_network(f"import:{name}", allow_import=True)


# Heads of detectors

DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"min_size": 64, "max_size": 64},
    "maskrcnn_resnet50_fpn": {"min_size": 64, "max_size": 64},
    "retinanet_resnet50_fpn": {"min_size": 64, "max_size": 64},
    "fcos_resnet50_fpn": {"min_size": 64, "max_size": 64},
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
}


def detector(name: str, classes: int, **options: Any) -> Any:
    return models.get_model(
        name, weights=None, weights_backbone=None, num_classes=classes, **DETECTORS[name], **options
    )


@pytest.mark.parametrize("name", DETECTORS)
def test_a_new_head_is_that_of_a_detector_made_for_these_classes(name: str) -> None:
    with torch.device("meta"):
        net, expected = detector(name, 91), detector(name, 4)
    before, after = ({n: p.shape for n, p in m.named_parameters()} for m in (net, expected))
    enable_fine_tuning(net, DetectionHeadStrategy(4))
    assert {n: p.shape for n, p in net.named_parameters()} == after
    assert set(trainable(net)) == {n for n in after if after[n] != before[n]}
    heads = [m for m in net.modules() if hasattr(m, "num_classes") or hasattr(m, "num_columns")]
    assert all(getattr(m, "num_classes", getattr(m, "num_columns", 0)) in (4,) for m in heads)


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn",
                                  "ssdlite320_mobilenet_v3_large"])  # fmt: skip
def test_a_new_head_starts_as_torchvision_starts_it(name: str) -> None:
    net, expected = detector(name, 91), detector(name, 50)
    enable_fine_tuning(net, DetectionHeadStrategy(50))
    other = dict(expected.named_parameters())
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            std, its = parameter.detach().std(), other[key].detach().std()
            torch.testing.assert_close(std, its, rtol=0.1, atol=0)
            torch.testing.assert_close(parameter.mean(), other[key].mean(), rtol=1e-5, atol=1e-3)


@pytest.mark.filterwarnings("ignore::gift.engine.enable.GiftWarning")
@pytest.mark.parametrize("name", [n for n in DETECTORS if "mobilenet" in n])
def test_a_detector_learns_new_classes(name: str, tmp_path: Path) -> None:
    boxes = [box(i, 7 + i, 90, [3, 4, 20, 15]) for i in range(3)]
    examples = coco(*coco_files(tmp_path, boxes))
    assert examples.classes is not None
    base = detector(name, 91)
    net = copy.deepcopy(base)
    head = DetectionHeadStrategy(len(examples.classes))
    enable_fine_tuning(net, merge_strategies([head, LoRAAllFineTuningStrategy()]))
    batch = examples.collate([examples.dataset[i] for i in range(3)])  # type: ignore[misc]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # which boxes count is drawn
        loss = sum(net(*batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gift.save(net, tmp_path / "delta.safetensors")
    other = copy.deepcopy(base)
    gift.load(other, tmp_path / "delta.safetensors")
    for own, its in zip(net.eval()(batch[0]), other.eval()(batch[0]), strict=True):
        assert all(torch.equal(own[key], its[key]) for key in own)
    disable_fine_tuning(net)
    assert same(net, base)
    assert [vars(m).get("num_columns") for m in net.modules()] == [
        vars(m).get("num_columns") for m in base.modules()
    ]


@pytest.mark.parametrize("number", [1, 0, True, 2.0, "3"])
def test_a_detector_has_a_class_beside_the_background(number: Any) -> None:
    with pytest.raises(ValueError, match="the background is one of the classes"):
        DetectionHeadStrategy(number)


def test_the_strategy_comes_back_from_its_file() -> None:
    strategy = DetectionHeadStrategy(4)
    loaded = load_strategy_from_config(json.loads(json.dumps(strategy.to_config())))
    assert (type(loaded), loaded.to_config()) == (DetectionHeadStrategy, strategy.to_config())
