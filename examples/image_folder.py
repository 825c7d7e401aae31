"""Fine-tune a network on a folder of images by `finetune`, and predict.

    python image_folder.py data/train data/val --network timm:resnet18.a1_in1k --predict garden.jpg

The same call resumes a run that was stopped. As a command: gift finetune (see the guide on jobs).
"""

import argparse

from gift.data import class_folders
from gift.strategies import HeadReplacementStrategy, LoRAAllFineTuningStrategy, merge_strategies
from gift.training import finetune, predict
from gift.zoo import load_network


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="folder with a folder of images for each class")
    parser.add_argument("valid", help="the same, to evaluate on")
    parser.add_argument("--network", default="torchvision:resnet18", help="name for load_network")
    parser.add_argument("--weights", default="default", help="pretrained weights, a file, or none")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--size", type=int, help="height and width of images")
    parser.add_argument("--folder", default="run", help="deltas, checkpoint, logs, report")
    parser.add_argument("--predict", nargs="*", default=[], help="images to predict afterwards")
    return parser.parse_args()


def main() -> None:
    """Run the example."""
    args = parse_args()
    weights = None if args.weights == "none" else args.weights
    reader = {"size": args.size} if args.size else None
    loaded = load_network(args.network, weights, reader=reader)
    train = class_folders(args.train, loaded.reader, augment=True)
    valid = class_folders(args.valid, loaded.reader, classes=train.classes)
    strategy = merge_strategies(
        [HeadReplacementStrategy(len(train.classes)), LoRAAllFineTuningStrategy(rank=args.rank)]
    )
    result = finetune(
        loaded.net,
        train,
        valid,
        strategy=strategy,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        folder=args.folder,
    )
    print(result)
    for prediction in predict(loaded.net, args.predict, top=2) if args.predict else []:
        print(prediction)


if __name__ == "__main__":
    main()
