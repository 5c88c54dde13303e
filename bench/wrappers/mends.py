"""Lines of copies of the original that choose other codes than 2811af1 does, and what makes them choose the same.

A program is driven with these lines changed in a temporary copy, which shows that nothing else makes the difference.
"""

import shutil
from pathlib import Path
from typing import TypeAlias

Mend: TypeAlias = tuple[tuple[str, str, str], ...]  # (file, text that it holds once, text in its place)


def cache_index(package: str) -> Mend:
    """An audio prompt's last row but one keeps its key and value; the first step overwrites them otherwise."""
    text = "self.current_idx = prefill_len - 1"
    return ((f"{package}/state.py", text, text.removesuffix(" - 1")),)


def padding(package: str) -> Mend:
    """Cross-attention leaves the padding of a text out, whose keys it sets to 0 and attends to otherwise."""
    text = "attn_k, attn_v = cache.k, cache.v\n"
    mask = "(cache.k != 0).any(3).any(1)[:, None, None]"
    return ((f"{package}/layers.py", text, f"attn_k, attn_v, attn_mask = cache.k, cache.v, {mask}\n"),)


def tags(package: str) -> Mend:
    """`[S1]` and `[S2]` are one byte each, as the weights were trained on; the fork spells them out."""
    text = "        replaced_bytes = byte_text"
    return (
        (f"{package}/model.py", text + "\n", text + r""".replace(b"[S1]", b"\1").replace(b"[S2]", b"\2")""" + "\n"),
    )


def first_release(package: str) -> Mend:
    """An audio prompt has room in the cache, its last row is stored once, and its delayed last codes are given."""
    choice = "            if audio_prompt_path is None:\n"
    given = """            if audio_prompt_path is not None:
                given = self.dac_model.given
                row = (step - delay_tensor).clamp(max=given.shape[1] - 1)[:, None]
                pred_C = torch.where(generation_step_index >= delay_tensor, pred_C, given.gather(1, row)[:, 0])
"""
    length = "    seq_length = encoded_frame.shape[2]\n"
    return (
        (
            f"{package}/model.py",
            "gqa_query_heads,\n                    max_tokens,",
            "gqa_query_heads, max_tokens + 999,",
        ),
        (f"{package}/layers.py", "self.current_idx = prefill_len\n", "self.current_idx = prefill_len - 1\n"),
        (f"{package}/audio.py", length, length + "    model.given = encoded_frame[0]\n"),
        (f"{package}/model.py", choice, given + choice),
    )


def mended(checkout: Path, folder: Path, mend: Mend) -> Path:
    """Copy a checkout with some lines changed. Raises ValueError if one of them is not there exactly once."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))
    for name, text, other in mend:
        path = folder / name
        source = path.read_text(encoding="utf-8")
        if source.count(text) != 1:
            raise ValueError(f"{path} holds {text!r} {source.count(text)} times")
        path.write_text(source.replace(text, other), encoding="utf-8")
    return folder
