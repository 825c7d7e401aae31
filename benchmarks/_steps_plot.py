"""A plot of training steps by rank."""

from pathlib import Path
from typing import Any

PANELS = {
    "resnet18": "ResNet18, 16 images of 128 x 128",
    "bert": "BERT of 6 x 384, 8 x 128 tokens",
}
BATCHES = {"resnet18": 16, "bert": 8}
LINES = {
    "full": {"color": "black", "label": "full fine-tuning"},
    "peft": {"color": "tab:orange", "marker": "s", "label": "PEFT"},
    "gift, balanced": {
        "color": "tab:blue",
        "marker": "o",
        "linestyle": ":",
        "label": "gift, balanced layout",
    },
    "gift": {"color": "tab:blue", "marker": "o", "label": "gift"},
}


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Time of a step as a ratio to the bound, one panel for each network."""
    from matplotlib.figure import Figure

    figure = Figure((8.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (case, title) in zip(panels, PANELS.items(), strict=True):
        mine = [r for r in results if (r["part"], r["case"]) == ("step", case)]
        mine = sorted((r for r in mine if r["batch"] == BATCHES[case]), key=lambda r: r["rank"])
        ranks = [r["rank"] for r in mine]
        for name, style in LINES.items():
            if mine and name in mine[0]["ratio"]:
                axes.plot(ranks, [r["ratio"][name] for r in mine], **style)
        axes.axhline(1, color="gray", linestyle="--", linewidth=1, label="bound")
        axes.set(title=title, xlabel="rank", xscale="log")
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time of a training step / bound")
    panels[0].set_ylim(bottom=0.95)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(file, dpi=120)
