"""Private parts of Python; see `gift.private`."""

import sys
from types import FrameType


def frames_of_threads() -> dict[int, FrameType]:
    """The current frame of each thread, by thread id; empty if Python does not provide them.

    No public function gives the stacks of other threads.
    """
    frames = getattr(sys, "_current_frames", None)
    return {} if frames is None else frames()
