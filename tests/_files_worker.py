"""What one process saves and another one loads: everything that can be fine-tuned.

Each `Trip` makes a base, fine-tunes it and gives it values; what it computes is known by its bits.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gift
from gift import FineTuningStrategy, GiftWarning, enable_fine_tuning
from gift.factories import ma_adapt
from gift.factories.serializable import bind
from gift.strategies import BottleneckFineTuningStrategy, PromptFineTuningStrategy
from tests.cases import calls, prompts
from tests.cases.layers import ANY_LAYER
from tests.cases.selection import selected
from tests.common import bits
from tests.test_matrix import PLACED
from tests.test_strategies import REGISTERED, some_of_all


class Unnamed:
    """A check that no file can name, as a lambda."""

    def __init__(self, check: Callable[..., bool]) -> None:
        self.check = check

    def __call__(self, *place: Any) -> bool:
        return self.check(*place)

    def bind(self, network: nn.Module) -> "Unnamed":
        return Unnamed(bind(self.check, network))


def unnamed(strategy: FineTuningStrategy) -> FineTuningStrategy:
    """The same strategy with checks that no file can name."""

    def caps(given: list[Any]) -> list[Any]:
        own = [unnamed(a) if isinstance(a, FineTuningStrategy) else a for _, a, _ in given]
        return [(Unnamed(cap.check), a, cap.params) for cap, a in zip(given, own, strict=True)]

    return FineTuningStrategy(caps(strategy.module_caps), caps(strategy.para_caps))


@dataclass(frozen=True)
class Trip:
    """One network and what becomes of it.

    Args:
        make: the base, the same one for the same seed.
        strategy: what fine-tunes it.
        outputs: from the network, what it computes.
    """

    make: Callable[[], nn.Module]
    strategy: FineTuningStrategy
    outputs: Callable[[nn.Module], Any]

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def tuned(self) -> nn.Module:
        """The base, fine-tuned, its parameters as after some training."""
        net = self.base()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GiftWarning)  # of deltas larger than small weights
            enable_fine_tuning(net, self.strategy)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=0.3)
        return net

    def result(self, net: nn.Module) -> list[str]:
        """All bits of what the network computes."""
        torch.manual_seed(1)
        with torch.no_grad():
            leaves = tree_leaves(self.outputs(net.eval()))
        return [bits(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def effective(net: nn.Module) -> list[Tensor]:
    """All parameters and buffers as a layer reads them."""
    return [
        getattr(module, name)
        for module in net.modules()
        for name in (*module._parameters, *module._buffers)
    ]


def _matrix() -> Iterator[tuple[str, Trip]]:
    for cell in selected(PLACED, 0):
        method, layer = cell.values
        caps: dict[str, Any] = {"module_caps": [(ANY_LAYER, ma_adapt)]}
        made = {
            kind: [(check, act(method.method, **method.settings)) for check, act in pairs]
            for kind, pairs in (layer.caps or caps).items()
        }

        def outputs(net: nn.Module, layer: Any = layer) -> Any:
            return layer.output(net(*layer.inputs()))

        yield str(cell.id), Trip(layer.make, FineTuningStrategy(**made), outputs)


def _strategies() -> Iterator[tuple[str, Trip]]:
    for strategies in REGISTERED.values():
        for number, strategy in enumerate(strategies):
            if not strategy.dry_run:
                name = f"{type(strategy).__name__}-{number}"
                yield name, Trip(some_of_all, strategy, effective)


def _calls() -> Iterator[tuple[str, Trip]]:
    for name, case in calls.CASES.items():
        for parallel in (False, True)[: 1 if case.alone else 2]:
            strategy = BottleneckFineTuningStrategy(3, parallel, after=case.after, **case.settings)

            def outputs(net: nn.Module, case: Any = case) -> Any:
                return calls.tensors(net(*case.inputs()))

            yield f"bottleneck-{name}-{parallel}", Trip(case.make, strategy, outputs)


def _prompts() -> Iterator[tuple[str, Trip]]:
    for kind, head in prompts.EACH_TOKEN + prompts.EACH_SEQUENCE:
        if prompts.config_of(kind) is None:
            continue

        def make(kind: str = kind, head: str = head) -> nn.Module:
            return prompts.made(kind, head)

        def outputs(net: Any) -> Any:
            given = prompts.batch("right")
            if net.config.is_encoder_decoder:
                given["decoder_input_ids"] = given["input_ids"]
            net.config.use_cache = False  # some old models make one for the words alone
            # Old versions of transformers make their masks of the default dtype.
            torch.set_default_dtype(torch.float64)
            try:
                return net(**given).logits
            finally:
                torch.set_default_dtype(torch.float32)

        yield f"prompt-{kind}-{head}", Trip(make, PromptFineTuningStrategy(3), outputs)


def trips() -> dict[str, Trip]:
    """Every trip with a strategy that files can name, a fourth also with one that they cannot."""
    named = dict([*_matrix(), *_strategies(), *_calls(), *_prompts()])
    again = {
        f"{name}-unnamed": Trip(trip.make, unnamed(trip.strategy), trip.outputs)
        for name, trip in list(named.items())[::4]
    }
    return named | again


def save_all(folder: Path) -> None:
    """Save every network, and what each computes."""
    expected = {}
    for number, (name, trip) in enumerate(trips().items()):
        net = trip.tuned()
        gift.save(net, folder / f"{number}.safetensors")
        expected[name] = trip.result(net)
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


def load_all(folder: Path) -> dict[str, str]:
    """Load every network onto its base in this process; gives what went wrong, by name."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    wrong = {}
    for number, (name, trip) in enumerate(trips().items()):
        try:
            net = trip.base()
            gift.load(net, folder / f"{number}.safetensors")
            if trip.result(net) != expected[name]:
                wrong[name] = "gives something else"
        except Exception:
            wrong[name] = traceback.format_exc(limit=-3)
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    (place / "wrong.json").write_text(json.dumps(load_all(place)), encoding="utf-8")
