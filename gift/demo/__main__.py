"""Fine-tune a small network on real images, and see what gift does.

Without options: a base that knows the handwritten digits 0 to 4 learns 5 to 9.
"""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.error import URLError

import torch

from gift.demo.data import BadFolderError, digits, read_folder
from gift.demo.drawing import draw_predictions
from gift.demo.network import SmallResNet
from gift.demo.story import Base, Facts, fine_tune, heading, say, train_base
from gift.support.optional import require

IMAGE_SIZE = 64
PRETRAINED_SIZE = 96


def main(arguments: Sequence[str] | None = None) -> Facts:
    """Run the demo, and return its facts.

    Args:
        arguments: command line arguments; None uses those of the process.

    Raises:
        SystemExit: if arguments are wrong, or the demo cannot learn from the folder.
    """
    parser = argparse.ArgumentParser("python -m gift.demo", description=__doc__)
    parser.add_argument(
        "--images", type=Path, metavar="DIR",
        help="learn from images (2,000 at most) in DIR/CLASS/, or in DIR/train/CLASS/ and "
        "DIR/val/CLASS/; images of predictions are written",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for saved states and images (with --images, gift_demo if not given)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each network")
    parser.add_argument(
        "--scratch", action="store_true", help="with --images: no weights from torchvision"
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps is {options.steps}, expected at least 2")
    try:
        if options.images is None:
            return demo_of_digits(options.steps or 200, options.out)
        out = options.out or Path("gift_demo")
        return demo_of_images(options.images, options.steps or 200, out, options.scratch)
    except (BadFolderError, ImportError) as error:
        parser.error(str(error))


def demo_of_digits(steps: int, out: Path | None = None) -> Facts:
    """Let a base that knows the digits 0 to 4 learn 5 to 9; files stay only in a given folder."""
    task = digits()
    heading("A base learns the handwritten digits 0, 1, 2, 3, 4 (8 x 8 pixels)")
    base = train_base(partial(SmallResNet, 1, 5), task.only(range(5)), steps, lr=0.01)
    with tempfile.TemporaryDirectory() as temporary:
        folder = _made(out or Path(temporary))
        return fine_tune(base, task.only(range(5, 10)), steps, lr=0.01, rank=2, out=folder)


def demo_of_images(folder: Path, steps: int, out: Path, scratch: bool = False) -> Facts:
    """Let a base learn the other half of the classes of a folder; images are written to `out`."""
    task = read_folder(folder, IMAGE_SIZE)
    _made(out)
    base = None if scratch else _pretrained()
    if base is not None:
        task = read_folder(folder, PRETRAINED_SIZE)
        say("The base is torchvision's resnet18 with ImageNet weights.")
        torch.set_num_threads(min(4, os.cpu_count() or 1))
        steps, lr = max(2, steps // 6), 0.001  # a step takes fifty times as long
    else:
        lr = 0.005
        number, half = len(task.names), len(task.names) // 2
        if half > 1:
            first, task = task.only(range(half)), task.only(range(half, number))
            heading(f"A base learns {', '.join(first.names)}")
        else:
            first = task.rotated()
            heading("A base learns how far an image was turned")
            say(f"{number} classes are too few to keep half for it, so do not expect much of it.")
        make = partial(SmallResNet, 3, len(first.names), stride=2)
        base = train_base(make, first, steps, lr)
    result = fine_tune(base, task, steps, lr=lr, rank=4, out=out)
    assert result.outputs is not None
    result.images = draw_predictions(task, result.outputs, out)
    heading("Images")
    say("\n".join(str(file.resolve()) for file in result.images))
    return result


def _pretrained() -> Base | None:
    """Return a ResNet18 with ImageNet weights, if they are available locally or downloadable."""
    models = require("torchvision.models", "demo")
    try:
        with _impatient():
            return Base(models.resnet18(weights="DEFAULT"), models.resnet18)
    except (URLError, OSError, RuntimeError) as error:
        say(f"Without torchvision's pretrained weights ({error}): a small base is trained here.")
        return None


@contextmanager
def _impatient(seconds: float = 10) -> Iterator[None]:
    """Context manager that shortens the timeout of a connection that does not respond."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFolderError(f"{folder} cannot be made a folder: {error.strerror}") from error
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)  # the layers are too small for more threads
    facts = main()
    sys.exit(0 if facts.same_output and facts.same_base else 1)
