"""The trainer of the demo voice, here on a CPU, against `dia_fast.training`; and its runs that were stopped."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.tools.pairs import pack
from bench.tools.tiny_models import random_state, tiny_config
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import save_pretrained
from dia_fast.errors import InputError
from dia_fast.model.model import DiaModel
from dia_fast.text.tokenizer import encode_text
from dia_fast.training import Example, batch_loss, build_batch
from dia_kernels import get_ops
from examples.demo_voice import train
from examples.demo_voice.codes import TurnCodes
from examples.demo_voice.dialogues import TURNS, Dialogue, Dialogues
from examples.demo_voice.train import Data, Plan, Training
from tests.helpers.tolerance import (
    EVALUATIONS,
    assert_equal_up_to_rounding,
    assert_same_numbers,
    nudged_weights,
    of_weights,
)

CONFIG = tiny_config()
CPU = torch.device("cpu")
HEIGHTS = (24, 40)
WEIGHTS = (3.0, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5)
PLAN = Plan(
    steps=20,
    rows=96,
    rate=1e-3,
    warmup=2,
    dropout=0.0,
    drop_text=0.2,
    channel_weights=WEIGHTS,
    dtype="float32",
    seed=4,
    epoch=12,
)


def some_dialogues(count: int, longest: int = 24) -> list[Dialogue]:
    generator = torch.Generator().manual_seed(3)
    return [
        Dialogue(
            f"[S1] {'abcdefghijklmnop'[: 3 + number]}",
            torch.randint(0, 1024, (frames, 9), generator=generator).short(),
            torch.ones(frames, dtype=torch.bool),
            ("af_heart",),
        )
        for number, frames in enumerate(torch.linspace(3, longest, count).int().tolist())
    ]


def examples_of(dialogues: list[Dialogue]) -> list[Example]:
    return [Example(encode_text(dialogue.text), dialogue.codes.long()) for dialogue in dialogues]


def begin(dialogues: list[Dialogue], plan: Plan = PLAN) -> Training:
    return Training(pack(CONFIG, random_state(CONFIG)), Data(dialogues, CONFIG, CPU, HEIGHTS), plan)


def test_loss_and_gradients_are_those_of_dia_fast() -> None:
    dialogues = some_dialogues(4)
    ours = begin(dialogues)
    mean, sums, counts, _ = ours.loss(torch.arange(4), 40)
    mean.backward()
    examples = examples_of(dialogues)

    model = DiaModel(CONFIG, get_ops("torch")).load(pack(CONFIG, random_state(CONFIG))).requires_grad_(True)
    numbers, gradients = [], []
    for moved in range(EVALUATIONS):
        with nudged_weights(model, moved) if moved else nullcontext():
            model.zero_grad()
            wanted = batch_loss(model, build_batch(examples, CONFIG), channel_weights=torch.tensor(WEIGHTS))
            wanted.mean.backward()
            numbers.append([wanted.mean.item(), *wanted.sums.tolist()])
            gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    # The loss is a sum over labels, which is added up in another order.
    assert_same_numbers([mean.item()], [row[:1] for row in numbers], "mean", terms=mean.item())
    assert_same_numbers(sums.tolist(), [row[1:] for row in numbers], "sums", terms=float(sums.max()))
    assert counts.tolist() == wanted.counts.tolist()
    for name in gradients[0]:
        got = ours.weights[name].grad
        assert got is not None
        assert_equal_up_to_rounding(got, [found[name] for found in gradients], name)


def test_the_height_of_a_batch_changes_nothing() -> None:
    dialogues = some_dialogues(3, longest=8)
    run = begin(dialogues)
    assert run.data.height([0, 1, 2]) == 24
    low, high = (run.loss(torch.arange(3), height)[0].item() for height in HEIGHTS)
    model = DiaModel(CONFIG, get_ops("torch")).load(pack(CONFIG, random_state(CONFIG)))
    batch = build_batch(examples_of(dialogues), CONFIG)
    found = of_weights(model, lambda: batch_loss(model, batch, channel_weights=torch.tensor(WEIGHTS)).mean.detach())
    for got in (low, high):
        assert_same_numbers([got], [[item.item()] for item in found], terms=got)  # sums of labels


def test_frames_that_are_given_are_read_and_not_learnt() -> None:
    whole = some_dialogues(1, longest=12)[0]
    learnt = torch.arange(len(whole.codes)) >= 2
    given = replace(whole, learnt=learnt)
    changed = replace(given, codes=torch.where(learnt[:, None], given.codes, 7))
    loss = {}
    for name, dialogue in (("whole", whole), ("given", given), ("changed", changed)):
        loss[name], _, counts, _ = begin([dialogue]).loss(torch.arange(1), 40)
        # EOS is a label in each channel, as well.
        assert counts.tolist() == [int(dialogue.learnt.sum()) + 1] * 9
    assert len({value.item() for value in loss.values()}) == 3


def test_each_step_disturbs_texts_and_codes_but_no_label() -> None:
    run = begin(some_dialogues(6), replace(PLAN, rows=160))
    run.step(1, 40, torch.arange(4))
    drawn = run.drawn[40]

    def disturbed(kept: float, chances: float) -> float:
        drawn.kept.fill_(kept), drawn.chances.fill_(chances)
        mean, _, counts, _ = run.loss(drawn.items, 40, disturbed=True)
        assert torch.equal(counts, labels)
        return mean.item()

    assert len(drawn.kept.unique()) == 4 and len(drawn.chances.unique()) > 1000
    mean, _, labels, _ = run.loss(drawn.items, 40)
    assert disturbed(1, 1) == mean.item()
    assert len({disturbed(1, 1), disturbed(0, 1), disturbed(1, 0), disturbed(0, 0)}) == 4
    run.plan = replace(run.plan, dropout=0.5)
    assert len({disturbed(1, 1), disturbed(1, 1), mean.item(), run.loss(drawn.items, 40)[0].item()}) == 3


def test_an_epoch_has_every_dialogue_once_but_for_the_rest() -> None:
    data = Data(some_dialogues(11), CONFIG, CPU, HEIGHTS)
    for seed in range(4):
        epoch = data.batches(96, seed)
        items = torch.cat([items for _, items in epoch])
        assert len(items.unique()) == len(items) >= 7
        for height, batch in epoch:
            assert len(batch) == 96 // height
            assert (data.rows[batch.numpy()] <= height).all()
    assert [items.tolist() for _, items in epoch] != [items.tolist() for _, items in data.batches(96, 0)]


def test_it_learns_the_same_for_the_same_seed() -> None:
    losses = []
    for _ in range(2):
        run = begin(some_dialogues(6))
        before = run.evaluate(run.data)
        batches = run.data.batches(96, 1) * 8
        for number, (height, items) in enumerate(batches[:8], 1):
            run.step(number, height, items)
        losses.append(run.evaluate(run.data))
        assert sum(losses[-1]) / 9 < sum(before) / 9 - 0.03
        assert len(run.seen()) == 9
    assert losses[0] == losses[1]


def test_a_state_is_taken_into_the_tensors_that_are_there(tmp_path: Path) -> None:
    """A captured graph has their addresses."""
    saved, other = begin(some_dialogues(6)), begin(some_dialogues(6))
    for run, count in ((saved, 3), (other, 1)):
        for number, (height, items) in enumerate((run.data.batches(96, 1) * 3)[:count], 1):
            run.step(number, height, items)
    saved.save(tmp_path / "state.pt", 3)
    before = [value for state in other.optimizer.state.values() for value in state.values()]
    assert other.restore(tmp_path / "state.pt") == 3
    after = [value for state in other.optimizer.state.values() for value in state.values()]
    wanted = [value for state in saved.optimizer.state.values() for value in state.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, wanted, strict=True))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="needs 46 rows, and 40 are prepared"):
        Data(some_dialogues(2, longest=30), CONFIG, CPU, HEIGHTS)
    with pytest.raises(InputError, match="2 dialogues do not fill a batch of 160 rows"):
        Data(some_dialogues(2, longest=24), CONFIG, CPU, HEIGHTS).batches(160, 1)


def source_of(count: int) -> Dialogues:
    turns = [TurnCodes(voice, "Yes.", some_dialogues(1, 4)[0].codes) for voice in ("a", "b") for _ in range(count)]
    return Dialogues(turns, torch.zeros(9, dtype=torch.int16), 24)


def test_it_begins_with_single_turns_and_goes_on_with_dialogues() -> None:
    drawn = list[tuple[int, ...]]()

    class Source(Dialogues):
        def draw(self, seed: int, count: int, turns: tuple[int, ...] = TURNS) -> list[Dialogue]:  # type: ignore[override]
            drawn.append(turns)
            return super().draw(seed, count, (1,))

    source = Source(source_of(3).of["a"] + source_of(3).of["b"], torch.zeros(9, dtype=torch.int16), 24)
    data = Data(source.draw(1, 12), CONFIG, CPU, HEIGHTS)
    drawn.clear()
    numbers = [number for number, _, _ in train.steps_of(source, data, replace(PLAN, short=0.5), first=3)]
    assert numbers == list(range(3, 21))
    assert drawn[0] == (1,) and drawn[-1] == TURNS and drawn == sorted(drawn, key=len)


def test_a_training_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = save_pretrained(tmp_path / "untrained", CONFIG, pack(CONFIG, random_state(CONFIG)))
    monkeypatch.setattr(train, "HEIGHTS", HEIGHTS)
    plan, source = replace(PLAN, steps=6, look=2), source_of(3)
    done, step = [], Training.step

    def stopped(run: Training, number: int, height: int, items: torch.Tensor) -> None:
        done.append(number)
        if len(done) == 4:
            raise KeyboardInterrupt
        step(run, number, height, items)

    monkeypatch.setattr(Training, "step", stopped)
    given = source.draw(0, 3), untrained, tmp_path / "made", plan
    with pytest.raises(KeyboardInterrupt):
        train.train(source, *given)
    assert not (tmp_path / "made").exists()
    made = open_checkpoint(train.train(source, *given))
    assert done == [1, 2, 3, 4, 3, 4, 5, 6]
    assert capsys.readouterr().out.count("held out") == 3
    learnt, before = made.load(), open_checkpoint(untrained).load()
    assert made.config == CONFIG
    assert all(torch.isfinite(weight).all() for weight in learnt.values())
    assert not torch.equal(learnt["decoder.head"], before["decoder.head"])


def test_what_is_astray_is_counted_turn_by_turn() -> None:
    text = "[S1] Yes. [S2] No, not yet."
    codes = torch.zeros(36, 9, dtype=torch.int16)
    dialogue = Dialogue(text, codes, torch.ones(36, dtype=torch.bool), ("a", "b"), ((2, 12), (16, 34), (35, 35)))
    data = Data([dialogue], CONFIG, CPU, (64,))
    ids = encode_text(text)
    second = ids.index(2)
    aim, said = data.aim[0], data.spread[0] > 0
    assert said.nonzero()[:, 0].tolist() == [*range(2, 12), *range(16, 34)]
    assert (aim[2], aim[11], aim[16], aim[33]) == (1, second - 1, second + 1, len(ids) - 1)
    assert aim[2:12].diff().min() > 0 and aim[16:34].diff().min() > 0

    def lost(places: torch.Tensor) -> float:
        shares = torch.nn.functional.one_hot(places.long(), len(ids)).float()[None, None].expand(1, 2, -1, -1)
        return train.astray(shares, data.aim, data.spread).item()

    there, behind = aim.round(), (aim.round() + 8).clamp(max=len(ids) - 1)
    assert lost(there) < 0.02 < lost(behind) < lost(torch.zeros(64)) < 1
    where = torch.where(said, there, 5)  # rows without an aim do not count
    assert lost(where) == lost(there)


def test_guided_attention_goes_where_it_is_shown_and_is_let_go() -> None:
    dialogues = [replace(each, spoken=((0, len(each.codes)),)) for each in some_dialogues(4)]
    lost = dict[float, float]()
    for guide in (0.0, 5.0):
        run = begin(dialogues, replace(PLAN, rows=160, guide=guide, guided=1e9, drop_text=0.0))
        for number in range(1, 9):
            run.step(number, 40, torch.arange(4))
        lost[guide] = run.loss(torch.arange(4), 40)[3].item()
    assert lost[5.0] < lost[0.0] - 0.01
    plan = Plan(steps=100, guide=2.0, guided=0.5)
    assert [plan.guide_of(step) for step in (0, 25, 50, 90)] == [2.0, 1.0, 0.0, 0.0]
