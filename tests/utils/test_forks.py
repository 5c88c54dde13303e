"""Copies of what belongs to one process, and forks after use: an error or a result, never a wait."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_fast.api import Dia
from dia_fast.engine import Request
from dia_fast.errors import InputError
from dia_fast.integrations.original import Dia as OriginalDia
from dia_fast.utils import forks
from tests.helpers.front import TEXT, make_dia

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def dia(tmp_path_factory: pytest.TempPathFactory) -> Dia:
    return make_dia(tmp_path_factory.mktemp("forks"))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", ["Dia", "DiaModel", "Codec", "Engine", "Handle", "Stream", "AsyncStream", "original"])
def test_what_belongs_to_a_process_is_not_copied(dia: Dia, copied: Any, kind: str) -> None:
    things: dict[str, Any] = {
        "Dia": lambda: dia,
        "DiaModel": lambda: dia.model,
        "Codec": lambda: dia.codec,
        "Engine": lambda: dia.engine,
        "Handle": lambda: dia.engine.submit(Request([1], max_new_tokens=20)),
        "Stream": lambda: dia.stream(TEXT),
        "AsyncStream": lambda: dia.astream(TEXT),
        "original": lambda: OriginalDia(dia.config, device="cpu", dac_model=dia.codec),
    }
    thing = things[kind]()
    with pytest.raises(InputError, match=r"neither copied nor pickled.*from_pretrained"):
        copied(thing)
    dia.close()


# Runs in a process of its own: the parent computes with several threads, which those that run tests do not.
PROGRAM = """
import os, sys, threading, time, traceback
from pathlib import Path
import torch
from dia_fast.utils.ambient import isolated
from dia_fast.engine import Request
from dia_fast.errors import InputError
from tests.helpers.front import TEXT, make_dia

def in_child(work):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)

def speak():
    return dia.generate(TEXT, seed=3, max_new_tokens=60).samples

folder = Path(sys.argv[1])
"""


def run(body: str, folder: Path, threads: int = 2) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM + textwrap.dedent(body), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,  # a hang; a busy machine takes a minute
    )
    assert done.returncode == 0, done.stderr


def test_a_child_computes_with_one_thread_and_refuses_more(tmp_path: Path) -> None:
    run(
        """
        torch.set_num_threads(2)
        dia = make_dia(folder)
        before = speak()
        torch.ones(400, 400, dtype=torch.float32) @ torch.ones(400, 400, dtype=torch.float32)  # starts the threads

        def several():
            for use in (speak, lambda: dia.codec.decode(torch.zeros(4, 9, dtype=torch.int64)),
                        lambda: next(dia.stream(TEXT)), lambda: dia.generate_codes(TEXT)):
                try:
                    use()
                except InputError as error:
                    assert "spawn" in str(error) and "torch.set_num_threads(1)" in str(error)
                else:
                    raise AssertionError("computed with several threads")

        def one():
            torch.set_num_threads(1)
            assert (speak() == before).all()
            assert in_child(lambda: speak()) == 0

        assert in_child(several) == 0
        assert in_child(one) == 0
        assert (speak() == before).all()
        """,
        tmp_path,
    )


def test_a_fork_before_use_leaves_every_thread(tmp_path: Path) -> None:
    run(
        """
        def child():
            global dia
            torch.set_num_threads(2)
            dia = make_dia(folder)
            assert len(speak())

        torch.set_num_threads(2)
        assert in_child(child) == 0
        """,
        tmp_path,
    )


def test_locks_that_other_threads_hold_at_a_fork_are_not_waited_for(tmp_path: Path) -> None:
    run(
        """
        dia = make_dia(folder)
        before = speak()
        engine, held, over = dia.engine, threading.Event(), threading.Event()
        handle = engine.submit(Request([1], max_new_tokens=180, seed=3), stream=True)  # 68 rows
        stream = dia.stream(TEXT, seed=8)
        next(stream)
        assert not handle.done

        def hold():
            torch.set_float32_matmul_precision("high")
            with isolated(), dia._making, engine.lock, engine._turn, engine._door:
                held.set()
                over.wait()

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        held.wait()

        def child():
            assert torch.get_float32_matmul_precision() == "high"
            handle.cancel()
            stream.close()
            for use in (handle.result, lambda: engine.submit(handle.request), engine.step):
                try:
                    use()
                except InputError as error:
                    assert "forked" in str(error)
                else:
                    raise AssertionError("the parent's engine was used")
            assert (speak() == before).all() and dia.engine is not engine
            assert torch.get_float32_matmul_precision() == "high"
            dia.close()

        assert in_child(child) == 0
        over.set()
        holder.join()
        assert len(handle.result().delayed_codes) and dia.engine is engine
        """,
        tmp_path,
        threads=1,
    )


def test_a_fork_inside_a_block_leaves_it_open(tmp_path: Path) -> None:
    run(
        """
        torch.set_float32_matmul_precision("high")

        def child():
            assert torch.get_float32_matmul_precision() == "highest"

        with isolated():
            assert in_child(child) == 0
            if not (child := os.fork()):
                pass
        assert torch.get_float32_matmul_precision() == "high"
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
        tmp_path,
        threads=1,
    )


def test_a_gpu_of_the_parent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(InputError, match="spawn"):
        forks.check_device(torch.device("cuda"))
    forks.check_device(torch.device("cpu"))


def test_an_accelerated_model_in_a_child(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run(
        """
        from dia_fast.integrations.transformers import accelerate
        from tests.integrations.models import make_model
        model = accelerate(make_model())
        ids = torch.tensor([[5, 6, 7]])
        before = model.generate(input_ids=ids, max_new_tokens=20, seed=3)
        found = []
        model._dia_fast.lock.acquire()

        def generate():
            found.append(model.generate(input_ids=ids, max_new_tokens=20, seed=3))

        def child():
            thread = threading.Thread(target=generate)  # a lock that this thread holds would let it pass
            thread.start()
            thread.join(30)
            assert torch.equal(found[0], before)

        assert in_child(child) == 0
        """,
        tmp_path,
        threads=1,
    )
