"""What can go wrong while a network is trained."""


class TrainingError(RuntimeError):
    """Training cannot start, or cannot go on; the message says why and what to do."""
