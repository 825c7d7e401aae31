"""Examples in common formats, and readers of inputs, independent of networks."""

from gift.data.boxes import coco
from gift.data.examples import Examples, Reader
from gift.data.folders import class_folders
from gift.data.hub import hugging_face
from gift.data.language import language_text
from gift.data.memory import labelled, tensors
from gift.data.named import torchvision_dataset
from gift.data.readers import DetectorReader, PictureReader, TextReader, reader_from_config
from gift.data.tables import picture_table, text_table
from gift.errors import DataError

__all__ = [
    "DataError",
    "DetectorReader",
    "Examples",
    "PictureReader",
    "Reader",
    "TextReader",
    "class_folders",
    "coco",
    "hugging_face",
    "labelled",
    "language_text",
    "picture_table",
    "reader_from_config",
    "tensors",
    "text_table",
    "torchvision_dataset",
]
