"""Assumptions of a prediction that no data sheet settles: each with a best and a worst value and its source.

The best values together give the low end of a predicted time, the worst ones the high end. Those for sm_90 were
measured on an H200, or chosen so that the times measured there come out; the others were not measured by the authors.
`dia-fast plan --measure` shows what is wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumption:
    """best, worst: in `unit`, the first for the low end of a time. hopper: the two for sm_90, and their source."""

    key: str
    best: float
    worst: float
    unit: str
    meaning: str
    source: str
    hopper: tuple[float, float, str] | None = None

    def span(self, target: str) -> tuple[float, float, str]:
        """Return best, worst and source for a target."""
        return self.hopper if self.hopper and target == "sm_90" else (self.best, self.worst, self.source)

    def value(self, worst: bool, target: str = "") -> float:
        """Return one of the two for a target."""
        best, worse, _ = self.span(target)
        return worse if worst else best


ASSUMED = "assumed"
H200 = "measured on an H200"
FITTED = "fitted to what was measured on an H200"

MEMORY_SHARE = Assumption(
    "memory_share", 0.93, 0.82, "of published", "memory bandwidth that a long read reaches",
    "assumed; refresh and bank conflicts keep every memory below its data sheet",
    (0.904, 0.86, H200 + ": 4.34 and 4.13 TB/s"),
)  # fmt: skip
CACHE_SHARE = Assumption(
    "cache_share", 1.0, 0.6, "of the device's", "bandwidth from the L2 cache to the SMs", ASSUMED,
    (0.85, 0.7, FITTED + ": steps of 16 and 64 rows"),
)  # fmt: skip
OTHER_FROM_MEMORY = Assumption(
    "other_from_memory", 0.0, 1.0, "share", "activations and partial sums that come from memory and not from L2",
    "assumed; the launch before has just written them, and they are smaller than the cache",
)  # fmt: skip
LATENCY = Assumption(
    "latency", 1.0, 1.5, "of the device's", "time until a load from memory arrives, the worst under load", ASSUMED,
    (1.0, 1.25, FITTED + ": gate and up run at the memory's rate"),
)  # fmt: skip
CACHED_LATENCY = Assumption(
    "cached_latency", 0.4, 0.6, "of the latency", "time until a load that hits L2 arrives", ASSUMED
)  # fmt: skip
IN_FLIGHT = Assumption(
    "in_flight", 1.0, 0.6, "of the most", "bytes of weights on their way, on average",
    "assumed; the most is read off the machine code",
    (1.0, 0.75, FITTED + ": gate and up run at the memory's rate"),
)  # fmt: skip
ISSUE = Assumption(
    "issue", 0.9, 0.6, "of the slots", "issue slots that find an instruction ready", ASSUMED,
    (0.55, 0.45, FITTED + ": steps of 16 and 64 rows"),
)  # fmt: skip
COMPUTE = Assumption(
    "compute", 0.9, 0.5, "of published", "peak arithmetic that these matrix instructions reach",
    "assumed; Hopper's peak needs instructions that these kernels do not use",
)  # fmt: skip
CLOCK = Assumption(
    "clock", 1.0, 0.85, "of published", "clock under this load", ASSUMED
)  # fmt: skip
GRAPH_GAP = Assumption(
    "graph_gap", 0.8e-6, 1.8e-6, "s", "from one kernel's end to the next one's start, CUDA graph", ASSUMED,
    (1.6e-6, 1.7e-6, H200 + ": an empty launch"),
)  # fmt: skip
PDL_GAP = Assumption(
    "pdl_gap", 0.3e-6, 1.0e-6, "s", "the same with programmatic dependent launch (sm_90 and later)", ASSUMED,
    (1.3e-6, 1.5e-6, H200 + ": an empty launch"),
)  # fmt: skip
GRAPH_START = Assumption(
    "graph_start", 5e-6, 45e-6, "s", "from the end of one step's graph to the start of the next one's first kernel",
    "assumed; on an H200, 45 us of a step of 992 are in none of its launches",
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
    (22_000, 30_000, FITTED + ": 20 us for the launch"),
)  # fmt: skip

ASSUMPTIONS = (
    MEMORY_SHARE, OTHER_FROM_MEMORY, LATENCY, CACHED_LATENCY, IN_FLIGHT, ISSUE, CACHE_SHARE, COMPUTE, CLOCK, GRAPH_GAP,
    PDL_GAP, GRAPH_START, AMD_GAP, HOST_LAUNCH, HOST_STEP, EPILOGUE, SAMPLING,
)  # fmt: skip

STATEMENTS = (
    "best case: programs refill an SM one by one; worst case: they come in whole waves, and a last one runs alone",
    "programs with room beside the launch in front request weights, keys and values before it ends (sm_90 and later)",
    "best case: such room is shared out evenly; worst case: in whole programs per SM",
    "best case: programs on one SM share what they read again through L1; worst case: each fetches it from L2",
    "nothing that a step streams is still in the cache from the step before",
    "every request has the same context; the GPU does nothing else and does not throttle",
    "figures of registers, bytes in flight and instructions are the compiler's, not those of a run",
)
"""Other assumptions of the arithmetic, a sentence each."""
