"""What several benchmarks need: shapes, names of layers, the machine."""

import json
import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gift


def linear_pattern(network: nn.Module) -> str:
    """A short regular expression for the names of all linear layers.

    PEFT is fastest with one, and its "all-linear" passes the output layer of a transformer by.
    """
    names = {n.rpartition(".")[2] for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    return r"(.*\.)?(" + "|".join(sorted({r"\d+" if n.isdigit() else n for n in names})) + ")"


def adaptable_pattern(network: nn.Module) -> str:
    """A regular expression for the names of all linear layers and convolutions that PEFT adapts."""
    return "|".join(re.escape(n) for n, m in network.named_modules() if peft_adapts(m))


def peft_adapts(module: nn.Module) -> bool:
    """Whether PEFT has LoRA for a layer: for no transposed convolution, and for groups only at
    ranks that they divide, where each delta reads the channels of all groups.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) and getattr(module, "groups", 1) == 1


def llama_7b(layers: int = 32) -> nn.Module:
    """The shape of Llama 7B, or less deep, on the meta device."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # resource tells that of the process which started this one, if it is more
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> dict[str, Any]:
    """The machine, and the versions of the contenders."""
    modules = {"torch": torch, "gift": gift, "peft": peft, "transformers": transformers}
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    } | {name: str(module.__version__) for name, module in modules.items()}


def write_results(file: Path, results: dict[str, Any]) -> None:
    """Store what was measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
