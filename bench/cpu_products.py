"""Which product should a processor multiply weights with? The measurement behind `dia_fast.model.cpu_weights.TABLE`.

    python -m bench.cpu_products [--threads 1] [--features 8192] [--hidden 2048] [--rounds 3]
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m bench.cpu_products

Several matrices are multiplied in turn, more than caches hold. Printed is the least processor time of a product in
microseconds, for the rows of decode steps and of a prompt. One thread measures best on a machine that others use.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tools.results import Results, add_options
from dia_fast.errors import DiaFastError
from dia_fast.model.cpu_weights import choose, instruction_set
from dia_kernels.reference import packed
from dia_kernels.reference.quantized import quantize

ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
MATRICES = 5
Product = Callable[[Tensor], Tensor]


def candidates(features: int, hidden: int) -> Iterator[tuple[str, list[Product]]]:
    """Each product by name, for every matrix: torch's own, then those of `packed.PRODUCTS` that run here."""
    torch.manual_seed(0)
    weights = [(torch.randn(features, hidden) * hidden**-0.5).bfloat16() for _ in range(MATRICES)]
    yield "torch bf16", [lambda x, w=w: F.linear(x, w) for w in weights]  # type: ignore[misc]
    for name, (_, dtypes) in packed.PRODUCTS.items():
        if packed.runs_here(name):
            taken = [quantize(weight) if torch.int8 in dtypes else weight.to(dtypes[0]) for weight in weights]
            yield name, [packed.pack(weight, name).linear for weight in taken]  # type: ignore[union-attr]


def microseconds(products: Sequence[Product], x: Tensor, rounds: int) -> float:
    """The least processor time of one product, after a round that does not count."""
    found = []
    for _ in range(rounds + 1):
        for product in products:
            start = time.process_time()
            product(x)
            found.append(time.process_time() - start)
    return min(found[len(products) :]) * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="cpu_products", description=(__doc__ or "").splitlines()[0])
    for name, value in {"threads": 1, "features": 8192, "hidden": 2048, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    add_options(parser)
    options: Any = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"cpu_products: {error}", file=sys.stderr)
        return 2
    print(f"{options.features} x {options.hidden}, {options.threads} threads, {instruction_set()}")
    print(f"{'us of all threads':16}" + "".join(f"{rows:9}" for rows in ROWS))
    for name, products in candidates(options.features, options.hidden):
        cells = []
        for rows in ROWS:
            some = products[: 1 if rows > 64 else None]
            cells.append(microseconds(some, torch.randn(rows, options.hidden).bfloat16(), options.rounds))
            results.add({"product": name, "rows": rows}, {"cpu_us": cells[-1]})
        print(f"{name:16}" + "".join(f"{cell:9.0f}" for cell in cells), flush=True)
    print(f"bfloat16 is multiplied by {choose(torch.bfloat16).product}: {choose(torch.bfloat16).why}")
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
