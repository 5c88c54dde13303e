"""Decode a long sound with a codec of random weights: memory beside the samples, and time.

    python -m bench.long_sound [--frames 3072] [--width 1536] [--device cpu] [--dtype float32] [--json FILE]

1536 channels are the official size. On a CPU it is the largest size of the process, which Linux tells, beside what it
had after decoding three frames; on a GPU the largest sum of torch's allocations.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from bench.measure import DTYPES, describe_machine, use
from bench.metrics import forget_peak, resident
from bench.tools.results import Results, add_options
from dia_fast.audio.codec import Codec, CodecConfig, random_codec
from dia_fast.errors import DiaFastError
from dia_fast.model.device import choose_device

MIB = 2**20


def measure(codec: Codec, frames: int) -> dict[str, float]:
    """Decode so many random frames; `beside_mib`: memory beside the samples, `realtime_factor`: of the decoding."""
    size, cuda = (frames, codec.num_codebooks), codec.device.type == "cuda"
    codes = torch.randint(0, codec.codebook_size, size, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # what is made at first use does not count
        codec.decode(codes[:3]).cpu()
    if cuda:
        torch.cuda.reset_peak_memory_stats(codec.device)
        before = torch.cuda.memory_allocated(codec.device)
    else:
        forget_peak()
        before = resident("VmRSS")
    start = time.perf_counter()
    samples = codec.decode(codes)
    if cuda:
        torch.cuda.synchronize(codec.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(codec.device) if cuda else resident("VmHWM")
    sound = len(samples) / codec.sample_rate
    return {
        "seconds_of_sound": sound,
        "beside_mib": (peak - before - samples.nbytes) / MIB,
        "samples_mib": samples.nbytes / MIB,
        "realtime_factor": sound / seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="long_sound", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=3072)
    parser.add_argument("--width", type=int, default=1536, help="channels of the decoder (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        device = use(choose_device(options.device))
        results = Results(parser, options, arguments, device)
        config = CodecConfig(encoder_hidden_size=4, decoder_hidden_size=options.width)
        codec = random_codec(config, device=device, dtype=DTYPES[options.dtype])
        row = measure(codec, options.frames)
    except DiaFastError as error:
        print(f"long_sound: {error}", file=sys.stderr)
        return 2
    results.add({"frames": options.frames, "width": options.width}, row)
    print(f"{describe_machine(device)}; torch {torch.__version__}\n{codec}, {options.width} channels")
    print(
        f"{options.frames} frames, {row['seconds_of_sound']:.1f} s: {row['beside_mib']:.0f} MiB beside "
        f"{row['samples_mib']:.1f} MiB of samples, {row['realtime_factor']:.2f} x realtime"
    )
    return results.end(0)


if __name__ == "__main__":
    sys.exit(main())
