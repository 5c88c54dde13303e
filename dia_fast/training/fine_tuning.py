"""`finetune`: from a checkpoint and recordings to a checkpoint; what `dia-fast train` does."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dia_fast.audio.code_store import default_cache
from dia_fast.audio.codec import Codec, codec_for, load_codec
from dia_fast.audio.codec.load import AUTO
from dia_fast.checkpoint.loading import Checkpoint, open_checkpoint
from dia_fast.checkpoint.saving import write_checkpoint
from dia_fast.errors import CheckpointError, InputError
from dia_fast.model.device import choose_device
from dia_fast.training.data import Dataset, Recording, load_dataset, read_recordings, split
from dia_fast.training.lora import save_adapters
from dia_fast.training.options import TrainOptions
from dia_fast.training.plot import plot_losses
from dia_fast.training.run import Run
from dia_fast.training.trainer import Trainer, train_steps
from dia_fast.utils.files import checked_path, replacing_folder

PLOT_SECONDS = 60.0  # between pictures of the loss during a run


def finetune(
    output: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    backend: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    offline: bool = False,
    quiet: bool = True,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Path:
    """Train and write `output/model`, a checkpoint in the layout of transformers; return its path.

    Args:
        output: A new folder, or with `resume` that of a run that was interrupted.
        options: Fields of `TrainOptions`; when resuming only those that are to be checked, or changed where that
            changes no result.
        resume: Go on with the run in `output`.
        device: See `Dia.from_pretrained`.
        backend: See `Dia.from_pretrained`.
        cache: The folder of codes (default: the user's).
        offline: Use only what has been downloaded before.
        quiet: No progress bar while audio is encoded.
        report: Called with each line of the log.

    Raises:
        InputError: For a value that cannot be used.
        CheckpointError: For a checkpoint that cannot be used.
        KeyboardInterrupt: When it was asked to stop, with a state saved from which `resume` goes on to the same end.
    """
    folder, place = checked_path(output, "output"), choose_device(device)
    named = _absolute(options)
    run = Run.reopen(folder, named) if resume else Run.create(folder, TrainOptions.from_dict(named))
    chosen = run.options
    if run.model.is_dir():
        return _with_codec(run.model, chosen)
    checkpoint = open_checkpoint(chosen.model, local_files_only=offline)
    store = default_cache() if cache is None else checked_path(cache, "cache")
    training, held_out = _datasets(chosen, checkpoint, place, store, offline, quiet)
    trainer = Trainer(checkpoint, chosen, place, backend)
    run.begin(f"{training.digest} {held_out.digest}")

    drawn = time.monotonic()

    def look(line: dict[str, Any]) -> None:
        nonlocal drawn
        if time.monotonic() - drawn > PLOT_SECONDS:
            plot_losses(run.lines(), folder / "loss.png")
            drawn = time.monotonic()
        report(line)

    try:
        train_steps(trainer, run, training, held_out, look)
    except BaseException:
        with contextlib.suppress(InputError):  # what ended the run is to be told, not that its picture failed, too
            plot_losses(run.lines(), folder / "loss.png")
        raise
    finally:
        run.close()
    plot_losses(run.lines(), folder / "loss.png")
    return _with_codec(_write(trainer, run, checkpoint), chosen)


def _datasets(
    options: TrainOptions, checkpoint: Checkpoint, device: torch.device, cache: Path, offline: bool, quiet: bool
) -> tuple[Dataset, Dataset]:
    """`(training, held out)`. Texts and paths are looked at before the codec is loaded, which may be a download."""
    recordings = read_recordings(options.data)
    others = [] if options.eval_data is None else read_recordings(options.eval_data)
    codec = load_codec(codec_for(options.model, options.codec), device, local_files_only=offline)
    _check_codec(codec, checkpoint)

    def load(found: list[Recording]) -> Dataset:
        return load_dataset(found, checkpoint.config, codec, cache, skip_bad=options.skip_bad, hidden=quiet)

    dataset = load(recordings)
    return (dataset, load(others)) if others else split(dataset, options.eval_share, options.seed)


def _write(trainer: Trainer, run: Run, checkpoint: Checkpoint) -> Path:
    """The finished model, its weights in the dtype of the checkpoint it began with; before it, adapters if any."""
    if trainer.adapters:
        _write_adapters(trainer, run.folder / "adapter", checkpoint.source)
    dtypes = {name: checkpoint.stored_dtype(name) for name in dict(trainer.model.named_parameters())}

    def fetch(name: str) -> Tensor:
        if name in trainer.trained:
            return trainer.trained[name].detach().to("cpu", dtypes[name])
        weight = checkpoint.load_fused(name, dtypes[name])
        adapter = trainer.adapters.get(name)
        return weight if adapter is None else adapter.merged(weight)

    return write_checkpoint(run.model, checkpoint.config, dtypes, fetch, defaults=checkpoint.defaults)


def _with_codec(model: Path, options: TrainOptions) -> Path:
    """The finished model, and beside it the codec that lay beside the one it began with."""
    codec = Path(codec_for(options.model, options.codec))
    if options.codec == AUTO and codec.is_dir() and not (model / "codec").is_dir():
        with replacing_folder(model / "codec") as partial:
            shutil.copytree(codec, partial, dirs_exist_ok=True)
    return model


def _write_adapters(trainer: Trainer, folder: Path, base: str) -> None:
    with replacing_folder(folder, over=True) as partial:  # over that of a run that was killed before its model came
        save_adapters(partial, trainer.config, trainer.adapters, base)


def _check_codec(codec: Codec, checkpoint: Checkpoint) -> None:
    decoder = checkpoint.config.decoder
    if codec.num_codebooks != decoder.num_channels or codec.codebook_size > decoder.eos_token_id:
        raise CheckpointError(
            f"the codec has {codec.num_codebooks} codebooks of {codec.codebook_size} codes, and the model speaks "
            f"{decoder.num_channels} channels of {decoder.eos_token_id}: they do not belong together"
        )


def _absolute(options: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as they are from anywhere, so that a run can be resumed from another folder; Hub names stay."""
    found = dict(options)
    for name in ("model", "codec", "data", "eval_data"):
        if isinstance(found.get(name), str | os.PathLike):
            path = Path(os.path.expanduser(found[name]))
            with contextlib.suppress(OSError):
                found[name] = str(path.resolve()) if path.exists() else os.fspath(found[name])
    return found
