"""Objects that belong to one process: no copies of them, and what is left of them after a fork.

A child that was forked has one thread, and memory in which the others seem to be there: a lock that one of them held
is never released, and a computation that counts on torch's pool of threads waits for ever. So locks are made anew in
the child, and whatever would compute with several threads is refused.
"""

import os
from typing import Any, NoReturn
from weakref import WeakSet

import torch

from dia_fast.errors import InputError

_holders: "WeakSet[Any]" = WeakSet()
_threaded = False  # whether a computation of this process may have started torch's pool of threads
_inherited = False  # whether one of the process that this one was forked from may have


class OneProcess:
    """Base of what can be neither copied nor pickled: it holds memory, locks or requests of its process."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(
            f"a {type(self).__name__} can be neither copied nor pickled: threads of one process share a Dia; in "
            "another process make one with from_pretrained, and send texts and results"
        )


def renew_in_child(holder: Any) -> None:
    """Have `holder._renew()` called in every child that is forked while the holder lives: to make its locks anew."""
    _holders.add(holder)


def check_threads() -> None:
    """Look whether this process can compute. Every entry point calls it.

    Raises:
        InputError: In a child that was forked after several threads had computed, and would use several itself.
    """
    global _threaded
    threads = torch.get_num_threads()
    if threads == 1:
        return
    if _inherited:
        raise InputError(
            f"this process was forked from one in which torch had computed: with {threads} threads it would wait for "
            'ever. Start it by multiprocessing.get_context("spawn"), or call torch.set_num_threads(1) in it'
        )
    _threaded = True


def check_device(device: torch.device) -> None:
    """Raise InputError in a child that was forked after its parent had used the GPU, if that is to be used again."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise InputError(
            "this process was forked from one that had used the GPU, which CUDA does not allow: start it by "
            'multiprocessing.get_context("spawn")'
        )


def _in_child() -> None:
    global _threaded, _inherited
    _inherited, _threaded = _inherited or _threaded, False
    for holder in list(_holders):
        holder._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
