"""Fine-tune a network of torchvision on a folder of images, in a plain training loop of PyTorch.

    python own_loop.py data/train --valid data/val --arch resnet18 --rank 4 --epochs 5

The folder has a folder of images for each class.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import gift
from gift.strategies import HeadReplacementStrategy, LoRAAllFineTuningStrategy


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="folder with a folder of images for each class")
    parser.add_argument("--valid", help="the same, to evaluate on")
    parser.add_argument("--arch", default="resnet18", help="a classifier of torchvision")
    parser.add_argument("--weights", default="DEFAULT", help="pretrained weights, or none")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=224, help="height and width of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default="delta.safetensors", help="file of the delta")
    return parser.parse_args()


def images(folder: str, size: int, augment: bool) -> datasets.ImageFolder:
    """Images of a folder, normalised as pretrained weights expect."""
    steps: list[nn.Module | transforms.ToTensor] = [transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    if augment:
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize((size, size))]
    return datasets.ImageFolder(folder, transforms.Compose([*crop, *steps]))


def train(net: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> float:
    """Train for one epoch, and return the mean loss. Nothing in here knows of gift."""
    device = next(net.parameters()).device
    net.train()
    total = 0.0
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(net(inputs.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    return total / len(loader.dataset)


@torch.no_grad()
def accuracy(net: nn.Module, loader: DataLoader) -> float:
    """Return the share of correct predictions."""
    device = next(net.parameters()).device
    net.eval()
    correct = sum(
        (net(inputs.to(device)).argmax(1).cpu() == labels).sum().item() for inputs, labels in loader
    )
    return correct / len(loader.dataset)


def main() -> None:
    """Run the example."""
    args = parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = images(args.train, args.size, augment=True)
    loader = DataLoader(data, args.batch_size, shuffle=True)
    valid = DataLoader(images(args.valid or args.train, args.size, augment=False), args.batch_size)

    weights = None if args.weights.lower() == "none" else args.weights
    net = models.get_model(args.arch, weights=weights).to(device)
    strategy = gift.merge_strategies(
        [HeadReplacementStrategy(len(data.classes)), LoRAAllFineTuningStrategy(rank=args.rank)]
    )
    report = gift.enable_fine_tuning(net, strategy)  # the only line that is new
    print(report.summary())

    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in range(args.epochs):
        loss = train(net, loader, optimizer)
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy(net, valid):.1%}")

    gift.save(net, args.save)
    print(gift.inspect(args.save).summary())


if __name__ == "__main__":
    main()
