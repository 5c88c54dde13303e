"""The part of librosa that a server uses."""

from dia_fast.audio.audio import convert


def resample(y, orig_sr, target_sr, **_):
    return convert(y, orig_sr, target_sr)
