"""Chats and instructions, for language models that answer."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gift.data.examples import IGNORED, Examples
from gift.data.readers.chats import ChatReader, Record, record
from gift.data.readers.texts import TextReader
from gift.errors import DataError, GiftWarning, refuse

Row = tuple[list[int], list[int]]
"""Token ids, and labels: the same, or `IGNORED` where nothing is to be learnt."""


class AnsweredRows(Dataset[dict[str, Any]]):
    """Rows of one or several examples, each its tokens and labels.

    Args:
        rows: the examples in each row.
    """

    def __init__(self, rows: Sequence[Sequence[Row]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        parts = self.rows[place]
        labels = [labels for _, labels in parts]
        return {
            "input_ids": [token for tokens, _ in parts for token in tokens],
            # What follows the end of another example is not its continuation.
            "labels": [v for own in labels for v in (IGNORED, *own[1:])],
            "lengths": [len(tokens) for tokens, _ in parts],
        }


class CollateRows:
    """Pads rows, and keeps examples in one row apart.

    Args:
        padding: token that fills rows up.
        packed: whether rows have several examples: these get positions of their own, and an
            attention mask (batch, 1, length, length), True where a token sees another one.
    """

    def __init__(self, padding: int, packed: bool) -> None:
        self.padding, self.packed = padding, packed

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input ids, labels and attention mask, with positions if rows are packed."""
        longest = max(len(item["input_ids"]) for item in items)
        tokens = torch.full((len(items), longest), self.padding)
        labels = torch.full((len(items), longest), IGNORED)
        owner = torch.full((len(items), longest), -1)
        positions = torch.zeros(len(items), longest, dtype=torch.int64)
        for row, item in enumerate(items):
            count, lengths = len(item["input_ids"]), torch.tensor(item["lengths"])
            tokens[row, :count] = torch.tensor(item["input_ids"])
            labels[row, :count] = torch.tensor(item["labels"])
            owner[row, :count] = torch.arange(len(lengths)).repeat_interleave(lengths)
            starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            positions[row, :count] = torch.arange(count) - starts
        found = {"input_ids": tokens, "labels": labels}
        if not self.packed:
            return found | {"attention_mask": (owner >= 0).long()}
        same = owner[:, None, :, None] == owner[:, None, None, :]
        mask = same & torch.ones(longest, longest, dtype=torch.bool).tril()
        return found | {"attention_mask": mask, "position_ids": positions}


def chats(
    path: str | Path | Sequence[Mapping[str, Any]],
    reader: TextReader,
    length: int = 512,
    packing: bool = False,
) -> Examples:
    """Load chats, or prompts and their completions, for a language model that learns to answer.

    Each line of the file is a record with "messages" (of "role" and "content"; "conversations" of
    "from" and "value" do as well), with "prompt" and "completion", or with "instruction", perhaps
    "input", and "output". The chat template of the tokenizer makes texts of messages; a prompt and
    completion that are texts are taken as they are, followed by the end-of-text token. Only answers
    are learnt: the loss is that of the assistant's messages, or of the completion.

    Args:
        path: path of a file of JSON lines in UTF-8, or the records themselves.
        reader: reader with the tokenizer of the model.
        length: number of tokens after which an example is cut.
        packing: whether short examples share a row of `length` tokens, which is faster. They do not
            see each other.

    Raises:
        DataError: naming all lines that are not records, or have no answer; or if the tokenizer has
            no chat template but needs one.
    """
    if type(length) is not int or length < 2:
        refuse(DataError, "chats", [f"length is {length!r}, expected at least 2"])
    if not isinstance(reader, TextReader):
        raise DataError(f"the reader is {reader!r:.60}, expected TextReader(tokenizer)")
    what = str(path) if isinstance(path, str | Path) else "chats"
    records, conversational = _checked(what, path)
    own = ChatReader(reader.tokenizer, max_length=length, conversational=conversational)
    rows = _rows(what, own, records, length)
    packed = _packed(rows, length) if packing else [[row] for row in rows]
    collate = CollateRows(own.tokenizer.pad_token_id, packing)
    return Examples(AnsweredRows(packed), "language", None, collate, own)


def _checked(what: str, path: Any) -> tuple[dict[str, Record], bool]:
    """Return the records by their places, and whether they are messages."""
    records: dict[str, Record] = {}
    problems: list[str] = []
    for place, given in _records(path, problems):
        found, problem = record(given)
        if found is None:
            problems.append(f"{place}: {problem}")
        else:
            records[place] = found
    texts = {isinstance(one.prompt, str) for one in records.values()}
    if len(texts) > 1:
        problems.append("some records have messages, some texts: expected all of one kind")
    if not records and not problems:
        problems.append("there are no records")
    refuse(DataError, what, problems)
    return records, False in texts


def _rows(what: str, reader: ChatReader, records: Mapping[str, Record], length: int) -> list[Row]:
    """Return the tokens and labels of records, cut to a length."""
    rows, cut, problems = [], 0, []
    for place, one in records.items():
        try:
            tokens, labels = _tokens(reader, one)
        except DataError as error:
            problems.append(f"{place}: {error}")
            continue
        cut += len(tokens) > length
        if any(label != IGNORED for label in labels[1:length]):
            rows.append((tokens[:length], labels[:length]))
        elif len(tokens) <= length:
            problems.append(f"{place}: there is no answer to learn")
    refuse(DataError, what, problems)
    if not rows:
        refuse(DataError, what, [f"all answers begin after {length} tokens: give another length"])
    if cut:
        warnings.warn(
            f"{what}: {cut} of {len(records)} examples have more than {length} tokens and are cut; "
            f"{len(records) - len(rows)} of them are left out, whose answers begin later",
            GiftWarning,
            stacklevel=3,
        )
    return rows


def _records(path: Any, problems: list[str]) -> list[tuple[str, Any]]:
    """Return records and their places; lines that cannot be read are added to the problems."""
    if not isinstance(path, str | Path):
        return [(f"record {place}", one) for place, one in enumerate(path)]
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problems.append("there is no such file")
        return []
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"this is not text in UTF-8: {error}")
        return []
    found = []
    if text.lstrip()[:1] == "[":
        try:
            return [(f"record {place}", one) for place, one in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            problems.append(f"this is not JSON: {error}")
            return []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                problems.append(f"line {number}: this is not JSON: {error}")
    return found


def _tokens(reader: ChatReader, one: Record) -> Row:
    """Return the tokens of a record, and labels for its answers."""
    if isinstance(one.prompt, str):
        return _of_texts(reader, one.prompt, one.answer)
    messages = one.prompt
    whole = reader.rendered(messages)
    answers = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = reader.rendered(messages[:place], True)
        after = reader.rendered(messages[: place + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                "the chat template writes earlier messages in another way once later ones follow, "
                "so answers cannot be found: leave only the last answer in each record, or set a "
                "tokenizer.chat_template without this"
            )
        answers.append((len(before), len(after)))
    return _labelled(reader, whole, answers)


def _of_texts(reader: ChatReader, prompt: str, answer: str) -> Row:
    """Return the tokens of a prompt and its completion, which an end-of-text token follows."""
    tokenizer = reader.tokenizer
    end = tokenizer.eos_token_id
    # Tokenized apart, since at prediction a prompt ends where its last token does.
    first = list(tokenizer(prompt, verbose=False)["input_ids"])
    if len(first) > 1 and first[-1] in (end, tokenizer.sep_token_id):
        first.pop()
    second = list(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])
    second += [] if end is None else [end]
    if not answer.strip():
        return first, [IGNORED] * len(first)
    return [*first, *second], [*[IGNORED] * len(first), *second]


def _labelled(reader: ChatReader, text: str, answers: Sequence[tuple[int, int]]) -> Row:
    """Return the tokens of a text, and labels for those that begin within an answer."""
    if not getattr(reader.tokenizer, "is_fast", False):
        raise DataError("the tokenizer does not say where tokens begin: take a fast tokenizer")
    found = reader.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    tokens = list(found["input_ids"])
    labels = [
        token if any(begin <= start < end for begin, end in answers) else IGNORED
        for token, (start, _) in zip(tokens, found["offset_mapping"], strict=True)
    ]
    return tokens, labels


def _packed(rows: Sequence[Row], length: int) -> list[list[Row]]:
    """Return rows of several examples: the longest first, each in the first row that has room."""
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        size = len(row[0])
        place = next((n for n, left in enumerate(room) if left >= size), None)
        if place is None:
            bins.append([row])
            room.append(length - size)
        else:
            bins[place].append(row)
            room[place] -= size
    return bins
