"""Time the drop-in beside the engine that it stands on, and beside transformers.

    python -m bench.dropin [--model FOLDER] [--steps 100] [--rounds 5] [--batch 1] [--clock cpu|wall] [--copy]

Three sides speak the same text greedily, in turns, in one process, on one copy of the weights: the engine called
directly, `accelerate(model).generate`, and the model's own `generate`. The time is that of a whole call: arguments,
settings, encoder, steps, and the tensors at the end. Without --model the weights are random, of a model of 40 million
(four decoder layers of 512). The processor's clock counts only what this process does, on a machine with other work.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.tools.results import Results, add_options
from dia_fast.engine import Request
from dia_fast.errors import DiaFastError
from dia_fast.integrations.transformers import accelerate, loop, patch
from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MEDIUM = DiaConfig(
    EncoderConfig(256, 1024, 4, 4, 4, 64),
    DecoderConfig(512, 2048, 4, 8, 2, 64, 8, 8, 64, 256),
)
MOST = 0.03  # of a call's time may be spent on being a drop-in


def load(path: str | None, dtype: torch.dtype) -> Any:
    """Return a model of transformers whose speech never ends by itself."""
    from transformers import DiaForConditionalGeneration

    if path is not None:
        model = DiaForConditionalGeneration.from_pretrained(path, dtype=dtype)
    else:
        from bench.tools.tiny_models import transformers_model

        model = transformers_model(MEDIUM).to(dtype)
    with torch.no_grad():
        model.logits_dense.weight[model.config.decoder_config.eos_token_id] = 0
    return model.eval()


def make_inputs(config: DiaConfig, batch: int, text: int) -> dict[str, torch.Tensor]:
    """Return the processor's inputs for texts of one length, without audio prompts."""
    from bench.tools.pairs import delayed_inputs, random_prompts, random_texts, text_inputs

    grid = delayed_inputs(config, random_prompts(config, [0] * batch))
    return text_inputs(random_texts(config, [text] * batch)) | grid


def sides(model: Any, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return the calls to compare, each making the same rows."""
    accelerate(model, share_memory=not options.copy)
    state = model.__dict__[patch.STATE]
    config = patch.weights.read_config(model)
    given = make_inputs(config, options.batch, options.text)
    settings = {"do_sample": False, "max_new_tokens": options.steps, "guidance_scale": 3.0, "top_k": 45}
    tokens = {name: getattr(config.decoder, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    expected = model.generate(**given, **settings, **tokens)
    engine = state._engine
    requests = [
        Request(ids, max_new_tokens=options.steps, guidance_scale=3.0, temperature=0.0, top_k=45, seed=0)
        for ids in given["input_ids"].tolist()
    ]
    spoken = loop.speak(engine, requests)
    assert torch.equal(spoken[0].delayed_codes.long(), expected[0].cpu()), "the engine speaks something else"
    found: dict[str, Callable[[], Any]] = {
        "engine": lambda: loop.speak(engine, requests),
        "accelerate": lambda: model.generate(**given, **settings, **tokens),
    }
    if options.transformers:
        own = type(model).generate
        # Called like this the class's own method finds no call of ours under way, and the hooks let everything pass.
        found["transformers"] = lambda: own(model, **given, **settings, **tokens)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 1 if the drop-in costs more than it may."""
    parser = argparse.ArgumentParser(prog="dropin", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; random weights by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text", type=int, default=100, help="bytes of text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false", help="skip the model's own")
    parser.add_argument("--copy", action="store_true", help="accelerate(share_memory=False)")
    add_options(parser)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        results = Results(parser, options, arguments, device)
    except DiaFastError as error:
        print(f"dropin: {error}", file=sys.stderr)
        return 2
    model = load(options.model, getattr(torch, options.dtype))
    if torch.cuda.is_available():
        model.cuda()
    calls, clock = sides(model, options), CLOCKS[options.clock]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[name].append(clock() - start)
    return results.end(report(seconds, options, results))


def report(seconds: dict[str, list[float]], options: argparse.Namespace, results: Results) -> int:
    """Print the medians, the cost of the drop-in, and its lead."""
    from bench.measure import describe_machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{describe_machine(device)}; torch {torch.__version__}; {options.clock} clock; batch {options.batch}")
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        spread = f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"
        print(f"{name:13} {middle[name] * 1e3:8.1f} ms for {options.steps} steps ({spread})")
        results.add({"side": name, "clock": options.clock}, {"median_s": middle[name], "min_s": min(times)})
    # In pairs of one round, so that a change of the machine's pace meets both.
    extra = [after - before for before, after in zip(seconds["engine"], seconds["accelerate"], strict=True)]
    cost = statistics.median(extra) / middle["engine"]
    print(f"the drop-in costs {cost:.1%} of a call ({statistics.median(extra) * 1e3:.2f} ms); allowed: {MOST:.0%}")
    results.add({"side": "drop-in", "clock": options.clock}, {"extra_s": statistics.median(extra), "share": cost})
    if "transformers" in middle:
        print(f"ratio {middle['accelerate'] / middle['transformers']:.3f} of transformers' time, for the whole call")
    return int(cost > MOST)


if __name__ == "__main__":
    sys.exit(main())
