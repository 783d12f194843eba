"""Reads chest CTs as they arrive, and moves the patient in trouble up the reading list."""

from importlib.metadata import version

__version__ = version("triage")
