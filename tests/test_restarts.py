"""How often a run is started again; a shell stands for it. Real ones are in tests/engines."""

import os
from pathlib import Path

import pytest

from gift.many.engines.watched import Watched

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it needs a shell and signals")

# What a run does, number of processes, how often it is started, the reason why it failed.
CASES: dict[str, tuple[str, int, int, str | None]] = {
    "killed twice": ("[ $n -eq 3 ] || kill -9 $$", 1, 3, None),
    "always killed": ("kill -9 $$", 1, 4, "it ended with -9"),
    "own error": ("echo no data > error.txt; exit 1", 1, 1, "no data"),
    "told to stop": ("kill -15 $$", 1, 1, "it ended with -15"),
    "several, one killed": ("echo port $n > error.txt; [ $n -eq 2 ]", 2, 2, None),
    "several, always killed": ("echo port $n > error.txt; exit 1", 2, 4, "port 4"),
    "several, own error": ("echo no data > error.txt; exit 1", 2, 2, "no data"),
    "several, told to stop": ("echo SignalException: 15; exit 1", 2, 1, "SignalException: 15"),
}


@pytest.mark.parametrize(("script", "processes", "starts", "reason"), CASES.values(), ids=CASES)
def test_how_often_a_run_is_started(
    script: str,
    processes: int,
    starts: int,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = f"cd {tmp_path}; echo >> starts; n=$(wc -l < starts); {script}"
    monkeypatch.setattr(
        "gift.many.engines.base.task_command", lambda *arguments: ["sh", "-c", counted]
    )
    monkeypatch.setattr("gift.many.engines.watched._EACH", 0.01)
    watched = Watched(tmp_path, processes)
    if reason is None:
        watched.run()
    else:
        with pytest.raises(RuntimeError, match=f"^{reason}$"):
            watched.run()
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
