"""Compare the codes that the first generation chooses with those of the original package of its time.

    python -m bench.first_generation CHECKOUT [--rows 2000] [--probabilities 200] [--json FILE]

CHECKOUT: of `nari-labs/dia` at 2811af1, the last commit before the new weights; it is read only, and the package of the
codec and torchaudio, which it imports, are stood in for. Tiny random weights, fp32, on the CPU, greedily: batches of
texts of different length, with and without audio prompts, with several guidance scales, until there are enough rows.
Beside the codes it compares the logits of every step, and the probabilities that a code is drawn from for random logits
and settings. Where the two best logits are closer than rounding tells apart, both choices are right: a text that parts
from the original's there is counted as a tie, and its rows up to there alone. Exit status 1 if a code differs
otherwise, or a probability by more than 1e-6.
"""

import argparse
import contextlib
import functools
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.tools.results import Results, add_options
from bench.tools.tiny_models import original_state, random_state, tiny_config
from dia_fast.errors import DiaFastError, InputError
from dia_fast.integrations import original
from dia_fast.text.tokenizer import encode_text
from dia_kernels import reference

SIZES = tiny_config({}, {"max_position_embeddings": 384})
CONFIG = replace(SIZES, first_generation=True)
STAND_INS = Path(__file__).parent / "wrappers" / "stand_ins"
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.?!'"
ALLOWED = 1e-6  # of a probability


@dataclass(frozen=True)
class Case:
    """A batch: bytes of each text, frames of each prompt, the guidance scale, and how likely the end of speech is."""

    texts: tuple[int, ...]
    prompts: tuple[int, ...]
    scale: float
    eos_gain: float = 0.0

    def __str__(self) -> str:
        ends = ", ends by itself" if self.eos_gain else ""
        return f"texts {_listed(self.texts)}; prompts {_listed(self.prompts)}; scale {self.scale:g}{ends}"


CASES = (
    Case((17, 5, 64, 128), (0, 0, 0, 0), 3.0),
    Case((64, 30, 9), (40, 0, 12), 3.0),
    Case((12, 77), (25, 25), 1.5),
    Case((100, 8), (0, 7), 0.0),
    Case((6, 8, 13, 21, 34), (0, 12, 0, 5, 20), 3.0, 4.0),
)


def _listed(counts: Sequence[int]) -> str:
    return "/".join(map(str, counts))


def load(checkout: Path) -> Any:
    """Import the original's `dia.model`. Raises InputError."""
    if not (checkout / "dia" / "model.py").is_file():
        raise InputError(f"{checkout}: no checkout of nari-labs/dia, which holds dia/model.py")
    sys.path[:0] = [str(checkout), str(STAND_INS)]
    import dia.model

    if "data" not in dia.model.DiaConfig.model_fields:
        raise InputError(f"{checkout}: its configuration is that of the second generation; check 2811af1 out")
    return dia.model


def pair(theirs: Any, eos_gain: float) -> tuple[Any, original.Dia]:
    """Return both with the same weights and no codec."""
    state = random_state(SIZES, 3)
    state["logits_dense.weight"][CONFIG.decoder.eos_token_id] *= eos_gain
    weights = original_state(SIZES, state)
    with contextlib.redirect_stdout(io.StringIO()):  # a warning that there is no codec
        made = theirs.Dia(theirs.DiaConfig(**CONFIG.to_original()), "float32", torch.device("cpu"), load_dac=False)
    made.model.load_state_dict(weights)
    ours = original.Dia(CONFIG, device=torch.device("cpu"), load_dac=False, quirks=True)
    assert ours.model is not None
    ours.model.load_state_dict(weights)
    return made, ours


def watched(made: Any) -> tuple[list[Any], dict[int, Tensor]]:
    """Keep what the original's next call generates, and the logits of its steps, `[2 * batch, channels, vocab]`."""
    outputs: list[Any] = []
    logits: dict[int, Tensor] = {}
    prepare, step = made._prepare_generation, made.model.decoder.decode_step

    def preparing(*given: Any, **options: Any) -> Any:
        found = prepare(*given, **options)
        outputs.append(found[1])
        return found

    def stepping(tokens: Tensor, state: Any, index: Tensor) -> Tensor:
        found = step(tokens, state, index)
        logits[int(index)] = found[:, -1].clone()
        return found

    made._prepare_generation, made.model.decoder.decode_step = preparing, stepping
    return outputs, logits


def parting(expected: np.ndarray, found: np.ndarray) -> tuple[int, int, int] | None:
    """Return the code that was generated first of those that differ.

    Args:
        expected: Codes of frames, delay undone, `[frames, channels]`.
        found: Those of the other; the frames that both have are compared.

    Returns:
        The row of its generation, counted from the first generated one, its frame and its channel; None if all agree.
    """
    both = min(len(expected), len(found))
    differing = np.argwhere(expected[:both] != found[:both]).tolist()
    return min(((frame + CONFIG.delay_pattern[channel], frame, channel) for frame, channel in differing), default=None)


def is_tie(logits: Tensor, scale: float, error: float) -> bool:
    """Say whether rounding can change which of two logits, mixed by `scale`, is the larger one.

    Either is `cond + scale * (cond - uncond)`, each of which may be off by `error`.
    """
    return float((logits[0] - logits[1]).abs()) <= 2 * (abs(1 + scale) + abs(scale)) * error


def compare(theirs: Any, case: Case, seed: int) -> dict[str, float]:
    """Let both speak a batch of random texts and prompts, `seed` says which.

    Returns:
        Counts of rows, of codes, of texts that differ and of ties, the largest logit, the largest error of one, and the
        least distance of a best logit from the second best.
    """
    generator = np.random.default_rng(seed)
    texts = ["[S1] " + "".join(generator.choice(list(LETTERS), count - 2)) for count in case.texts]
    prompts: list[Any] = [
        torch.from_numpy(generator.integers(0, CONFIG.decoder.eos_token_id, (count, 9))) if count else None
        for count in case.prompts
    ]
    made, ours = pair(theirs, case.eos_gain)
    outputs, logits = watched(made)
    limit = CONFIG.decoder.max_position_embeddings
    settings: dict[str, Any] = {"max_tokens": limit, "cfg_scale": case.scale, "temperature": 0.0}
    expected = made.generate(texts, audio_prompt=prompts, **settings)
    found = ours.generate(texts, audio_prompt=prompts, **settings)
    figures = {"rows": 0, "codes": 0, "differ": 0, "ties": 0, "error": 0.0, "margin": np.inf, "largest": 0.0}
    model = ours.model
    assert model is not None
    for item, text in enumerate(texts):
        given, frames = case.prompts[item], len(expected[item])
        # Rows that hold the frames: the delay pattern completes the last one 15 rows later.
        rows = outputs[0].generated_tokens[item, : given + 1 + frames + max(CONFIG.delay_pattern)].long()
        cond, uncond = model.forward_logits([encode_text(text)], rows[None, :-1])
        assert uncond is not None
        steps = [step for step in sorted(logits) if step < len(rows) - 1]
        error = 0.0
        for branch, mine in ((0, uncond), (1, cond)):
            other = torch.stack([logits[step][2 * item + branch] for step in steps])
            error = max(error, float((mine[0, steps] - other).abs().max()))
            figures["largest"] = max(figures["largest"], float(other.abs().max()))
        figures["error"] = max(figures["error"], error)
        mixed = (cond + case.scale * (cond - uncond))[0, given:, :, : CONFIG.decoder.eos_token_id]
        first = parting(expected[item], found[item])
        if first is None:
            figures["differ"] += int(found[item].shape != expected[item].shape)
            figures["rows"] += len(rows) - given - 1
            figures["codes"] += expected[item].size
            best = mixed[:frames].topk(2).values
            figures["margin"] = min(figures["margin"], float((best[..., 0] - best[..., 1]).min()))
            continue
        row, frame, channel = first
        chosen = [int(codes[item][frame, channel]) for codes in (expected, found)]
        figures["ties" if is_tie(mixed[row, channel, chosen], case.scale, error) else "differ"] += 1
        figures["rows"] += row
        figures["codes"] += row * CONFIG.decoder.num_channels
    return figures


@contextlib.contextmanager
def noted_probabilities() -> Iterator[list[Tensor]]:
    """Keep what is given to `torch.multinomial`."""
    kept: list[Tensor] = []
    draw = torch.multinomial

    def drawing(weights: Tensor, num_samples: int, *more: Any, **options: Any) -> Tensor:
        kept.append(weights)
        return draw(weights, num_samples, *more, **options)

    torch.multinomial = drawing  # type: ignore[assignment]
    try:
        yield kept
    finally:
        torch.multinomial = draw


def probabilities(theirs: Any, count: int) -> float:
    """Return the largest difference of a probability, over random logits and settings.

    Logits, scales and temperatures are such that float32 holds what is computed of them, and the best logits are not
    equal: the rules are compared, not the rounding of a division.
    """
    made, _ = pair(theirs, 0.0)
    generator = np.random.default_rng(1)
    eos, largest, one = CONFIG.decoder.eos_token_id, 0.0, torch.ones(1)
    seed = compared = 0
    while compared < count:
        seed += 1
        scale, temperature, top_p = (
            float(generator.choice(values)) for values in ((0.0, 1.5, 3.0, -2.0), (0.5, 1.0, 2.0), (0.3, 0.95, 1.0))
        )
        top_k = int(generator.choice((1, 5, 45, 1028)))
        logits = torch.randn(2, 9, 1028, generator=torch.Generator().manual_seed(seed)) * 4
        logits = (logits * 2**16).round() / 2**16  # cond, uncond
        best = (logits[0] + scale * (logits[0] - logits[1])).topk(64).values
        if bool((best[:, 1:] == best[:, :-1]).any()):
            continue
        compared += 1
        logits[:, 0, eos] += float(generator.choice((-30.0, 0.0, 12.0, 60.0)))
        # Unconditional logits first, as in its batches.
        made.model.decoder.decode_step = functools.partial(lambda found, *_: found.clone(), logits.flip(0)[:, None])
        with noted_probabilities() as kept:
            made._decoder_step(torch.zeros(2, 1, 9), None, scale, temperature, top_p, top_k, 0)
        weights = reference.sample_weights(
            logits, one * scale, one * temperature, torch.tensor([top_k], dtype=torch.int32), one * top_p, eos=eos,
            first_generation=True,
        ).double()  # fmt: skip
        weights /= weights.sum(-1, keepdim=True)
        largest = max(largest, float((weights[0] - kept[0].double()).abs().max()))
    return largest


def report(options: argparse.Namespace, results: Results) -> int:
    """Print a line for each batch, and what was compared in all. Raises InputError."""
    theirs = load(options.checkout.resolve())
    columns = f"{'differ':>6} {'ties':>4} {'largest logit':>13} {'error':>8} {'margin':>8}"
    print(f"{'batch':<66} {'rows':>5} {'codes':>6} {columns}")
    rows = differ = ties = seed = 0
    while rows < options.rows:
        for case in CASES:
            figures = compare(theirs, case, seed)
            rows += int(figures["rows"])
            differ += int(figures["differ"])
            ties += int(figures["ties"])
            print(
                f"{case!s:<66} {figures['rows']:5} {figures['codes']:6} {figures['differ']:6} {figures['ties']:4} "
                f"{figures['largest']:13.1f} {figures['error']:8.1e} {figures['margin']:8.1e}",
                flush=True,
            )
            results.add({"batch": str(case), "seed": seed}, figures)
        seed += 1
    wrong = probabilities(theirs, options.probabilities)
    told = f"{rows} rows, {differ} texts differ, {ties} part at a tie"
    print(f"{told}; {options.probabilities} settings, probabilities differ by {wrong:.1e}")
    results.add({"batch": "probabilities"}, {"settings": options.probabilities, "error": wrong})
    return results.end(int(bool(differ) or wrong > ALLOWED))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="first_generation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="of nari-labs/dia at 2811af1")
    parser.add_argument("--rows", type=int, default=2000, help="least number of rows")
    parser.add_argument("--probabilities", type=int, default=200, help="random settings of sampling")
    add_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return report(options, Results(parser, options, arguments))
    except DiaFastError as error:
        print(f"first_generation: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
