"""Compiled decode kernels with all their programs at once: sound ones pass, planted faults are seen.

Compiling needs a process without the interpreter.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: there is nothing to compile with", allow_module_level=True)

ROOT = Path(__file__).parents[2]

PLANTED = """
import json, re
from bench import ordering
from bench.ordering import cases, problems

def without_wait(text):
    return text.replace("griddepcontrol.wait;", "")

def wait_first(text):
    return text.replace("griddepcontrol.launch_dependents;", "griddepcontrol.wait;", 1)

def relaxed(text):
    return text.replace("acq_rel", "relaxed")

def without_barrier_before_the_counter(text):
    head, _, tail = text.partition("atom.global")
    stores, _, between = head.rpartition("st.global")
    return stores + "st.global" + re.sub(r"bar.sync[^;]*;", "", between) + "atom.global" + tail

def without_barriers(text):
    return re.sub(r"bar.sync[^;]*;", "", text)

named = {case.name: case for case in cases()}
rope, empty = named["rope_attention, kv_ready"], named["rope_attention, kv_ready, all rows empty"]
linear = named["linear_residual, 2 rows"]
print(json.dumps({
    "wait first": problems(rope, "sm_90", edit=wait_first),
    "no wait": problems(rope, "sm_90", edit=without_wait),
    "empty, no wait": problems(empty, "sm_90", edit=without_wait),
    "relaxed": problems(rope, "sm_90", edit=relaxed),
    "no barrier": problems(rope, "sm_90", edit=without_barrier_before_the_counter),
    "linear, no wait": problems(linear, "sm_90", edit=without_wait),
    "linear, no barriers": problems(linear, "sm_90", edit=without_barriers),
}))
"""


def in_a_process(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DIA_KERNELS_TABLE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_kernel_of_a_step_is_right_in_any_order_and_has_no_race() -> None:
    found = in_a_process("-m", "bench.ordering")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("right, no race") == 18


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
def test_other_targets_and_orders(target: str) -> None:
    found = in_a_process("-m", "bench.ordering", "--targets", target, "--seeds", "3")
    assert found.returncode == 0, found.stderr


def test_planted_faults_are_seen() -> None:
    done = in_a_process("-c", PLANTED)
    assert done.returncode == 0, done.stderr
    found = {name: " ".join(problems) for name, problems in json.loads(done.stdout).items()}
    assert found["wait first"] == "", "waiting earlier is slow, not wrong"
    assert "reads qkv before it waits for the launches in front" in found["no wait"]
    assert "no program waits" in found["no wait"]
    assert "no program waits" in found["empty, no wait"]
    assert "partials unordered with another warp" in found["relaxed"]
    assert "partials unordered with another warp" in found["no barrier"]
    assert "reads x before it waits for the launches in front" in found["linear, no wait"]
    assert "shared memory unordered with another warp" in found["linear, no barriers"]


def test_programs_that_wait_for_one_another_and_copies_through_shared_memory() -> None:
    """Kernels of the test's own: nothing that is shipped spins, or copies asynchronously, yet."""
    done = in_a_process("-m", "tests.bench.resident_kernels")
    assert done.returncode == 0, done.stderr
    found = {name: " ".join(problems) for name, problems in json.loads(done.stdout).items()}
    assert found["two phases"] == found["pipelined"] == ""
    for fault in ("nothing released", "nothing acquired"):
        assert found[fault] == "reads y unordered with another warp", "right by luck, and a race all the same"
    assert "reads y unordered with another warp" in found["everybody let through"]
    assert "warps wait for ever" in found["nobody arrives"]
    assert "reads shared memory unordered with another warp" in found["copies not awaited"]
    assert "shared memory unordered with another warp" in found["no barriers"]


STAGED = """
import json, sys
from pathlib import Path
import torch
from bench.ordering import other_bits, projections

torch.manual_seed(0)
named = {case.name.partition(",")[0]: case for case in projections(12, 528, 96)}
table, found = Path(sys.argv[1]), {}
for op, label, use in (
    ("rms_norm_glu", "staged", {"STAGES": 3, "BLOCK_N": 32}),
    ("linear_residual", "staged", {"STAGES": 4, "BLOCK_N": 32}),
    ("codebook_logits", "another order", {"STAGES": 3, "CHUNKS": 1}),  # results in float32 show it
):
    path = table / f"{op}.json"
    path.write_text(json.dumps({op: [{"use": use}]}))
    found[f"{op} {label}"] = other_bits(named[op], "sm_90", path)
print(json.dumps(found))
"""


def test_projections_through_shared_memory_have_the_bits_of_those_in_registers(tmp_path: Path) -> None:
    done = in_a_process("-c", STAGED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, problems in json.loads(done.stdout).items():
        if name.endswith("staged"):
            assert problems == [], name
        else:
            assert len(problems) == 1 and "has other bits" in problems[0], (name, problems)
