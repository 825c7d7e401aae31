"""Readers: convert files, images and texts to inputs of networks."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gift.data.readers.chats import ChatReader
from gift.data.readers.images import DetectorReader, PictureReader
from gift.data.readers.masks import SegmentationReader
from gift.data.readers.rows import RowReader
from gift.data.readers.sounds import AudioReader, ExtractorReader
from gift.data.readers.texts import TextReader
from gift.errors import DataError

READERS: dict[str, type[Any]] = {
    reader.kind: reader
    for reader in (
        PictureReader, SegmentationReader, DetectorReader, TextReader, ChatReader, RowReader,
        AudioReader, ExtractorReader,
    )
}  # fmt: skip
"""Readers by the kind that their config names."""


def reader_from_config(config: Mapping[str, Any], folder: str | Path | None = None) -> Any:
    """Create a reader from the plain data of `to_config`.

    Args:
        config: plain data.
        folder: folder that was given to `to_config`.

    Raises:
        DataError: if it does not describe a reader.

    Example:
        >>> from gift.data import PictureReader, reader_from_config
        >>> reader_from_config(PictureReader(size=32).to_config()) == PictureReader(size=32)
        True
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    reader = READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise DataError(f"the kind of reader is {kind!r}, expected one of {sorted(READERS)}")
    known = {field.name for field in dataclasses.fields(reader) if field.init}
    if unknown := sorted(set(settings) - known):
        raise DataError(f"a reader of kind {kind!r} has no {unknown}, but {sorted(known)}")
    name = settings.get("tokenizer")
    if folder is not None and isinstance(name, str) and (Path(folder) / name).is_dir():
        settings["tokenizer"] = Path(folder) / name
    try:
        inspect.signature(reader).bind(**settings)
        return reader(**settings)
    except (TypeError, ValueError) as error:
        raise DataError(f"this describes no reader of kind {kind!r}: {error}") from error


__all__ = [
    "READERS",
    "AudioReader",
    "ChatReader",
    "DetectorReader",
    "ExtractorReader",
    "PictureReader",
    "RowReader",
    "SegmentationReader",
    "TextReader",
    "reader_from_config",
]
