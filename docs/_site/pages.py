"""A script of mkdocs-gen-files: the pages that are made of source, results and other documents."""

import builtins
import json
import re
import sys
import tomllib
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from docs._site.markdown import as_markdown
from docs._site.messages import messages
from docs._site.public import (
    ROOMS,
    ROOT,
    Public,
    Registered,
    public_names,
    registered_methods,
)

ABOUT = tomllib.loads((ROOT / "docs" / "methods.toml").read_text(encoding="utf-8"))
RESULTS = ROOT / "benchmarks" / "results"


def write(page: str, text: str) -> None:
    """Write a page of the site."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def copy(source: Path, target: str) -> None:
    """Copy a file into the site."""
    with mkdocs_gen_files.open(target, "wb") as file:
        file.write(source.read_bytes())


def reference() -> None:
    """One page for each room; a public name without a docstring is an error."""
    names = public_names()
    if missing := [f"{one.room}.{one.name}" for one in names if not one.documented]:
        raise SystemExit(f"public names without a docstring: {missing}")
    summary = ["* [All names](index.md)"]
    index = ["# Reference", "", "Every public name, by the module that you import it from.", ""]
    for room, title in ROOMS.items():
        own = [one for one in names if one.room == room or one.room.startswith(f"{room}.")]
        own = [one for one in own if room != "gift" or one.room == "gift"]
        page = f"{room.removeprefix('gift.')}.md"
        summary.append(f"* [{title}]({page})")
        index += [f"## [{title}]({page})", "", f"`{room}`", ""]
        index += [
            ", ".join(f"[`{one.name}`][{one.path}]" for one in own),
            "",
        ]
        write(f"reference/{page}", room_page(room, title, own))
    write("reference/SUMMARY.md", "\n".join(summary) + "\n")
    write("reference/index.md", "\n".join(index))


def room_page(room: str, title: str, names: list[Public]) -> str:
    """The page of one room."""
    lines = [f"# {title}", "", f"`{room}`", ""]
    if room == "gift.strategies":
        lines += [
            "Each [method](../methods/index.md) has three strategies, for all layers, for linear "
            "layers and for convolutions: their page is that of the method.",
            "",
        ]
    if room == "gift.methods":
        lines += ["The methods themselves have [pages of their own](../methods/index.md).", ""]
        classes = {method.cls for method in registered_methods()}
        lines += [f"* [`{name}`][gift.methods.{name}]" for name in sorted(classes)] + [""]
        names = [one for one in names if one.name not in classes]
    if room == "gift.wrappers":
        pages = {one["wrapper"] for one in ABOUT["wrappers"].values() if "wrapper" in one}
        lines += ["Methods that wrap have [pages of their own](../methods/index.md).", ""]
        lines += [f"* [`{name}`][gift.wrappers.{name}]" for name in sorted(pages)] + [""]
        names = [one for one in names if one.name not in pages]
    for one in names:
        lines += [f"::: {one.path}", ""]
    return "\n".join(lines)


def methods() -> None:
    """An index, and one page for each method."""
    known = {method.name: method for method in registered_methods()}
    if odd := set(known) ^ set(ABOUT["methods"]):
        raise SystemExit(f"docs/methods.toml and the registered methods differ in {sorted(odd)}")
    summary = ["* [All methods](index.md)"]
    index = [(ROOT / "docs" / "_site" / "methods.head.md").read_text(encoding="utf-8")]
    for group, title in ABOUT["groups"].items():
        index += [f"## {title}", "", "| method | effective weight | parameters | take it |"]
        index += ["|---|---|---|---|"]
        summary.append(f"* {title}")
        for name, about in ABOUT["methods"].items():
            if about["group"] != group:
                continue
            method = known[name]
            page = f"{name}.md"
            title = about.get("title", method.title)
            summary.append(f"    * [{title}]({page})")
            weight = formula(method, about)
            row = f"[{title}]({page})", f"\\({weight}\\)", about["parameters"], about["take"]
            index.append("| " + " | ".join(row) + " |")
            write(f"methods/{page}", method_page(method, about))
        index.append("")
    index += wrappers(summary)
    index.append((ROOT / "docs" / "_site" / "methods.foot.md").read_text(encoding="utf-8"))
    write("methods/SUMMARY.md", "\n".join(summary) + "\n")
    write("methods/index.md", "\n".join(index))


def wrappers(summary: list[str]) -> list[str]:
    """A page for each method that wraps forward passes; returns their part of the index."""
    title = "Wrapped forward passes"
    summary.append(f"* {title}")
    lines = [f"## {title}", "", (ROOT / "docs" / "_site" / "wrappers.head.md").read_text("utf-8")]
    lines += ["| method | what it adds | parameters | take it |", "|---|---|---|---|"]
    for name, about in ABOUT["wrappers"].items():
        summary.append(f"    * [{about['title']}]({name}.md)")
        row = f"[{about['title']}]({name}.md)", about["does"], about["parameters"], about["take"]
        lines.append("| " + " | ".join(row) + " |")
        write(f"methods/{name}.md", wrapper_page(about))
    return [*lines, ""]


def wrapper_page(about: dict[str, Any]) -> str:
    """The page of one method that wraps forward passes."""
    papers = ", ".join(f"[paper]({url})" for url in about["papers"])
    strategy = about["strategy"]
    lines = [
        f"# {about['title']}",
        "",
        f"**When to take it.** {about['when']} ({papers})",
        "",
        f"It adds {about['does']}. Parameters: {about['parameters']}.",
        "",
        "```python",
        "from gift import enable_fine_tuning",
        f"from gift.strategies import {strategy}",
        "",
        f"enable_fine_tuning(net, {strategy}({about['example']}))",
        "```",
        "",
        "In a cap of your own:",
        "",
        "```python",
        about["cap"],
        "```",
        "",
        f"The strategy is [`{strategy}`][gift.strategies.{strategy}].",
        "",
    ]
    if "wrapper" in about:
        lines += [
            f"::: gift.wrappers.{about['wrapper']}",
            "    options:",
            "      members: false",
            "",
        ]
    if rows := of_quality(about.get("benchmark", about["title"])):
        lines += ["## Figures", "", *rows, ""]
    return "\n".join(lines)


def formula(method: Registered, about: dict[str, str]) -> str:
    """What the index shows as the effective weight."""
    if "formula" in about:
        return about["formula"]
    found = re.search(r"\\\[ (.*?) \\\]", as_markdown(method.doc), re.DOTALL)
    assert found is not None, method.name
    return found[1].split(", \\quad")[0].strip().removeprefix("W' = ")


def method_page(method: Registered, about: dict[str, str]) -> str:
    """The page of one method."""
    strategies = [f"{method.title}{kind}FineTuningStrategy" for kind in ("All", "Linear", "Conv")]
    lines = [
        f"# {about.get('title', method.title)}",
        "",
        f"**When to take it.** {about['when']}",
        "",
        "```python",
        "from gift import enable_fine_tuning",
        f"from gift.strategies import {strategies[0]}",
        "",
        f"enable_fine_tuning(net, {strategies[0]}({about.get('example', '')}))",
        "```",
        "",
        "In a cap of your own:",
        "",
        "```python",
        f'(mc_path(glob="encoder.*"), ma_adapt("{method.name}"'
        + (f", {about['example']}" if "example" in about else "")
        + "))",
        "```",
        "",
        f"::: gift.methods.{method.cls}",
        "    options:",
        "      members: false",
        "",
        "## Strategies",
        "",
        "All take the settings above, and `train_bias`, `conv_layout`, `split_qkv` and "
        "`freeze_statistics`: see [What is trained](../guides/strategies.md).",
        "",
        "| | adapts |",
        "|---|---|",
        f"| `{strategies[0]}` | every layer whose weights gift knows, and experts of mixtures |",
        f"| `{strategies[1]}` | linear layers, their subclasses, `Conv1D` of transformers |",
        f"| `{strategies[2]}` | convolutions, transposed ones included |",
        "",
    ]
    if rows := of_quality(about.get("benchmark", method.title)):
        lines += ["## Figures", "", *rows, ""]
    return "\n".join(lines)


def of_quality(title: str) -> list[str]:
    """What the benchmark of quality measured of a method, beside LoRA and full fine-tuning."""
    lines = []
    for task, rows in quality().items():
        chosen = {
            name: rows[name] for name in dict.fromkeys(["full", "LoRA", title]) if name in rows
        }
        if title not in chosen:
            continue
        for name, row in chosen.items():
            shown = f"**{name}**" if name == title else name
            lines.append(f"| {task} | {shown} | {' | '.join(row)} |")
    if not lines:
        return []
    head = [
        "| task | | parameters | % of all | accuracy % | ± | step / full |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    return [
        "At a budget near that of the others, three seeds each; differences of one ± mean nothing "
        "([how it is measured](../project/benchmarks.md)).",
        "",
        *head,
        *lines,
    ]


def quality() -> dict[str, dict[str, list[str]]]:
    """For each task of `benchmarks/quality.py`, a row of each contender."""
    tasks = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["tasks"]
    return {
        task["title"]: {
            name: cells for name, one in task["contenders"].items() if (cells := measured(one))
        }
        for task in tasks.values()
    }


def measured(one: dict[str, Any]) -> list[str]:
    """The cells of one contender on one task; none if it could not take part."""
    if "accuracies" not in one:
        return []
    accuracies = one["accuracies"]
    return [
        f"{one['parameters']:,}",
        f"{100 * one['share']:.2f}",
        f"{mean(accuracies):.1f}",
        f"{stdev(accuracies):.1f}",
        f"{one['step_over_full']:.2f}",
    ]


def documents() -> None:
    """Documents that stand beside the source, with their links turned to pages."""
    linked = {
        "CHANGELOG.md": "project/changelog.md",
        "CONTRIBUTING.md": "project/contributing.md",
        "SECURITY.md": "project/security.md",
        "benchmarks/README.md": "project/benchmarks.md",
    }
    for source, page in linked.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?:\.\./)?(?:benchmarks/)?results/([\w.]+)\)", r"](results/\1)", text)
        text = re.sub(r"\[([^\]]+)\]\((?!http|results/|#)[^)]*\)", r"\1", text)
        write(page, text)
    for file in sorted(RESULTS.glob("*")):
        if file.suffix in {".png", ".md", ".json"}:
            copy(file, f"project/results/{file.name}")


def notebooks() -> None:
    """The notebooks as they are stored, outputs included, and a list of them."""
    about: dict[str, tuple[str, str]] = {}
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        copy(notebook, f"notebooks/{notebook.name}")
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        title, text, *_ = "".join(cells[0]["source"]).split("\n\n")
        about[notebook.name] = title.removeprefix("# "), text
    ordered = sorted(about, key=lambda name: (name != "quick_start.ipynb", about[name][0]))
    listed = [f"* [{about[name][0]}]({name})" for name in ordered]
    write("notebooks/SUMMARY.md", "\n".join(["* [All notebooks](index.md)", *listed]) + "\n")
    index = [(ROOT / "docs" / "_site" / "notebooks.head.md").read_text(encoding="utf-8")]
    index += [f"**[{about[name][0]}]({name})** {about[name][1]}\n" for name in ordered]
    write("notebooks/index.md", "\n".join(index))


def every_message() -> None:
    """All messages of errors and warnings, to search in."""
    found = messages()
    lines = [(ROOT / "docs" / "_site" / "messages.head.md").read_text(encoding="utf-8")]
    kinds = sorted({one.kind for one in found}, key=lambda kind: (kind in dir(builtins), kind))
    for kind in kinds:
        own = sorted((one for one in found if one.kind == kind), key=lambda one: one.module)
        lines += [f"## {kind}", "", "| message | in |", "|---|---|"]
        for one in own:
            text = one.text.replace("|", "\\|").replace("`", "'")
            module = f'<code class="module">{one.module.removeprefix("gift.")}</code>'
            lines.append(f"| `{text}` | {module} |")
        lines.append("")
    write("troubleshooting/messages.md", "\n".join(lines))


reference()
methods()
documents()
notebooks()
every_message()
