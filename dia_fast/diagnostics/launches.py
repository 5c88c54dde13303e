"""The launches that Dia-1.6B makes, on tensors of the meta device: exact shapes and dtypes, no memory, no arithmetic.

Run them under `dia_kernels.aot.compiling` to compile them, or under `dia_kernels.launcher.listening` to look at them.
"""

from dataclasses import replace
from typing import Any

import torch

from dia_fast.model.config import DiaConfig
from dia_fast.model.cpu_weights import set_matrix
from dia_fast.model.decode_state import DecodeState, Sizes
from dia_fast.model.model import DiaModel
from dia_fast.model.quantization import FLOAT, quantized_names
from dia_kernels import triton as kernels
from dia_kernels.reference.quantized import Int8Weight

META = torch.device("meta")
TEXT, FRAMES = 512, 860  # bytes of text; ten seconds of prompt
CONTEXT = 3073


def one_layer(
    dtype: torch.dtype, ops: Any = kernels, config: DiaConfig | None = None, weights: str = FLOAT
) -> DiaModel:
    """Dia-1.6B, or a model of another config, with a single decoder layer: the others launch the same.

    weights: of `quantization.WEIGHTS`, those of the decoder.
    """
    config = config or DiaConfig()
    return all_layers(dtype, ops, replace(config, decoder=replace(config.decoder, num_hidden_layers=1)), weights)


def all_layers(
    dtype: torch.dtype, ops: Any = kernels, config: DiaConfig | None = None, weights: str = FLOAT
) -> DiaModel:
    """Dia-1.6B, or a model of another config, with everything that a decode step reads."""
    model = DiaModel(config or DiaConfig(), ops).to(dtype)
    decoder = model.config.decoder
    for name in ("cos", "sin"):
        table = torch.empty(
            decoder.max_position_embeddings + 1, decoder.head_dim // 2, device=META, dtype=torch.float32
        )
        model.decoder.register_buffer(name, table, persistent=False)
    if model.config.first_generation:
        for name in ("cross_cos", "cross_sin"):
            table = torch.empty(
                decoder.max_position_embeddings + 1, decoder.cross_head_dim // 2, device=META, dtype=torch.float32
            )
            model.decoder.register_buffer(name, table, persistent=False)
    for layer in model.decoder.layers:
        constant = torch.empty(decoder.hidden_size, dtype=dtype, device=META)
        layer.register_buffer("uncond_cross", constant, persistent=False)
    for path in quantized_names(model.config, weights):
        module, _, name = path.rpartition(".")
        if module.startswith("decoder"):
            values = torch.empty(model.get_parameter(path).shape, dtype=torch.int8, device=META)
            scales = torch.empty(values.shape[0], dtype=torch.float32, device=META)
            set_matrix(model.get_submodule(module), name, Int8Weight(values, scales))
    return model


def decode(rows: int, dtype: torch.dtype, ops: Any = kernels, model: DiaModel | None = None) -> None:
    """One decode step: `rows` rows, two per request, or one request without guidance if `rows` is 1.

    model: on the meta device with everything that a step reads; by default one layer of Dia-1.6B.
    """
    batch = max(rows // 2, 1)
    model = model or one_layer(dtype, ops)
    pages = rows * CONTEXT // 32 + rows
    sizes = Sizes(batch, guided=rows > 1, steps=CONTEXT, text=1024, pages=pages, text_pages=batch * 32)
    model.decode_step(DecodeState(model.config, model.ops, sizes, dtype, META))


def prefill(
    dtype: torch.dtype, ops: Any = kernels, config: DiaConfig | None = None, text: int = TEXT, frames: int = FRAMES
) -> None:
    """Run the encoder, an audio prompt of `frames` frames and the codec once each. By default of Dia-1.6B."""
    config = config or DiaConfig()

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    encoder, decoder = config.encoder, config.decoder
    for stack, tokens, kv_heads, causal in (
        (encoder, text, encoder.num_key_value_heads, False),
        (decoder, frames, decoder.num_key_value_heads, True),
    ):
        x = tensor(tokens, stack.hidden_size)
        ops.rms_norm(x, tensor(stack.hidden_size), stack.norm_eps, torch.empty_like(x))
        heads, dim = stack.num_attention_heads, stack.head_dim
        qkv = tensor(tokens, (heads + 2 * kv_heads) * dim)
        angles = tensor(CONTEXT, dim // 2, dtype=torch.float32), tensor(CONTEXT, dim // 2, dtype=torch.float32)
        positions = tensor(tokens, dtype=torch.int32)
        pages, slot_mapping = tensor(128, kv_heads, 32, dim), tensor(tokens, dtype=torch.int64)
        store = (pages, torch.empty_like(pages), slot_mapping) if causal else ()
        ops.rope(qkv, *angles, positions, kv_heads, *store)
        q, k, v = qkv.view(tokens, -1, dim).split((heads, kv_heads, kv_heads), 1)
        starts = tensor(2, dtype=torch.int32)
        ops.ragged_attention(q, k, v, starts, tensor(tokens, heads * dim), causal=causal)
        ops.glu(tensor(tokens, 2 * stack.intermediate_size), tensor(tokens, stack.intermediate_size))
    q = tensor(frames, decoder.cross_num_attention_heads, decoder.cross_head_dim)
    keys = tensor(32, decoder.cross_num_key_value_heads, 32, decoder.cross_head_dim)
    table, length = tensor(1, 32, dtype=torch.int32), tensor(1, dtype=torch.int32)
    ops.ragged_attention(
        q, keys, torch.empty_like(keys), tensor(2, dtype=torch.int32), tensor(frames, q.shape[1] * q.shape[2]),
        causal=False, block_table=table, kv_lengths=length,
    )  # fmt: skip
    for channels, samples in ((1536, frames), (96, 512 * frames)):
        x, alpha = tensor(1, channels, samples), tensor(channels)
        ops.snake(x, alpha, torch.empty_like(x))
        ops.snake_residual(x, x, alpha, torch.empty_like(x), torch.empty_like(x))
