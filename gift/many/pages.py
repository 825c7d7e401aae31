"""The report of a search: Optuna's own plots, and the trials as a table."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gift.many.study import REASON, Study
from gift.many.variants import in_words
from gift.support.atomic_files import write_bytes
from gift.support.optional import require
from gift.training.report.page import Image, address, rendered
from gift.training.report.plots import DARK, LIGHT, Theme, render
from gift.training.report.tables import Table, duration, number, plain, words

_MOST = 200  # rows of the table; trials.csv has all
Picture = Callable[[Any, Theme], Any]


def write_search_report(study: Study, best: list[Any]) -> Path:
    """Write ``report.html`` into the folder of a search, with its images as PNG files.

    Args:
        study: the study of the search.
        best: the best trial, or those of the front.

    Returns:
        Path of the page.
    """
    images = write_images(study.folder, _pictures(study), study.study)
    page = rendered(
        title=f"Search for {', '.join(map(words, study.objectives))}",
        facts=_facts(study, best),
        images=images,
        tables=[_front(study, best), _trials(study)],
    )
    path = study.folder / "report.html"
    write_bytes(path, page.encode(errors="replace"))
    return path


def write_images(
    folder: Path, pictures: dict[str, tuple[str, str, Picture]], shown: Any
) -> list[Image]:
    """Write pictures as PNG files, and return those that show something, for a page.

    Args:
        folder: where they are written.
        pictures: for each name its title, the alternative text and the function that draws.
        shown: what is drawn.
    """
    images = []
    for name, (title, alt, draw) in pictures.items():
        light, dark = render(draw, shown, LIGHT), render(draw, shown, DARK)
        file = folder / f"{name}.png"
        if light is None or dark is None:
            file.unlink(missing_ok=True)
            continue
        write_bytes(file, light)
        images.append(Image(title, alt, address(light), address(dark)))
    return images


def _pictures(study: Study) -> dict[str, tuple[str, str, Picture]]:
    found: dict[str, tuple[str, str, Picture]] = {}
    several = len(study.objectives) > 1
    if several and len(study.objectives) in (2, 3):
        alt = "Values of the objectives of all trials; the front is marked, its table is below."
        found["front"] = ("Front", alt, _plot("plot_pareto_front"))
    for place, objective in enumerate(study.objectives):
        target = _target(place, objective) if several else {}
        name, shown = (f"-{objective}", f": {words(objective)}") if several else ("", "")
        for kind, (title, alt, plot) in _KINDS.items():
            found[f"{kind}{name}"] = (f"{title}{shown}", alt, _plot(plot, **target))
    if not several:
        alt = "The value after each epoch of each trial; pruned trials end early."
        found["curves"] = ("Curves of the trials", alt, _plot("plot_intermediate_values"))
    return found


_KINDS = {
    "history": ("Best value so far", "Value of each trial, and the best so far.",
                "plot_optimization_history"),
    "importance": ("Importance", "How much of the value each setting explains.",
                   "plot_param_importances"),
    "parallel": ("Parallel coordinates", "Settings of each trial as a line; colours are values.",
                 "plot_parallel_coordinate"),
}  # fmt: skip


def _target(place: int, objective: str) -> dict[str, Any]:
    return {"target": lambda trial: trial.values[place], "target_name": words(objective)}


def _plot(name: str, **options: Any) -> Picture:
    """Return a function that draws one of Optuna's plots in the colours of a page."""

    def draw(study: Any, theme: Theme) -> Any:
        plots = require("optuna.visualization.matplotlib", "search")
        pyplot = require("matplotlib.pyplot", "train")
        own = dict(options)
        optuna = require("optuna", "search")
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # there may be too little to draw
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if name == "plot_param_importances":
                    importance = require("optuna.importance", "search")
                    own["evaluator"] = importance.PedAnovaImportanceEvaluator()
                axes = getattr(plots, name)(study, **own)
            except (ValueError, RuntimeError):  # too few trials, or none that differ
                return None
            finally:
                optuna.logging.set_verbosity(level)
            figure = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
            pyplot.close(figure)
            figure.set_size_inches(7.2, 4.2)
            figure.set_layout_engine("tight")
            for part in figure.axes:
                _coloured(part, theme)
            figure.set_facecolor(theme.face)
        empty = not any(part.has_data() for part in figure.axes)
        return None if empty else figure

    return draw


def _coloured(axes: Any, theme: Theme) -> None:
    """Give axes that Optuna drew the colours of a page."""
    axes.set_facecolor(theme.face)
    axes.tick_params(colors=theme.text, which="both")
    axes.set_title("")
    for label in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
        label.set_color(theme.text)
    for spine in axes.spines.values():
        spine.set_edgecolor(theme.grid)
    for line in [*axes.xaxis.get_gridlines(), *axes.yaxis.get_gridlines()]:
        line.set_color(theme.grid)
    if (legend := axes.get_legend()) is not None:
        legend.get_frame().set_facecolor(theme.face)
        legend.get_frame().set_edgecolor("none")
        for text in legend.get_texts():
            text.set_color(theme.text)


def _facts(study: Study, best: list[Any]) -> list[tuple[str, str]]:
    trials = study.trials()
    states = [trial.state.name.lower() for trial in trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    seconds = sum(trial.user_attrs.get("seconds") or 0.0 for trial in trials)
    network = study.job.network
    rows = [
        ("Network", "given in code" if network is None else network.name),
        ("Objectives", ", ".join(map(words, study.objectives))),
        ("Trials", f"{len(trials)}: {counts}"),
        ("Training", f"{duration(seconds)} in all complete trials"),
    ]
    if len(best) == 1:
        rows.append(("Best", f"trial {best[0].number}: {in_words(study.settings_of(best[0]))}"))
    rows.append(("Study", f"optuna-dashboard {study.folder / 'study.journal'}"))
    return [(name, plain(text)) for name, text in rows]


def _front(study: Study, best: list[Any]) -> Table:
    title = "The front: no trial is better in all objectives" if len(best) > 1 else "The best trial"
    return Table(title, _header(study), [_row(study, trial) for trial in best])


def _trials(study: Study) -> Table:
    trials = study.trials()
    rows = [
        [*_row(study, t), t.state.name.lower(), plain(t.user_attrs.get(REASON, ""))[:120]]
        for t in trials[:_MOST]
    ]
    more = len(trials) - len(rows)
    note = f"and {more:,} more, see trials.csv" if more else ""
    header = [*_header(study), "state", "reason"]
    return Table("Trials", header, rows, note, words=[len(header) - 2, len(header) - 1])


def _header(study: Study) -> list[str]:
    return ["trial", *map(words, study.objectives), *(p.name for p in study.space), "trained"]


def _row(study: Study, trial: Any) -> list[str]:
    settings = study.settings_of(trial)
    values = trial.values or [None] * len(study.objectives)
    trained = trial.user_attrs.get("trained")
    chosen = [_text(settings.get(parameter.name)) for parameter in study.space]
    return [f"{trial.number}", *map(number, values), *chosen, number(trained)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value) if is_number else plain(str(value))
