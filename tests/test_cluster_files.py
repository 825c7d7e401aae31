"""The files of examples/clusters have the form that their tools ask for; nothing here runs them."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gift.cli.app import app

CLUSTERS = Path(__file__).parent.parent / "examples" / "clusters"


def is_command(words: list[str]) -> bool:
    """Whether gift has the command, with all of these options."""
    shown = CliRunner().invoke(app, [words[1], "--help"], terminal_width=300, color=False)
    options = {word for word in words if word.startswith("--")}
    return shown.exit_code == 0 and all(option in shown.output for option in options)


def test_the_cluster_launcher_accepts_its_file() -> None:
    """By the schema that comes with Ray; the commands in its head are gift's."""
    jsonschema = pytest.importorskip("jsonschema")
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:
        pytest.skip("there is no Ray, which has the schema")
    schema = json.loads(Path(found.origin).with_name("autoscaler").joinpath("ray-schema.json")
                        .read_text(encoding="utf-8"))  # fmt: skip
    text = (CLUSTERS / "ray_aws.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"head_node": "head"}, schema)
    assert content["head_node_type"] in content["available_node_types"]
    commands = [shlex.split(one) for one in re.findall(r"gift (?:submit|jobs)[^\"]*", text)]
    assert len(commands) == 2
    assert all(map(is_command, commands))
    for starts in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in content[starts][-1]


def test_the_job_of_kuberay_runs_a_command_of_gift() -> None:
    content: dict[str, Any] = yaml.safe_load((CLUSTERS / "kuberay_job.yaml").read_text("utf-8"))
    assert is_command(shlex.split(content["spec"]["entrypoint"]))
    cluster = content["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    volumes = [group["template"]["spec"]["volumes"] for group in groups]
    assert volumes[0] == volumes[1], "runs and checkpoints must outlive the pods"
