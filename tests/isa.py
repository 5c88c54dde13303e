"""Run the numeric tests under the instruction sets and numbers of threads that this processor has: `make test-isa`.

torch picks its own loops by ATEN_CPU_CAPABILITY and oneDNN's by ONEDNN_MAX_CPU_ISA. Each run below takes one choice of
both and a number of threads; together they hold every value once. A run that asks for more than the processor has is
left out, and said to be.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, threads, and the flags of /proc/cpuinfo that make it differ from the next.
RUNS = (
    ("default", "AVX2", 2, ()),
    ("avx2", "AVX2", 1, ("avx2",)),
    ("avx512", "AVX512_CORE", 2, ("avx512f",)),
    ("avx512", "AVX512_CORE_AMX", 1, ("avx512f", "amx_tile")),
)

NUMERIC = (
    "tests/parity",
    "tests/audio/test_codec.py",
    "tests/audio/test_codec_files.py",
    "tests/demo_voice/test_demo_voice.py",
    "tests/model/test_packed.py",
    "tests/kernels/test_reference.py",
    "tests/kernels/test_reference_layers.py",
    "tests/bench/test_row_bits.py",
    "tests/generation/test_streaming.py",
    "tests/training/test_loss.py",
    "tests/kernels/test_codec_on_kernels.py",
    "tests/kernels/test_cross_attention.py",
    "tests/kernels/test_elementwise.py",
    "tests/kernels/test_gradients.py",
    "tests/kernels/test_linear.py",
    "tests/kernels/test_training_on_kernels.py",
    "tests/kernels/test_whole_model.py",
    "tests/integrations/test_original.py",
)


def flags() -> set[str]:
    """Features of the processor, as Linux names them; an empty set elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def main(arguments: list[str]) -> int:
    """Run pytest once for each choice that the processor has; returns 1 if any run failed."""
    found, failed = flags(), []
    for aten, onednn, threads, needed in RUNS:
        name = f"ATEN_CPU_CAPABILITY={aten} ONEDNN_MAX_CPU_ISA={onednn} OMP_NUM_THREADS={threads}"
        if missing := [flag for flag in needed if flag not in found]:
            print(f"left out: {name}: this processor has no {', '.join(missing)}", flush=True)
            continue
        print(f"running: {name}", flush=True)
        began = time.monotonic()
        chosen = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "OMP_NUM_THREADS": str(threads)}
        # With two threads a worker fills both cores by itself.
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(3 - threads), "--dist", "worksteal"]
        if subprocess.run([*command, *NUMERIC, *arguments], cwd=ROOT, env=os.environ | chosen).returncode:
            failed.append(name)
        print(f"took {time.monotonic() - began:.0f} s: {name}", flush=True)
    for name in failed:
        print(f"failed: {name}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
