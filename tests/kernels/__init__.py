"""Kernel tests. They do not know where they run: repaired interpreter, emulator or GPU (see executor.py)."""
