"""fastai: its learner trains, freezes, saves, loads and exports a fine-tuned network."""

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift import GiftWarning, enable_fine_tuning
from gift.strategies import LoRAAllFineTuningStrategy
from tests.clients._properties import Client
from tests.common import all_bits, trainable

pytest.importorskip("fastai")
from fastai.callback import schedule  # noqa: F401 - which gives learners more methods
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner, load_learner
from fastai.torch_core import params, trainable_params
from fastai.vision.learner import create_vision_model
from torchvision.models import resnet18

X = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def body_and_head() -> nn.Module:
    """A ResNet18 as `vision_learner` cuts it: a body, and fastai's own head."""
    torch.manual_seed(0)
    return create_vision_model(resnet18, 4, pretrained=False)


def image_of(number: int) -> Tensor:
    return X[number]


def label_of(number: int) -> Tensor:
    return Y[number]


def learner(net: nn.Module, folder: Path, **settings: Any) -> Any:
    random.seed(1)  # by which fastai shuffles
    torch.manual_seed(1)
    data = Datasets(range(16), [[image_of], [label_of]])
    loaders = DataLoaders.from_dsets(data, data, bs=8, device="cpu", num_workers=0)
    return Learner(
        loaders, net, loss_func=nn.CrossEntropyLoss(), path=folder, model_dir="models", **settings
    )


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        found = net.eval()(X)
    net.train()
    return found


def losses_of(made: Any) -> list[float]:
    return [float(loss) for loss in made.recorder.losses]


def lora() -> Any:
    return LoRAAllFineTuningStrategy(rank=2)


def body_and_head_deltas(net: Any) -> list[Any]:
    """Groups of parameters for `freeze`: as `vision_learner` has them, but what is trained only."""
    return [trainable_params(net[0]), trainable_params(net[1])]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the delta has more", GiftWarning)
        yield


def test_fitting_and_saving(tmp_path: Path) -> None:
    """The best model is loaded at the end, and the one that is saved and loaded is the same."""
    net = body_and_head()
    client = Client(net, lambda: output(net), atol=1e-4)
    client.enable(lora())
    made = learner(net, tmp_path, cbs=[SaveModelCallback(fname="best")])
    with made.no_logging(), made.no_bar():
        made.lr_find(num_it=4, show_plot=False)
        assert trainable(net) == client.deltas
        made.fit_one_cycle(8, 2e-2)

    def reload() -> Tensor:
        made.save("now")
        fresh = body_and_head()
        enable_fine_tuning(fresh, lora())
        return output(learner(fresh, tmp_path).load("now").model)

    assert set(torch.load(tmp_path / "models" / "best.pth")) == set(net.state_dict())
    client.check(losses_of(made), reload, exact=True)


def test_an_exported_learner_is_fine_tuned(tmp_path: Path) -> None:
    net = body_and_head()
    client = Client(net, lambda: output(net), atol=1e-4)
    client.enable(lora())
    made = learner(net, tmp_path)
    with made.no_logging(), made.no_bar():
        made.fit(6, 1e-2)

    def reload() -> Tensor:
        made.export("whole.pkl")
        loaded = load_learner(tmp_path / "whole.pkl")
        assert trainable(loaded.model) == client.deltas
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(1.0)  # a network of its own
        return output(load_learner(tmp_path / "whole.pkl").model)

    client.check(losses_of(made), reload, exact=True)


def test_freezing_and_unfreezing_groups_of_deltas(tmp_path: Path) -> None:
    """First the head's alone, then all, as `fine_tune` does."""
    net = body_and_head()
    client = Client(net, lambda: output(net), atol=1e-4)
    client.enable(lora())
    made = learner(net, tmp_path, splitter=body_and_head_deltas)
    with made.no_logging(), made.no_bar():
        made.freeze()
        assert {name.partition(".")[0] for name in trainable(net)} == {"1"}
        made.fit(1, 1e-2)
        now = all_bits(net)
        moved = {name for name in client.deltas if now[name] != client.start[name]}
        assert moved == {name for name in client.deltas if name.startswith("1.")}
        made.unfreeze()
        made.fit(6, slice(3e-3, 1e-2))
    client.check(losses_of(made), None)


def test_unfreezing_all_parameters_of_a_body_is_reported(tmp_path: Path) -> None:
    """The groups of `vision_learner` have what is frozen, too.

    Optimizers of fastai are none of torch's, so it is the network that notices.
    """
    net = body_and_head()
    enable_fine_tuning(net, lora())
    made = learner(net, tmp_path, splitter=lambda net: [params(net[0]), params(net[1])])
    made.freeze()
    made.unfreeze()
    with (
        made.no_logging(),
        made.no_bar(),
        pytest.warns(GiftWarning, match="frozen by fine-tuning") as caught,
    ):
        made.fit(1, 1e-2)
    assert len([one for one in caught if issubclass(one.category, GiftWarning)]) == 1
