"""What can be wrong with examples."""


class DataError(ValueError):
    """Examples that cannot be read or learnt from; the message names them and says what to do."""
