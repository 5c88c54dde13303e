"""The matrices of a model on a CPU, replaced by what the processor multiplies fastest.

`TABLE` is the choice, from measurement (`python -m bench.cpu_products` repeats it). One product serves every number of
rows, because a row's bits must not depend on how many others there are; where rows enter is the measurement: 1 to 64 of
a decode step, hundreds of a prompt. `DiaModel.pack` applies the table, `dia-fast doctor` shows it.
"""

import os
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dia_fast.errors import InputError, shown
from dia_fast.utils.heap import give_back
from dia_kernels.reference import PackedWeight, packed
from dia_kernels.reference.quantized import Int8Weight

_MOST_WORKERS = 4  # each holds one matrix in float32
VARIABLE = "DIA_FAST_CPU_PRODUCT"
PLAIN = "plain"

TABLE: dict[str, dict[str, str]] = {
    "amx": {"bfloat16": "onednn-bf16", "float16": "fbgemm-fp16", "int8": "fbgemm-int8"},
    "avx512_bf16": {"bfloat16": "onednn-bf16", "float16": "fbgemm-fp16", "int8": "fbgemm-int8"},
    "avx512": {"bfloat16": "fbgemm-fp16", "float16": "fbgemm-fp16", "int8": "fbgemm-int8"},
    "avx2": {"bfloat16": "fbgemm-fp16", "float16": "fbgemm-fp16", "int8": "fbgemm-int8"},
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
    """The product for matrices of `dtype`, on a CPU.

    Args:
        dtype: Of the matrices as they are loaded; `torch.int8` for those in 8 bits.
        product: True for those that the environment variable DIA_FAST_CPU_PRODUCT names, else those of the table; or
            names with commas between them, each for the dtypes that it takes; False for none.
        isa: Of `TABLE`; by default this processor's.

    Raises:
        InputError: For a product that is unknown or does not run here, or if none of several takes the dtype.
    """
    isa = isa or instruction_set()
    kind = str(dtype).removeprefix("torch.")
    told = os.environ.get(VARIABLE, "") if product is True else ""
    source, asked = (f"{VARIABLE} says so", told) if told else ("asked for", PLAIN if product is False else product)
    if isinstance(asked, str):
        names = [_known(name.strip(), source) for name in asked.split(",")]
        fitting = [name for name in names if name == PLAIN or dtype in packed.PRODUCTS[name][1]]
        if fitting:
            return Choice(fitting[0], source)
        if not told and dtype != torch.int8:
            others = [name for name, (_, dtypes) in packed.PRODUCTS.items() if dtype in dtypes]
            raise InputError(f"the CPU product {asked} does not take weights in {kind}; use {_either(others)}")
    chosen = TABLE[isa].get(kind, PLAIN)
    if chosen != PLAIN and not packed.runs_here(chosen):
        return Choice(PLAIN, f"this torch cannot run {chosen}, the choice for {kind} on {isa}")
    return Choice(chosen, f"the choice for {kind} on {isa}")


def _either(names: list[str]) -> str:
    return " or ".join([*names, PLAIN])


def _known(name: str, source: str) -> str:
    """The name of a product that runs here."""
    if name != PLAIN and name not in packed.PRODUCTS:
        names = ", ".join([PLAIN, *packed.PRODUCTS])
        raise InputError(f"the CPU product {shown(name)} ({source}) is unknown; use one of {names}")
    if name != PLAIN and not packed.runs_here(name):
        raise InputError(f"the CPU product {name} ({source}) does not run on this processor with this torch")
    return name


def check_product(product: bool | str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError for a `pack` that `DiaModel.pack` could not follow: before weights are loaded."""
    if not isinstance(product, bool | str):
        raise InputError(f"pack must be True, False or the name of a CPU product, not {shown(product)}")
    if device.type == "cpu":
        choose(dtype, product)
    elif isinstance(product, str):
        raise InputError(f"pack={shown(product)} names a product of CPUs, but the model goes to {device}; leave it out")


def try_product(
    shapes: Iterable[tuple[int, ...]], product: bool | str, dtype: torch.dtype, device: torch.device
) -> None:
    """Try the product of these matrices before they are loaded: what is tried needs as much memory as the largest.

    Args:
        shapes: Of the weights; those of matrices count.
        product: As in `choose`.
        dtype: Of the weights.
        device: Where the model goes.
    """
    if device.type == "cpu" and choose(dtype, product).product == "onednn-bf16":
        for features, hidden in {shape for shape in shapes if len(shape) == 2}:
            packed.onednn_row_counts(features, hidden, torch.get_num_threads())


def pack_matrices(model: nn.Module, product: bool | str, show_progress: bool) -> bool:
    """Replace every matrix that is multiplied by its layout for a product (see `choose`); has any changed?

    A matrix is let go as soon as it is replaced, and the memory given back to the system, so that it stays at one copy
    and what is in work.
    """
    from tqdm import tqdm

    places = list(_matrices(model))
    kinds = {_dtype(getattr(*place)) for place in places}
    products = {kind: choose(kind, product).product for kind in kinds}

    def replace(place: tuple[nn.Module, str]) -> bool:
        weight = getattr(*place)
        chosen = products[_dtype(weight)]
        result = weight if chosen == PLAIN else packed.pack(weight.detach() if _is_tensor(weight) else weight, chosen)
        if isinstance(result, PackedWeight) and result is not weight:
            set_matrix(*place, result)
            return True
        return False

    changed = False
    with (
        ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_WORKERS)) as pool,
        # disable=None: only where somebody may be looking, a terminal
        tqdm(total=len(places), desc="packing weights", disable=None if show_progress else True, leave=False) as bar,
    ):
        for replaced in pool.map(replace, places):
            if replaced:
                changed = True
                give_back()
            bar.update()
    return changed


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Module and name of each matrix that is multiplied and in no product's layout."""
    for module in model.modules():
        for name, value in [*module.named_parameters(recurse=False), *vars(module).items()]:
            if isinstance(value, Int8Weight) or (_is_tensor(value) and value.ndim == 2 and name != "embedding"):
                yield module, name


def set_matrix(module: nn.Module, name: str, weight: PackedWeight) -> None:
    """Put a matrix that is no tensor where a parameter was; tensors are no longer read from or put into the module."""
    if name in module._parameters:
        delattr(module, name)
        module.register_state_dict_pre_hook(_refuse_state_dict)
        module.register_load_state_dict_pre_hook(_refuse_state_dict)
    setattr(module, name, weight)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _dtype(weight: Any) -> torch.dtype:
    return weight.dtype if _is_tensor(weight) else torch.int8


def refuse_packed(what: str) -> None:
    """Raise InputError: a packed model has no tensors to do that with."""
    raise InputError(
        f"the model is packed for inference and its matrices cannot be {what}: load it again with pack=False (for "
        "weights in 8 bits: with weights='float' as well), or do not call DiaModel.pack"
    )


def _refuse_state_dict(*_: Any) -> None:
    refuse_packed("read or replaced")
