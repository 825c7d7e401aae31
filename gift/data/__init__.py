"""Examples in common formats, and readers of inputs, independent of networks."""

from gift.data.boxes import coco
from gift.data.chats import chats
from gift.data.examples import Examples, Reader
from gift.data.folders import audio_folders, class_folders
from gift.data.hub import hugging_face
from gift.data.language import language_text
from gift.data.masks import mask_folders, mask_table
from gift.data.memory import labelled, tensors
from gift.data.named import torchvision_dataset
from gift.data.pairs import text_pairs
from gift.data.readers import (
    AudioReader,
    ChatReader,
    DetectorReader,
    ExtractorReader,
    PictureReader,
    RowReader,
    SegmentationReader,
    TextReader,
    reader_from_config,
)
from gift.data.tables import audio_table, picture_table, text_table
from gift.data.tabular import tabular
from gift.errors import DataError

__all__ = [
    "AudioReader",
    "ChatReader",
    "DataError",
    "DetectorReader",
    "Examples",
    "ExtractorReader",
    "PictureReader",
    "Reader",
    "RowReader",
    "SegmentationReader",
    "TextReader",
    "audio_folders",
    "audio_table",
    "chats",
    "class_folders",
    "coco",
    "hugging_face",
    "labelled",
    "language_text",
    "mask_folders",
    "mask_table",
    "picture_table",
    "reader_from_config",
    "tabular",
    "tensors",
    "text_pairs",
    "text_table",
    "torchvision_dataset",
]
