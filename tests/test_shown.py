"""What notebooks and terminals show: trees, tables and reports as HTML; bars of long work."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gift
from gift.factories import ma_adapt, ma_freeze, ma_train, mc_name, mc_type
from gift.strategies import (
    FineTuningStrategy,
    LoRALinearFineTuningStrategy,
    PiSSALinearFineTuningStrategy,
)
from gift.training import find_lr, finetune
from gift.utils.info import summary, tree


class Parsed(HTMLParser):
    """The texts of a page, and whether each tag is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def html(shown: Any) -> str:
    page: str = shown._repr_html_()
    return " ".join(Parsed(page).texts)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)


def network() -> nn.Module:
    net = nn.Module()
    net.blocks = nn.ModuleList(Block() for _ in range(12))
    net.head = nn.Linear(16, 3)
    return net


def strategy() -> FineTuningStrategy:
    return FineTuningStrategy(
        [(mc_name("head"), ma_train()), (mc_type(nn.Linear), ma_adapt("lora"), {"rank": 1})]
    )


def test_the_network_as_a_tree_says_what_is_trained_adapted_and_frozen_by_which_cap() -> None:
    """Twelve equal layers are one branch; counts are those of the network."""
    net = network()
    report = gift.enable_fine_tuning(net, strategy())
    expected = {
        "[0-11] 12 x Block": "",
        "query": r"Linear: lora\(rank=1\) on weight, 32 trained, cap 1 \(adapted\)",
        "norm": r"LayerNorm: 32 parameters \(frozen\)",
        "head": r"Linear: trained, 51 trained, cap 0 \(trained\)",
    }
    shown = tree(net, colours=False)
    for name, text in expected.items():
        assert re.search(rf"── {re.escape(name)} ?{text}", shown), (name, shown)
    assert len(shown.splitlines()) == 6
    page = html(tree(net))
    assert page.count("(adapted)") == 12  # to open and close, all are there
    assert "cap 1" in html(report)
    assert "12 trained" not in page
    assert html(summary(net)).startswith(str(summary(net)).splitlines()[0])


def test_a_plain_network_is_shown_by_what_requires_a_gradient() -> None:
    net = network()
    net.blocks.requires_grad_(False)
    shown = tree(net, colours=False).splitlines()
    assert shown[0] == "Module"
    assert any("blocks" in line and "(frozen)" in line for line in shown)
    assert any("head Linear: 51 parameters (trained)" in line for line in shown)


def test_terminals_get_colours() -> None:
    net = network()
    gift.enable_fine_tuning(net, strategy())
    coloured = tree(net, colours=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == tree(net, colours=False)
    assert "\x1b[" not in tree(net)  # standard output is no terminal here


def test_names_are_escaped() -> None:
    net = nn.ModuleDict({"<script>": nn.Linear(4, 4)})
    report = gift.enable_fine_tuning(net, LoRALinearFineTuningStrategy(rank=1))
    for shown in (report, tree(net), summary(net)):
        assert "<script>" not in shown._repr_html_()
        assert "<script>" in html(shown)


def test_results_suggestions_and_files_are_html(tmp_path: Path) -> None:
    """With the numbers that the same objects print."""
    inputs, labels = torch.randn(32, 64), torch.arange(32) % 2
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    suggestion = gift.suggest(net, 1000)
    assert f"{suggestion.parameters:,} trained parameters" in html(suggestion)
    assert all(path in html(suggestion) for path in suggestion.ranks)
    quiet = {"device": "cpu", "progress": False}
    rates = find_lr(net, (inputs, labels), steps=5, **quiet)
    assert str(rates) in html(rates)
    assert "data:image/png;base64,iVBOR" in rates._repr_html_()
    result = finetune(
        net, (inputs, labels), (inputs, labels), epochs=2,
        strategy=LoRALinearFineTuningStrategy(rank=1), **quiet,
    )  # fmt: skip
    assert f"{result.after['accuracy']:.4g}"[:5] in html(result)
    assert "Each epoch" in html(result)
    gift.save(net, tmp_path / "delta.safetensors")
    assert "LoRALinearFineTuningStrategy" in html(gift.inspect(tmp_path / "delta.safetensors"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_long_work_outside_training_shows_a_bar(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each look at the clock takes a second: SVDs, digests, ranks and merging last long."""
    import tqdm.std

    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(tqdm.std, "time", clock)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(20)))
    screens = {}

    def watched(name: str, work: Any) -> None:
        screens[name] = Terminal() if is_terminal else io.StringIO()
        monkeypatch.setattr("sys.stderr", screens[name])
        work()

    watched("searching ranks", lambda: gift.suggest(net, "5%"))
    watched("enabling", lambda: gift.enable_fine_tuning(net, PiSSALinearFineTuningStrategy(rank=1)))
    watched("hashing", lambda: gift.save(net, tmp_path / "delta.safetensors"))
    watched("merging", lambda: gift.merge(net))
    for name, screen in screens.items():
        assert (name in screen.getvalue()) == is_terminal, (name, screen.getvalue())


def test_what_a_cap_freezes_is_frozen_in_the_tree() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    strategy = FineTuningStrategy([(mc_name("0"), ma_freeze()), (mc_name("1"), ma_train())])
    report = gift.enable_fine_tuning(net, strategy)
    states = {child.name: child.state for child in report.nodes().children}
    assert states == {"0": "frozen", "1": "trained", "2": "frozen"}
    lines = [line for line in report.tree(colours=False).splitlines() if "── " in line]
    assert [line.rpartition("(")[2].rstrip(")") for line in lines] == [*states.values()]
    assert "\x1b[" in report.tree(colours=True)
