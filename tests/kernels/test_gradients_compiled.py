"""The kernels of training compile for every target, without spills."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: there is nothing to compile with", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
DTYPES = ("bfloat16", "float16", "float32")


@pytest.mark.parametrize(
    ("targets", "dtypes"),
    # One target of each maker in every run, the rest in the slow one.
    [(("sm_90", "gfx942"), DTYPES[:1])] + [pytest.param((t,), DTYPES, marks=pytest.mark.slow) for t in TARGETS],
    ids=("quick", *TARGETS),
)
def test_every_kernel_of_training(targets: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_gradients", ",".join(targets), ",".join(dtypes)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    each = {"rms_norm": 1, "rms_norm_backward": 2, "glu": 1, "glu_backward": 1, "rotate": 2, "cross_entropy": 2}
    assert Counter((line["target"], line["dtype"], line["kernel"]) for line in lines) == {
        (target, dtype, kernel): count for target in targets for dtype in dtypes for kernel, count in each.items()
    }
    wrong = [problem for line in lines for problem in line["violations"]]
    assert not wrong, "\n".join(wrong)
