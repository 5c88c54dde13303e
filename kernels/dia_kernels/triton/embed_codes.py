"""embed_codes: the next decoder input from the codes sampled in the last step, in one launch.

    code[c]  = prompt_codes[step - first_step, c] if given, else sampled[c], then the EOS countdown
    x        = sum_c table[c * vocab + code[c]]        # fp32 sum in channel order, rounded once

One program per request: it alone reads and advances the request's state, so no other program can see it half advanced.
Reads channels table rows, writes one or two rows of x (the unconditional row has the same input).
"""

import torch
import triton
import triton.language as tl

from dia_kernels import launcher as launch


@triton.jit
def _embed_codes(
    sampled_ptr,  # [batch, CHANNELS] int32
    prompt_codes_ptr,  # [batch, DEPTH, CHANNELS] int32, -1 where free
    step_ptr,  # [batch] int32, advanced
    first_step_ptr,  # [batch] int32
    end_step_ptr,  # [batch] int32
    eos_step_ptr,  # [batch] int32, set once
    delay_ptr,  # [CHANNELS] int32
    table_ptr,  # [CHANNELS * VOCAB, HIDDEN]
    codes_ptr,  # [batch, capacity, CHANNELS] int32
    positions_ptr,  # [rows] int32
    finished_ptr,  # [batch] int32
    x_ptr,  # [rows, HIDDEN]
    batch,
    capacity,
    EOS: tl.constexpr,
    PAD: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS_PER_REQUEST: tl.constexpr,
):
    batch_idx = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr + batch_idx)
    first_step = tl.load(first_step_ptr + batch_idx)
    end_step = tl.load(end_step_ptr + batch_idx)
    eos_step = tl.load(eos_step_ptr + batch_idx)
    active = (step >= 0) & (tl.load(finished_ptr + batch_idx) == 0)

    channel = tl.arange(0, BLOCK_C)
    real = channel < CHANNELS
    delay = tl.load(delay_ptr + channel, mask=real, other=0)
    max_delay = tl.max(delay, 0)
    sampled = tl.load(sampled_ptr + batch_idx * CHANNELS + channel, mask=real, other=0)
    depth = step - first_step
    inside = real & (depth >= 0) & (depth < DEPTH) & active
    prompt_codes = tl.load(prompt_codes_ptr + (batch_idx * DEPTH + depth) * CHANNELS + channel, mask=inside, other=-1)
    code = tl.minimum(tl.maximum(tl.where(prompt_codes >= 0, prompt_codes, sampled), 0), VOCAB - 1)

    open_ended = active & (eos_step < 0) & (step > first_step)
    code = tl.where((channel == 0) & open_ended & (step == end_step - max_delay), EOS, code)
    leader = tl.sum(tl.where(channel == 0, code, 0), 0)
    eos_step = tl.where(open_ended & (leader == EOS), step, eos_step)
    since = step - eos_step - delay
    code = tl.where((eos_step >= 0) & (since == 0), EOS, code)
    code = tl.where((eos_step >= 0) & (since > 0), PAD, code)
    done = (step >= end_step) | ((eos_step >= 0) & (step >= eos_step + max_delay))

    # Every warp has to have read the state before any of them overwrites it.
    tl.debug_barrier()
    tl.store(eos_step_ptr + batch_idx, eos_step, mask=active)
    tl.store(step_ptr + batch_idx, step + 1, mask=active)
    tl.store(finished_ptr + batch_idx, 1, mask=active & done)
    at = tl.minimum(step, capacity - 1)
    tl.store(codes_ptr + (batch_idx * capacity + at) * CHANNELS + channel, code, mask=real & active)
    for branch in tl.static_range(ROWS_PER_REQUEST):
        tl.store(positions_ptr + branch * batch + batch_idx, tl.where(active, step, -1))

    for start in tl.static_range(0, HIDDEN, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inner = h < HIDDEN
        total = tl.zeros([BLOCK_H], tl.float32)
        for c in tl.static_range(CHANNELS):
            entry = c * VOCAB + tl.sum(tl.where(channel == c, code, 0), 0).to(tl.int64)
            total += tl.load(table_ptr + entry * HIDDEN + h, mask=inner & active, other=0.0).to(tl.float32)
        for branch in tl.static_range(ROWS_PER_REQUEST):
            tl.store(x_ptr + (branch * batch + batch_idx) * HIDDEN + h, total.to(x_ptr.dtype.element_ty), mask=inner)


def _default_config(dtype: torch.dtype, arch: str, *, hidden: int) -> dict[str, int]:
    warps = 4 if hidden < 1024 else 16 if arch == "sm_90" else 8
    return {"BLOCK_H": min(triton.next_power_of_2(hidden), 2048), "num_warps": warps}


def embed_codes(
    sampled: torch.Tensor,
    prompt_codes: torch.Tensor,
    step: torch.Tensor,
    first_step: torch.Tensor,
    end_step: torch.Tensor,
    eos_step: torch.Tensor,
    delay: torch.Tensor,
    table: torch.Tensor,
    codes: torch.Tensor,
    positions: torch.Tensor,
    finished: torch.Tensor,
    x: torch.Tensor,
    *,
    eos: int,
    pad: int,
) -> torch.Tensor:
    """As `dia_kernels.reference.embed_codes`; all tensors contiguous."""
    batch, channels = sampled.shape
    rows, hidden = x.shape
    if rows not in (batch, 2 * batch):
        raise ValueError(f"x: has {rows} rows, needs {batch} (one per request) or {2 * batch} (guided)")
    per_request = {
        "step": step,
        "first_step": first_step,
        "end_step": end_step,
        "eos_step": eos_step,
        "finished": finished,
    }
    launch.require(
        {
            "sampled": (sampled, (batch, channels)),
            "prompt_codes": (prompt_codes, (batch, prompt_codes.shape[1], channels)),
            **{name: (tensor, (batch,)) for name, tensor in per_request.items()},
            "delay": (delay, (channels,)),
            "table": (table, (table.shape[0] // channels * channels, hidden)),
            "codes": (codes, (batch, codes.shape[1], channels)),
            "positions": (positions, (rows,)),
            "x": (x, (rows, hidden)),
        }
    )
    config = launch.configuration("embed_codes", _default_config, x.dtype, x.device, hidden=hidden)
    launch.run(
        _embed_codes,
        (batch,),
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
        batch,
        codes.shape[1],
        EOS=eos,
        PAD=pad,
        DEPTH=prompt_codes.shape[1],
        CHANNELS=channels,
        BLOCK_C=triton.next_power_of_2(channels),
        VOCAB=table.shape[0] // channels,
        HIDDEN=hidden,
        ROWS_PER_REQUEST=rows // batch,
        **config,
    )
    return x
