"""Model cards, and uploading a delta with its card to the Hugging Face hub."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gift.errors import JobError
from gift.jobs.runs import INPUTS, JOB, Run
from gift.support import yaml_files
from gift.support.atomic_files import write_text
from gift.support.optional import require
from gift.training.report.tables import Table, comparisons, facts

CARD = "README.md"
_PIPELINES = {
    ("classification", "text"): "text-classification",
    ("classification", "picture"): "image-classification",
    ("classification", "audio"): "audio-classification",
    ("classification", "extractor"): "audio-classification",
    ("detection", "detector"): "object-detection",
    ("segmentation", "segmentation"): "image-segmentation",
    ("language", "text"): "text-generation",
}
"""Names of the hub for what a network does, by task and kind of reader."""


def write_card(run: Run, path: Path) -> Path:
    """Write the model card beside what was exported: in a folder, or with the name of a file.

    Args:
        run: the run.
        path: the file or folder that it describes.

    Returns:
        Path of the card.
    """
    card = path / CARD if path.is_dir() else path.with_suffix(".md")
    write_text(card, card_text(run, path.name))
    return card


def card_text(run: Run, name: str, repository: str | None = None) -> str:
    """Return a model card in Markdown, with what the hub reads in front of it.

    Args:
        run: the run.
        name: name of the file or folder that it describes.
        repository: repository that the delta is uploaded to.
    """
    base = None if run.job.network is None else run.job.network.name
    library, _, model = (base or "").partition(":")
    about: dict[str, Any] = {
        "library_name": "gift",
        "tags": ["gift", "fine-tuned", library or "torch"],
    }
    if library == "transformers" and not Path(model).is_absolute():
        about["base_model"] = model
    pipeline = _PIPELINES.get((run.task, getattr(run.reader, "kind", "")))
    if pipeline is not None:
        about["pipeline_tag"] = pipeline
    parts = ["---\n" + yaml_files.dump(about) + "---", f"# {repository or name}", _first(run, base)]
    try:
        result = run.result
    except FileNotFoundError:
        parts.append("The run has not ended yet, so there are no final metrics.")
    else:
        parts += [_markdown(table) for table in comparisons(result)]
        rows = [[k, v] for k, v in facts(result) if k not in ("Folder", "Network")]
        parts.append(_markdown(Table("Training", ["", ""], rows)))
        for title, section in result.about.items():
            shown = {k: v for k, v in section.items() if "examples" not in k and k != "System"}
            parts.append(_markdown(Table(title, ["", ""], [[k, v] for k, v in shown.items()])))
    parts.append(_use(run, name, repository, base))
    return "\n\n".join(parts) + "\n"


def _first(run: Run, base: str | None) -> str:
    classes = run.classes or ()
    told = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    named = "a network of its own" if base is None else f"`{_without_folders(base)}`"
    return f"{named}, fine-tuned for {run.task}" + (f": {told}." if told else ".")


def _use(run: Run, name: str, repository: str | None, base: str | None) -> str:
    if name.endswith((".onnx", ".pt2")):
        opened = (
            f'onnxruntime.InferenceSession("{name}")' if name.endswith(".onnx")
            else f'torch.export.load("{name}").module()'
        )  # fmt: skip
        code = f"program = {opened}"
    elif repository is None:
        code = "# the merged network: it is loaded by the library that made it"
    else:
        code = (
            "import gift\nfrom huggingface_hub import hf_hub_download\n"
            "from gift.zoo import load_network\n\n"
            f'net = load_network("{_without_folders(base or "import:...")}").net\n'
            f'gift.load(net, hf_hub_download("{repository}", "{name}"))'
        )
    return f"## How to use it\n\n```python\n{code}\n```"


def _markdown(table: Table) -> str:
    """Return a table in Markdown."""
    escaped = [
        [str(cell).replace("|", "\\|") for cell in row] for row in (table.header, *table.rows)
    ]
    header, *rows = (f"| {' | '.join(row)} |" for row in escaped)
    return "\n".join([f"## {table.title}", "", header, "|---" * len(table.header) + "|", *rows])


def _without_folders(name: str) -> str:
    """Shorten the path of a local model to its name, which says nothing about this machine."""
    library, _, model = name.partition(":")
    return f"{library}:{Path(model).name}" if Path(model).is_absolute() else name


def pushed(run: Run, repository: str, which: str | Path | None, private: bool, message: str) -> str:
    """Upload delta, job, reader and card of a run, and return the address.

    Paths of this machine are shortened to names in the job that is uploaded.

    Args:
        run: the run.
        repository: owner and name.
        which: see `Run.delta`.
        private: whether a new repository is private.
        message: message of the commit.

    Raises:
        JobError: if the hub refuses it, or cannot be reached.
    """
    hub = require("huggingface_hub", "hub")
    delta = run.delta(which)
    api = hub.HfApi(library_name="gift")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copy(delta, folder / delta.name)
        shutil.copy(run.folder / INPUTS, folder / INPUTS)
        if (run.folder / "tokenizer").is_dir():
            shutil.copytree(run.folder / "tokenizer", folder / "tokenizer")
        job = _shortened(run.job.to_config())
        (folder / JOB).write_text(yaml_files.dump(job), encoding="utf-8")
        (folder / CARD).write_text(card_text(run, delta.name, repository), encoding="utf-8")
        try:
            api.create_repo(repository, private=private or None, exist_ok=True)
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
        except Exception as error:  # of httpx, requests or the hub, by their versions
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise JobError(f"{repository} was not uploaded", [problem]) from error
    return str(getattr(done, "commit_url", done))


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else _without_folders(value)
    return json.loads(json.dumps(value))
