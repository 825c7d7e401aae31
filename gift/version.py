"""The version of gift, and what it is called where it is installed from."""

__version__ = "0.1.0"

# `gift` on PyPI is another project; the import is `gift` all the same.
DISTRIBUTION = "gift-torch"
