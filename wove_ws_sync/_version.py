"""The version of the distribution. Owns: that one string. Never: imports anything."""

__all__ = ["__version__"]

__version__ = "0.1.0"
