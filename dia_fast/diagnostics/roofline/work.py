"""Bytes and operations of each launch of a decode step, by formula.

The bytes are those that `bench/traffic.py` counts in the interpreter, to the byte; a test compares the two. `weights`
and `kv` cannot come from a cache that is smaller than they are; `other` is what else is touched once (activations,
tables, partial sums), `again` what is read of it a second time and more, from the caches.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dia_fast.model.config import DiaConfig
from dia_fast.model.decode_state import cross_pages, self_pages
from dia_fast.model.quantization import FLOAT, INT8, INT8_MLP

LAUNCHES = (
    "embed", "qkv", "self_attention", "o", "cross_q", "cross_attention", "cross_o", "gate_up", "down", "heads", "sample"
)  # fmt: skip
KERNELS = {
    "qkv": "rms_norm_linear", "cross_q": "rms_norm_linear", "gate_up": "rms_norm_glu", "heads": "codebook_logits",
    "o": "linear_residual", "cross_o": "linear_residual", "down": "linear_residual", "embed": "embed_codes",
    "self_attention": "rope_attention", "cross_attention": "cross_attention", "sample": "sample",
}  # fmt: skip
FIRST = " of the first generation"  # after the name of a launch that the first generation runs by other code
NORMED = ("qkv", "cross_q", "gate_up", "heads")
PROJECTIONS = ("qkv", "o", "cross_q", "cross_o", "gate_up", "down", "heads")
ATTENTIONS = ("self_attention", "cross_attention")
IN_8_BITS = {FLOAT: (), INT8: PROJECTIONS, INT8_MLP: ("gate_up", "down", "heads")}  # launches, by `weights`
SELF_SPLIT, CROSS_SPLIT = 64, 256  # tokens that the two attentions ask for; `split` says what they get


@dataclass(frozen=True)
class Step:
    """One decode step: what it serves, and the room that its buffers have.

    requests: in use, each at `context` tokens of sound, the one being written included, and with `text` bytes of text;
    padded: requests with padding; capacity, text_capacity: tokens that the block tables have room for. mixes: whether
    the sampler reads both branches' logits, as it does unless the guidance scale is 1. forced: whether the codes of the
    row are prescribed, as those of the first ones are. weights: of `quantization.WEIGHTS`.
    """

    requests: int
    context: int
    text: int
    itemsize: int
    guided: bool
    padded: int
    capacity: int
    text_capacity: int
    mixes: bool = True
    prompt_codes: bool = False
    weights: str = FLOAT

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1

    @property
    def rows(self) -> int:
        return self.padded * self.branches


@dataclass(frozen=True)
class Tiles:
    """The tiles of the kernels on one target, which decide what is read again.

    block: rows of the weights per program, of a launch with so many rows of x; self_split, cross_split: tokens per
    program; reads_twice: whether a normed projection reads x once for the norm and once for the product.
    """

    block: Callable[[str, int], int]
    self_split: int
    cross_split: int
    reads_twice: bool


@dataclass(frozen=True)
class Work:
    """One launch: bytes, useful floating-point operations, programs and how many of them find something to do.

    times: launches like it in a step; rows: of x; features, width: of the weights, 0 without any; split: tokens per
    program, 0 outside attention; splits: programs that share a row and kv head; weight_size: bytes of a weight.
    """

    name: str
    kernel: str
    times: int
    rows: int
    weights: int
    kv: int
    other: int
    again: int
    flops: int
    programs: int
    active: int
    features: int = 0
    width: int = 0
    split: int = 0
    splits: int = 1
    weight_size: int = 0

    @property
    def moved(self) -> int:
        return self.weights + self.kv + self.other

    @property
    def streamed(self) -> int:
        """Bytes that have to come from memory."""
        return self.weights + self.kv


def split(head_dim: int, itemsize: int, target: str, wanted: int) -> int:
    """Tokens per program of a decode attention: `triton.paged_attention`'s default config, without Triton."""
    width = _power_of_two(head_dim)
    most = 131072 if target == "sm_90" and itemsize == 2 else 65536  # bytes of keys and values
    tokens = max(min(wanted, most // (2 * width * itemsize)), min(64, 8192 // width))
    return min(tokens, 64) if target.startswith("gfx") else tokens


def launches(config: DiaConfig, step: Step, tiles: Tiles) -> list[Work]:
    """Every launch of a step, in order; those of a layer once, with `times`. 8 * layers + 3 in all."""
    decoder = config.decoder
    dim, cross_dim, hidden = decoder.head_dim, decoder.cross_head_dim, decoder.hidden_size
    qkv = (decoder.num_attention_heads + 2 * decoder.num_key_value_heads) * dim
    cross = decoder.cross_num_attention_heads * cross_dim
    layers = decoder.num_hidden_layers

    def project(name: str, features: int, width: int, times: int = layers) -> Work:
        return _projection(name, features, width, times, step, tiles)

    return [
        _embed(config, step),
        project("qkv", qkv, hidden),
        _self_attention(config, step, tiles.self_split),
        project("o", hidden, decoder.num_attention_heads * dim),
        project("cross_q", cross, hidden),
        _cross_attention(config, step, tiles.cross_split),
        project("cross_o", hidden, cross),
        project("gate_up", 2 * decoder.intermediate_size, hidden),
        project("down", hidden, decoder.intermediate_size),
        project("heads", decoder.num_channels * decoder.vocab_size, hidden, 1),
        _sample(config, step),
    ]


def _projection(name: str, features: int, width: int, times: int, step: Step, tiles: Tiles) -> Work:
    """`x @ weight.T`: every program reads all of x, the normed ones the norm's weights too.

    Weights in 8 bits are a byte each, and four for the scale of each feature.
    """
    size, rows = step.itemsize, step.padded if name.startswith("cross") else step.rows
    programs = -(-features // tiles.block(name, rows))
    x = rows * width * size
    if name in NORMED:
        norm = width * size
        reads = x * (2 if tiles.reads_twice else 1) + norm
        out = rows * features * {"heads": 4, "gate_up": size / 2}.get(name, size)
        other, again = x + norm + int(out), programs * reads - x - norm
    else:
        # The residual is read and written; rows without an input get a constant instead of a product.
        constant = features * size if step.rows > rows else 0
        other, again = x + 2 * step.rows * features * size + constant, (programs - 1) * x
    weight_size, scales = (1, 4 * features) if name in IN_8_BITS[step.weights] else (size, 0)
    return Work(
        name, KERNELS[name], times, rows, features * width * weight_size + scales, 0, other, again,
        2 * rows * features * width, programs, programs, features, width, weight_size=weight_size,
    )  # fmt: skip


def _embed(config: DiaConfig, step: Step) -> Work:
    """Codes, a few integers of each request, and a row of the table per channel. Padding counts as well."""
    decoder, padded = config.decoder, step.padded
    codes = 4 * decoder.num_channels
    prompt_codes = codes if step.prompt_codes else 0
    rows = decoder.num_channels * decoder.hidden_size * step.itemsize
    reads = codes + 5 * 4 + prompt_codes + rows
    writes = 2 * 4 + codes + step.branches * (4 + decoder.hidden_size * step.itemsize)
    return Work(
        "embed", "embed_codes", 1, step.rows, 0, 0, padded * (reads + writes) + codes, (padded - 1) * codes,
        padded * decoder.num_channels * decoder.hidden_size, padded, padded,
    )  # fmt: skip


def _self_attention(config: DiaConfig, step: Step, tokens: int) -> Work:
    decoder, size = config.decoder, step.itemsize
    heads, kv_heads, dim = decoder.num_attention_heads, decoder.num_key_value_heads, decoder.head_dim
    rows, busy = step.rows, step.requests * step.branches
    page = self_pages(config)
    pages, splits = page.pages(step.capacity), -(-step.context // tokens)
    grid = -(-pages * page.page_size // tokens)
    active, angles = busy * kv_heads * splits, 4 * dim
    other = busy * (heads + 2 * kv_heads) * dim * size + angles + rows * (4 * pages + 4 + heads * dim * size)
    again = busy * dim * size * (heads * (2 * splits - 1) + kv_heads) + (active - 1) * angles
    again += rows * 4 * ((kv_heads - 1) * pages + kv_heads * grid - 1) + active * 4
    merged, counted = _merging(busy, heads, kv_heads, dim, splits)
    return Work(
        "self_attention", "rope_attention", decoder.num_hidden_layers, rows, 0,
        busy * step.context * 2 * kv_heads * dim * size, other + merged, again + counted,
        4 * busy * heads * dim * step.context, rows * kv_heads * grid, active, split=tokens, splits=splits,
    )  # fmt: skip


def _cross_attention(config: DiaConfig, step: Step, tokens: int) -> Work:
    decoder, size = config.decoder, step.itemsize
    heads, kv_heads = decoder.cross_num_attention_heads, decoder.cross_num_key_value_heads
    dim, busy, padded = decoder.cross_head_dim, step.requests, step.padded
    page = cross_pages(config)
    pages, splits = page.pages(step.text_capacity), -(-step.text // tokens)
    grid = -(-pages * page.page_size // tokens)
    q = busy * heads * dim * size
    other = q + padded * (heads * dim * size + 4 * pages + 4)
    again = (splits - 1) * q + padded * 4 * ((kv_heads - 1) * pages + kv_heads * grid - 1)
    merged, counted = _merging(busy, heads, kv_heads, dim, splits)
    return Work(
        "cross_attention", "cross_attention", decoder.num_hidden_layers, padded, 0,
        busy * step.text * 2 * kv_heads * dim * size, other + merged, again + counted,
        4 * busy * heads * dim * step.text, padded * kv_heads * grid, busy * kv_heads * splits,
        split=tokens, splits=splits,
    )  # fmt: skip


def _merging(rows: int, heads: int, kv_heads: int, dim: int, splits: int) -> tuple[int, int]:
    """Other and again of the float32 partial sums, written and read once, and of the counters of arrived splits."""
    if splits == 1:
        return 0, 0
    counter = 4 * rows * kv_heads
    return 2 * rows * heads * splits * (4 * dim + 8) + counter * (splits + 2), counter * (splits - 1)


def _sample(config: DiaConfig, step: Step) -> Work:
    """Per request and channel a row of logits, two where they are mixed, and the request's parameters."""
    channels, params = config.decoder.num_channels, 28
    logits = 4 * channels * config.decoder.vocab_size * (2 if step.guided and step.mixes else 1)
    return Work(
        "sample", "sample", 1, step.rows, 0, 0, step.padded * (logits + params + 4 * channels),
        step.padded * (channels - 1) * params, 0, step.padded * channels, step.padded * channels,
    )  # fmt: skip


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
