"""Images of predictions."""

from pathlib import Path

import torch
from torch import Tensor

from gift.demo.data import Task, visible
from gift.support.optional import require


def draw_predictions(task: Task, outputs: Tensor, out: Path, number: int = 12) -> list[Path]:
    """Draw held-out images with their predictions: a selection, and the most confident mistakes.

    Args:
        task: task whose held-out images are drawn.
        outputs: outputs of the network for each of these images.
        out: folder for the PNG files.
        number: number of images in each file.

    Returns:
        The files; only one if there are no mistakes.
    """
    sureness, said = outputs.softmax(1).max(1)
    wrong = torch.where(said != task.test.labels)[0]
    chosen = {
        "predictions.png": torch.linspace(0, len(task.test) - 1, number).long().unique(),
        "mistakes.png": wrong[sureness[wrong].argsort(descending=True)][:number],
    }
    return [
        _draw(task, said, sureness, places.tolist(), out / name)
        for name, places in chosen.items()
        if len(places)
    ]


def _draw(task: Task, said: Tensor, sureness: Tensor, places: list[int], file: Path) -> Path:
    columns = min(4, len(places))
    rows = -(-len(places) // columns)
    make = require("matplotlib.figure", "demo").Figure
    figure = make((2.2 * columns, 2.6 * rows), layout="constrained")
    for number, place in enumerate(places):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(visible(task.test.images[place]).numpy(), interpolation="nearest")
        axes.set_axis_off()
        label, guess = int(task.test.labels[place]), int(said[place])
        title = f"{task.names[guess]} {sureness[place]:.0%}"
        title += "" if guess == label else f"\nis {task.names[label]}"
        axes.set_title(title, color="darkgreen" if guess == label else "firebrick", fontsize=10)
    figure.savefig(file, dpi=100)
    return file
