"""Tests of the voice that comes with the package, and of how it is made."""
