"""Map the tensors of a checkpoint to the fused weights that the kernels stream.

Fused weights are `[out, in]`; what one launch reads is one tensor (q|k|v, gate|up, the k|v of cross-attention).
"""

import math

from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig

FusedSlice = tuple[str, int, int]


def fused_shapes(config: DiaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every fused weight by its name, which is its name in `DiaModel.state_dict()`."""
    encoder, decoder = config.encoder, config.decoder
    codes = decoder.num_channels * decoder.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"encoder.embedding": (encoder.vocab_size, encoder.hidden_size)}
    for layer in range(encoder.num_hidden_layers):
        shapes |= _shared_shapes(f"encoder.layers.{layer}.", encoder)
    shapes["encoder.norm"] = (encoder.hidden_size,)
    shapes["decoder.embedding"] = (codes, decoder.hidden_size)
    cross = decoder.cross_num_attention_heads * decoder.cross_head_dim
    cross_shared = decoder.cross_num_key_value_heads * decoder.cross_head_dim
    for layer in range(decoder.num_hidden_layers):
        prefix = f"decoder.layers.{layer}."
        shapes |= _shared_shapes(prefix, decoder)
        shapes |= {
            f"{prefix}cross_norm": (decoder.hidden_size,),
            f"{prefix}cross_q": (cross, decoder.hidden_size),
            f"{prefix}cross_kv": (2 * cross_shared, decoder.cross_hidden_size),
            f"{prefix}cross_o": (decoder.hidden_size, cross),
        }
    shapes["decoder.norm"] = (decoder.hidden_size,)
    shapes["decoder.head"] = (codes, decoder.hidden_size)
    return shapes


def fused_slices(config: DiaConfig) -> dict[str, FusedSlice]:
    """For every tensor of the transformers layout: `(fused name, first row, row after the last)`.

    The rows of a fused tensor are covered once each; the columns are the same in both layouts.
    """
    encoder, decoder = config.encoder, config.decoder
    shapes = fused_shapes(config)
    found: dict[str, FusedSlice] = {}

    def place(fused: str, *tensors: str) -> None:
        """Let the tensors divide the rows of the fused one evenly."""
        step = shapes[fused][0] // len(tensors)
        found.update({name: (fused, i * step, (i + 1) * step) for i, name in enumerate(tensors)})

    def place_shared(stack: EncoderConfig | DecoderConfig, prefix: str, mlp_norm: str) -> None:
        source = f"model.{prefix}"
        q, kv = stack.num_attention_heads * stack.head_dim, stack.num_key_value_heads * stack.head_dim
        for name, first, last in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            found[f"{source}self_attention.{name}_proj.weight"] = (f"{prefix}qkv", first, last)
        place(f"{prefix}self_norm", f"{source}pre_sa_norm.weight")
        place(f"{prefix}o", f"{source}self_attention.o_proj.weight")
        place(f"{prefix}mlp_norm", f"{source}{mlp_norm}.weight")
        place(f"{prefix}gate_up", f"{source}mlp.gate_up_proj.weight")
        place(f"{prefix}down", f"{source}mlp.down_proj.weight")

    place("encoder.embedding", "model.encoder.embedding.weight")
    for layer in range(encoder.num_hidden_layers):
        place_shared(encoder, f"encoder.layers.{layer}.", "post_sa_norm")
    place("encoder.norm", "model.encoder.norm.weight")
    place("decoder.embedding", "model.decoder.embeddings.embed.weight")
    for layer in range(decoder.num_hidden_layers):
        prefix = f"decoder.layers.{layer}."
        place_shared(decoder, prefix, "pre_mlp_norm")
        cross = f"model.{prefix}cross_attention"
        place(f"{prefix}cross_norm", f"model.{prefix}pre_ca_norm.weight")
        place(f"{prefix}cross_q", f"{cross}.q_proj.weight")
        place(f"{prefix}cross_kv", f"{cross}.k_proj.weight", f"{cross}.v_proj.weight")
        place(f"{prefix}cross_o", f"{cross}.o_proj.weight")
    place("decoder.norm", "model.decoder.norm.weight")
    place("decoder.head", "logits_dense.weight")
    return found


def parameter_count(config: DiaConfig) -> int:
    """Count the weights of the model."""
    return sum(math.prod(shape) for shape in fused_shapes(config).values())


def _shared_shapes(prefix: str, stack: EncoderConfig | DecoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads = stack.hidden_size, stack.num_attention_heads
    return {
        f"{prefix}self_norm": (hidden,),
        f"{prefix}qkv": ((heads + 2 * stack.num_key_value_heads) * stack.head_dim, hidden),
        f"{prefix}o": (hidden, heads * stack.head_dim),
        f"{prefix}mlp_norm": (hidden,),
        f"{prefix}gate_up": (2 * stack.intermediate_size, hidden),
        f"{prefix}down": (hidden, stack.intermediate_size),
    }
