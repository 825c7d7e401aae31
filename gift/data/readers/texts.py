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
    """Makes numbers of texts, as networks of transformers take them.

    Args:
        tokenizer: of transformers, or its name or folder. One without a token for padding pads
            with the one for the end.
        max_length: tokens after which a text, or a pair of texts, is cut off.

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
            tokenizer = copy.deepcopy(tokenizer)  # the caller's stays as it is
            tokenizer.pad_token = tokenizer.eos_token
        object.__setattr__(self, "tokenizer", tokenizer)

    def __call__(self, raw: Any) -> dict[str, Any]:
        """The numbers of a text, or of two in a tuple.

        Raises:
            DataError: if it is something else.
        """
        texts = (raw,) if isinstance(raw, str) else raw
        if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"expected a text or a pair of texts, got {raw!r:.60}")
        return dict(self.tokenizer(*texts, truncation=True, max_length=self.max_length))

    def augmented(self, raw: Any) -> dict[str, Any]:
        """The same: texts stay as they are."""
        return self(raw)

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tensors of all, padded to the longest."""
        return dict(self.tokenizer.pad(list(items), return_tensors="pt"))

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Itself as plain data; see `reader_from_config`.

        Args:
            folder: gets the tokenizer's files, so that nothing else is needed to read texts again.
                Without one, the tokenizer's name or folder is told.

        Raises:
            DataError: if it has neither, and no folder is given.
        """
        name = str(getattr(self.tokenizer, "name_or_path", "") or "")
        if folder is not None:
            name = _FOLDER
            self.tokenizer.save_pretrained(Path(folder) / name)
        elif not name:
            raise DataError("the tokenizer has no name or folder: give a folder for its files")
        return {"kind": self.kind, "tokenizer": name, "max_length": self.max_length}


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of that name, or in that folder.

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
    # transformers makes such a one where a folder has a network, but no tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"{str(name)!r} has no tokenizer with a vocabulary: save one there")
    return tokenizer
