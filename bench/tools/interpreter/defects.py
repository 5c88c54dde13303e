"""Defects that the repaired interpreter reports. Messages name kernel, line, program and argument."""


class KernelDefect(Exception):
    """A kernel did something that a GPU does not catch."""


class OutOfBounds(KernelDefect):
    """An active lane points outside the tensor that its pointer came from."""


class Overflow(KernelDefect):
    """An integer result does not fit its type."""


class FailedAssert(KernelDefect):
    """A `tl.device_assert` or `tl.assume` does not hold."""


class Disagreement(KernelDefect):
    """Lanes of one store write different values to one address."""


class Unsupported(KernelDefect):
    """A GPU would refuse this, or this project does."""
