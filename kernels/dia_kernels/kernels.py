"""The op set in Triton. An op that has no kernel is absent: nothing here ever falls back to torch."""

name = "triton"

__all__: list[str] = []
