"""The ops as torch custom operators, for use one at a time in other models and under `torch.compile`.

`import dia_kernels.torch_library` registers them as `torch.ops.dia_kernels.*`; the functions here are the same
operators. They allocate what they return; the decode engine does not use them, since its buffers exist before the step.
Where Triton can run on the tensors' device the kernels run, elsewhere the torch reference: `implementation(device)`
tells which. Shapes and formulas are those of `dia_kernels.reference`. Projections take a weight in 8 bits as int8
values and their float32 `scales`, one for each output feature. Scores of attention are multiplied by `scale`, 1.0 in
Dia; `workspace`, of `attention_workspace`, spares the two decode attentions an allocation and a fill in each call.
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from dia_kernels.ops import get_ops, triton_obstacle
from dia_kernels.reference.linear import Weight
from dia_kernels.reference.quantized import Int8Weight
from dia_kernels.reference.sampling import NOT_FINITE


def implementation(device: torch.device | str) -> str:
    """Return `"triton"` or `"torch"`: the op set that these operators run for tensors on `device`."""
    return "triton" if triton_obstacle(device) is None else "torch"


def _ops(x: Tensor) -> ModuleType:
    return get_ops(implementation(x.device), x.device)


def _weight(values: Tensor, scales: Tensor | None) -> Weight:
    return values if scales is None else Int8Weight(values, scales)


def attention_workspace(rows: int, heads: int, head_dim: int, max_length: int, device: torch.device | str) -> Tensor:
    """Return scratch memory for `rope_attention` and `cross_attention`, for calls one after another on one stream.

    Args:
        rows: Most rows of a call.
        heads: Query heads.
        head_dim: Of a head.
        max_length: Most tokens that a block table has room for: pages of a row times their size.
        device: Of the tensors.

    Returns:
        A tensor that only these two read and write; empty where torch computes, which needs none.
    """
    if implementation(device) == "torch":
        return torch.empty(0, 1, dtype=torch.float32, device=device)
    from dia_kernels.triton.paged_attention import packed_workspace

    return packed_workspace(rows, heads, head_dim, max_length, device)


def _scratch(q: Tensor, heads: int, k_pages: Tensor, block_table: Tensor, workspace: Tensor | None) -> object:
    """Return scratch memory as the op set takes it, made if none was given."""
    page_size, head_dim = k_pages.shape[2:]
    if workspace is None:
        length = block_table.shape[1] * page_size
        return _ops(q).attention_workspace(q.shape[0], heads, head_dim, length, q.device)
    if implementation(q.device) == "torch":
        return None
    from dia_kernels.triton.paged_attention import unpacked_workspace

    return unpacked_workspace(workspace, head_dim)


def _checked(scale: float) -> float:
    if not math.isfinite(scale):
        raise ValueError(f"scale: {scale}, needs a finite number, such as head_dim ** -0.5")
    return scale


@custom_op("dia_kernels::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of `[rows, hidden]`."""
    return _ops(x).rms_norm(x, weight, eps, torch.empty_like(x))


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("dia_kernels::glu", mutates_args=())
def glu(x: Tensor) -> Tensor:
    """Return `silu(gate) * up` of `[rows, 2 * intermediate]`, gate first."""
    return _ops(x).glu(x, x.new_empty(x.shape[0], x.shape[1] // 2))


@glu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@custom_op("dia_kernels::rms_norm_linear", mutates_args=())
def rms_norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, scales: Tensor | None = None) -> Tensor:
    """Return `rms_norm(x) @ weight.T`, for 1 to 64 rows."""
    return _ops(x).rms_norm_linear(
        x, norm_weight, _weight(weight, scales), eps, x.new_empty(x.shape[0], weight.shape[0])
    )


@rms_norm_linear.register_fake
def _(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@custom_op("dia_kernels::rms_norm_glu", mutates_args=())
def rms_norm_glu(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, scales: Tensor | None = None) -> Tensor:
    """Return `silu(gate) * up` of `rms_norm(x) @ weight.T`, for 1 to 64 rows."""
    return _ops(x).rms_norm_glu(
        x, norm_weight, _weight(weight, scales), eps, x.new_empty(x.shape[0], weight.shape[0] // 2)
    )


@rms_norm_glu.register_fake
def _(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, scales: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


@custom_op("dia_kernels::linear_residual", mutates_args=("residual",))
def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, constant: Tensor | None = None, scales: Tensor | None = None
) -> None:
    """Add in place: `residual[:m] += x @ weight.T` in place, `residual[m:] += constant`, for 1 to 64 rows."""
    _ops(x).linear_residual(x, _weight(weight, scales), residual, constant)


@linear_residual.register_fake
def _(
    x: Tensor, weight: Tensor, residual: Tensor, constant: Tensor | None = None, scales: Tensor | None = None
) -> None:
    return None


@custom_op("dia_kernels::codebook_logits", mutates_args=())
def codebook_logits(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, channels: int, scales: Tensor | None = None
) -> Tensor:
    """Apply the final norm and the heads of all channels: float32 `[rows, channels, vocab]`."""
    out = x.new_empty(x.shape[0], channels, weight.shape[0] // channels, dtype=torch.float32)
    return _ops(x).codebook_logits(x, norm_weight, _weight(weight, scales), eps, out)


@codebook_logits.register_fake
def _(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, channels: int, scales: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], channels, weight.shape[0] // channels, dtype=torch.float32)


@custom_op("dia_kernels::rope_attention", mutates_args=("k_pages", "v_pages", "workspace"))
def rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    scale: float = 1.0,
    workspace: Tensor | None = None,
) -> Tensor:
    """Make one decode step of self-attention over pages, the new k and v written in place."""
    _, kv_heads, _, head_dim = k_pages.shape
    width = qkv.shape[1] - 2 * kv_heads * head_dim
    out = qkv.new_empty(qkv.shape[0], width)
    scratch = _scratch(qkv, width // head_dim, k_pages, block_table, workspace)
    return _ops(qkv).rope_attention(
        qkv, cos, sin, k_pages, v_pages, block_table, positions, out, scratch, scale=_checked(scale)
    )


@rope_attention.register_fake
def _(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    scale: float = 1.0,
    workspace: Tensor | None = None,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_pages.shape[1] * k_pages.shape[3])


@custom_op("dia_kernels::cross_attention", mutates_args=("workspace",))
def cross_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float = 1.0,
    workspace: Tensor | None = None,
) -> Tensor:
    """Make one decode step of attention over paged keys and values of given lengths."""
    scratch = _scratch(q, q.shape[1] // k_pages.shape[3], k_pages, block_table, workspace)
    return _ops(q).cross_attention(
        q, k_pages, v_pages, block_table, lengths, torch.empty_like(q), scratch, scale=_checked(scale)
    )


@cross_attention.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float = 1.0,
    workspace: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(q)


@custom_op("dia_kernels::rope", mutates_args=("qkv",))
def rope(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int) -> None:
    """Rotate q and k of packed `[tokens, (heads + 2 * kv_heads) * head_dim]` in place."""
    _ops(qkv).rope(qkv, cos, sin, positions, kv_heads)


@rope.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int) -> None:
    return None


@custom_op("dia_kernels::ragged_attention", mutates_args=())
def ragged_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool, scale: float = 1.0) -> Tensor:
    """Attend within packed ragged sequences: `[tokens, heads, head_dim]` to `[tokens, heads * head_dim]`."""
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    return _ops(q).ragged_attention(q, k, v, starts, out, causal=causal, scale=_checked(scale))


@ragged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool, scale: float = 1.0) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


@custom_op("dia_kernels::snake", mutates_args=())
def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """Return `x + sin(alpha * x)^2 / (alpha + 1e-9)` of `[batch, channels, samples]`."""
    return _ops(x).snake(x, alpha, torch.empty_like(x))


@snake.register_fake
def _(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op("dia_kernels::snake_residual", mutates_args=())
def snake_residual(x: Tensor, residual: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(x + residual, snake(x + residual))`."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _ops(x).snake_residual(x, residual, alpha, total, out)
    return total, out


@snake_residual.register_fake
def _(x: Tensor, residual: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@custom_op("dia_kernels::sample", mutates_args=())
def sample(
    logits: Tensor,
    step: Tensor,
    seed: Tensor,
    guidance_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    eos: int,
) -> Tensor:
    """Draw one code per request and channel: int32 `[batch, channels]`; a request with `step < 0` gives `eos`.

    Waits for the device. Raises ValueError where logits are NaN or infinity, or leave a draw no candidate.
    """
    out = torch.full((step.shape[0], logits.shape[1]), eos, dtype=torch.int32, device=logits.device)
    status = torch.zeros_like(out)
    _ops(logits).sample(logits, step, seed, guidance_scale, temperature, top_k, top_p, out, status, eos=eos)
    if wrong := status.nonzero().tolist():
        batch_idx, channel = wrong[0]
        kind = int(status[batch_idx, channel]) & 3
        what = "are NaN or infinity" if kind == NOT_FINITE else "leave no candidate to draw from"
        raise ValueError(f"logits: those of request {batch_idx}, channel {channel} {what}")
    return out


@sample.register_fake
def _(
    logits: Tensor,
    step: Tensor,
    seed: Tensor,
    guidance_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    eos: int,
) -> Tensor:
    return torch.empty((step.shape[0], logits.shape[1]), dtype=torch.int32, device=logits.device)


@custom_op(
    "dia_kernels::embed_codes",
    mutates_args=("step", "eos_step", "codes", "positions", "finished", "x"),
)
def embed_codes(
    sampled: Tensor,
    prompt_codes: Tensor,
    step: Tensor,
    first_step: Tensor,
    end_step: Tensor,
    eos_step: Tensor,
    delay: Tensor,
    table: Tensor,
    codes: Tensor,
    positions: Tensor,
    finished: Tensor,
    x: Tensor,
    eos: int,
    pad: int,
) -> None:
    """Form and embed the next delayed codes, advancing the state in place."""
    _ops(x).embed_codes(
        sampled,
        prompt_codes,
        step,
        first_step,
        end_step,
        eos_step,
        delay,
        table,
        codes,
        positions,
        finished,
        x,
        eos=eos,
        pad=pad,
    )


@embed_codes.register_fake
def _(
    sampled: Tensor,
    prompt_codes: Tensor,
    step: Tensor,
    first_step: Tensor,
    end_step: Tensor,
    eos_step: Tensor,
    delay: Tensor,
    table: Tensor,
    codes: Tensor,
    positions: Tensor,
    finished: Tensor,
    x: Tensor,
    eos: int,
    pad: int,
) -> None:
    return None
