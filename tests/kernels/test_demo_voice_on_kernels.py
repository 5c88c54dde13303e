"""The voice that comes with the package, spoken by the kernels."""

import pytest
import torch

from dia_fast import Dia, demo_voice


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_the_demo_voice_says_the_same_on_the_kernels(greedy: bool, device: torch.device) -> None:
    [kernels, plain] = (
        Dia.from_pretrained(demo_voice(), device=device, dtype="fp32", backend=backend).generate_codes(
            "[S1] Hello.", do_sample=not greedy, seed=5, max_new_tokens=24
        )[0]
        for backend in ("triton", "torch")
    )
    assert len(plain) >= 8
    assert torch.equal(kernels, plain)
