"""The package's version, which setup.py and the Hub are told too."""

__version__ = "0.2.0"
