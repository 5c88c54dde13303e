"""Calls that the decode kernels refuse because they would compute something else, or write where they must not."""

import pytest
import torch

from dia_kernels.triton.codebook_logits import codebook_logits
from dia_kernels.triton.cross_attention import cross_attention
from dia_kernels.triton.paged_attention import attention_workspace


def attend(head_dim: int, page_size: int, room: tuple[int, int, int, int], rows: int, device: torch.device) -> None:
    pages = torch.zeros(2, 1, page_size, head_dim, device=device)
    table, lengths = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((rows, 1), (rows,)))
    q = torch.zeros(rows, head_dim, device=device)
    cross_attention(q, pages, pages, table, lengths, torch.empty_like(q), attention_workspace(*room, device))


def test_pages_larger_than_a_split(device: torch.device) -> None:
    with pytest.raises(ValueError, match="k_pages: pages of 64 tokens do not fill splits of 32"):
        attend(256, 64, (1, 1, 256, 64), 1, device)
    attend(256, 32, (1, 1, 256, 64), 1, device)


def test_a_workspace_with_too_few_counters(device: torch.device) -> None:
    with pytest.raises(ValueError, match="workspace: too small"):
        attend(16, 16, (1, 1, 16, 4096), 8, device)


def test_head_rows_that_do_not_divide_into_channels(device: torch.device) -> None:
    x, norm = torch.ones(2, 16, device=device), torch.ones(16, device=device)
    with pytest.raises(ValueError, match="weight: 25 rows are no multiple of the 3 channels"):
        codebook_logits(x, norm, torch.ones(25, 16, device=device), 1e-5, torch.empty(2, 3, 8, device=device))
