"""dia-fast behind the interface of the original package, `nari-labs/dia`.

from dia_fast.integrations import original

original.install()            # or: from dia_fast.integrations.original import Dia
from dia.model import Dia     # a program written for the original package, unchanged
"""

from dia_fast.integrations.original.config import ComputeDtype, OriginalConfig
from dia_fast.integrations.original.model import DEFAULT_SAMPLE_RATE, SAMPLE_RATE_RATIO, Dia
from dia_fast.integrations.original.names import install, uninstall

__all__ = [
    "DEFAULT_SAMPLE_RATE",
    "SAMPLE_RATE_RATIO",
    "ComputeDtype",
    "Dia",
    "OriginalConfig",
    "install",
    "uninstall",
]
