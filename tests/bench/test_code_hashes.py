"""`bench.tools.code_hashes`: what enters a hash, and what the comparison of two files says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.tools import code_hashes

ROOT = Path(__file__).resolve().parent.parent.parent
PTX = """
//
.version 8.7
	.file	1 "kernel.py"
	.loc	1 36 9                          // kernel.py:36:9
	{ .reg .b32 t; mov.b32 t, %r1; }	// a comment
$L__BB0_2:                              // in a loop
"""


def test_comments_and_line_information_do_not_count() -> None:
    assert code_hashes.stripped(PTX, "//").splitlines() == [
        ".version 8.7", "\t{ .reg .b32 t; mov.b32 t, %r1; }", "$L__BB0_2:",
    ]  # fmt: skip
    assert code_hashes.stripped("\ts_endpgm ; the end\n; %bb.0:\n\t.loc 1 2 3\n", ";") == "\ts_endpgm"


COMPILED = """
import json, os, sys, torch
from bench.tools import code_hashes
from dia_kernels import aot, triton as kernels
shapes = (2, 2048), (2048,), (48, 2048), (2, 48)
tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
found = {}
with code_hashes.text_only():
    for target in ("sm_90", "gfx942"):
        for table in ("", "", sys.argv[1]):
            os.environ["DIA_KERNELS_TABLE"] = table
            with aot.compiling(target) as compiled:
                kernels.rms_norm_linear(*tensors[:3], 1e-5, tensors[3])
            found.setdefault(target, []).append(code_hashes.digest(compiled[0]))
print(json.dumps(found))
"""


def test_another_configuration_has_another_hash(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rms_norm_linear": [{"use": {"DEPTH": 1}}]}))
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", COMPILED, str(table)], env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for first, again, other in json.loads(done.stdout).values():
        assert first == again != other


def test_differences_are_named_and_end_in_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"one": "a", "two": "b"}
    monkeypatch.setattr(code_hashes, "hashes", lambda *_: found.items())

    def run(*arguments: Any) -> tuple[int, str]:
        return code_hashes.main([str(argument) for argument in arguments]), capsys.readouterr().out

    before, after = tmp_path / "before.json", tmp_path / "after.json"
    assert run(before)[0] == 0
    status, said = run(after, "--against", before)
    assert status == 0 and "2 launches, 2 different codes" in said and "2 compared, 0 differ\n" in said
    found |= {"two": "c", "three": "d"}
    status, said = run(after, "--against", before)
    assert status == 1 and "differs: two\n" in said and f"not in {before}: three\n" in said
