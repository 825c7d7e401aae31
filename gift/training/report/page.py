"""The report as images and one HTML page that works offline."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gift.support.atomic_files import write_bytes
from gift.support.optional import require
from gift.training.report import plots, tables
from gift.training.result import Result
from gift.training.shown_examples import ShownExample


class Image(NamedTuple):
    """An image of the page.

    Args:
        title: title of the image.
        alt: alternative text for readers who cannot see the image, with the most important values.
        light, dark: PNG for light and dark pages, as ``data:`` URL.
    """

    title: str
    alt: str
    light: str
    dark: str


DRAWN: dict[str, tuple[str, plots.Draw]] = {
    "losses": ("Losses", plots.losses),
    "metrics": ("Metrics", plots.metrics),
    "rates": ("Learning rates", plots.rates),
    "confusion": ("Confusion", plots.confusion),
    "numbers": ("Predicted numbers", plots.numbers),
}


def write_report(result: Result, folder: Path) -> Path:
    """Write ``report.html`` and its images as PNG files.

    The page is a single file that works offline, in light and dark mode. An image without data is
    not written, and one that an earlier run left is removed.

    Args:
        result: result of `gift.training.finetune`.
        folder: output folder; it is created if necessary.

    Returns:
        Path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for name, (title, draw) in DRAWN.items():
        file = folder / f"{name}.png"
        light = plots.render(draw, result, plots.LIGHT)
        dark = plots.render(draw, result, plots.DARK)
        if light is None or dark is None:
            file.unlink(missing_ok=True)
            continue
        write_bytes(file, light)
        images.append(Image(title, _alt(name, result), address(light), address(dark)))
    page = folder / "report.html"
    write_bytes(page, _page(result, images).encode(errors="replace"))
    return page


def _page(result: Result, images: list[Image]) -> str:
    """Render the HTML of the page."""
    after = (tables.unfrozen, tables.epochs, tables.confusions, tables.classes, tables.skipped)
    return rendered(
        title=f"{tables.plain(result.network)}, fine-tuned",
        facts=tables.facts(result),
        stopped="" if result.stopped == "done" else tables.plain(result.stopped),
        comparisons=tables.comparisons(result),
        images=images,
        samples=[(tables.plain(one.caption), address(one.png)) for one in result.samples],
        seen=[(title, [_seen(one) for one in seen]) for title, seen in _sections(result) if seen],
        about=tables.about(result),
        tables=[table for make in after if (table := make(result))],
    )


def rendered(
    title: str,
    facts: Sequence[tuple[str, str]],
    images: Sequence[Image],
    tables: Sequence[tables.Table],
    *,
    comparisons: Sequence[tables.Table] = (),
    samples: Sequence[tuple[str, str]] = (),
    stopped: str = "",
    seen: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = (),
    about: Sequence[tables.Table] = (),
) -> str:
    """Render a page of facts, images and tables as HTML.

    Args:
        title: its title.
        facts: names and texts.
        images: the images, each below a heading.
        tables: the tables below them.
        comparisons: tables above the images, before and after training.
        samples: captions and ``data:`` URLs of further images.
        stopped: why training ended early.
        seen: examples and what the network says of them, below headings.
        about: tables at the end, about the run itself.
    """
    jinja2 = require("jinja2", "train")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(
        title=title, facts=facts, stopped=stopped, comparisons=comparisons, images=images,
        samples=samples, seen=seen, about=about, tables=tables, light=plots.LIGHT, dark=plots.DARK,
    )  # fmt: skip


def _sections(result: Result) -> list[tuple[str, list[ShownExample]]]:
    return [("Worst mistakes", result.mistakes), ("Examples", result.shown)]


def _seen(one: ShownExample) -> dict[str, Any]:
    """Return an example as texts for the page."""
    return {
        "input": tables.plain(one.input),
        "image": address(one.png) if one.png else "",
        "true": tables.plain(one.true),
        "predicted": tables.plain(one.predicted),
        "loss": tables.number(one.loss),
        "is_right": one.true == one.predicted,
    }


def _alt(name: str, result: Result) -> str:
    """Describe an image in words."""
    history = result.history
    if name == "losses" and history:
        first, last = (
            ", ".join(
                f"{said} {tables.number(row[key])}"
                for said, key in (("training", "train_loss"), ("validation", "valid_loss"))
                if key in row
            )
            for row in (history[0], history[-1])
        )
        best = "" if result.best_epoch is None else f" Best epoch: {result.best_epoch}."
        return f"Losses over the epochs. First epoch: {first}. Last epoch: {last}.{best}"
    if name == "confusion" and result.confusion:
        right = sum(row[place] for place, row in enumerate(result.confusion))
        total = sum(map(sum, result.confusion))
        return f"Confusion of {len(result.confusion)} classes: {right} of {total} examples right."
    if name == "numbers":
        return f"Predicted against true numbers of {len(result.numbers)} validation examples."
    return {
        "losses": "Losses over the steps.",
        "metrics": "Metrics of the validation examples over the epochs; values are in the table.",
        "rates": "Learning rate of each group of parameters over the training.",
    }[name]


def address(png: bytes) -> str:
    """Return an image as ``data:`` URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
