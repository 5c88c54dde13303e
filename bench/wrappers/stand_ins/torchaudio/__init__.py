"""The part of torchaudio that programs for Dia use, on soundfile."""

from types import SimpleNamespace

import soundfile
import torch

from dia_fast.audio.audio import convert


def load(path, channels_first=True, **_):
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = torch.from_numpy(samples)
    return (samples.T if channels_first else samples), rate


def save(path, waveform, rate, **_):
    soundfile.write(path, waveform.detach().cpu().numpy().T, rate)


def resample(waveform, orig_freq, new_freq, **_):
    """Any shape `[..., n]`."""
    if orig_freq == new_freq:
        return waveform
    rows = [
        torch.from_numpy(convert(row.numpy(), orig_freq, new_freq)) for row in waveform.reshape(-1, waveform.shape[-1])
    ]
    return torch.stack(rows).reshape(*waveform.shape[:-1], -1)


class _Resample:
    def __init__(self, orig_freq, new_freq):
        self.rates = orig_freq, new_freq

    def to(self, *_):
        return self

    def __call__(self, waveform):
        return resample(waveform, *self.rates)


functional = SimpleNamespace(resample=resample)
transforms = SimpleNamespace(Resample=_Resample)
