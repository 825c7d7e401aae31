"""The documentation runs, and says of gift what is there."""

import ast
import importlib
import inspect
import os
import re
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from torchvision.models import WeightsEnum
from typer.testing import CliRunner

import gift
from docs._site.markdown import as_markdown
from docs._site.messages import HOLE, fragments, messages
from docs._site.public import (
    INSIDE,
    ROOMS,
    all_of,
    file_of,
    public_names,
    registered_methods,
    resolve,
)
from gift.cli.app import app
from gift.methods import METHODS
from gift.strategies import STRATEGIES
from tests.documentation import DOCS, ROOT, blocks, pages, random_weights, run

LONG = {page for page in pages() if "<!-- lane: " in page.read_text(encoding="utf-8")}
with_code = [page for page in pages() if any(b.runs for b in blocks(page.read_text("utf-8")))]


@pytest.mark.parametrize("page", with_code, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files, networks and models stand for real ones; pages marked "lane" take long."""
    if page in LONG and not os.environ.get("GIFT_DOCUMENTATION"):
        pytest.skip("takes long: GIFT_DOCUMENTATION=long runs it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)

    def call(arguments: list[str]) -> None:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, (arguments, result.output)

    known, strategies = dict(METHODS), dict(STRATEGIES)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the delta has more parameters")  # nets are small
            warnings.filterwarnings("ignore", "these cannot have the requested size")
            run(page, tmp_path, call)
    finally:
        for table, before in ((METHODS, known), (STRATEGIES, strategies)):
            for name in [name for name in table if name not in before]:
                del table[name]


def test_every_page_is_in_the_navigation() -> None:
    """And what the navigation names exists, but for what is made."""
    text = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"([\w/]+\.md)$", text, re.MULTILINE))
    written = {str(page.relative_to(DOCS)) for page in pages() if page.is_relative_to(DOCS)}
    made = {
        f"project/{name}.md" for name in ("changelog", "contributing", "benchmarks", "security")
    }
    assert named - made - {"troubleshooting/messages.md"} == written


def test_links_between_pages_lead_somewhere() -> None:
    made = {"methods", "reference", "notebooks", "project"}
    for page in pages():
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", page.read_text("utf-8")):
            place = (page.parent / target.partition("#")[0]).resolve()
            if page.is_relative_to(DOCS) and place.is_relative_to(DOCS):
                first = place.relative_to(DOCS).parts[0]
                if first in made or place.name == "messages.md":
                    continue
            assert place.exists(), f"{page.relative_to(ROOT)}: {target}"


def is_module(room: str, name: str) -> bool:
    return (file_of(room).parent / f"{name}.py").exists()


def test_references_are_to_what_the_reference_shows() -> None:
    shown = {one.path for one in public_names()}
    for room in ROOMS:
        shown |= {f"{room}.{name}" for name in all_of(room) if not is_module(room, name)}
    for page in pages():
        named = set(re.findall(r"\]\[(gift[\w.]*)\]", page.read_text("utf-8")))
        assert named <= shown, (page, named - shown)


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_documented(room: str) -> None:
    """What the reference reads in the source is what the module gives."""
    module = importlib.import_module(room)
    for name in all_of(room):
        assert hasattr(module, name), name
    given = {*getattr(module, "__all__", [])} - {*STRATEGIES}
    assert given <= {*all_of(room)}
    for one in public_names():
        if one.room == room:
            assert one.documented, one
            value = getattr(module, one.name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), one


def test_every_room_with_public_names_has_a_page() -> None:
    """Or is known as one for other rooms, or as one whose names another page has."""
    shown = {one.origin for one in public_names()}
    for file in (ROOT / "gift").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if not any(
            isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" for n in tree.body
        ):
            continue
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in {*ROOMS, *INSIDE}:
            continue
        for name in all_of(module):
            assert resolve(module, name)[0] in shown, (module, name)


def test_every_method_has_a_page() -> None:
    about = tomllib.loads((DOCS / "methods.toml").read_text(encoding="utf-8"))
    found = {method.name: method for method in registered_methods()}
    assert set(found) == set(METHODS) == set(about["methods"])
    for name, one in about["methods"].items():
        assert one["group"] in about["groups"], name
        settings = eval(f"dict({one.get('example', '')})")
        strategy = STRATEGIES[f"{found[name].title}AllFineTuningStrategy"](**settings)
        assert isinstance(strategy, gift.FineTuningStrategy)
        assert "\\[" in as_markdown(found[name].doc)


def test_every_method_that_wraps_has_a_page() -> None:
    """With strategies, caps and papers that gift has."""
    about = tomllib.loads((DOCS / "methods.toml").read_text(encoding="utf-8"))["wrappers"]
    wrapping = {name for name in all_of("gift.strategies.wrapping") if name.endswith("Strategy")}
    assert {one["strategy"] for one in about.values()} == wrapping
    for name, one in about.items():
        assert name not in METHODS
        made = eval(f"dict({one['example']})")
        strategy = getattr(gift.strategies, one["strategy"])(**made)
        assert isinstance(strategy, gift.FineTuningStrategy)
        gift.FineTuningStrategy(eval(f"[{one['cap']}]", vars(gift.factories).copy()))
        shown = getattr(gift.wrappers, one.get("wrapper", "Prompt"))
        assert all(url in (shown.__doc__ or "") for url in one["papers"]), name


def test_quoted_messages_are_those_of_the_source() -> None:
    """What pages quote as a message, after "> ", stands in gift; "…" stands for what differs."""
    known = fragments()
    quoted = 0
    for page in (DOCS / "troubleshooting").rglob("*.md"):
        for line in re.findall(r"^> `(.+)`$", page.read_text("utf-8"), re.MULTILINE):
            for part in line.split(HOLE):
                assert part.strip() in known, f"{page.name}: {part!r} is no message of gift"
            quoted += 1
    assert quoted > 20


def test_the_list_of_messages_has_what_gift_raises() -> None:
    """One of each kind, raised here."""
    listed = messages()
    with pytest.raises(RuntimeError) as raised:
        gift.disable_fine_tuning(torch.nn.Linear(2, 2))
    parts = [one.text.split(HOLE) for one in listed if one.kind == "RuntimeError"]
    assert any(
        all(part.strip() in str(raised.value) for part in p) and max(map(len, p)) > 10
        for p in parts
    )
    assert {"AdaptationError", "DeltaFileError", "GiftWarning", "ValueError"} <= {
        one.kind for one in listed
    }


def test_commands_are_documented() -> None:
    guides = [DOCS / "guides" / name for name in ("jobs.md", "clusters.md")]
    text = "".join(guide.read_text(encoding="utf-8") for guide in guides)
    for command in app.registered_commands:
        assert command.callback is not None
        if command.hidden:
            continue
        name = command.name or command.callback.__name__.replace("_", "-")
        assert f"`gift {name}`" in text
