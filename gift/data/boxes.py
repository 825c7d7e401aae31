"""Images with bounding boxes, in COCO format."""

import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gift.data.classes import classes_of
from gift.data.examples import Examples
from gift.data.readers import DetectorReader
from gift.data.readers.images import LARGEST_IMAGE
from gift.errors import DataError, GiftWarning, refuse
from gift.support.optional import require

BACKGROUND = "__background__"
"""Name of class 0, which torchvision's detectors reserve for the background."""


@dataclass(frozen=True)
class Objects:
    """The objects in an image.

    Args:
        file: path of the image.
        size: width and height of the image.
        boxes: left, top, right and bottom of each object.
        labels: class numbers of the objects, from 1.
        shapes: outlines of the objects in COCO format.
    """

    file: str
    size: tuple[int, int]
    boxes: list[list[float]]
    labels: list[int]
    shapes: list[Any]


class BoxedImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Pairs of an image and a dictionary of boxes, labels and, if requested, masks.

    Args:
        images: the objects in each image.
        reader: reads the images.
        augment: whether to flip images horizontally at random, with a probability of 0.5.
        masks: whether to return masks.
    """

    def __init__(
        self, images: list[Objects], reader: DetectorReader, augment: bool, masks: bool
    ) -> None:
        self.images, self.reader, self.augment, self.masks = images, reader, augment, masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, dict[str, Tensor]]:
        objects = self.images[place]
        image = self.reader(objects.file)
        height, width = image.shape[-2:]
        if (width, height) != objects.size:
            raise DataError(
                f"{objects.file} is {width} x {height}, its boxes are for an image of "
                f"{objects.size[0]} x {objects.size[1]}"
            )
        targets = {
            "boxes": torch.tensor(objects.boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(objects.labels, dtype=torch.int64),
        }
        if self.masks:
            targets["masks"] = masks_of(objects.shapes, height, width)
        if self.augment and torch.rand(()) < 0.5:
            return image.flip(-1), _mirrored(targets, width)
        return image, targets

    def plain(self) -> "BoxedImages":
        """Return the same examples without random augmentation."""
        return BoxedImages(self.images, self.reader, False, self.masks)


def collate_boxed(items: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Collate a batch for torchvision's detectors, which take two lists."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def coco(
    images: str | Path,
    annotations: str | Path,
    classes: Sequence[str] | None = None,
    augment: bool = False,
    masks: bool = False,
) -> Examples:
    """Load images with bounding boxes in COCO format.

    Classes are numbered from 1 in the order of the category ids. Class 0 is the background, for
    which `classes` also has a name. Boxes that reach beyond their image are cut; crowds, and boxes
    that are empty or lie outside, are left out. A warning tells how many.

    Args:
        images: folder of the images.
        annotations: JSON file of the boxes.
        classes: names of categories in the order of their numbers, `train.classes` for validation;
            None uses all categories of the file.
        augment: flip images at random, for training.
        masks: also read outlines, for Mask R-CNN.

    Raises:
        DataError: naming all missing images and all invalid annotations.
    """
    data = _read(Path(annotations))
    names = {entry["id"]: str(entry["name"]) for entry in data["categories"]}
    known = [name for name in classes or () if name != BACKGROUND]
    if classes is None:
        known = [names[number] for number in sorted(names)]
    known = [BACKGROUND, *known]
    numbers = {name: number for number, name in enumerate(classes_of((), known))}
    problems: list[str] = []
    objects: dict[Any, Objects] = {}
    for entry in data["images"]:
        file = Path(images) / str(entry["file_name"])
        if not file.is_file():
            problems.append(f"image {entry['id']}: there is no image {file}")
        objects[entry["id"]] = Objects(
            str(file), (int(entry["width"]), int(entry["height"])), [], [], []
        )
    counts: Counter[str] = Counter()
    for entry in data["annotations"]:
        if entry.get("iscrowd"):
            counts["crowds are left out"] += 1
            continue
        problem = _add(entry, objects, names, numbers, masks, counts)
        problems += [f"annotation {entry['id']}: {problem}"] if problem else []
    if not problems and not any(one.boxes for one in objects.values()):
        problems = ["there are no boxes"]
    refuse(DataError, str(annotations), problems)
    if told := "; ".join(f"{count} {what}" for what, count in sorted((+counts).items())):
        total = len(data["annotations"])
        text = f"{annotations}: of {total} boxes, {told}"
        warnings.warn(text, GiftWarning, stacklevel=2)
    reader = DetectorReader()
    dataset = BoxedImages(list(objects.values()), reader, augment, masks)
    return Examples(dataset, "detection", tuple(known), collate_boxed, reader)


_NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the file, and check that it has all required entries."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    problems = []
    for part, keys in _NEEDED.items():
        entries = data.get(part) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            problems.append(f"there is no list {part!r}, expected the format of COCO's instances")
            continue
        twice: dict[Any, int] = defaultdict(int)
        for place, entry in enumerate(entries):
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            wrong = [] if missing else list(_wrong(entry, keys))
            if missing:
                problems.append(f"{part}[{place}] has no {', '.join(missing)}")
            elif wrong:
                problems += [f"{part}[{place}]: {problem}" for problem in wrong]
            else:
                twice[str(entry["id"])] += 1
        problems += [f"{part}: there are {n} with id {i}" for i, n in twice.items() if n > 1]
    refuse(DataError, str(path), problems)
    return data


def _is_id(value: Any) -> bool:
    return type(value) is int or isinstance(value, str)


def _is_side(value: Any) -> bool:
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return whole and 1 <= value <= LARGEST_IMAGE


_TYPES = {
    **dict.fromkeys(("id", "image_id", "category_id"), (_is_id, "a whole number or a text")),
    **dict.fromkeys(("file_name", "name"), (lambda v: isinstance(v, str) and v, "a text")),
    **dict.fromkeys(("width", "height"), (_is_side, "a whole number of pixels")),
}


def _wrong(entry: dict[str, Any], keys: Sequence[str]) -> Iterator[str]:
    """Yield the values of an entry that do not have the types of the COCO format."""
    for key in (key for key in keys if key in _TYPES):
        fits, expected = _TYPES[key]
        if not fits(entry[key]):
            yield f"{key} is {entry[key]!r:.60}, expected {expected}"
    sides = [entry[key] for key in ("width", "height") if key in keys and _is_side(entry[key])]
    if math.prod(sides) > LARGEST_IMAGE:
        yield f"it has {sides[0]:,} x {sides[1]:,} pixels, expected at most {LARGEST_IMAGE:,}"


def _add(
    entry: dict[str, Any],
    images: dict[Any, Objects],
    names: dict[Any, str],
    numbers: dict[str, int],
    masks: bool,
    counts: Counter[str],
) -> str:
    """Add an object to its image; returns what is wrong with it, if anything.

    Boxes that are left out or cut are counted.
    """
    image, name = images.get(entry["image_id"]), names.get(entry["category_id"])
    if image is None:
        return f"there is no image {entry['image_id']}"
    if name is None:
        return f"there is no category {entry['category_id']}"
    if name not in numbers:
        return f"{name!r} is none of the classes {', '.join(list(numbers)[1:])}"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        return f"the box is {box!r:.80}, expected left, top, width and height"
    shape = entry.get("segmentation")
    if masks and not shape:
        return "there is no segmentation, which masks need"
    if masks and (problem := _shape_incompatibility(shape, *image.size)):
        return f"the segmentation {problem}"
    (left, top, wide, high), (width, height) = box, image.size
    corners = [max(left, 0), max(top, 0), min(left + wide, width), min(top + high, height)]
    if wide <= 0 or high <= 0:
        counts["are empty and left out"] += 1
    elif corners[2] <= corners[0] or corners[3] <= corners[1]:
        counts["lie outside of their image and are left out"] += 1
    else:
        beyond = (-left, -top, left + wide - width, top + high - height)
        counts["reach beyond their image and are cut"] += max(beyond) > 1  # not by rounding
        image.boxes.append(corners)
        image.labels.append(numbers[name])
        image.shapes.append(shape if masks else None)
    return ""


def _shape_incompatibility(shape: Any, width: int, height: int) -> str:
    """Say what is wrong with an outline; pycocotools does not validate its input."""
    if isinstance(shape, list):
        far = 4 * max(width, height)
        for part in shape:
            if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
                return "has a polygon that is not a list of 3 points or more, x and y of each"
            if not all(_is_finite(value) and abs(value) <= far for value in part):
                return f"has points that are not numbers up to {far}, or far from the image"
        return ""
    if not isinstance(shape, dict) or shape.get("size") != [height, width]:
        found = shape.get("size") if isinstance(shape, dict) else type(shape).__name__
        return f"has the size {found!r:.60}, the image {[height, width]}"
    runs = shape.get("counts")
    if isinstance(runs, str):
        runs = _runs(runs)
    whole = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs or ()) != width * height:
        return f"has runs that do not add up to the {width * height:,} pixels of the image"
    return ""


def _runs(text: str) -> list[int] | None:
    """Decode the run lengths of a COCO string; None if it is invalid.

    Each character holds five bits, and one bit that says whether more follow. From the fourth
    number on, values are differences to the number two places before.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (1 << shift) if bits & 0x10 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value)


def masks_of(shapes: Sequence[Any], height: int, width: int) -> Tensor:
    """Return masks (objects, height, width) from COCO outlines: polygons or run lengths."""
    coder = require("pycocotools.mask", "detection")
    found = torch.zeros(len(shapes), height, width, dtype=torch.uint8)
    for place, shape in enumerate(shapes):
        if isinstance(shape, list):
            shape = coder.merge(coder.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = coder.frPyObjects(shape, height, width)
        found[place] = torch.from_numpy(coder.decode(shape))
    return found


def _mirrored(targets: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Flip boxes and masks horizontally, along with their image."""
    left, top, right, bottom = targets["boxes"].unbind(1)
    found = {**targets, "boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in targets:
        found["masks"] = targets["masks"].flip(-1)
    return found
