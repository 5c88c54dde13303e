"""Hypothesis strategies that several tests use."""

from typing import Any

from hypothesis import strategies as st

from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig


def configs() -> st.SearchStrategy[DiaConfig]:
    """Small configurations of every proportion: heads, shared heads, widths and depths that differ everywhere."""

    @st.composite
    def draw_config(draw: st.DrawFn) -> DiaConfig:
        def heads(prefix: str = "") -> dict[str, int]:
            shared = draw(st.integers(1, 3))
            return {
                f"{prefix}num_key_value_heads": shared,
                f"{prefix}num_attention_heads": shared * draw(st.integers(1, 3)),
                f"{prefix}head_dim": 2 * draw(st.integers(1, 12)),
            }

        def sizes(positions: int = 1) -> dict[str, Any]:
            return {
                "hidden_size": draw(st.integers(1, 40)),
                "intermediate_size": draw(st.integers(1, 40)),
                "num_hidden_layers": draw(st.integers(1, 3)),
                "max_position_embeddings": draw(st.integers(positions, 5000)),
                "norm_eps": draw(st.floats(1e-8, 1e-3)),
                "rope_theta": draw(st.floats(1.0, 1e6)),
            }

        channels = draw(st.integers(1, 4))
        vocab = draw(st.integers(3, 30))
        tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=3, max_size=3, unique=True))
        encoder = EncoderConfig(**sizes(), **heads(), vocab_size=draw(st.integers(3, 30)))
        decoder = DecoderConfig(
            **sizes(positions=22),
            **heads(),
            **heads("cross_"),
            cross_hidden_size=encoder.hidden_size,
            num_channels=channels,
            vocab_size=vocab,
            **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), tokens, strict=True)),
        )
        delays = draw(st.lists(st.integers(0, 20), min_size=channels - 1, max_size=channels - 1))
        return DiaConfig(encoder, decoder, (0, *delays))

    return draw_config()
