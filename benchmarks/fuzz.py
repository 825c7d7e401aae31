"""Hundreds of thousands of hostile files, loaded onto networks: what came of them.

Files are made of good ones by truncation, flipped bits, spliced bytes and hostile headers; a share
of them has right digests and says nonsense. `tests/hostile_files.py` makes and tries them, in
batches with a process for each. Results: outcomes by kind of file, whatever went wrong (with the
file), the seconds, and the growth of a process's peak memory. A batch that crashes or hangs counts
as wrong.

    python benchmarks/fuzz.py --files 200000

They are written to ``results/fuzz.json``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

ROOT = Path(__file__).parent.parent


def batch(seed: int, count: int, consistent: float, seconds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "tests.hostile_files", folder]
        command += [str(number) for number in (seed, count, consistent, seconds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            wrong = {"kind": "crash or hang", "what": done.stderr[-4000:], "file": f"seed {seed}"}
            return {"outcomes": {"batch: died": 1}, "wrong": [wrong], "memory_mb": 0.0}
        return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=20_000)
    parser.add_argument("--consistent", type=float, default=0.2, help="share of right digests")
    parser.add_argument("--seconds", type=int, default=20, help="for one file, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/fuzz.json")
    args = parser.parse_args()
    start, outcomes, wrong, memory = time.perf_counter(), Counter[str](), [], []
    for number in range(-(-args.files // args.batch)):
        result = batch(args.seed + number, args.batch, args.consistent, args.seconds)
        outcomes.update(result["outcomes"])
        wrong += result["wrong"]
        memory.append(result["memory_mb"])
        print(f"{sum(outcomes.values()):,} files, {len(wrong)} wrong", flush=True)
    results = {
        "torch": str(torch.__version__),
        "files": sum(outcomes.values()),
        "share_of_right_digests": args.consistent,
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_growth_mb": max(memory),
    }
    print(tabulate(sorted(outcomes.items()), headers=["outcome", "files"]))
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
