"""Plain texts for language models."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gift.data.examples import Examples
from gift.data.readers import TextReader
from gift.errors import DataError, refuse


class PackedTexts(Dataset[dict[str, Tensor]]):
    """Rows of tokens for next-token prediction.

    Args:
        rows: token ids (rows, length).
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
    """Load plain text files for a language model, packed into rows of equal length.

    Files are concatenated, each followed by the tokenizer's end-of-text token if it has one.
    Tokens after the last full row are dropped.

    Args:
        path: path of a UTF-8 file, or of a folder with ``.txt`` files, or several of these.
        reader: reader with the tokenizer of the model.
        length: number of tokens in a row.

    Raises:
        DataError: naming all files that cannot be read or that hold records (chats in JSON lines,
            tables) instead of text, or if there is not enough text for a row.
    """
    if length < 2:
        refuse(DataError, "language_text", [f"length is {length}, expected at least 2"])
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
        if problem := _records(file, text):
            problems.append(f"{file}: {problem}")
            continue
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    refuse(DataError, "language_text", problems)
    number = len(tokens) // length
    if not number:
        refuse(
            DataError,
            "language_text",
            [f"there are {len(tokens)} tokens, fewer than one row has: {length}"],
        )
    rows = torch.tensor(tokens[: number * length]).view(number, length)
    return Examples(PackedTexts(rows), task="language", reader=reader)


_TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".yaml", ".yml")
_KEYS = {"messages", "conversations", "conversation", "prompt", "completion", "instruction",
         "response", "chosen", "rejected", "text", "input", "output"}  # fmt: skip


def _records(file: Path, text: str) -> str:
    """Say what is wrong with a file that holds records, such as chats or a table; else empty."""
    keys = _keys(text)
    if file.suffix.lower() not in _TABLES and not keys & _KEYS:
        return ""
    if not keys:
        return f"{file.suffix} files hold records; plain text is read here, as .txt"
    return (
        f"these are records with {sorted(keys)}, whose braces and names would be learnt as text: "
        "make texts of them first, for chats by tokenizer.apply_chat_template(messages, "
        "tokenize=False), and write these to a .txt file; or give gift.data.Examples(rows, "
        "task='language') with 'input_ids' and 'labels'"
    )


def _keys(text: str) -> set[str]:
    """Return the keys of the first record of a JSON Lines or JSON text; else none."""
    first = text.lstrip()[:1_000_000]
    candidates = [first.partition("\n")[0], first] if first[:1] in ("{", "[") else []
    for candidate in candidates:
        try:
            found = json.JSONDecoder().raw_decode(candidate)[0]
        except (ValueError, RecursionError):
            continue
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, dict):
            return {str(key) for key in found}
    return set()


def _reason(file: Path, error: Exception) -> str:
    if file.is_dir():
        return "there are no .txt files in this folder"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"this is not text in UTF-8: {error}" if isinstance(error, ValueError) else str(error)
