"""Assumptions of a prediction that no data sheet settles: each with a best and a worst value and its source.

The best values together give the low end of a predicted time, the worst ones the high end. None was measured by the
authors. (A whole step of one request took 0.99 ms on a tuned H200.) `dia-fast plan --measure` shows what is wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumption:
    """best, worst: in `unit`, the first for the low end of a time."""

    key: str
    best: float
    worst: float
    unit: str
    meaning: str
    source: str

    def value(self, worst: bool) -> float:
        return self.worst if worst else self.best


ASSUMED = "assumed"

MEMORY_SHARE = Assumption(
    "memory_share", 0.93, 0.82, "of published", "memory bandwidth that a long read reaches",
    "assumed; refresh and bank conflicts keep every memory below its data sheet",
)  # fmt: skip
CACHE_SHARE = Assumption(
    "cache_share", 1.0, 0.6, "of the device's", "bandwidth from the L2 cache to the SMs", ASSUMED
)  # fmt: skip
OTHER_FROM_MEMORY = Assumption(
    "other_from_memory", 0.0, 1.0, "share", "activations and partial sums that come from memory and not from L2",
    "assumed; the launch before has just written them, and they are smaller than the cache",
)  # fmt: skip
LATENCY = Assumption(
    "latency", 1.0, 1.5, "of the device's", "time until a load from memory arrives, the worst under load", ASSUMED
)  # fmt: skip
CACHED_LATENCY = Assumption(
    "cached_latency", 0.4, 0.6, "of the latency", "time until a load that hits L2 arrives", ASSUMED
)  # fmt: skip
IN_FLIGHT = Assumption(
    "in_flight", 1.0, 0.6, "of the most", "bytes of weights on their way, on average",
    "assumed; the most is read off the machine code",
)  # fmt: skip
ISSUE = Assumption(
    "issue", 0.9, 0.6, "of the slots", "issue slots that find an instruction ready", ASSUMED
)  # fmt: skip
COMPUTE = Assumption(
    "compute", 0.9, 0.5, "of published", "peak arithmetic that these matrix instructions reach",
    "assumed; Hopper's peak needs instructions that these kernels do not use",
)  # fmt: skip
CLOCK = Assumption(
    "clock", 1.0, 0.85, "of published", "clock under this load", ASSUMED
)  # fmt: skip
GRAPH_GAP = Assumption(
    "graph_gap", 0.8e-6, 1.8e-6, "s", "from one kernel's end to the next one's start, CUDA graph", ASSUMED
)  # fmt: skip
PDL_GAP = Assumption(
    "pdl_gap", 0.3e-6, 1.0e-6, "s", "the same with programmatic dependent launch (sm_90 and later)", ASSUMED
)  # fmt: skip
AMD_GAP = Assumption("amd_gap", 2.0e-6, 6.0e-6, "s", "the same on AMD, HIP graph", ASSUMED)
HOST_LAUNCH = Assumption(
    "host_launch", 15e-6, 60e-6, "s", "time of the host per launch through Triton, where there is no graph", ASSUMED
)  # fmt: skip
HOST_STEP = Assumption(
    "host_step", 0.1e-3, 0.4e-3, "s", "time of the host per step with a graph, beside the GPU's", ASSUMED
)  # fmt: skip
EPILOGUE = Assumption(
    "epilogue", 300, 1000, "clocks", "adding up the warps of a program and storing the result", ASSUMED
)  # fmt: skip
SAMPLING = Assumption(
    "sampling", 13_000, 32_000, "clocks", "the sampler's two bisections of 16 rounds, each with two reductions",
    "assumed: 200 to 500 clocks for a reduction over 4 warps",
)  # fmt: skip

ASSUMPTIONS = (
    MEMORY_SHARE, OTHER_FROM_MEMORY, LATENCY, CACHED_LATENCY, IN_FLIGHT, ISSUE, CACHE_SHARE, COMPUTE, CLOCK, GRAPH_GAP,
    PDL_GAP, AMD_GAP, HOST_LAUNCH, HOST_STEP, EPILOGUE, SAMPLING,
)  # fmt: skip

STATEMENTS = (
    "best case: programs refill an SM one by one; worst case: they come in whole waves, and a last one runs alone",
    "best case: programs on one SM share what they read again through L1; worst case: each fetches it from L2",
    "nothing that a step streams is still in the cache from the step before",
    "every request has the same context; the GPU does nothing else and does not throttle",
    "figures of registers, bytes in flight and instructions are the compiler's, not those of a run",
)
"""Other assumptions of the arithmetic, a sentence each."""
