"""What leaves torch, or this process, of a merged network: outputs as of the fine-tuned one."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from gift import merge, merged
from gift.strategies import DoRALinearFineTuningStrategy as DoRA
from tests.cases.selection import cells
from tests.test_merging import NETWORKS, Case, call, tuned


def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64)


def vit_of_timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return VisionTransformer(num_classes=5, **sizes)


EXPORTED = {
    "torchvision": Case(resnet, inputs=lambda: torch.randn(2, 3, 32, 32)),
    "timm": Case(vit_of_timm, DoRA, inputs=lambda: torch.randn(2, 3, 8, 8)),
    "norms and statistics": NETWORKS["norms and statistics"],
    "recurrent": NETWORKS["recurrent"],
    "encoder": NETWORKS["encoder"],
}


def by_export(net: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(net, (x,)).module()(x)


def by_exported_file(net: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (x,)), file)
    file.seek(0)
    return torch.export.load(file).module()(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def by_trace(net: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, x), file)
    file.seek(0)
    return torch.jit.load(file)(x)


def by_onnx(net: nn.Module, x: Tensor) -> Tensor:
    from onnxruntime import InferenceSession

    file = io.BytesIO()
    torch.onnx.export(net, (x,), dynamo=True, verbose=False).save(file)
    session = InferenceSession(file.getvalue())
    (output, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


WAYS = [by_export, by_exported_file, by_trace, by_onnx]


@cells(2, case=EXPORTED, way={way.__name__: way for way in WAYS})
def test_a_merged_network_is_exported(case: Case, way: Callable[[Any, Tensor], Tensor]) -> None:
    """For good, and for a while; the values are checked where both run."""
    net, x = tuned(case).eval(), case.inputs()
    with torch.no_grad():
        expected = call(net, x)
        with merged(net):
            inside = way(net, x)
        assert torch.equal(call(net, x), expected)
        for output in (inside, way(merge(net), x)):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("for_a_while", [False, True])
def test_save_pretrained(name: str, for_a_while: bool, tmp_path: Path) -> None:
    """The folder is one of the plain model: tied weights once, nothing of gift in it."""
    case = NETWORKS[name]
    net, x = tuned(case).eval(), case.inputs()
    keys = case.make().state_dict().keys()
    with torch.no_grad():
        expected = call(net, x)
        with merged(net) if for_a_while else nullcontext(merge(net)):
            net.save_pretrained(tmp_path)
        again, info = type(case.make()).from_pretrained(tmp_path, output_loading_info=True)
        torch.testing.assert_close(call(again.eval(), x), expected, rtol=1e-4, atol=1e-4)
    assert not any(info.values())
    assert again.state_dict().keys() == keys
    assert again.config.architectures == [type(case.make()).__name__]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(keys)
    assert "gift" not in (tmp_path / "config.json").read_text()


WITHOUT_GIFT = """
import sys
sys.modules["gift"] = None
import torch
for net, x, expected, state in torch.load(sys.argv[1], weights_only=False):
    assert torch.allclose(net(x), expected, atol=1e-4)
    net.load_state_dict(state)
    net(x).sum().backward()
"""


def test_a_pickle_needs_no_gift(tmp_path: Path) -> None:
    """In a fresh process in which gift cannot be imported."""
    saved = []
    for case in (EXPORTED["torchvision"], EXPORTED["timm"]):
        net, x = tuned(case).eval(), case.inputs()
        expected = call(net, x).detach()
        with merged(net):
            saved.append((copy.deepcopy(net), x.requires_grad_(), expected, net.state_dict()))
        saved.append((merge(net), x, expected, net.state_dict()))
    torch.save(saved, tmp_path / "nets.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_GIFT, tmp_path / "nets.pt"], check=True)
