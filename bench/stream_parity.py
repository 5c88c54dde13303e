"""Measure the distance between the joined chunks of a stream and the same speech decoded at once.

    python -m bench.stream_parity [--codec FOLDER] [--frames 200] [--chunks 43 9 1]

In float32, on random codes, with the weights of `--codec` or random ones of the official size. Prints the largest
difference of a sample for each length of chunk in frames; full scale is 1, a step of 16-bit sound is 3.1e-5.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.tools.results import Results, add_options
from dia_fast.audio.codec import Codec, CodecConfig, load_codec, random_codec
from dia_fast.errors import DiaFastError


def joined(codec: Codec, codes: Tensor, size: int) -> Tensor:
    """Return the samples of spans of `size` frames, one after another."""
    spans = [(start, min(start + size, len(codes))) for start in range(0, len(codes), size)]
    return torch.cat([codec.decode_span(codes, *span) for span in spans])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="stream_parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--codec", help="folder, file or Hub id (default: random weights of the official size)")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--chunks", type=int, nargs="+", default=[43, 9, 1], help="lengths in frames of 1/86 s")
    add_options(parser)
    options = parser.parse_args(arguments)
    if min(options.frames, *options.chunks) < 1:
        parser.error("--frames and --chunks count frames: at least 1")
    try:
        codec = load_codec(options.codec) if options.codec else random_codec(CodecConfig())
        results = Results(parser, options, arguments)
    except DiaFastError as error:
        print(f"stream_parity: {error}", file=sys.stderr)
        return 2
    codes = torch.randint(0, codec.codebook_size, (options.frames, codec.num_codebooks))
    with torch.inference_mode():
        whole = codec.decode(codes)
        for size in options.chunks:
            difference, loudest = float((joined(codec, codes, size) - whole).abs().max()), float(whole.abs().max())
            print(f"chunks of {size} frames: {difference:.2g} (loudest sample {loudest:.2g})", flush=True)
            results.add({"chunk_frames": size}, {"largest_difference": difference, "loudest_sample": loudest})
    return results.end(0)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
