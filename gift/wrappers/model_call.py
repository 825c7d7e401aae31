"""Check and extend the arguments of a language model's call.

A prompted model prepends its virtual tokens to the first tokens of a text, and never again. So each
call must show whether it is the first, and everything that counts tokens must agree: a cache, a
mask, positions. Anything that disagrees, or is unknown here, is rejected.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gift.wrappers.caches import (
    FLAGS,
    Note,
    caches_in,
    has_fixed_length,
    is_cache,
    is_empty,
    is_nothing,
    is_tuples,
    items_of,
    length_of,
    note_of,
    put_note,
    version,
)

# Arguments that are extended here, or that do not depend on the tokens that are read.
_KNOWN = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels",
    "encoder_hidden_states", "encoder_attention_mask", "encoder_outputs", "head_mask",
    "cross_attn_head_mask", "num_items_in_batch", "logits_to_keep", "num_logits_to_keep",
}  # fmt: skip
_TYPES = "token_type_ids"  # also of images and experts, with a longer name


class ModelCall:
    """A call of a language model, and the problems with it.

    Args:
        named: the arguments by name; `extend` changes them.
        tokens: the ids ``(batch, time)`` or embeddings ``(batch, time, dim)`` among them.
        virtual: the number of virtual tokens.
        first: the first position that the model assigns to a token.
        limit: the number of the model's positions; None if there is no limit.
        keeps_states: whether the model is a state-space model, which accepts a cache of states.
    """

    def __init__(
        self,
        named: dict[str, Any],
        tokens: Tensor,
        *,
        virtual: int,
        first: int,
        limit: int | None,
        keeps_states: bool,
    ) -> None:
        self.named, self.shape, self.virtual, self.first = named, tokens.shape[:2], virtual, first
        self.time = tokens.shape[1]
        self.problems: list[str] = []
        self.offset: int | None = None
        self.cache, self.cache_name = self._only_cache()
        # A state-space model has no positions: its `cache_position`, if any, says whether to start
        # a new state.
        states = keeps_states if self.cache is None else length_of(self.cache) is None
        self.has_positions = not states
        self.note = None if self.cache is None else note_of(self.cache)
        self.continues = self.cache is not None and not is_empty(self.cache)
        self.past = self._past() if self.continues else 0
        # The number of tokens so far, without virtual ones.
        self.given = None if self.past is None else self.past + self.time
        if self.continues and self.given is not None:
            self.given -= virtual
        self._check_limit(limit)
        self._check_counts(limit)
        self._check_others()

    def _only_cache(self) -> tuple[Any, str]:
        found = {name: value for name, value in self.named.items()
                 if is_cache(value) or is_tuples(value)}  # fmt: skip
        if len(caches_in(found.values())) > 1:
            self.problems.append(f"was given several caches, {sorted(found)}")
        name = [*found, ""][0]
        return found.get(name), name

    def _past(self) -> int | None:
        """Return the number of positions in a cache; None if neither it nor its note says."""
        cache, note = self.cache, self.note
        length, kind = length_of(cache), type(cache).__name__
        if has_fixed_length(cache):
            return length
        of = "" if length is None else f" of {length} positions"
        if not is_tuples(cache) and (note is None or note.virtual != self.virtual):
            self.problems.append(
                f"was given a cache{of}, a {kind} that it did not fill, so that the {self.virtual} "
                f"virtual tokens are not in it: start over without {self.cache_name}"
            )
        # If the first layer holds a state, its length is zero or None.
        return note.length if not length and note is not None else length

    def _check_limit(self, limit: int | None) -> None:
        n = self.virtual
        if limit is not None and self.given is not None and self.given <= limit < self.given + n:
            self.problems.append(
                f"has {limit} positions: {n} virtual tokens leave room for {limit - n} others, "
                f"{self.given} were given"
            )

    def _check_counts(self, limit: int | None) -> None:
        """Check that the cache, the mask and the positions count the same tokens."""
        if self.cache is not None and has_fixed_length(self.cache):
            self.problems.append(
                f"was given a {type(self.cache).__name__} of fixed length, which was made without "
                "the virtual tokens: use a dynamic cache"
            )
            return
        mask, positions = self.named.get("attention_mask"), self.named.get("position_ids")
        places = self.named.get("cache_position")
        lengths: set[int | None] = set()
        if isinstance(mask, Tensor) and mask.ndim == 2:
            lengths.add(mask.shape[-1])
        elif mask is not None:
            self.problems.append(
                "was given an attention_mask that is not (batch, time): gift does not know what it "
                "is for virtual tokens"
            )
        if torch.compiler.is_compiling():  # tensor values are unknown
            self._agree(lengths)
            return
        if isinstance(places, Tensor) and self.has_positions:
            lengths.add(int(places[-1]) + 1 if places.shape == (self.time,) else -1)
        elif isinstance(places, Tensor) and self.cache is not None:
            lengths.add(self.given if bool(places[0]) == self.continues else -1)
        if isinstance(positions, Tensor):
            self._check_positions(positions, lengths, limit)
        self._agree(lengths)

    def _check_positions(
        self, positions: Tensor, lengths: set[int | None], limit: int | None
    ) -> None:
        end = int(positions.max()) + 1 - self.first
        if limit is not None and end <= limit < end + self.virtual and not self.problems:
            self.problems.append(
                f"has {limit} positions: {self.virtual} virtual tokens leave room for "
                f"{limit - self.virtual} others, position_ids are for {end}"
            )
        if self.given is None:
            return
        self.offset = end - self.given
        before = None if self.note is None else self.note.offset
        # With padding or images, positions count fewer tokens than there are, by a constant offset.
        expected = self.offset <= 0 if before is None else self.offset == before
        if not expected or (is_tuples(self.cache) and not lengths and self.offset):
            lengths.add(end)
        elif is_tuples(self.cache) and not lengths:
            lengths.add(self.given)
        packed = positions.shape[-1] > 1 and "attention_mask" not in self._tensors()
        if packed and bool((positions.diff(dim=-1) != 1).any()):
            self.problems.append(
                "was given position_ids that begin again, for several texts in a row, and no "
                "attention_mask: virtual tokens would come before the first only"
            )

    def _tensors(self) -> set[str]:
        return {name for name, value in self.named.items() if isinstance(value, Tensor)}

    def _agree(self, lengths: set[int | None]) -> None:
        wrong = sorted(count for count in lengths - {self.given} if count is not None)
        if wrong and self.given is not None:
            counted = "another number of" if -1 in wrong else wrong[0]
            held = (
                "no cache"
                if not self.continues
                else (
                    f"a cache of {self.past} positions, {self.virtual} of them for virtual tokens"
                )
            )
            self.problems.append(
                f"was given {self.time} tokens and {held}, but mask or positions for {counted} "
                f"tokens: start over without {self.cache_name or 'a cache'}"
            )
        if lengths or not self.continues or torch.compiler.is_compiling() or self.problems:
            return
        if is_tuples(self.cache) or (self.note and self.note.length not in (None, self.past)):
            self.problems.append(
                f"was given {self.time} tokens and a cache of {self.past} positions, of which "
                f"nothing tells whether {self.virtual} are those of virtual tokens: give an "
                "attention_mask for all tokens"
            )

    def _check_others(self) -> None:
        for name, value in self.named.items():
            if name in _KNOWN or name.endswith(_TYPES) or value is self.cache:
                continue
            if isinstance(value, FLAGS) or is_nothing(value):
                continue
            if isinstance(value, Tensor):
                shape = tuple(value.shape)
                goes = " which goes with the tokens:" if value.shape[:2] == self.shape else ""
                self.problems.append(
                    f"was given {name} {shape},{goes} gift does not know what it is for virtual "
                    f"tokens ({version()})"
                )
            else:
                self.problems.append(
                    f"was given {name}, a {type(value).__name__}, which gift does not know: it may "
                    f"hold states of earlier tokens ({version()})"
                )

    def extend(self, in_cache: bool = False) -> None:
        """Put virtual tokens into everything that goes with the tokens, but not into these.

        Args:
            in_cache: whether the virtual tokens are in the cache before the first call, so that
                they are not read, as the others are.
        """
        named, n, new = self.named, self.virtual, not (self.continues or in_cache)
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor):
            named["attention_mask"] = F.pad(mask, (n, 0), value=1)
        self._shift("position_ids", self._begin(), new)
        if self.has_positions:
            self._shift("cache_position", 0, new)
        for name, value in named.items():
            if not new or not isinstance(value, Tensor) or value.shape[:2] != self.shape:
                continue
            if name == "labels" or name.endswith(_TYPES):
                named[name] = F.pad(value, (n, 0), value=-100 if name == "labels" else 0)

    def _begin(self) -> int:
        """Return where given positions start, which is zero in ``generate()`` for any model."""
        positions, mask = self.named.get("position_ids"), self.named.get("attention_mask")
        if not self.first or self.continues or not isinstance(positions, Tensor):
            return self.first
        if isinstance(mask, Tensor):  # already extended
            mask = mask[:, self.virtual :].expand(positions.shape).bool()
            positions = positions[mask]
        begins = torch.compiler.is_compiling() or bool((positions >= self.first).all())
        return self.first if begins else 0

    def _shift(self, name: str, first: int, new: bool) -> None:
        positions = self.named.get(name)
        if not isinstance(positions, Tensor):
            return
        shifted = positions + self.virtual
        if new:
            own = torch.arange(first, first + self.virtual, dtype=positions.dtype,
                               device=positions.device)  # fmt: skip
            shifted = torch.cat([own.expand(*positions.shape[:-1], self.virtual), shifted], -1)
        self.named[name] = shifted

    def note_caches(self, output: Any) -> None:
        """Note in the caches of the call and of its output what they hold now."""
        length = None
        if self.given is not None and not torch.compiler.is_compiling():
            length = self.given + self.virtual
        offset = self.offset
        if offset is None and self.note is not None:
            offset = self.note.offset
        for cache in caches_in([self.cache, *items_of(output)]):
            if not is_empty(cache):
                put_note(cache, Note(self.virtual, length, offset))


def continuing(virtual: int, named: Mapping[str, Any]) -> list[str]:
    """Return why ``generate()`` cannot continue with the caches that it is given.

    It drops as many of the given tokens as the cache is long, and the cache counts virtual tokens.
    """
    problems = []
    for name, value in named.items():
        if (is_cache(value) or is_tuples(value)) and not is_empty(value):
            length = length_of(value)
            of = "" if length is None else f" of {length} positions"
            problems.append(
                f"was given a cache{of}, {virtual} of them for virtual tokens, which generate() "
                f"would count with the tokens that it is given: start over without {name}"
            )
    return problems
