"""Readers of chats and prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gift.data.readers.texts import TextReader
from gift.errors import DataError, first_line

ROLES = ("system", "user", "assistant", "tool")
_FOREIGN = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class ChatReader(TextReader):
    """Converts chats and prompts to token ids, up to where a language model answers.

    A chat is a list of messages, dictionaries of "role" and "content", which the chat template of
    the tokenizer makes a text.

    Args:
        tokenizer: transformers tokenizer, or its name or folder.
        max_length: number of tokens after which a prompt is truncated, from its beginning.
        conversational: whether a bare text is the message of a user; else it is a text to go on
            with.

    Raises:
        DataError: if there is no such tokenizer, or it has no chat template but needs one.
    """

    kind: ClassVar[str] = "chat"

    max_length: int = 1024
    conversational: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conversational and not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template, which says how messages become a text: set "
                "tokenizer.chat_template, or take the tokenizer of a model for chats"
            )

    def __call__(self, raw: Any) -> dict[str, Any]:
        """Tokenize a text, a list of messages, or a record with "messages" or "prompt".

        Raises:
            DataError: if it is something else.
        """
        text = raw if isinstance(raw, str) and not self.conversational else self.prompt(raw)
        tokens = self.tokenizer(text, add_special_tokens=not self.conversational, verbose=False)
        return {name: tokens[name][-self.max_length :] for name in ("input_ids", "attention_mask")}

    def prompt(self, raw: Any) -> str:
        """Return the text up to the answer.

        Raises:
            DataError: if the input is not a chat.
        """
        if isinstance(raw, str):
            raw = [{"role": "user", "content": raw}]
        if isinstance(raw, Mapping):
            found, problem = record(raw)
            if found is None:
                raise DataError(problem)
            if isinstance(found.prompt, str):
                return found.prompt
            raw = found.prompt
        messages, problem = checked_messages(raw)
        if problem:
            raise DataError(problem)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.rendered(messages, True)

    def rendered(self, messages: Sequence[Mapping[str, str]], answer: bool = False) -> str:
        """Return messages as a text.

        Args:
            messages: the messages.
            answer: whether the beginning of an answer follows.

        Raises:
            DataError: if the chat template refuses them.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=answer
                )
            )
        except Exception as error:  # templates raise what they like
            raise DataError(f"the chat template refuses it: {first_line(error)}") from error

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data; see `reader_from_config`."""
        return super().to_config(folder) | {"conversational": self.conversational}


@dataclass(frozen=True)
class Record:
    """A prompt and its answer.

    Args:
        prompt: messages, or a text.
        answer: messages or text that follow; empty if there is none yet.
    """

    prompt: Any
    answer: Any


def record(given: Any) -> tuple[Record | None, str]:
    """Return what a record of a data set says, or what is wrong with it.

    It has "messages" (or "conversations", with "from" and "value"), "prompt" and "completion"
    (texts or messages), or "instruction", perhaps "input", and "output".
    """
    if not isinstance(given, Mapping):
        return None, f"this is {given!r:.60}, expected a record with names and values"
    for name in ("messages", "conversations", "conversation"):
        if name in given:
            messages, problem = checked_messages(given[name])
            return (None, f"{name}: {problem}") if problem else (Record(messages, ()), "")
    if "prompt" in given:
        return _pair(given["prompt"], given.get("completion", given.get("response", "")))
    if "instruction" in given:
        parts = [given["instruction"], given.get("input") or ""]
        answer = given.get("output", given.get("response", ""))
        if not all(isinstance(part, str) for part in (*parts, answer)) or not parts[0].strip():
            return None, "instruction, input and output are not all texts"
        user = {"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}
        reply = [{"role": "assistant", "content": answer}] if answer.strip() else []
        return Record([user, *reply], ()), ""
    return None, (
        f"it has {sorted(map(str, given))[:8]}, expected messages, prompt and completion, or "
        "instruction and output"
    )


def _pair(prompt: Any, answer: Any) -> tuple[Record | None, str]:
    """Return a record of a prompt and its completion, both texts or both messages."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return (Record(prompt, answer), "") if prompt else (None, "the prompt is empty")
    messages, problem = checked_messages(prompt)
    more, reason = checked_messages(answer) if answer else ([], "")
    if problem or reason:
        return None, f"prompt and completion: {problem or reason}"
    return Record([*messages, *more], ()), ""


def checked_messages(given: Any) -> tuple[list[dict[str, str]], str]:
    """Return messages with the names of roles that templates know, or what is wrong with them."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        return [], f"expected a list of messages, got {given!r:.60}"
    found = []
    for place, message in enumerate(given):
        if not isinstance(message, Mapping):
            return [], f"message {place} is {message!r:.60}, expected role and content"
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = _FOREIGN.get(str(role), role)
        if role not in ROLES:
            return [], f"message {place} has the role {role!r:.40}, expected one of {ROLES}"
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            return [], f"message {place}, of {role}, has the content {content!r:.60}, no text"
        found.append({"role": role, "content": content})
    return found, ""
