"""What can go wrong while a network is trained."""


class TrainingError(RuntimeError):
    """Training cannot start, or cannot go on; the message says why and what to do."""


class NotFiniteError(TrainingError):
    """The loss or a gradient is not finite: the network has diverged, as a rule."""
