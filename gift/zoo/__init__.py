"""Networks by name, one file for each library. Custom networks do not need this package."""

from gift.errors import NetworkError
from gift.zoo.loaded import LoadedNetwork
from gift.zoo.networks import load_network

__all__ = ["LoadedNetwork", "NetworkError", "load_network"]
