"""Readers of texts."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gift.errors import DataError, first_line
from gift.support.optional import require

_FOLDER = "tokenizer"


@dataclass(frozen=True)
class TextReader:
    """Converts texts to token ids for transformers networks.

    Args:
        tokenizer: transformers tokenizer, or its name or folder. If it has no padding token, its
            end-of-text token is used for padding.
        max_length: number of tokens after which a text, or a pair of texts, is truncated.

    Raises:
        DataError: if there is no such tokenizer, or it cannot pad.
        ValueError: if `max_length` is below 1.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from gift.data import TextReader
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, "[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
        >>> reader = TextReader(tokenizer, max_length=3)
        >>> reader.collate([reader("good"), reader("good , good , good")])["input_ids"]
        tensor([[2, 0, 0],
                [2, 1, 2]])
    """

    kind: ClassVar[str] = "text"
    stands_alone: ClassVar[bool] = False  # it needs the files of a tokenizer

    tokenizer: Any
    max_length: int = 128

    def __post_init__(self) -> None:
        if type(self.max_length) is not int or self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length!r}, expected at least 1")
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        if not callable(tokenizer) or not hasattr(tokenizer, "pad"):
            raise DataError(
                f"the tokenizer is a {type(tokenizer).__name__}, expected one of transformers, or "
                "its name or folder"
            )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise DataError("the tokenizer has no token for padding: set tokenizer.pad_token")
            tokenizer = copy.deepcopy(tokenizer)  # leaves the caller's tokenizer unchanged
            tokenizer.pad_token = tokenizer.eos_token
        object.__setattr__(self, "tokenizer", tokenizer)

    def __call__(self, raw: Any) -> dict[str, Any]:
        """Tokenize a text, or a tuple of two texts.

        Raises:
            DataError: if it is something else.
        """
        texts = (raw,) if isinstance(raw, str) else raw
        if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"expected a text or a pair of texts, got {raw!r:.60}")
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length))

    def augmented(self, raw: Any) -> dict[str, Any]:
        """Tokenize in the same way: texts are not augmented."""
        return self(raw)

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad to the longest text, and return tensors."""
        return dict(self.tokenizer.pad(list(items), return_tensors="pt"))

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data; see `reader_from_config`.

        Args:
            folder: folder for the tokenizer's files, so that nothing else is needed to read texts
                again. Without it, the tokenizer's name or folder is recorded.

        Raises:
            DataError: if the tokenizer has neither, and no folder is given.
        """
        name = str(getattr(self.tokenizer, "name_or_path", "") or "")
        if folder is not None:
            name = _FOLDER
            self.tokenizer.save_pretrained(Path(folder) / name)
        elif not name:
            raise DataError("the tokenizer has no name or folder: give a folder for its files")
        return {"kind": self.kind, "tokenizer": name, "max_length": self.max_length}


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of that name, or from that folder.

    Raises:
        DataError: if it cannot be loaded.
    """
    try:
        tokenizer = require("transformers", "text").AutoTokenizer.from_pretrained(
            str(name), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"there is no tokenizer {str(name)!r} here, and it cannot be fetched: give a folder "
            f"that save_pretrained wrote ({type(error).__name__}: {first_line(error)})"
        ) from error
    # transformers creates an empty tokenizer if a folder has a network but no tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"{str(name)!r} has no tokenizer with a vocabulary: save one there")
    return tokenizer
