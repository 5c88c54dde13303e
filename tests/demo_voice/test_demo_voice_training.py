"""The making of the demo voice: its trainer for GPUs, here on a CPU, against `dia_fast.training`; and seeded speech."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.tools.pairs import pack
from bench.tools.tiny_models import random_state, tiny_config
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.errors import InputError
from dia_fast.model.model import DiaModel
from dia_fast.training import Example, TrainOptions, batch_loss, build_batch
from dia_kernels import get_ops
from examples.demo_voice import speech
from examples.demo_voice.on_gpu import Data, Training, train
from tests.helpers.tolerance import (
    EVALUATIONS,
    assert_equal_up_to_rounding,
    assert_same_numbers,
    nudged_weights,
    of_weights,
)
from tests.training.corpus import make_home

CONFIG = tiny_config()
CPU = torch.device("cpu")
HEIGHTS = (24, 40)
WEIGHTS = (3.0, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5)
OPTIONS = TrainOptions(
    "-", "-", batch_size=3, learning_rate=1e-3, warmup=2, drop_text=0.2, drop_codes=0.2, channel_weights=WEIGHTS, seed=4
)


def some_examples(count: int, longest: int = 24) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.linspace(3, longest, count).int().tolist()
    return [
        Example(
            torch.randint(1, 256, (5 + 2 * number,), generator=generator).tolist(),
            torch.randint(0, 1024, (frames, 9), generator=generator),
        )
        for number, frames in enumerate(lengths)
    ]


def begin(examples: list[Example], options: TrainOptions = OPTIONS) -> Training:
    return Training(pack(CONFIG, random_state(CONFIG)), Data(examples, CONFIG, CPU, HEIGHTS), options)


def test_loss_and_gradients_are_those_of_dia_fast() -> None:
    examples = some_examples(4)
    ours = begin(examples)
    mean, sums, counts = ours.loss(torch.arange(4), 40)
    mean.backward()

    model = DiaModel(CONFIG, get_ops("torch")).load(pack(CONFIG, random_state(CONFIG))).requires_grad_(True)
    numbers, gradients = [], []
    for moved in range(EVALUATIONS):
        with nudged_weights(model, moved) if moved else nullcontext():
            model.zero_grad()
            wanted = batch_loss(model, build_batch(examples, CONFIG), channel_weights=torch.tensor(WEIGHTS))
            wanted.mean.backward()
            numbers.append([wanted.mean.item(), *wanted.sums.tolist()])
            gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert_same_numbers([mean.item(), *sums.tolist()], numbers)
    assert counts.tolist() == wanted.counts.tolist()
    for name in gradients[0]:
        got = ours.weights[name].grad
        assert got is not None
        assert_equal_up_to_rounding(got, [found[name] for found in gradients], name)


def test_the_height_of_a_batch_changes_nothing() -> None:
    examples = some_examples(3, longest=8)
    run = begin(examples)
    assert run.data.height([0, 1, 2]) == 24
    low, high = (run.loss(torch.arange(3), height)[0].item() for height in HEIGHTS)
    model = DiaModel(CONFIG, get_ops("torch")).load(pack(CONFIG, random_state(CONFIG)))
    batch = build_batch(examples, CONFIG)
    found = of_weights(model, lambda: batch_loss(model, batch, channel_weights=torch.tensor(WEIGHTS)).mean.detach())
    for got in (low, high):
        assert_same_numbers([got], [[item.item()] for item in found])


def test_each_step_disturbs_texts_and_codes_but_no_label() -> None:
    run = begin(some_examples(6))
    run.step(1)

    def disturbed(kept: float, chances: float) -> float:
        run.kept.fill_(kept), run.chances.fill_(chances)
        mean, _, counts = run.loss(run.items, 40, disturbed=True)
        assert torch.equal(counts, labels)
        return mean.item()

    assert len(run.kept.unique()) == 3 and len(run.chances.unique()) > 1000
    mean, _, labels = run.loss(run.items, 40)
    assert disturbed(1, 1) == mean.item()
    assert len({disturbed(1, 1), disturbed(0, 1), disturbed(1, 0), disturbed(0, 0)}) == 4


def test_an_epoch_has_every_recording_once_but_for_the_rest() -> None:
    data = Data(some_examples(11), CONFIG, CPU, HEIGHTS)
    draws = data.batches(3, seed=1)
    for _ in range(4):
        epoch = [next(draws) for _ in range(3)]
        items = torch.cat([items for _, items in epoch])
        assert len(items.unique()) == len(items) == 9
        assert all((data.rows[items.numpy()] <= height).all() for height, items in epoch)
    assert [items.tolist() for _, items in epoch] != [next(draws)[1].tolist() for _ in range(3)]


def test_it_learns_the_same_for_the_same_seed() -> None:
    losses = []
    for _ in range(2):
        run = begin(some_examples(6))
        before = run.evaluate(run.data)
        for number in range(1, 9):
            run.step(number)
        losses.append(run.evaluate(run.data))
        assert np.mean(losses[-1]) < np.mean(before) - 0.05
        assert len(run.seen()) == 9
    assert losses[0] == losses[1]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="needs 46 rows, and 40 are prepared"):
        Data(some_examples(2, longest=30), CONFIG, CPU, HEIGHTS)
    with pytest.raises(InputError, match="2 recordings do not fill a batch of 3"):
        next(Data(some_examples(2), CONFIG, CPU, HEIGHTS).batches(3, seed=1))


def test_from_recordings_to_a_checkpoint(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    options = replace(
        OPTIONS, model=str(home / "model"), codec=str(home / "codec"), data=str(home / "data"), steps=2, eval_share=0.2
    )
    made = train(options, tmp_path / "codes", tmp_path / "made", CPU)
    old, new = (open_checkpoint(folder) for folder in (home / "model", made))
    assert new.config == old.config and new.dtype == old.dtype
    learnt = new.load()
    assert all(torch.isfinite(weight).all() for weight in learnt.values())
    assert not torch.equal(learnt["decoder.head"], old.load()["decoder.head"])


def test_the_other_throat_leaves_nothing_to_chance() -> None:
    times = np.arange(speech.RATE) / speech.RATE
    sound = 0.3 * np.sign(np.sin(2 * np.pi * 95 * times)) * (times < 0.5)
    sound += 0.05 * np.random.default_rng(0).normal(size=speech.RATE) * (times > 0.4)
    first, again = (speech._other_throat(sound, 185.0) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.abs(first).max() > 0.05
