"""Interrupts a run at random moments until it is done; see `test_interrupted`.

The interpreter is forked for each try, since importing torch takes longer than the run. It has one
thread, so that a fork is safe.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from gift.strategies import HeadReplacementStrategy, merge_strategies  # noqa: E402
from gift.strategies.lora import LoRAAllFineTuningStrategy  # noqa: E402
from gift.training import finetune, loop  # noqa: E402
from tests.test_training_resume import DATA, LABELS, QUIET, Noisy, net  # noqa: E402

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def train(folder: Path | None, epochs: int) -> Any:
    """Dropout, running statistics and examples that are random, also those to validate on."""
    network = net()
    strategy = merge_strategies(
        [HeadReplacementStrategy(num_classes=3), LoRAAllFineTuningStrategy(rank=2)]
    )
    loop.write_report = lambda *_: None
    finetune(
        network, Noisy(), Noisy(), strategy=strategy, epochs=epochs, batch_size=10, lr=0.05,
        folder=folder, keep="last", **QUIET,
    )  # fmt: skip
    return network.state_dict(), (DATA, LABELS)


def tried(folder: Path, epochs: int, out: Path, interrupt: bool) -> int:
    """Train in a fork, perhaps interrupt it after a random time, and return how it ended."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.write(writing, b"!")  # a signal that arrives within the fork itself is lost
            os.dup2(os.open(folder.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            torch.save(train(folder, epochs)[0], out)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(code)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    if interrupt:
        time.sleep(random.uniform(0.0, 0.5))
        os.kill(child, random.choice(SIGNALS))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, interruptions: int, seed: int) -> None:
    """Print how each try ended, in the end 0; write the weights of the whole run beside them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    epochs = 5 * interruptions
    torch.save(train(None, epochs)[0], folder / "expected.pt")
    random.seed(seed)
    ended: list[int] = []
    while 0 not in ended:
        left = len(ended) < interruptions
        ended.append(tried(folder / "run", epochs, folder / "weights.pt", left))
        assert 1 not in ended, (folder / "said.txt").read_text()
    print(*ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
