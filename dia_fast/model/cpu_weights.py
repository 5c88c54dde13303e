"""The matrices of a model on a CPU, replaced by what the processor multiplies fastest.

`TABLE` is the choice, from measurement (`python -m bench.cpu_products` repeats it). One product serves every number of
rows, because a row's bits must not depend on how many others there are; where rows enter is the measurement: 1 to 64 of
a decode step, hundreds of a prompt. `DiaModel.pack` applies the table, `dia-fast doctor` shows it.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dia_fast.errors import InputError, shown
from dia_kernels.reference import packed

_MOST_WORKERS = 4  # each holds one matrix in float32
VARIABLE = "DIA_FAST_CPU_PRODUCT"
PLAIN = "plain"

TABLE: dict[str, dict[str, str]] = {
    "amx": {"bfloat16": "onednn-bf16", "float16": "fbgemm-fp16"},
    "avx512_bf16": {"bfloat16": "onednn-bf16", "float16": "fbgemm-fp16"},
    "avx512": {"bfloat16": "fbgemm-fp16", "float16": "fbgemm-fp16"},
    "avx2": {"bfloat16": "fbgemm-fp16", "float16": "fbgemm-fp16"},
    "other": {},
}
"""The product for weights of a dtype on a processor with an instruction set; what is missing is multiplied by torch."""

_ONEDNN_LIMITS = (
    "DEFAULT",
    "ALL",
    "AVX10",
    "AVX512_CORE_AMX",
    "AVX512_CORE_FP16",
    "AVX512_CORE_BF16",
    "AVX512",
    "AVX2",
)


class Choice(NamedTuple):
    """product: of `packed.PRODUCTS`, or "plain"; why: a sentence for people."""

    product: str
    why: str


def instruction_set() -> str:
    """The best of the instruction sets in `TABLE` that this processor has and that ONEDNN_MAX_CPU_ISA allows."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "other"
    found = _features()
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT").upper()
    allowed = next((i for i, name in enumerate(_ONEDNN_LIMITS) if limit.startswith(name)), len(_ONEDNN_LIMITS))
    if "amx_tile" in found and "amx_bf16" in found and allowed <= _ONEDNN_LIMITS.index("AVX512_CORE_AMX"):
        return "amx"
    if "avx512_bf16" in found and allowed <= _ONEDNN_LIMITS.index("AVX512_CORE_BF16"):
        return "avx512_bf16"
    if "avx512f" in found and allowed <= _ONEDNN_LIMITS.index("AVX512"):
        return "avx512"
    return "avx2" if "avx2" in found else "other"


def _features() -> set[str]:
    """Features of the processor, as Linux names them."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones have none
    names = {"avx512_f": "avx512f"}
    found = {names.get(name, name) for name, value in told.items() if value is True}
    info = Path("/proc/cpuinfo")
    if not found and info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        found = set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())
    return found


def choose(dtype: torch.dtype, product: bool | str = True, isa: str | None = None) -> Choice:
    """The product for the matrices of a model whose weights have `dtype`, on a CPU.

    product: True for that of the environment variable DIA_FAST_CPU_PRODUCT, else of the table; one to take instead;
    False for none. isa: of `TABLE`; by default this processor's. Raises InputError for a product that is unknown, does
    not take this dtype, or does not run here.
    """
    isa = isa or instruction_set()
    kind = str(dtype).removeprefix("torch.")
    source, asked = "asked for", PLAIN if product is False else product
    if asked is True and os.environ.get(VARIABLE) and dtype != torch.float32:  # which no product takes
        source, asked = f"{VARIABLE} says so", os.environ[VARIABLE]
    if asked is True:
        chosen = TABLE[isa].get(kind, PLAIN)
        if chosen != PLAIN and not packed.runs_here(chosen):
            return Choice(PLAIN, f"this torch cannot run {chosen}, the choice for {kind} on {isa}")
        return Choice(chosen, f"the choice for {kind} on {isa}")
    if asked == PLAIN:
        return Choice(PLAIN, source)
    if asked not in packed.PRODUCTS:
        names = ", ".join([PLAIN, *packed.PRODUCTS])
        raise InputError(f"the CPU product {shown(asked)} ({source}) is unknown; use one of {names}")
    dtypes = packed.PRODUCTS[asked][1]
    if dtype not in dtypes:
        takes = " and ".join(str(taken).removeprefix("torch.") for taken in dtypes)
        raise InputError(f"the CPU product {asked} ({source}) takes weights in {takes}, not in {kind}")
    if not packed.runs_here(asked):
        raise InputError(f"the CPU product {asked} ({source}) does not run on this processor with this torch")
    return Choice(asked, source)


def check_product(product: bool | str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises InputError for a `pack` that `DiaModel.pack` could not follow: before weights are loaded."""
    if not isinstance(product, bool | str):
        raise InputError(f"pack must be True, False or the name of a CPU product, not {shown(product)}")
    if device.type == "cpu":
        choose(dtype, product)
    elif isinstance(product, str):
        raise InputError(f"pack={shown(product)} names a product of CPUs, but the model goes to {device}; leave it out")


def pack_matrices(model: nn.Module, product: str, show_progress: bool) -> bool:
    """Replaces every matrix that is multiplied by its layout for `product`; returns whether any has changed.

    The tensor of a matrix is let go as soon as it is replaced, so that memory stays at one copy and what is in work.
    """
    if product == PLAIN:
        return False
    from tqdm import tqdm

    places = [
        (module, name)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 2 and name != "embedding"
    ]

    def replace(place: tuple[nn.Module, str]) -> bool:
        module, name = place
        weight = module.get_parameter(name).detach()
        result = packed.pack(weight, product)
        if result is weight:
            return False
        delattr(module, name)
        setattr(module, name, result)
        return True

    changed = False
    with (
        ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_WORKERS)) as pool,
        # disable=None: only where somebody may be looking, a terminal
        tqdm(total=len(places), desc="packing weights", disable=None if show_progress else True, leave=False) as bar,
    ):
        for replaced in pool.map(replace, places):
            changed |= replaced
            bar.update()
    if changed:
        for module in {module for module, _ in places}:
            module.register_state_dict_pre_hook(_refuse_state_dict)
            module.register_load_state_dict_pre_hook(_refuse_state_dict)
    return changed


def refuse_packed(what: str) -> None:
    """Raises InputError: a packed model has no tensors to do that with."""
    raise InputError(
        f"the model is packed for inference and its matrices cannot be {what}: load it again with pack=False, or do "
        "not call DiaModel.pack (Dia.from_pretrained calls it for 16-bit weights on a CPU)"
    )


def _refuse_state_dict(*_: Any) -> None:
    refuse_packed("read or replaced")
