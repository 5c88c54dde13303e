"""The codec over the Triton ops, which it calls in place: the results go where the inputs lie."""

import torch

from dia_fast.audio.codec import random_codec
from dia_kernels import triton as kernels
from tests.helpers.codecs import SMALL, assert_same_sound, random_codes
from tests.kernels.support import random


def test_the_codec_over_the_kernels(device: torch.device) -> None:
    plain, fused = random_codec(SMALL, device=device), random_codec(SMALL, device=device, ops=kernels)
    codes = random_codes(11).to(device)
    assert_same_sound(fused.decode(codes), plain.decode(codes), plain)
    samples = random((83,), torch.float32, device, 1)
    assert torch.equal(fused.encode(samples), plain.encode(samples))
