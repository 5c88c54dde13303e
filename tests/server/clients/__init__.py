"""Programs around other people's clients, each run by the Python of an environment of its own: they need no common one.

`make test-clients` makes the environments in `.venv-clients`. Each program takes the address of a server, a text and a
voice, and writes JSON: `rate` in Hz, and `audio`, base64 of 16-bit samples.
"""
