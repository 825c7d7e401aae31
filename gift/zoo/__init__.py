"""Networks by name, one file a library. Networks of users need none of it."""

from gift.errors import NetworkError
from gift.zoo.loaded import LoadedNetwork
from gift.zoo.networks import load_network

__all__ = ["LoadedNetwork", "NetworkError", "load_network"]
