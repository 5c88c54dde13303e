"""The audio codec: DAC in plain torch, its files, and a door to the original package."""

from dia_fast.audio.codec.codec import Codec, random_codec
from dia_fast.audio.codec.config import CodecConfig
from dia_fast.audio.codec.load import codec_beside, codec_for, load_codec

__all__ = ["Codec", "CodecConfig", "codec_beside", "codec_for", "load_codec", "random_codec"]
