"""Images, outlines and adapters from strangers: sizes before pixels, formats by a list, casts."""

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gift
from gift.data import DataError, PictureReader, coco
from gift.data.boxes import _runs, masks_of
from gift.data.readers.images import LARGEST_IMAGE, opened
from gift.errors import DeltaFileError
from gift.interop import load_peft, save_peft
from gift.strategies import LoRAAllFineTuningStrategy

images = pytest.importorskip("PIL.Image")


def png(path: Path, width: int, height: int) -> Path:
    """A PNG whose header tells that size; its pixels are few, or missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    rows = zlib.compress(bytes((width + 1) * height if width * height < 10**6 else 100))
    parts = [(b"IHDR", sizes + b"\x08\0\0\0\0"), (b"IDAT", rows), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 60_000)])
def test_a_thin_image_is_not_scaled_to_a_huge_one(size: tuple[int, int], tmp_path: Path) -> None:
    path = png(tmp_path / "thin.png", *size)
    with pytest.raises(DataError, match=r"thin.png.*224 it would have more than.*resize="):
        PictureReader(size=224)(str(path))
    image = images.new("L", size)
    with pytest.raises(DataError, match=r"the image has .*resize="):
        PictureReader(size=224)(image)
    assert PictureReader(size=8, resize=(8, 8))(str(path)).shape == (3, 8, 8)
    assert PictureReader(size=8)(images.new("L", (20, 200))).shape == (3, 8, 8)


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**30, 2), (LARGEST_IMAGE + 1, 1)])
def test_the_size_in_a_header_is_looked_at_before_pixels_exist(
    size: tuple[int, int], tmp_path: Path
) -> None:
    path = png(tmp_path / "bomb.png", *size)
    with pytest.raises(DataError, match=r"bomb\.png cannot be read as an image: "):
        opened(str(path), "RGB")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) print\n%%EOF\n"


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.eps"])
def test_no_program_is_started_for_a_image(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    import subprocess

    def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a program is started")

    for function in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, function, start)
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(DataError, match="none of the formats BMP, GIF, JPEG"):
        opened(str(tmp_path / name), "RGB")


@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats_that_are_known_are_read_whatever_their_names(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    images.new("RGB", (9, 7), "white").save(path, form)
    assert opened(str(path), "L").size == (9, 7)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(DataError, match="cannot be read as an image"):
        opened(str(path), "L")


@pytest.mark.parametrize("form", ["PDF", "ICO", "TGA", "SGI", "PCX"])
def test_other_formats_are_refused(form: str, tmp_path: Path) -> None:
    images.new("RGB", (16, 16), "white").save(tmp_path / "x.jpg", form)
    with pytest.raises(DataError, match="none of the formats"):
        opened(str(tmp_path / "x.jpg"), "L")


def test_of_many_frames_one_is_read(tmp_path: Path) -> None:
    frames = [images.new("L", (8, 8), shade) for shade in range(0, 250, 5)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(opened(str(tmp_path / "x.gif"), "L")).max() == 0


# COCO


def annotated(tmp_path: Path, masks: bool = True, **changes: Any) -> Any:
    """One image of 6 x 4 with one object; what is changed is in `image`, `box` or `category`."""
    images.new("RGB", (6, 4)).save(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "width": 6, "height": 4} | changes.get("image", {})
    box = {"id": 5, "image_id": 1, "category_id": 2, "bbox": [1, 1, 3, 2],
           "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]]} | changes.get("box", {})  # fmt: skip
    category = {"id": 2, "name": "bee"} | changes.get("category", {})
    data = {"images": [image], "annotations": [box], "categories": [category]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    return coco(tmp_path, tmp_path / "a.json", masks=masks)


def rle(size: Any, counts: Any) -> dict[str, Any]:
    return {"box": {"segmentation": {"size": size, "counts": counts}}}


COCO: dict[str, tuple[dict[str, Any], str]] = {
    "a huge mask": (rle([10**5, 10**5], [10**10]), r"size \[100000, 100000\], the image \[4, 6"),
    "a mask of another size": (rle([6, 4], [24]), r"size \[6, 4\], the image \[4, 6\]"),
    "runs beyond": (rle([4, 6], [20, 10**9]), "do not add up to the 24 pixels"),
    "runs below zero": (rle([4, 6], [30, -6]), "do not add up"),
    "runs that are texts": (rle([4, 6], ["24"]), "do not add up"),
    "letters beyond": (rle([4, 6], "o" * 6 + "0"), "do not add up"),
    "no letters": (rle([4, 6], "\u00e9"), "do not add up"),
    "an end within": (rle([4, 6], "o"), "do not add up"),
    "nothing": (rle([4, 6], None), "do not add up"),
    "a far polygon": ({"box": {"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}}, "far from"),
    "a polygon of texts": ({"box": {"segmentation": [["0"] * 6]}}, "not numbers"),
    "two points": ({"box": {"segmentation": [[0, 0, 1, 1]]}}, "3 points"),
    "half a point": ({"box": {"segmentation": [[0] * 7]}}, "3 points"),
    "a text": ({"box": {"segmentation": "x"}}, "has the size 'str'"),
    "a huge image": ({"image": {"width": 10**5, "height": 10**5}}, r"images\[0\].*at most"),
    "a size below": ({"image": {"width": -6}}, r"images\[0\]: width is -6, expected a whole"),
    "a size that is a text": ({"image": {"width": "6"}}, r"images\[0\]: width is '6'"),
    "a size that is a list": ({"image": {"height": [4]}}, r"images\[0\]: height is \[4\]"),
    "half a pixel": ({"image": {"height": 4.5}}, r"images\[0\]: height is 4.5"),
    "an id that is a list": ({"box": {"image_id": [1]}}, r"annotations\[0\]: image_id is \[1\]"),
    "an id that is true": ({"box": {"id": True}}, r"annotations\[0\]: id is True"),
    "a category that is not an id": (
        {"box": {"category_id": {}}},
        r"annotations\[0\]: category_id",
    ),
    "a name that is a number": ({"category": {"name": 3}}, r"categories\[0\]: name is 3"),
    "a file that is a list": ({"image": {"file_name": ["a"]}}, r"images\[0\]: file_name is"),
    "a box of true": ({"box": {"bbox": [True, 1, 2, 2]}}, "annotation 5: the box is"),
    "a box of texts": ({"box": {"bbox": ["1", 1, 2, 2]}}, "annotation 5: the box is"),
    "a large number": ({"box": {"bbox": [10**400, 1, 2, 2]}}, "annotation 5: the box is"),
}


@pytest.mark.parametrize("name", COCO)
def test_wrong_outlines_are_named_by_file_and_entry(name: str, tmp_path: Path) -> None:
    changes, message = COCO[name]
    with pytest.raises(DataError, match=f"(?s)a.json.*{message}"):
        annotated(tmp_path, **changes)


def test_letters_of_runs_are_read_as_pycocotools_does() -> None:
    coder = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        mask = np.asfortranarray((random.random((37, 53)) < share).astype("u1"))
        packed = coder.encode(mask)
        runs = _runs(packed["counts"].decode())
        assert runs is not None
        flat = np.concatenate([np.full(n, i % 2, "u1") for i, n in enumerate(runs)])
        assert np.array_equal(mask, flat.reshape(53, 37).T)


@pytest.mark.parametrize(
    "shape", [[[1, 1, 4, 1, 4, 3, 1, 3]], {"size": [4, 6], "counts": [5, 2, 17]}]
)
def test_right_outlines_are_read(shape: Any, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    found = annotated(tmp_path, box={"segmentation": shape})
    expected = masks_of([shape], 4, 6)
    assert torch.equal(found.dataset[0][1]["masks"], expected)
    assert expected.any()


# Adapters of PEFT


def folder(tmp_path: Path, network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A folder, the network that it was written of, and its base."""
    base = copy.deepcopy(network)
    gift.enable_fine_tuning(network, LoRAAllFineTuningStrategy(rank=2))
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    save_peft(network, tmp_path)
    return network, base


def changed(tmp_path: Path, change: Any) -> None:
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = change(tensors[key])
    save_file(tensors, tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.double().fill_(1e300), "float64, expected float32: some of its numbers are"),
        (lambda t: t.to(torch.complex64), "complex64, expected a real floating-point"),
        (lambda t: t.to(torch.int64), "int64, expected a real floating-point"),
        (lambda t: t > 0, "bool, expected a real floating-point"),
        (lambda t: t.double().fill_(float("nan")), "not finite"),
    ],
)
def test_an_adapter_is_not_cast_blindly(change: Any, message: str, tmp_path: Path) -> None:
    _, base = folder(tmp_path, nn.Sequential(nn.Linear(6, 6)))
    changed(tmp_path, change)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(DeltaFileError, match=message):
        load_peft(base, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_an_adapter_of_more_digits_is_rounded(tmp_path: Path) -> None:
    tuned, base = folder(tmp_path, nn.Sequential(nn.Linear(6, 6)))
    changed(tmp_path, lambda t: t.double())
    load_peft(base, tmp_path)
    assert torch.equal(base[0].weight, tuned[0].weight)  # type: ignore[index]


@pytest.mark.parametrize("value", [1e39, 10**40, -1e300])
def test_an_alpha_beyond_float32_is_refused(value: Any, tmp_path: Path) -> None:
    _, base = folder(tmp_path, nn.Sequential(nn.Linear(6, 6)))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"lora_alpha": value}
    path.write_text(json.dumps(config))
    changed(tmp_path, lambda t: t)  # written without a digest of the configuration
    with pytest.raises(DeltaFileError, match=r"lora_alpha is .*expected a number from"):
        load_peft(base, tmp_path)


NAMES = [
    ["ff+1", "ffff1"],
    ["a(b", "c"],
    ["x[0]", "x0"],
    ["a|b", "a", "b"],
    ["f*", "f"],
    ["^q", "q"],
]


class Named(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


@pytest.mark.parametrize("names", NAMES, ids=[names[0] for names in NAMES])
def test_names_are_no_regular_expressions(names: list[str], tmp_path: Path) -> None:
    tuned, base = folder(tmp_path, Named(names))
    twin = copy.deepcopy(base)
    load_peft(base, tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(base(x), tuned(x))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path)
    torch.testing.assert_close(theirs(x), tuned(x))
