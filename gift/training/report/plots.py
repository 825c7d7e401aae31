"""The plots of a report, for light and dark pages."""

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gift.support.optional import require
from gift.training.report.tables import class_names, words
from gift.training.result import Result

POINTS = 2000  # maximum number of points of a line
GROUPS_NAMED = 8  # maximum number of learning rates in a legend
LARGEST = 1e100  # largest number that is plotted


@dataclass(frozen=True)
class Theme:
    """Colors of a page.

    Args:
        face: background color.
        text: color of texts and axes.
        grid: color of grid lines.
        colours: colors of the data; the first is training, the second validation.
        dark: whether the theme is for dark pages.
    """

    face: str
    text: str
    grid: str
    colours: tuple[str, ...]
    dark: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the settings for matplotlib."""
        cycler = require("cycler", "train").cycler
        return {
            "figure.facecolor": self.face,
            "axes.facecolor": self.face,
            "savefig.facecolor": self.face,
            "axes.prop_cycle": cycler(color=self.colours),
            "axes.edgecolor": self.grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "legend.facecolor": self.face,
            "legend.edgecolor": "none",
            "font.size": 9,
            "axes.titlesize": 10,
            **{
                f"{what}color": self.text
                for what in ("text.", "axes.label", "axes.title", "xtick.", "ytick.")
            },
        }


LIGHT = Theme("#ffffff", "#24292f", "#d8dee4", ("#1f6fb4", "#d4610b", "#2c8a57", "#8a4fb0"))
DARK = Theme("#16191d", "#dfe3e8", "#3a4048", ("#64adf0", "#f39a54", "#62c48c", "#c08fe3"), True)

Draw = Callable[[Any, Theme], Any]


def render(draw: Draw, shown: Any, theme: Theme) -> bytes | None:
    """Render a plot as PNG; None if there is nothing to show.

    The user's matplotlib settings are ignored and left unchanged.

    Args:
        draw: function that returns a figure, such as those below.
        shown: data to plot.
        theme: colors of the plot.
    """
    matplotlib = require("matplotlib", "train")
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the tables have all names
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(theme.settings())
        if (figure := draw(shown, theme)) is None:
            return None
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120)
        return out.getvalue()


def losses(result: Result, theme: Theme) -> Any:
    """Plot the training and validation losses, the best epoch, and when blocks were unfrozen."""
    steps = _smoothed([row.get("loss", math.nan) for row in result.steps])
    at, unit = _places(result)
    trained, validated = (_column(result, f"{name}_loss") for name in ("train", "valid"))
    if not any(math.isfinite(v) for v in [*steps, *(v for _, v in [*trained, *validated])]):
        return None
    figure, axes = panel(unit, "loss")
    training, validation = theme.colours[:2]
    if steps:
        axes.plot(*_thinned(at, steps), color=training, alpha=0.4, linewidth=1,
                  label="training, each step, smoothed")  # fmt: skip
    axes.plot(*_xy(trained), "o-", color=training, markersize=4, label="training, each epoch")
    if validated:
        axes.plot(*_xy(validated), "s-", color=validation, markersize=4, label="validation")
    _mark_best(axes, result, validated, theme)
    _scale(axes, [v for _, v in [*trained, *validated]] or steps)
    _mark_unfrozen(axes, result, theme)
    axes.legend()
    return figure


def metrics(result: Result, theme: Theme) -> Any:
    """Plot all other values of the epochs; those between 0 and 1 share a panel."""
    names = {name for row in result.history for name in row}
    names -= {"epoch", "seconds", "step", "train_loss", "valid_loss"}
    columns = {name: _column(result, name) for name in sorted(names)}
    columns = {name: c for name, c in columns.items() if any(math.isfinite(v) for _, v in c)}
    if not columns:
        return None
    shares = [n for n, c in columns.items() if all(0 <= v <= 1 for _, v in c if math.isfinite(v))]
    panels = [shares] * bool(shares) + [[name] for name in columns if name not in shares]
    figure = require("matplotlib.figure", "train").Figure(
        (7.2, 3.2 * len(panels)), layout="constrained"
    )
    for axes, group in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _name_axes(axes, "epoch", _label(group[0]) if len(group) == 1 else "")
        for name, mark in zip(group, "os^vD" * len(group), strict=False):
            axes.plot(*_xy(columns[name]), f"{mark}-", markersize=4, label=_label(name))
        if result.best_epoch is not None:
            axes.axvline(result.best_epoch, color=theme.text, linewidth=0.8, linestyle="--",
                         label=f"best epoch: {result.best_epoch}")  # fmt: skip
        axes.legend()
    return figure


def rates(result: Result, theme: Theme) -> Any:
    """Plot the learning rate of each parameter group."""
    names = list(dict.fromkeys(n for row in result.steps for n in row if n.startswith("lr")))
    if not names:
        return None
    at, unit = _places(result)
    figure, axes = panel(unit, "learning rate")
    colours = list(theme.colours)
    if len(names) > len(colours):
        shades = require("matplotlib", "train").colormaps["viridis"]
        low, high = (0.25, 1.0) if theme.dark else (0.0, 0.85)
        colours = [shades(low + (high - low) * i / (len(names) - 1)) for i in range(len(names))]
    shown = {*range(GROUPS_NAMED - 1), len(names) - 1}
    for place, (name, colour) in enumerate(zip(names, colours, strict=False)):
        values = [row.get(name, math.nan) for row in result.steps]
        label = f"group {place + 1}" if place in shown else None
        style = "-" if len(names) > 4 else ("-", "--", "-.", ":")[place]  # lines may coincide
        axes.plot(*_thinned(at, values), color=colour, linestyle=style, label=label)
    _scale_rates(axes, [max((r.get(n, 0) for r in result.steps), default=0) for n in names])
    _mark_unfrozen(axes, result, theme)
    if len(names) > 1:
        title = f"{len(names)} groups" if len(names) > GROUPS_NAMED else None
        axes.legend(title=title)
    return figure


def confusion(result: Result, theme: Theme) -> Any:
    """Plot the confusion matrix: counts, colored by the share of each class."""
    matrix = result.confusion
    if not matrix:
        return None
    count = len(matrix)
    sums = [sum(row) or 1 for row in matrix]
    shares = [[cell / total for cell in row] for row, total in zip(matrix, sums, strict=True)]
    side = min(3.2 + 0.42 * count, 11)
    figure = require("matplotlib.figure", "train").Figure((side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    colours = require("matplotlib.colors", "train")
    shades = colours.LinearSegmentedColormap.from_list("", [theme.face, theme.colours[0]])
    power = 1.0 if count <= 30 else 0.5 if count <= 100 else 0.35  # keeps small shares visible
    norm = colours.PowerNorm(power, 0, 1)
    image = axes.imshow(shares, cmap=shades, norm=norm)
    figure.colorbar(image, label="share of the class", shrink=0.8).outline.set_visible(False)
    axes.grid(False)
    axes.set(xlabel="predicted", ylabel="true")
    every = -(-count // 50)
    names = [n if len(n) <= 22 else f"{n[:21]}…" for n in class_names(result)][::every]
    small = {"parse_math": False, "fontsize": 9 if count <= 15 else 7 if count <= 30 else 6}
    flat = count <= 10 and max(map(len, names)) * 0.09 < 0.6 * side / count  # in inches
    turn = {} if flat else {"rotation": 45 if count <= 30 else 90, "rotation_mode": "anchor"}
    where = {} if flat else {"ha": "right", "va": "center" if count > 30 else "top"}
    axes.set_xticks(range(0, count, every), names, **small, **turn, **where)
    axes.set_yticks(range(0, count, every), names, **small)
    if count <= 20:
        for y, row in enumerate(matrix):
            for x, cell in enumerate(row):
                colour = theme.face if shares[y][x] > 0.5 else theme.text
                size = 9 if count <= 10 else 6.5
                axes.text(x, y, f"{cell:,}", ha="center", va="center", color=colour, fontsize=size)
    return figure


def numbers(result: Result, theme: Theme) -> Any:
    """Plot predicted numbers against the true ones; on the line they are equal."""
    pairs = [pair for pair in result.numbers if all(abs(value) < LARGEST for value in pair)]
    if not pairs:
        return None
    figure = require("matplotlib.figure", "train").Figure((4.8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    ends = [min(map(min, pairs)), max(map(max, pairs))]
    axes.plot(ends, ends, color=theme.text, linewidth=0.8)
    alpha = min(1.0, 0.15 + 60 / len(pairs))  # so that it shows where many lie
    axes.plot(*zip(*pairs, strict=True), "o", color=theme.colours[0], markersize=3, alpha=alpha)
    axes.set(xlabel="true", ylabel="predicted")
    axes.set_aspect("equal", "datalim")
    return figure


def panel(unit: str, value: str) -> tuple[Any, Any]:
    """Return a figure with one panel, and the panel."""
    figure = require("matplotlib.figure", "train").Figure((7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    _name_axes(axes, unit, value)
    return figure, axes


def _label(name: str) -> str:
    """Escape a name for matplotlib, which renders text between dollar signs as a formula."""
    return words(name).replace("$", r"\$")


def _name_axes(axes: Any, unit: str, value: str) -> None:
    ticker = require("matplotlib.ticker", "train")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set(xlabel=unit, ylabel=value)


def _places(result: Result) -> tuple[list[float], str]:
    """Return the x positions of the steps and their unit: epochs, or steps if no epoch ended."""
    steps = [row["step"] for row in result.steps]
    if not steps or not result.history:
        return steps, "step" if steps else "epoch"
    last = result.history[-1]
    each = last.get("step", steps[-1]) / last["epoch"]
    return [step / each for step in steps], "epoch"


def _column(result: Result, name: str) -> list[tuple[float, float]]:
    """Return the epochs and values of a column of the history."""
    return [(row["epoch"], row[name]) for row in result.history if name in row]


def _xy(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Split points into x and y for matplotlib; non-finite values become gaps."""
    pairs = list(points)
    return [x for x, _ in pairs], [y if abs(y) < LARGEST else math.nan for _, y in pairs]


def _thinned(at: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    each = -(-len(values) // POINTS) or 1
    return _xy(zip(at[::each], values[::each], strict=True))


def _smoothed(values: Sequence[float]) -> list[float]:
    """Bias-corrected exponential moving average over a fiftieth of the steps, or over ten."""
    keep = 1 - 1 / max(1, len(values) / 50, min(10, len(values) / 4))
    total = weight = 0.0
    smooth = []
    for value in values:
        if math.isfinite(value):
            total = keep * total + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        smooth.append(total / weight if weight and math.isfinite(value) else math.nan)
    return smooth


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Use a log scale if the values span more than two orders of magnitude."""
    found = [value for value in values if abs(value) < LARGEST]
    if found and min(found) > 0 and max(found) > 100 * min(found):
        axes.set_yscale("log")


def _scale_rates(axes: Any, highest: Sequence[float]) -> None:
    """Use a log scale if the lowest group would otherwise lie on the axis."""
    if min(highest) > 0 and max(highest) > 8 * min(highest):
        axes.set_yscale("log")
        axes.set_ylim(min(highest) / 100, max(highest) * 1.5)
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.set_ylim(bottom=0)


def _mark_best(
    axes: Any, result: Result, validated: Sequence[tuple[float, float]], theme: Theme
) -> None:
    loss: Mapping[float, float] = dict(validated)
    best = result.best_epoch
    if best is not None and math.isfinite(loss.get(best, math.nan)):
        axes.plot([best], [loss[best]], "o", markersize=11, markerfacecolor="none",
                  markeredgecolor=theme.text, markeredgewidth=1.4,
                  label=f"best epoch: {best}, loss {loss[best]:.4g}")  # fmt: skip


def _mark_unfrozen(axes: Any, result: Result, theme: Theme) -> None:
    """Draw a line at the start of each epoch in which blocks were unfrozen."""
    epochs = sorted(epoch for epoch, blocks in result.unfrozen.items() if blocks)
    if axes.get_xlabel() != "epoch":
        return
    for place, epoch in enumerate(epochs):
        label = "blocks unfrozen" if place == 0 else None
        axes.axvline(epoch - 1, color=theme.text, linewidth=0.9, linestyle=":", label=label)
        if len(epochs) <= 12:
            count = len(result.unfrozen[epoch])
            axes.text(epoch - 1, 1.01, f"+{count}", transform=axes.get_xaxis_transform(),
                      ha="center", fontsize=8)  # fmt: skip
