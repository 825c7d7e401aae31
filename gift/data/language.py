"""Plain texts for language models."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gift.data.examples import Examples
from gift.data.problems import refuse
from gift.data.readers import TextReader


class PackedTexts(Dataset[dict[str, Tensor]]):
    """Rows of tokens, which are to be predicted one after the other.

    Args:
        rows: numbers of tokens (rows, length).
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = self.rows[place]
        return {"input_ids": row, "labels": row}


def language_text(
    path: str | Path | Sequence[str | Path], reader: TextReader, length: int = 128
) -> Examples:
    """Plain text files for a language model, packed in rows of equal length.

    Each file ends with the tokenizer's token for that, if it has one; then the next one follows.
    What is left after the last whole row does not count.

    Args:
        path: of a file in UTF-8, of a folder with ``.txt`` files, or of several of these.
        reader: with the tokenizer of the model.
        length: tokens in a row.

    Raises:
        DataError: naming all files that cannot be read, or if there is not enough text for a row.
    """
    if length < 2:
        refuse("language_text", [f"length is {length}, expected at least 2"])
    files = []
    for place in [path] if isinstance(path, str | Path) else path:
        inside = sorted(Path(place).rglob("*.txt")) if Path(place).is_dir() else [Path(place)]
        files += inside or [Path(place)]
    tokenizer, tokens, problems = reader.tokenizer, [], []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{file}: {_reason(file, error)}")
            continue
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    refuse("language_text", problems)
    number = len(tokens) // length
    if not number:
        refuse(
            "language_text", [f"there are {len(tokens)} tokens, fewer than one row has: {length}"]
        )
    rows = torch.tensor(tokens[: number * length]).view(number, length)
    return Examples(PackedTexts(rows), task="language", reader=reader)


def _reason(file: Path, error: Exception) -> str:
    if file.is_dir():
        return "there are no .txt files in this folder"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"this is no text in UTF-8: {error}" if isinstance(error, ValueError) else str(error)
