"""Every op of `dia_kernels` called alone, in a function of plain torch that `torch.compile` takes whole.

    python -m examples.single_kernels [--backend inductor|aot_eager|eager] [OP ...]

Each function below is an example to copy: what the op takes, what it gives, what it stands for. It is run as it is and
under `torch.compile(fullgraph=True)`, and both are compared with plain torch. On a GPU the Triton kernels run,
elsewhere the torch reference (`library.implementation(device)` tells which), and the program is the same.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_kernels import torch_library as library

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
ROWS, HIDDEN, OUT = 3, 64, 96
HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 16, 16

Pair = tuple[Tensor, Tensor]  # what came out, what plain torch says


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def rms_norm() -> Pair:
    x, weight = rand(ROWS, HIDDEN), rand(HIDDEN)
    return library.rms_norm(x, weight, EPS), normed(x, weight)


def glu() -> Pair:
    x = rand(ROWS, 2 * HIDDEN)
    gate, up = x.chunk(2, -1)
    return library.glu(x), F.silu(gate) * up


def rms_norm_linear() -> Pair:
    """The norm of a block and the projection behind it, the weight `[out, in]` read once."""
    x, norm, weight = rand(ROWS, HIDDEN), rand(HIDDEN), rand(OUT, HIDDEN)
    return library.rms_norm_linear(x, norm, weight, EPS), F.linear(normed(x, norm), weight)


def rms_norm_glu() -> Pair:
    """The norm of an MLP, its gate and up projections as one weight, and the activation."""
    x, norm, weight = rand(ROWS, HIDDEN), rand(HIDDEN), rand(2 * OUT, HIDDEN)
    gate, up = F.linear(normed(x, norm), weight).chunk(2, -1)
    return library.rms_norm_glu(x, norm, weight, EPS), F.silu(gate) * up


def linear_residual() -> Pair:
    """A projection back to the residual stream, in place; rows without an input get a constant."""
    x, weight, residual, constant = rand(2, OUT), rand(HIDDEN, OUT), rand(ROWS, HIDDEN), rand(HIDDEN)
    expected = residual + torch.cat([F.linear(x, weight), constant[None]])
    library.linear_residual(x, weight, residual, constant)
    return residual, expected


def codebook_logits() -> Pair:
    """The last norm and the heads of several channels: float32 logits `[rows, channels, vocab]`."""
    x, norm, weight = rand(ROWS, HIDDEN), rand(HIDDEN), rand(9 * 40, HIDDEN)
    expected = F.linear(normed(x, norm), weight).view(ROWS, 9, 40)
    return library.codebook_logits(x, norm, weight, EPS, 9), expected


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE of `[tokens, heads, head_dim]`."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rope() -> Pair:
    """q and k of packed `[tokens, q | k | v]`, in place, each to its position in a table."""
    qkv, angles = rand(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM), rand(32, HEAD_DIM // 2)
    positions = integers(0, 1, 2, 0, 1)  # two sequences, one behind the other
    cos, sin = angles.cos(), angles.sin()
    split = qkv.view(5, -1, HEAD_DIM).split((HEADS + KV_HEADS, KV_HEADS), 1)
    expected = torch.cat([rotated(split[0], cos[positions], sin[positions]), split[1]], 1).view(5, -1)
    library.rope(qkv, cos, sin, positions, KV_HEADS)
    return qkv, expected


def ragged_attention() -> Pair:
    """Attention of packed sequences of several lengths, at scale 1: multiply q by another scale before."""
    q, k, v = rand(7, HEADS, HEAD_DIM), rand(7, KV_HEADS, HEAD_DIM), rand(7, KV_HEADS, HEAD_DIM)
    out = library.ragged_attention(q, k, v, integers(0, 3, 7), True)
    parts = []
    for span in (slice(0, 3), slice(3, 7)):
        one, two, three = (part[span].transpose(0, 1) for part in (q, k, v))
        parts.append(F.scaled_dot_product_attention(one, two, three, is_causal=True, scale=1.0, enable_gqa=True))
    return out, torch.cat(parts, 1).transpose(0, 1).reshape(7, -1)


def rope_attention() -> Pair:
    """One step of decoding: rotates q and k, stores k and v in their page, attends to everything before.

    Pages are `[pages, kv_heads, page_size, head_dim]`; a row of the block table lists the pages of a sequence.
    """
    qkv, angles = rand(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM), rand(64, HEAD_DIM // 2)
    keys, values = rand(4, KV_HEADS, PAGE, HEAD_DIM), rand(4, KV_HEADS, PAGE, HEAD_DIM)
    table, position = integers(2, 0)[None], 20
    cos, sin = angles.cos(), angles.sin()
    out = library.rope_attention(qkv, cos, sin, keys, values, table, integers(position))
    q, _, _ = qkv.view(1, -1, HEAD_DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
    turned = rotated(q, cos[position][None], sin[position][None])
    k, v = (torch.cat([pages[2], pages[0]], 1)[:, : position + 1] for pages in (keys, values))
    expected = F.scaled_dot_product_attention(turned.transpose(0, 1), k, v, scale=1.0, enable_gqa=True)
    return out, expected.reshape(1, -1)


def cross_attention() -> Pair:
    """One step of attention to a text whose keys and values lie in pages."""
    q, keys, values = rand(1, HEADS * HEAD_DIM), rand(2, HEADS, PAGE, HEAD_DIM), rand(2, HEADS, PAGE, HEAD_DIM)
    out = library.cross_attention(q, keys, values, integers(1, 0)[None], integers(19))
    k, v = (torch.cat([pages[1], pages[0]], 1)[:, :19] for pages in (keys, values))
    return out, F.scaled_dot_product_attention(q.view(HEADS, 1, HEAD_DIM), k, v, scale=1.0).reshape(1, -1)


def snake() -> Pair:
    """The activation of the codec, with a frequency for each channel."""
    x, alpha = rand(2, 5, 50), rand(5).exp()
    return library.snake(x, alpha), x + (alpha[:, None] * x).sin().square() / (alpha[:, None] + 1e-9)


def snake_residual() -> Pair:
    """A residual addition and the activation that follows it, in one pass: `(sum, activation)`."""
    x, residual, alpha = rand(2, 5, 50), rand(2, 5, 50), rand(5).exp()
    total, out = library.snake_residual(x, residual, alpha)
    expected = x + residual
    return torch.stack([total, out]), torch.stack([expected, library.snake(expected, alpha)])


def sample() -> Pair:
    """Codes from logits, under guidance: conditional rows first, then unconditional ones. Here greedily."""
    logits = rand(2, 9, 40)
    guidance, temperature, top_p = (torch.full((1,), value, device=DEVICE) for value in (3.0, 0.0, 1.0))
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    codes = library.sample(logits, integers(0), seed, guidance, temperature, integers(0), top_p, 30)
    guided = logits[0] + 3 * (logits[0] - logits[1])
    return codes[0, 1:], guided[1:, :30].argmax(-1).to(torch.int32)  # channel 0 may end the speech; see the reference


def embed_codes() -> Pair:
    """Form the next delayed codes, from the sampled ones and those of a prompt, and embed them."""
    channels, vocab, delay = 3, 20, integers(0, 1, 2)
    prompt_codes = torch.full((1, 3, channels), -1, dtype=torch.int32, device=DEVICE)
    prompt_codes[0, 0] = 19  # the first step is given: the code that begins a speech
    table, x = rand(channels * vocab, HIDDEN), rand(1, HIDDEN)
    step, first, end, eos_step, positions, finished = (integers(value) for value in (0, 0, 30, -1, 0, 0))
    codes = torch.zeros(1, 40, channels, dtype=torch.int32, device=DEVICE)
    library.embed_codes(
        integers(4, 5, 6)[None],
        prompt_codes,
        step,
        first,
        end,
        eos_step,
        delay,
        table,
        codes,
        positions,
        finished,
        x,
        17,
        18,
    )
    return x, table[[19, vocab + 19, 2 * vocab + 19]].sum(0, keepdim=True)


OPS: dict[str, Callable[[], Pair]] = {
    function.__name__: function
    for function in (
        rms_norm, glu, rms_norm_linear, rms_norm_glu, linear_residual, codebook_logits, rope, ragged_attention,
        rope_attention, cross_attention, snake, snake_residual, sample, embed_codes,
    )
}  # fmt: skip


def main() -> None:
    """Run the ops that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="names of ops; all by default")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (%(default)s)")
    options = parser.parse_args()
    unknown = [name for name in options.ops if name not in OPS]
    if unknown:
        parser.error(f"unknown op {unknown[0]}; there are {', '.join(OPS)}")
    print(f"on {DEVICE}: the {library.implementation(DEVICE)} ops")
    for name in options.ops or OPS:
        torch.manual_seed(0)
        out, expected = OPS[name]()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        torch.manual_seed(0)
        compiled, expected = torch.compile(OPS[name], fullgraph=True, backend=options.backend)()
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
        print(f"{name:18} {list(out.shape)}, compiled whole: {list(compiled.shape)}")


if __name__ == "__main__":
    main()
