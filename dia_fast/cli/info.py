"""`dia-fast info`: what a checkpoint is and what a run of it needs, without reading its weights."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from dia_fast.checkpoint import hub
from dia_fast.checkpoint.demo import located
from dia_fast.cli.paths import path
from dia_fast.errors import CheckpointError, InputError
from dia_fast.model.config import DiaConfig
from dia_fast.model.fused_weights import fused_shapes, parameter_count
from dia_fast.model.quantization import FLOAT, INT8, INT8_MLP, quantized_names
from dia_fast.utils.files import checked_path

DESCRIPTION = """\
Shows the configuration of a checkpoint, its parameters and files, and the memory that a run needs. Weights are not
read, and of a model on the Hub only the small files are downloaded.
"""

EXAMPLES = """\
examples:
  dia-fast info nari-labs/Dia-1.6B-0626
  what eight dialogues at once, each with 700 bytes of text and 1500 steps, would take in half precision
    dia-fast info my-folder --batch 8 --text-length 700 --length 1500 --dtype bf16
  for a program
    dia-fast info my-folder --json
"""

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "info",
        help="show a checkpoint's configuration, size and memory needs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="Hub repository or local folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--offline", action="store_true", help="use only what has been downloaded before")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="dialogues at once (%(default)s)")
    parser.add_argument("--length", type=int, metavar="N", help="steps, an audio prompt's included (the model's most)")
    parser.add_argument("--text-length", type=int, metavar="N", help="bytes of text (the model's most)")
    parser.add_argument("--no-guidance", action="store_true", help="reckon without the second, unconditional row")
    parser.add_argument("--dtype", choices=BYTES, help="reckon for one type only (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def memory_needed(
    config: DiaConfig,
    element: int,
    *,
    batch: int = 1,
    length: int,
    text_length: int,
    guided: bool = True,
    weights: str = FLOAT,
) -> dict[str, int]:
    """Bytes that stay allocated during a run: `weights`, `self_kv`, `cross_kv` and their `total`; the rest is small.

    element: bytes per number. weights: of `quantization.WEIGHTS`: a matrix in 8 bits is a byte per number, and four for
    each output channel. length: rows of the decoder per dialogue. Cross keys and values exist for the
    conditional row only.
    """
    decoder = config.decoder
    self_token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    cross_token = 2 * decoder.num_hidden_layers * decoder.cross_num_key_value_heads * decoder.cross_head_dim
    shapes = [fused_shapes(config)[name] for name in quantized_names(config, weights)]
    spared = sum(features * (hidden * (element - 1) - 4) for features, hidden in shapes)
    parts = {
        "weights": parameter_count(config) * element - spared,
        "self_kv": batch * (2 if guided else 1) * length * self_token * element,
        "cross_kv": batch * text_length * cross_token * element,
    }
    return parts | {"total": sum(parts.values())}


def _bounded(name: str, value: int | None, most: int) -> int:
    if value is None:
        return most
    if not 1 <= value <= most:
        raise InputError(f"{name} must be from 1 to {most} for this model, not {value}")
    return value


def readable(size: float) -> str:
    """Bytes for people: decimal units, three figures."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def run(args: argparse.Namespace) -> int:
    found = describe(args)
    config: DiaConfig = found.pop("config")
    if args.batch < 1:
        raise InputError(f"--batch must be at least 1, not {args.batch}")
    length = _bounded("--length", args.length, config.decoder.max_position_embeddings)
    text_length = _bounded("--text-length", args.text_length, config.encoder.max_position_embeddings)
    guided = not args.no_guidance
    needs = {
        dtype: memory_needed(
            config, BYTES[dtype], batch=args.batch, length=length, text_length=text_length, guided=guided
        )
        for dtype in ([args.dtype] if args.dtype else BYTES)
    }
    if not args.dtype:  # the same in fp16
        needs |= {
            weights: memory_needed(
                config, BYTES["bf16"], batch=args.batch, length=length, text_length=text_length, guided=guided,
                weights=weights,
            )
            for weights in (INT8, INT8_MLP)
        }  # fmt: skip
    run_of = {"batch": args.batch, "length": length, "text_length": text_length, "guidance": guided}
    if args.json:
        facts = {"model": args.model, "config": asdict(config), "parameters": parameter_count(config)}
        print(json.dumps(facts | found | {"run": run_of, "memory": needs}, indent=2))
        return 0
    print("\n".join(_lines(args.model, config, found)))
    rows = f"{args.batch} {'dialogue' if args.batch == 1 else 'dialogues'}, {'2 rows' if guided else '1 row'} each"
    print(f"\nmemory of a run ({rows}, {length} steps, {text_length} bytes of text)")
    print(f"  {'':<9}{'weights':>9}{'self KV':>10}{'cross KV':>10}{'total':>10}")
    for dtype, need in needs.items():
        cells = [readable(size) for size in need.values()]
        print(f"  {dtype:<9}{cells[0]:>9}" + "".join(f"{cell:>10}" for cell in cells[1:]))
    return 0


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """`config`, and what the files tell; of a Hub repository that is not in the cache, the configuration alone.

    args: with `model`, `revision` and `offline`. Raises CheckpointError.
    """
    from dia_fast.checkpoint.loading import open_checkpoint

    local = checked_path(located(args.model), "model").exists()
    try:
        checkpoint = open_checkpoint(args.model, revision=args.revision, local_files_only=not local)
    except CheckpointError:
        if local or args.offline or args.model.count("/") != 1:
            raise
        if "config.json" not in hub.file_names(args.model, args.revision):
            raise CheckpointError(f"the Hub repository {args.model} has no config.json: not a Dia checkpoint") from None
        return {"config": DiaConfig.from_file(hub.fetch_file(args.model, "config.json", args.revision))}
    return {
        "config": checkpoint.config,
        "layout": checkpoint.layout,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bytes": checkpoint.stored_bytes,
        "files": [str(file) for file in checkpoint.files],
    }


def generation(config: DiaConfig) -> str:
    """Name the generation by whose rules a checkpoint is run."""
    if config.first_generation:
        return "first (Dia-1.6B, April 2025): RoPE in cross-attention, sampling from the guided logits"
    return "second (Dia-1.6B-0626)"


def _lines(name: str, config: DiaConfig, found: dict[str, Any]) -> list[str]:
    encoder, decoder = config.encoder, config.decoder
    lines = [name]
    if "files" in found:
        count = f"{len(found['files'])} file{'s' if len(found['files']) > 1 else ''}"
        lines.append(f"  weights     {found['layout']} layout, {found['dtype']}, {readable(found['bytes'])} in {count}")
    else:
        lines.append("  weights     on the Hub, not downloaded")
    lines.append(f"  generation  {generation(config)}")
    lines.append(f"  parameters  {parameter_count(config):,}")
    for part, stack in (("encoder", encoder), ("decoder", decoder)):
        lines.append(
            f"  {part:<12}{stack.num_hidden_layers} layers, {stack.hidden_size} wide, MLP {stack.intermediate_size}, "
            f"{stack.num_attention_heads} heads over {stack.num_key_value_heads} KV heads, {stack.head_dim} wide"
        )
    lines.append(
        f"  cross       {decoder.cross_num_attention_heads} heads over {decoder.cross_num_key_value_heads} KV heads, "
        f"{decoder.cross_head_dim} wide"
    )
    lines.append(f"  text        {encoder.vocab_size} ids, at most {encoder.max_position_embeddings} bytes")
    lines.append(
        f"  audio       {decoder.num_channels} channels of {decoder.vocab_size} codes, at most "
        f"{decoder.max_position_embeddings} steps, delays {' '.join(map(str, config.delay_pattern))}"
    )
    return lines
