"""The library's version; the format has its own (specs/format.md)."""

__version__ = "0.1.0"
