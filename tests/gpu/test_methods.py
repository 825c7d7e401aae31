"""Every method on every layer, beside the CPU in float64.

That `test_matrix` compares with the formulas of the papers.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.cases.layers import LayerCase
from tests.cases.methods import MethodCase
from tests.gpu.on_device import assert_near, gradients, moved
from tests.test_matrix import CELLS, adapt, randomise, run

# Float32 has 24 bits, and a layer sums up to a hundred products. Bfloat16 has 8 bits: recurrent
# layers round a dozen times, one after the other, and the products of an anchored delta cancel. A
# wrong factor would be far more.
TOLERANCES = {"float32": 5e-5, "bfloat16": 0.2, "autocast": 0.2}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("method", "layer"), CELLS)
def test_outputs_and_gradients_are_those_of_the_cpu_in_float64(
    method: MethodCase, layer: LayerCase, precision: str, device: torch.device
) -> None:
    if precision == "bfloat16" and "bfloat16" in layer.differs:
        pytest.skip(layer.differs["bfloat16"])
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    net, inputs = layer.make().to(dtype).eval(), moved(layer.inputs(), torch.device("cpu"), dtype)
    with torch.no_grad():
        run(net, layer, inputs)  # a weight that is computed by a hook is there from now on
    adapt(net, method, layer)
    randomise(net)
    exact, net = copy.deepcopy(net).double(), net.to(device)
    expected = run(exact, layer, moved(inputs, torch.device("cpu"), torch.float64))
    summed(expected).backward()
    half = torch.autocast(device.type, torch.bfloat16) if precision == "autocast" else None
    with half or nullcontext():
        found = run(net, layer, moved(inputs, device))
        with torch.no_grad():
            again = run(net, layer, moved(inputs, device))
    summed(found.float()).backward()
    assert found.device.type == device.type
    assert_near(found, expected, TOLERANCES[precision])
    assert_near(again, expected, TOLERANCES[precision])
    if "gradients" not in layer.differs:
        assert_near(gradients(net), gradients(exact), TOLERANCES[precision])


def summed(output: Tensor) -> Tensor:
    """A sum in which each output has another weight, so that its gradient is not rounded."""
    steps = torch.arange(output.numel(), device=output.device) % 7 + 1
    return steps.to(output.dtype) @ output.flatten()
