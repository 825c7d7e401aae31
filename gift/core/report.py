"""What a strategy did to a network, as plain data that prints as tables."""

from collections import Counter
from dataclasses import dataclass, field
from html import escape

from tabulate import tabulate

from gift.errors import some
from gift.support.trees import Node, as_html, as_text, condensed, table_html


@dataclass(frozen=True)
class Claim:
    """One module or parameter that a cap claimed.

    Args:
        cap: number of the cap, as in `Report.caps`.
        name: dotted path of the module or parameter; empty for the network itself.
        class_name: class of the module, before any adaptation.
        what: what the cap's action did with it.
        trainable: trainable elements in it afterwards.
        larger: paths of the tensors in it whose delta has more parameters than they have.
    """

    cap: int
    name: str
    class_name: str
    what: str
    trainable: int
    larger: tuple[str, ...] = ()


@dataclass
class Report:
    """What a strategy did, or would do, to a network.

    Args:
        network: class of the network.
        strategy: the strategy, with its arguments.
        caps: what each cap is: ``module cap 0: mc_type(Linear) -> ma_adapt('lora')``.
        optional: numbers of caps that are not reported if they claim nothing.
        claims: what the caps claimed, in the order in which they claimed it.
        frozen: names of the parameters that were frozen because no cap matched them.
        clipped: for the path of each weight that cannot have the requested size, the setting and
            the size that it got: ``("rank", 2)``.
        leftover: a note on raw weights that a strategy for all layers leaves out.
        total_before, trainable_before, total_after, trainable_after: elements of all parameters.
    """

    network: str
    strategy: str
    caps: list[str] = field(default_factory=list)
    optional: set[int] = field(default_factory=set)
    claims: list[Claim] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    clipped: dict[str, tuple[str, int]] = field(default_factory=dict)
    leftover: str = ""
    total_before: int = 0
    trainable_before: int = 0
    total_after: int = 0
    trainable_after: int = 0

    @property
    def unmatched(self) -> list[str]:
        """The caps that claimed nothing."""
        claimed = {claim.cap for claim in self.claims}
        return [self.caps[number] for number in self._shown if number not in claimed]

    @property
    def _shown(self) -> list[int]:
        """Numbers of the caps to show: all except optional ones that claimed nothing."""
        claimed = {claim.cap for claim in self.claims}
        return [n for n in range(len(self.caps)) if n in claimed or n not in self.optional]

    @property
    def larger_than_weight(self) -> list[str]:
        """Paths of the weights whose delta has more parameters than they have."""
        return [path for claim in self.claims for path in claim.larger]

    @property
    def clipped_texts(self) -> list[str]:
        """The weights that cannot have the requested size, as text: ``"fc.weight (rank 2)"``."""
        return [f"{path} ({setting} {size})" for path, (setting, size) in self.clipped.items()]

    def summary(self) -> str:
        """Totals, and what each cap claimed."""
        share = self.trainable_after / self.total_after if self.total_after else 0
        claimed = Counter(claim.cap for claim in self.claims)
        trainable: Counter[int] = Counter()
        for claim in self.claims:
            trainable[claim.cap] += claim.trainable
        rows = [[self.caps[n], claimed[n], f"{trainable[n]:,}"] for n in self._shown]
        return (
            f"{self.network}: {self.trainable_after:,} of {self.total_after:,} parameters are "
            f"trainable ({share:.3%}); before, {self.trainable_before:,} of {self.total_before:,}\n"
            + tabulate(rows, headers=["cap", "taken", "trainable"], disable_numparse=True)
        )

    def details(self, limit: int | None = None) -> str:
        """Every claim, or the first `limit` of them."""
        rows = [[c.cap, c.name, c.class_name, c.what, f"{c.trainable:,}"] for c in self.claims]
        table = tabulate(
            rows[:limit],
            headers=["cap", "name", "class", "what", "trainable"],
            disable_numparse=True,
        )
        more = len(rows) - len(rows[:limit])
        return table + (f"\n... and {more} more (report.details() lists all)" if more else "")

    def tree(self, colours: bool | None = None) -> str:
        """Return the network as a tree: what is trained, adapted and frozen, and by which cap.

        Equal layers in a row stand for each other, and what is frozen as a whole is one line.

        Args:
            colours: whether to use the colours of terminals; None does so in one.
        """
        return as_text(condensed(self.nodes()), colours)

    def nodes(self) -> Node:
        """Return the tree of what was claimed, and of what was frozen."""
        root = Node(self.network)
        for claim in self.claims:
            node = root.at(claim.name)
            node.state = node.state or _state_of(claim)
            said = f"{claim.class_name}: {claim.what}, {claim.trainable:,} trained, cap {claim.cap}"
            node.text = f"{node.text}; {said}" if node.text else said
        for name in self.frozen:
            node = root.at(name)
            node.state = node.state or "frozen"
        root.settle()
        return root

    def _repr_html_(self) -> str:
        head, *_ = self.summary().split("\n", 1)
        claimed = Counter(claim.cap for claim in self.claims)
        rows = [[n, self.caps[n], claimed[n]] for n in self._shown]
        notes = [f"took nothing: {text}" for text in self.unmatched] + [self.leftover]
        parts = [escape(head), table_html(rows, ["cap", "", "taken"]), as_html(self.nodes())]
        return "".join(f"<div>{part}</div>" for part in [*parts, *map(escape, filter(None, notes))])

    def __str__(self) -> str:
        parts = [self.summary(), self.details(limit=50)]
        if self.frozen:
            shown = ", ".join(self.frozen[:6]) + (", ..." if len(self.frozen) > 6 else "")
            parts.append(f"frozen, as no cap matched them: {len(self.frozen)} parameters ({shown})")
        if self.clipped:
            parts.append(f"clipped, as they cannot have the size: {some(self.clipped_texts, 6)}")
        parts += [self.leftover] if self.leftover else []
        parts += [f"took nothing: {text}" for text in self.unmatched]
        return "\n\n".join(parts)


def _state_of(claim: Claim) -> str:
    """Return whether what a cap claimed is trained itself, adapted, or frozen."""
    if not claim.trainable:
        return "frozen"
    return "trained" if claim.what.startswith(("trained", "replaced")) else "adapted"
