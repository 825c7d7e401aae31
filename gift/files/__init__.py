"""gift's own file format. Formats of other libraries are in `gift.interop`."""

from gift.errors import DeltaFileError
from gift.files.description import describe_deltas, resolve
from gift.files.inspection import DeltaFile, inspect
from gift.files.loading import load
from gift.files.saving import save

__all__ = ["DeltaFile", "DeltaFileError", "describe_deltas", "inspect", "load", "resolve", "save"]
