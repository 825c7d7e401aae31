"""Images and masks, which say the class of each pixel."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gift.data.classes import classes_of
from gift.data.examples import IGNORED, Examples
from gift.data.folders import files_in
from gift.data.readers.images import opened
from gift.data.readers.masks import (
    MaskFormat,
    SegmentationReader,
    checked_colours,
    colours_of,
    open_mask,
)
from gift.data.tables import Column, beside_table, read_table
from gift.errors import DataError, GiftWarning, refuse, some

LOOKED_AT = 64
"""Number of masks in which classes are looked for, if their names are given."""


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of an image and the class numbers of its pixels.

    Args:
        files: paths of an image and its mask.
        reader: reads both.
        form: how classes are written in masks.
        augment: whether to crop and flip both at random.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, str]],
        reader: SegmentationReader,
        form: MaskFormat,
        augment: bool = False,
    ) -> None:
        self.files, self.reader, self.form, self.augment = files, reader, form, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, mask = self.files[place]
        return self.reader.pair(image, self.form.read(mask), self.augment)

    def plain(self) -> "MaskedImages":
        """Return the same examples without random augmentation."""
        return MaskedImages(self.files, self.reader, self.form)


def mask_folders(
    images: str | Path,
    masks: str | Path,
    reader: SegmentationReader,
    classes: Sequence[str] | None = None,
    colours: Sequence[Sequence[int]] | None = None,
    values: Sequence[int] | None = None,
    ignore_index: int | None = 255,
    augment: bool = False,
) -> Examples:
    """Load images and masks for semantic segmentation, from two folders.

    A mask belongs to the image of the same name, without its extension, in the same subfolder; it
    may also end in ``_mask``, ``_label`` or ``_labelIds``. Masks are images without loss, such as
    PNG, of the size of their image.

    Args:
        images: folder of the images.
        masks: folder of the masks.
        reader: converts images and masks: `SegmentationReader`, or the reader of a network.
        classes: names of the classes in the order of their numbers, `train.classes` for validation;
            None looks for the numbers in all masks.
        colours: the colour of each class, red, green and blue; masks that are coloured images are
            read by them, and predictions drawn in them. None chooses colours for drawing.
        values: the value of each class in masks, such as [0, 255]; None if it is the class number.
        ignore_index: value of pixels that belong to no class; None if there is none.
        augment: crop and flip images and masks at random, for training.

    Raises:
        DataError: naming all images without a mask, masks without an image, and masks of another
            size; or, where they are read, masks with values that are not classes.
    """
    found, problems = _pairs(Path(images), Path(masks))
    refuse(DataError, f"{images} and {masks}", problems)
    coding = _Coding(classes, colours, values, ignore_index)
    files = [("", *pair) for pair in found]
    return _examples(f"{images} and {masks}", files, reader, coding, augment)


def mask_table(
    csv: str | Path,
    reader: SegmentationReader,
    image: Column = "image",
    mask: Column = "mask",
    classes: Sequence[str] | None = None,
    colours: Sequence[Sequence[int]] | None = None,
    values: Sequence[int] | None = None,
    ignore_index: int | None = 255,
    augment: bool = False,
    delimiter: str | None = None,
) -> Examples:
    """Load images and masks for semantic segmentation that a table lists.

    Args:
        csv: CSV or TSV table; its paths are relative to its folder.
        reader: converts images and masks: `SegmentationReader`, or the reader of a network.
        image: column of the paths of images: its name in the header, or its number from 0.
        mask: column of the paths of masks.
        classes: see `mask_folders`.
        colours: see `mask_folders`.
        values: see `mask_folders`.
        ignore_index: see `mask_folders`.
        augment: crop and flip images and masks at random, for training.
        delimiter: delimiter of columns; None chooses it by the file name.

    Raises:
        DataError: naming all rows that are incomplete, without a file, or with a mask of another
            size than their image.
    """
    rows = read_table(csv, (image, mask), delimiter)
    found: list[tuple[str, str, str]] = []
    problems: list[str] = []
    for line, (first, second) in zip(rows.lines, rows.values, strict=True):
        files = [beside_table(csv, line, name, "image", problems) for name in (first, second)]
        found.append((f"line {line}: ", files[0], files[1]))
    refuse(DataError, str(csv), problems)
    coding = _Coding(classes, colours, values, ignore_index)
    return _examples(str(csv), found, reader, coding, augment)


_ENDS = ("", "_mask", "_label", "_labelIds")


def _pairs(images: Path, masks: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the images and their masks, and what has no counterpart."""
    problems = [f"there is no folder {folder}" for folder in (images, masks) if not folder.is_dir()]
    if problems:
        return [], problems
    pictures = [p for p in files_in(images) if masks == images or masks not in p.parents]
    by_name: dict[str, list[Path]] = {}
    for mask in files_in(masks):
        by_name.setdefault(str(mask.relative_to(masks).with_suffix("")), []).append(mask)
    found, used = [], set()
    for picture in pictures:
        name = str(picture.relative_to(images).with_suffix(""))
        fitting = [name + end for end in _ENDS if name + end in by_name]
        if not fitting:
            problems.append(f"{picture}: there is no mask {masks / name}.png")
            continue
        used.add(fitting[0])
        known = by_name[fitting[0]]
        if len(known) > 1:
            problems.append(f"{picture}: there are several masks, {some([str(m) for m in known])}")
        found.append((str(picture), str(known[0])))
    left = [mask for name, paths in by_name.items() if name not in used for mask in paths]
    problems += [f"{mask}: there is no image for this mask" for mask in left]
    if not pictures:
        problems.append(f"there are no images in {images}")
    return found, problems


class _Coding(NamedTuple):
    """How a user says that classes are written in masks; see `mask_folders`."""

    classes: Sequence[str] | None
    colours: Sequence[Sequence[int]] | None
    values: Sequence[int] | None
    ignore_index: int | None


def _examples(
    what: str, files: Sequence[tuple[str, str, str]], reader: Any, coding: _Coding, augment: bool
) -> Examples:
    """Return the examples of files, each with its place in a table."""
    if not isinstance(reader, SegmentationReader):
        raise DataError(f"the reader is {reader!r:.60}, expected SegmentationReader(size=512)")
    refuse(DataError, what, [f"{place}{p}" for place, i, m in files if (p := _sizes(i, m))])
    drawn = None if coding.colours is None else checked_colours(coding.colours)
    masks = [mask for _, _, mask in files]
    form = _form(what, masks, coding, drawn)
    number = form.number
    assert number is not None
    names = [str(n) for n in range(number)] if coding.classes is None else coding.classes
    known = classes_of((), names)
    if len(known) < 2:
        refuse(DataError, what, [
            f"all pixels are of one class; where masks have other values than class numbers, such "
            f"as 0 and 255, give values=[0, 255] and ignore_index=None (ignored now: "
            f"{list(form.ignore)})"])  # fmt: skip
    _check_some(what, masks, form, known)
    pairs = [(image, mask) for _, image, mask in files]
    return Examples(
        MaskedImages(pairs, reader, form, augment), "segmentation", known, None, reader,
        {"colours": colours_of(number) if drawn is None else drawn},
    )  # fmt: skip


def _form(
    what: str, masks: Sequence[str], coding: _Coding, drawn: list[list[int]] | None
) -> MaskFormat:
    """Return how classes are written in masks, with their number; see `_Coding`."""
    values = coding.values
    given = (coding.classes, values, drawn)
    number = next((len(one) for one in given if one is not None), None)
    problems = []
    if values is not None and (len(set(values)) < len(values) or len(values) != number):
        problems.append(f"values are {list(values)}, expected another one for each class")
    if drawn is not None and len(drawn) != number:
        problems.append(f"there are {len(drawn)} colours for {number} classes")
    refuse(DataError, what, problems)
    coloured = drawn is not None and _is_coloured(masks[0])
    form = MaskFormat(
        None if values is None else tuple(values),
        tuple((r, g, b) for r, g, b in drawn or ()) if coloured else None,
        () if coding.ignore_index is None else (coding.ignore_index,),
        number,
    )
    return form if number is not None else replace(form, number=_highest(what, masks, form) + 1)


def _sizes(image: str, mask: str) -> str:
    """Say what is wrong with the sizes of an image and its mask."""
    try:
        sizes = [opened(image, None).size, open_mask(mask).size]
    except DataError as error:
        return str(error)
    if sizes[0] == sizes[1]:
        return ""
    return (
        f"{mask} is {sizes[1][0]} x {sizes[1][1]}, its image {sizes[0][0]} x {sizes[0][1]} "
        "(width x height)"
    )


def _is_coloured(mask: str) -> bool:
    return open_mask(mask).mode not in ("L", "P", "1", "I;16", "I")


def _highest(what: str, masks: Sequence[str], form: MaskFormat) -> int:
    """Return the highest class number in all masks."""
    highest, problems = 0, []
    for mask in masks:
        try:
            pixels = form.pixels(mask)
        except DataError as error:
            problems.append(str(error))
            continue
        kept = pixels[~torch.isin(pixels, torch.tensor(form.ignore).long())]
        highest = max(highest, int(kept.max()) if len(kept) else 0)
    refuse(DataError, what, problems)
    return highest


def _check_some(what: str, masks: Sequence[str], form: MaskFormat, known: tuple[str, ...]) -> None:
    """Read some masks; warn of classes that are in none of them."""
    seen: set[int] = set()
    problems = []
    for place in range(0, len(masks), -(-len(masks) // LOOKED_AT)):
        try:
            seen |= set(form.read(masks[place]).unique().tolist())
        except DataError as error:
            problems.append(str(error))
    refuse(DataError, what, problems)
    if len(seen - {IGNORED}) < 2:
        ignored = f"; {list(form.ignore)} is ignored" if form.ignore else ""
        warnings.warn(
            f"{what}: all pixels in the {min(len(masks), LOOKED_AT)} masks that were looked at are "
            f"of {some([known[n] for n in seen - {IGNORED}]) or 'no class'}{ignored}: where masks "
            "have other values than class numbers, such as 0 and 255, give values=[0, 255] and "
            "ignore_index=None",
            GiftWarning,
            stacklevel=4,
        )
