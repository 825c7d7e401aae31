"""Text, plots and page of a result: everything that was measured is there, and readable."""

import base64
import copy
import io
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from gift.training.report import plots, summary, write_report
from gift.training.result import Result

VOID = {"meta", "img", "source", "br", "link"}
HOSTILE = "<script>alert('x')</script> & $x^{ \\frac $ {{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser finds: balanced tags, tables, addresses, texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self._texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.rows: list[list[str]] = []
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)
            self._texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        text = self._texts.pop().strip()
        if tag in ("td", "th"):
            self.rows[-1].append(text)
        if tag == "caption":
            self.tables[text] = self.rows
        if tag in ("h1", "h2"):
            self.headings.append(text)

    def handle_data(self, data: str) -> None:
        if self._texts:
            self._texts[-1] += data

    def images(self, tag: str, attribute: str) -> list[Image.Image]:
        """What the addresses of a tag hold."""
        found = []
        for name, attributes in self.tags:
            if name == tag:
                kind, _, data = str(attributes[attribute]).partition(",")
                assert kind == "data:image/png;base64"
                found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        return found


def result(**changes: Any) -> Result:
    """Of a run over 8 epochs of 5 steps, in which blocks were unfrozen twice."""
    rates = [{"lr": 1e-3} | ({"lr_1": 1e-4} if number > 10 else {}) for number in range(1, 41)]
    whole: dict[str, Any] = {
        "network": "ResNet",
        "strategy": "LoRAAllFineTuningStrategy(rank=3)",
        "schedule": "UnfreezeMilestones((2, 5))",
        "classes": ("ants", "bees", "wasps"),
        "trained": 75_063,
        "total": 750_630,
        "history": [
            {"epoch": n, "train_loss": 1 / n, "seconds": 30.0, "valid_loss": abs(n - 6) + 0.25,
             "valid_accuracy": n / 8, "valid_perplexity": 7.5 * n}
            for n in range(1, 9)
        ],
        "steps": [{"step": n, "loss": 5 / n, **rate} for n, rate in enumerate(rates, 1)],
        "unfrozen": {3: ["layer4.0", "layer4.1"], 6: ["conv1"]},
        "before": {"loss": 1.25, "accuracy": 0.5},
        "after": {"loss": 0.25, "accuracy": 0.75},
        "old_before": {"accuracy": 0.8125},
        "old_after": {"accuracy": 0.625},
        "confusion": [[40, 9, 1], [0, 50, 0], [7, 0, 43]],
        "best_epoch": 6,
    }  # fmt: skip
    return Result(**whole | changes)


def page(of: Result, folder: Path) -> Page:
    text = write_report(of, folder).read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return Page(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("run") / "new"
    return folder, page(result(), folder)


def row(table: list[list[str]], name: str) -> dict[str, str]:
    """The texts of a row by the header of their column."""
    found = next(row for row in table if row[0] == name)
    return dict(zip(table[0], found, strict=True))


def test_before_and_after_are_compared_on_both_tasks(written: tuple[Path, Page]) -> None:
    new, old = (written[1].tables[name] for name in list(written[1].tables)[:2])
    expected = {"": "accuracy", "before": "0.5000", "after": "0.7500", "change": "+0.2500"}
    assert row(new, "accuracy") == expected
    assert row(new, "loss")["change"] == "-1"
    assert row(old, "accuracy")["change"] == "-0.1875"


def test_each_epoch_is_a_row_and_the_best_is_marked(written: tuple[Path, Page]) -> None:
    header, *rows = written[1].tables["Each epoch"]
    assert header[:4] == ["epoch", "train loss", "seconds", "valid loss"]
    assert [cells[0] for cells in rows] == [f"{n}" for n in range(1, 9)]
    assert [cells[0] for cells in rows if cells[-1] == "best"] == ["6"]


def test_the_page_says_what_was_unfrozen_when(written: tuple[Path, Page]) -> None:
    rows = written[1].tables["What the schedule unfroze"][1:]
    assert rows == [["3", "2", "layer4.0, layer4.1"], ["6", "1", "conv1"]]


def test_classes_and_their_mistakes_are_counted(written: tuple[Path, Page]) -> None:
    """Precision of bees: 50 of 59 images that were taken for them; recall of ants: 40 of 50."""
    tables = written[1].tables
    assert row(tables["Each class"], "bees")["precision"] == f"{50 / 59:.4f}"
    assert row(tables["Each class"], "ants")["recall"] == "0.8000"
    pairs = [cells[:3] for cells in tables["Most frequent mistakes"][1:]]
    assert pairs == [["ants", "bees", "9"], ["wasps", "ants", "7"], ["ants", "wasps", "1"]]


def test_the_page_needs_nothing_from_outside(written: tuple[Path, Page]) -> None:
    folder, found = written
    text = re.sub(r"base64,[^\"]*", "", (folder / "report.html").read_text())
    assert not re.search(r"https?:|url\(|@import|<script|<link|//[a-z]", text)
    for _, attributes in found.tags:
        addresses = [attributes.get(name) for name in ("src", "href", "srcset", "data", "action")]
        assert all(str(address).startswith("data:") for address in addresses if address)


def test_images_are_files_too_and_drawn_for_light_and_dark(written: tuple[Path, Page]) -> None:
    folder, found = written
    light, dark = found.images("img", "src"), found.images("source", "srcset")
    files = [Image.open(folder / f"{n}.png") for n in ("losses", "metrics", "rates", "confusion")]
    assert [x.tobytes() for x in light] == [x.tobytes() for x in files]
    for day, night in zip(light, dark, strict=True):
        assert day.size == night.size
        assert min(day.convert("L").resize((1, 1)).tobytes()) > 180
        assert max(night.convert("L").resize((1, 1)).tobytes()) < 90


def test_the_page_is_accessible(written: tuple[Path, Page]) -> None:
    found = written[1]
    assert ("html", {"lang": "en"}) in found.tags
    alts = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert all(alts)
    assert len(set(alts)) == 4
    assert "133 of 150" in str(alts[-1])
    assert [tag for tag, _ in found.tags if re.fullmatch(r"h\d", tag)].count("h1") == 1
    assert all(a.get("scope") in ("col", "row") for tag, a in found.tags if tag == "th")
    assert len(found.tables) == [tag for tag, _ in found.tags].count("table")


NOTHING: dict[str, Any] = {
    "history": [], "steps": [], "unfrozen": {}, "before": {}, "after": {}, "old_before": {},
    "old_after": {}, "confusion": None, "best_epoch": None, "classes": None, "total": 0,
}  # fmt: skip

ODD: dict[str, dict[str, Any]] = {
    "nothing at all": {},
    "no network": {"network": "", "strategy": "", "schedule": "", "trained": 0},
    "stopped in the first epoch": {"steps": [{"step": 1, "loss": 0.5}], "stopped": HOSTILE},
    "no steps": {"history": result().history, "unfrozen": {1: ["conv1"]}, "best_epoch": 3},
    "only NaN": {
        "history": [{"epoch": 1, "train_loss": math.nan, "valid_loss": math.nan}],
        "steps": [{"step": 1, "loss": math.nan, "lr": math.nan}],
        "before": {"loss": math.nan}, "after": {"loss": math.inf}, "best_epoch": 1,
    },
    "a loss that exploded": {
        "steps": [{"step": n, "loss": 10.0**n if n < 300 else math.inf} for n in range(1, 310)],
    },
    "rates of zero": {"steps": [{"step": n, "loss": 0.0, "lr": 0.0} for n in (1, 2)]},
    "a metric that comes later": {
        "history": [{"epoch": 1}, {"epoch": 2, "valid_f1": 0.5}], "best_epoch": 2,
    },
    "an unknown best epoch": {"history": [{"epoch": 1, "valid_loss": 0.5}], "best_epoch": 7},
    "hostile names": {
        "network": HOSTILE, "strategy": HOSTILE, "classes": (HOSTILE, "\ud800\0\n", "🐝 $\\frac$"),
        "unfrozen": {1: [HOSTILE]}, "before": {HOSTILE: 1.0}, "confusion": result().confusion,
        "history": [{"epoch": 1, f"valid_{HOSTILE}": 0.5}],
    },
    "classes without names": {"confusion": [[1, 2], [3, 4]]},
    "fewer names than classes": {"classes": ("ants",), "confusion": [[1, 2], [3, 4]]},
    "classes without examples": {"confusion": [[0, 0], [0, 0]]},
    "numbers": {"task": "regression", "numbers": [(1.0, 1.5), (2.0, math.nan), (3.0, math.inf)]},
    "numbers that are all the same": {"task": "regression", "numbers": [(1.0, 1.0)] * 3000},
    "one class": {"classes": ("ants",), "confusion": [[3]]},
    "no class": {"classes": (), "confusion": []},
    "40 groups": {
        "steps": [{"step": n, "loss": 1.0} | {f"lr_{g}": 0.9**g for g in range(1, 41)}
                  for n in (1, 2)],
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD.keys())
def test_any_result_gives_a_text_and_a_page(changes: dict[str, Any], tmp_path: Path) -> None:
    odd = result(**NOTHING | changes)
    before = copy.deepcopy(odd)
    text = write_report(odd, tmp_path).read_text(encoding="utf-8")
    found = Page(text)
    assert found.headings[1] == "Summary"
    assert "<script" not in text
    assert "49" not in found.headings[0]  # what a template would make of 7 * 7
    assert f"{odd.trained:,} of {odd.total:,}" in summary(odd)
    assert repr(odd) == repr(before)


def test_a_thousand_classes_are_drawn_and_listed(tmp_path: Path) -> None:
    count = 1000
    matrix = [[3 * (x == y) + (x == (7 * y) % count) for x in range(count)] for y in range(count)]
    names = tuple(f"class {n}" for n in range(count))
    found = page(result(confusion=matrix, classes=names, history=[], steps=[]), tmp_path)
    assert len(found.tables["Each class"]) == count + 1
    assert len(found.tables["Most frequent mistakes"]) == 21
    width, height = Image.open(tmp_path / "confusion.png").size
    assert max(width, height) < 2000


def test_images_of_an_earlier_run_go(tmp_path: Path) -> None:
    write_report(result(), tmp_path)
    (tmp_path / "own.png").write_bytes(b"of the user")
    write_report(result(confusion=None), tmp_path)
    assert not (tmp_path / "confusion.png").exists()
    assert (tmp_path / "losses.png").exists()
    assert (tmp_path / "own.png").read_bytes() == b"of the user"


def drawn(draw: Callable[..., Any], of: Result) -> Any:
    """The panel of a plot."""
    return draw(of, plots.LIGHT).axes[0]


def lines(panel: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(x.get_label()): (list(x.get_xdata()), list(x.get_ydata())) for x in panel.get_lines()
    }


def test_losses_are_drawn_where_they_were_measured() -> None:
    """Step 5 of 5 in an epoch stands where the epoch ends; epoch 3 begins at 2."""
    found = lines(drawn(plots.losses, result()))
    assert found["validation"] == ([*range(1, 9)], [abs(n - 6) + 0.25 for n in range(1, 9)])
    assert found["training, each step, smoothed"][0] == [n / 5 for n in range(1, 41)]
    assert found["best epoch: 6, loss 0.25"] == ([6], [0.25])
    assert found["blocks unfrozen"][0] == [2, 2]


def test_smoothing_keeps_a_constant_and_skips_what_is_not_finite() -> None:
    """Without the correction of its bias a mean that starts at zero would rise to it."""
    steps = [{"step": n, "loss": math.nan if n == 90 else 3.0} for n in range(1, 201)]
    smooth = lines(drawn(plots.losses, result(steps=steps, history=[])))
    values = smooth["training, each step, smoothed"][1]
    assert [n for n, value in enumerate(values, 1) if math.isnan(value)] == [90]
    assert all(value == pytest.approx(3.0) for value in values if not math.isnan(value))


def test_each_group_has_its_rates_from_when_it_is_there() -> None:
    found = lines(drawn(plots.rates, result()))
    assert found["group 1"][1] == [1e-3] * 40
    assert [n for n, rate in enumerate(found["group 2"][1], 1) if rate == 1e-4] == [*range(11, 41)]


def test_numbers_stand_where_they_are_beside_the_line_on_which_they_are_equal() -> None:
    pairs = [(1.0, 2.0), (4.0, 3.5), (2.0, math.nan)]
    panel = drawn(plots.numbers, result(task="regression", numbers=pairs))
    line, points = panel.lines
    assert [*zip(*line.get_data(), strict=True)] == [(1.0, 1.0), (4.0, 4.0)]
    assert [*zip(*points.get_data(), strict=True)] == pairs[:2]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("true", "predicted")


@pytest.mark.parametrize("count", [2, 20])
def test_confusion_shows_each_count_in_its_cell(count: int) -> None:
    matrix = [[100 * y + x for x in range(count)] for y in range(count)]
    names = tuple(f"class {n}" for n in range(count))
    panel = drawn(plots.confusion, result(confusion=matrix, classes=names))
    texts = {text.get_position(): text.get_text() for text in panel.texts}
    assert texts == {(x, y): f"{100 * y + x:,}" for x in range(count) for y in range(count)}
    for axis in (panel.get_xticklabels(), panel.get_yticklabels()):
        assert [label.get_text() for label in axis] == list(names)


def test_many_names_are_thinned_and_stand_at_their_class() -> None:
    names = tuple(f"class {n}" for n in range(130))
    matrix = [[int(x == y) for x in range(130)] for y in range(130)]
    panel = drawn(plots.confusion, result(confusion=matrix, classes=names))
    ticks = list(panel.get_yticks())
    assert [label.get_text() for label in panel.get_yticklabels()] == [names[n] for n in ticks]
    assert 40 < len(ticks) <= 50


def test_settings_of_matplotlib_stay_and_play_no_part() -> None:
    plain = plots.render(plots.losses, result(), plots.LIGHT)
    with matplotlib.rc_context({"lines.linewidth": 20, "text.usetex": True, "figure.dpi": 7}):
        before = dict(matplotlib.rcParams)
        assert plots.render(plots.losses, result(), plots.LIGHT) == plain
        assert dict(matplotlib.rcParams) == before


def test_the_text_tells_of_both_tasks_and_the_end() -> None:
    text = summary(result(stopped="no improvement in 2 epochs"))
    for part in ("75,063 of 750,630 (10 %)", "8; the best was epoch 6", "4 min 0 s", "0.6250",
                 "no improvement in 2 epochs", "-0.1875", "in 3 classes"):  # fmt: skip
        assert part in text
