"""Trains the demo voice's Dia on dialogues that are joined anew for every epoch.

    python -m examples.demo_voice.train CODES UNTRAINED OUTPUT [--steps 6000]

On a GPU in minutes, as nothing waits for the CPU: all data lie on it, padded on the right; dialogues of like length
make a batch; and a whole step (forward, loss, backward, clipping, AdamW) is one CUDA graph for each of a few lengths.
Forward and loss are those of `dia_fast.training` in plain torch, as a test holds them to. Batches and what disturbs
them follow from the seed; sums on a GPU do not: two runs differ in their last digits. A run that was stopped goes on
from its last state.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import write_checkpoint
from dia_fast.errors import InputError
from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.device import DTYPES
from dia_fast.model.model import rope_table
from dia_fast.text.tokenizer import encode_text
from examples.demo_voice.codes import read
from examples.demo_voice.dialogues import TURNS, Dialogue, Dialogues
from examples.demo_voice.stages import save
from examples.demo_voice.turns import HELD_OUT_VOICES, text_is_held_out

HEIGHTS = (192, 288, 448, 640, 896, 1184)  # rows of the grid, of which each batch takes the smallest that holds it
HEIGHTS_ON_CPU = tuple(range(64, HEIGHTS[-1] + 1, 32))  # where no length has to be captured first
LETTERS = 0.5  # bytes of a transcript that are prepared for each row
TAGS = tuple(encode_text("[S1] a [S2]")[at] for at in (0, -1))
NEAR, FAR = 3.0, 0.08  # how far attention may be from where it should, in bytes, and in parts of a turn


@dataclass(frozen=True)
class Plan:
    """The plan of a training.

    steps: all of them. rows: of a batch's grid, in all of its dialogues. rate: the learning rate at its peak; it rises
    over `warmup` steps and falls to nothing over the last `fall` of the steps. short: the share of the steps in which
    all dialogues are single turns, where a model first finds out that sound follows text. epoch: dialogues that are
    joined at a time. guide: weight of the loss that shows half of the heads of cross-attention where in its turn the
    text should be by now (see `astray`) at the first step; it falls to nothing at `guided` of the steps. Without it a
    model finds out late that sound follows text. dropout: of embeddings and of what each part of a layer adds.
    drop_text, drop_codes, channel_weights, dtype: see `dia_fast.training.TrainOptions`. look: steps between lines of
    the log and states.
    """

    steps: int = 6000
    rows: int = 4096
    rate: float = 2e-3
    warmup: int = 100
    fall: float = 0.4
    short: float = 0.3
    epoch: int = 1500
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip: float = 1.0
    guide: float = 2.0
    guided: float = 0.5
    dropout: float = 0.15
    drop_text: float = 0.1
    drop_codes: float = 0.3
    channel_weights: tuple[float, ...] = (3, 2, 1.5, 1, 1, 1, 1, 1, 1)
    dtype: str = "bfloat16"
    seed: int = 1
    look: int = 50

    def rate_of(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return self.rate * min(step / self.warmup, 1.0, 0.01 + (self.steps - step) / (self.fall * self.steps))

    def guide_of(self, step: int) -> float:
        """The weight of the loss that guides attention."""
        return self.guide * max(0.0, 1 - step / (self.guided * self.steps))


class _Rows(torch.autograd.Function):
    """`[batch, length(, channels)]` -> `[batch, length, hidden]`: rows of a table, summed over channels if there are.

    Each channel has rows of its own. The gradient is a product with one-hots, without a sort or atomic additions.
    """

    @staticmethod
    def forward(context: Any, table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        context.save_for_backward(index)
        context.count, context.dtype = table.shape[0], dtype
        rows = F.embedding(index, table)
        return rows.sum(2) if index.dim() == 3 else rows

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = context.saved_tensors
        channels = index.shape[2] if index.dim() == 3 else 1
        width = context.count // channels
        within = index.reshape(-1, channels).T - (torch.arange(channels, device=index.device) * width)[:, None]
        hot = within[:, None, :] == torch.arange(width, device=index.device)[None, :, None]
        hot = hot.to(context.dtype).reshape(context.count, -1)
        return (hot @ gradients[0].flatten(0, 1).to(context.dtype)).float(), None, None


class Data:
    """Dialogues as tensors on a device, padded on the right.

    text: `[items, width]` int16, 0 behind the text. grid: `[items, heights[-1] + 1, channels]` int16, delayed as in
    `dia_fast.training.build_batch`, PAD behind EOS. learnt: like grid, bool: labels that count. aim, spread:
    `[items, heights[-1]]` float32, the byte of the text that a row should say if a turn were said evenly, and how far
    off that may be; no spread where nothing is said. rows: of the grid that each item needs for its codes and its text,
    and letters: of its text, int64 on the CPU.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        config: DiaConfig,
        device: torch.device,
        heights: Sequence[int] | None = None,
    ) -> None:
        """Raise InputError if a dialogue, or its transcript, is longer than the largest of heights holds."""
        heights = heights or (HEIGHTS if device.type == "cuda" else HEIGHTS_ON_CPU)
        self.config, self.device, self.heights = config, device, heights
        shape = (len(dialogues), heights[-1] + 1, len(config.delay_pattern))
        self.text = torch.zeros(len(dialogues), self.width(heights[-1]), dtype=torch.int16, device=device)
        self.grid = torch.zeros(shape, dtype=torch.int16, device=device)
        self.learnt = torch.zeros(shape, dtype=torch.bool, device=device)
        self.aim, self.spread = (torch.zeros(len(dialogues), heights[-1], device=device) for _ in range(2))
        self.fill(dialogues)

    def fill(self, dialogues: Sequence[Dialogue]) -> None:
        """Put as many other dialogues in the place of those that are there."""
        decoder, delay = self.config.decoder, self.config.delay_pattern
        texts = [encode_text(dialogue.text) for dialogue in dialogues]
        rows = [len(dialogue.codes) + 1 + max(delay) for dialogue in dialogues]
        self.letters = np.array(list(map(len, texts)))
        self.rows = np.array([max(n, math.ceil(len(ids) / LETTERS)) for n, ids in zip(rows, texts, strict=True)])
        if self.rows.max() > self.heights[-1]:
            raise InputError(f"a dialogue needs {self.rows.max()} rows, and {self.heights[-1]} are prepared")
        text = torch.zeros(self.text.shape, dtype=torch.int16)
        grid = torch.full(self.grid.shape, decoder.pad_token_id, dtype=torch.int16)
        learnt = torch.zeros(self.learnt.shape, dtype=torch.bool)
        aim, spread = torch.zeros(self.aim.shape), torch.zeros(self.spread.shape)
        for item, dialogue in enumerate(dialogues):
            text[item, : len(texts[item])] = torch.tensor(texts[item], dtype=torch.int16)
            for (first, end), (byte, last) in zip(dialogue.spoken, _turns(texts[item]), strict=False):
                if end <= first:  # a turn of silence
                    continue
                aim[item, first:end] = torch.linspace(byte, last, end - first)
                spread[item, first:end] = NEAR + FAR * (last - byte)
            for channel, late in enumerate(delay):
                end = 1 + late + len(dialogue.codes)
                grid[item, : 1 + late, channel] = decoder.bos_token_id
                grid[item, 1 + late : end, channel] = dialogue.codes[:, channel]
                grid[item, end, channel] = decoder.eos_token_id
                learnt[item, 1 + late : end, channel] = dialogue.learnt
                learnt[item, end, channel] = True
        self.text.copy_(text)
        self.grid.copy_(grid)
        self.learnt.copy_(learnt)
        self.aim.copy_(aim)
        self.spread.copy_(spread)

    def width(self, height: int) -> int:
        """Bytes of a transcript that go with a height."""
        return int(LETTERS * height)

    def longest(self, items: Tensor, height: int) -> int:
        """Bytes that are read for these items: on a GPU, which has captured them, always the same for a height."""
        return self.width(height) if self.device.type == "cuda" else int(self.letters[items.numpy()].max())

    def height(self, items: Any) -> int:
        """The smallest that holds all items."""
        return min(height for height in self.heights if height >= self.rows[items].max())

    def batches(self, rows: int, seed: int) -> list[tuple[int, Tensor]]:
        """`(height, items)` of an epoch: each item once but for a few that fill no batch of its height."""
        draw = np.random.default_rng(seed)
        made, lower = list[tuple[int, Tensor]](), 0
        for height in self.heights:
            mine = draw.permutation(np.flatnonzero((self.rows > lower) & (self.rows <= height)))
            size, lower = max(1, rows // height), height
            made += [(height, torch.from_numpy(mine[at : at + size])) for at in range(0, len(mine) - size + 1, size)]
        if not made:
            raise InputError(f"{len(self.rows)} dialogues do not fill a batch of {rows} rows")
        draw.shuffle(made)
        return [(height, items.to(self.device)) for height, items in made]


def _turns(text: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last byte of each turn in the bytes of a transcript."""
    tags = [at for at, byte in enumerate(text) if byte in TAGS]
    return [(first + 1, max(first + 1, end - 1)) for first, end in zip(tags, [*tags[1:], len(text)], strict=True)]


def astray(shares: Tensor, aim: Tensor, spread: Tensor) -> Tensor:
    """The share of attention that is far from where a row should be in its text; mean over rows that have an aim.

    Guided attention as in https://arxiv.org/abs/1710.08969, turn by turn. shares: `[batch, heads, rows, length]`. aim,
    spread: `[batch, rows]`, as in `Data`.
    """
    place = torch.arange(shares.shape[-1], device=shares.device, dtype=torch.float32)
    aimed = spread > 0
    apart = (place - aim[..., None]) / torch.where(aimed, spread, 1.0)[..., None]
    far = (1 - torch.exp(-0.5 * apart.square())) * aimed[..., None]
    return (shares.float() * far[:, None]).sum() / (aimed.sum() * shares.shape[1]).clamp(min=1)


class Network:
    """`dia_fast.training.forward.Forward` on padding at the right, so that no mask is needed but that of the text.

    weights: packed, float32. dtype: of matrix products; the residual stream stays in float32.
    """

    def __init__(self, config: DiaConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.dropout = 0.0  # of embeddings, and of what each part of a layer adds
        device = next(iter(weights.values())).device
        self._rotations = {part: rope_table(config, part, device) for part in ("encoder", "decoder")}

    def __call__(
        self, text: Tensor, seen: Tensor, rows: Tensor, aim: Tensor | None = None, spread: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[batch, steps, channels, vocab]` of text and its mask `[batch, length]`, rows `[.., channels]`.

        With aim and spread, `[batch, steps]`, also how far half of the heads of cross-attention are `astray`.
        """
        encoder, decoder = self.config.encoder, self.config.decoder
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        bias = bias.masked_fill(~seen, float("-inf"))[:, None, None, :]
        # On a GPU the fast kernels of attention want a mask of the full shape.
        mask = bias.expand(-1, encoder.num_attention_heads, text.shape[1], -1)
        x = self._dropped(_Rows.apply(self.weights["encoder.embedding"], text, self.dtype))
        for layer in range(encoder.num_hidden_layers):
            x = x + self._dropped(self._self_attention(x, f"encoder.layers.{layer}.", encoder, mask))
            x = x + self._dropped(self._mlp(x, f"encoder.layers.{layer}.", encoder.norm_eps))
        memory = self._norm(x, "encoder.norm", encoder.norm_eps)
        offsets = torch.arange(rows.shape[2], device=rows.device) * decoder.vocab_size
        lost = list[Tensor]()
        x = self._dropped(_Rows.apply(self.weights["decoder.embedding"], rows + offsets, self.dtype))
        for layer in range(decoder.num_hidden_layers):
            x = x + self._dropped(self._self_attention(x, f"decoder.layers.{layer}.", decoder, None))
            more, shares = self._cross_attention(x, f"decoder.layers.{layer}.", memory, bias)
            x = x + self._dropped(more)
            if aim is not None and spread is not None:
                lost.append(astray(shares[:, : shares.shape[1] // 2], aim, spread))
            x = x + self._dropped(self._mlp(x, f"decoder.layers.{layer}.", decoder.norm_eps))
        logits = self._linear(self._norm(x, "decoder.norm", decoder.norm_eps), "decoder.head")
        return logits.view(*rows.shape, decoder.vocab_size), torch.stack(lost).mean() if lost else None

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout else x

    def _self_attention(
        self, x: Tensor, prefix: str, stack: EncoderConfig | DecoderConfig, mask: Tensor | None
    ) -> Tensor:
        """mask: of the text; without one, each row sees those before it."""
        heads, kv_heads = stack.num_attention_heads, stack.num_key_value_heads
        qkv = self._linear(self._norm(x, f"{prefix}self_norm", stack.norm_eps), f"{prefix}qkv")
        turned, v = qkv.view(*x.shape[:2], -1, stack.head_dim).split((heads + kv_heads, kv_heads), 2)
        cos, sin = (table[: x.shape[1], None] for table in self._rotations[prefix.split(".")[0]])
        a, b = turned.float().chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(self.dtype)
        q, k = turned.split((heads, kv_heads), 2)
        shape = (-1, -1, -1, heads // kv_heads, -1)  # of query heads that share a key
        k, v = (part.unsqueeze(3).expand(shape).flatten(2, 3) for part in (k, v))
        return self._linear(_attention(q, k, v, mask), f"{prefix}o")

    def _cross_attention(self, x: Tensor, prefix: str, memory: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        decoder = self.config.decoder
        q = self._linear(self._norm(x, f"{prefix}cross_norm", decoder.norm_eps), f"{prefix}cross_q")
        kv = self._linear(memory, f"{prefix}cross_kv").view(*memory.shape[:2], -1, decoder.cross_head_dim)
        k, v = kv.chunk(2, 2)
        out, shares = _plain_attention(q.view(*q.shape[:2], -1, decoder.cross_head_dim), k, v, bias)
        return self._linear(out, f"{prefix}cross_o"), shares

    def _mlp(self, x: Tensor, prefix: str, eps: float) -> Tensor:
        gate, up = self._linear(self._norm(x, f"{prefix}mlp_norm", eps), f"{prefix}gate_up").chunk(2, -1)
        return self._linear(F.silu(gate) * up, f"{prefix}down")

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[name], eps).to(self.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name].to(self.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """At scale 1, all `[batch, length, heads, head_dim]`: `[batch, length, heads * head_dim]`; causal without mask."""
    if not q.is_cuda:
        return _plain_attention(q, k, v, mask)[0]
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=1.0)
    return out.transpose(1, 2).flatten(2)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_attention`, with the shares `[batch, heads, length, keys]`.

    On a CPU, at lengths such as these, several times as fast as its fused kernels, whose way back is slow.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if mask is None:
        mask = torch.full((q.shape[2], k.shape[2]), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    shares = (q @ k.transpose(2, 3) + mask).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2), shares


class _Drawn:
    """The items of a step of one height and the chances that disturb them; at fixed places, for its graph."""

    def __init__(self, size: int, height: int, channels: int, device: torch.device) -> None:
        self.items = torch.arange(size, device=device)
        self.kept = torch.zeros(size, device=device)
        self.chances = torch.zeros(size, height, channels, device=device)
        self.others = torch.zeros(size, height, channels, dtype=torch.int64, device=device)


class Training:
    """Weights, optimizer, and steps over data; on a GPU a step is a graph that reads its batch from fixed places."""

    def __init__(self, weights: Mapping[str, Tensor], data: Data, plan: Plan) -> None:
        """weights: packed, float32, on the device of data; they are trained in place."""
        self.data, self.plan, self.on_gpu = data, plan, data.device.type == "cuda"
        self.weights = {name: weight.requires_grad_(True) for name, weight in weights.items()}
        self.network = Network(data.config, self.weights, DTYPES[plan.dtype])
        channels = data.config.decoder.num_channels
        self.channel_weights = torch.tensor(plan.channel_weights, device=data.device)
        self.optimizer = self._optimizer()
        self.drawn = {
            height: _Drawn(max(1, plan.rows // height), height, channels, data.device) for height in data.heights
        }
        self.guide = torch.zeros((), device=data.device)
        self.sums, self.counts = (torch.zeros(channels, device=data.device) for _ in range(2))
        self._draw = torch.Generator(data.device)
        self._graphs: dict[int, Any] = {}
        self._gradients: list[list[Tensor | None]] = []  # of each graph, which writes to them where they are
        self._stream = torch.cuda.Stream() if self.on_gpu else None

    def step(self, number: int, height: int, items: Tensor) -> None:
        """Take a step, counted from 1; it is drawn from the seed and its number alone."""
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            drawn = self.drawn[height]
            self._draw.manual_seed(self.plan.seed * 1_000_003 + number)
            torch.manual_seed(self.plan.seed * 1_000_003 + number)  # of dropout
            drawn.items.copy_(items)
            drawn.kept.uniform_(generator=self._draw)
            drawn.chances.uniform_(generator=self._draw)
            drawn.others.random_(0, self.data.config.decoder.eos_token_id, generator=self._draw)
            self.guide.fill_(self.plan.guide_of(number))
            rate = self.plan.rate_of(number)
            for group in self.optimizer.param_groups:
                if self.on_gpu:
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            if self.on_gpu:
                self._graphs[height].replay()
            else:
                self.optimizer.zero_grad(set_to_none=True)
                self._body(height)

    def loss(self, items: Tensor, height: int, *, data: Data | None = None, disturbed: bool = False) -> Any:
        """`(weighted mean over the labels, sums [channels], counts [channels], attention astray)` of items of data.

        data: (default: that of the training).
        disturbed: some texts are dropped and some codes replaced, as the last step of this height has drawn it.
        """
        data, decoder, plan = data or self.data, self.data.config.decoder, self.plan
        text = data.text[:, : data.longest(items, height)].index_select(0, items).long()
        grid = data.grid[:, : height + 1].index_select(0, items).long()
        learnt = data.learnt[:, 1 : height + 1].index_select(0, items)
        aim, spread = (part[:, :height].index_select(0, items) for part in (data.aim, data.spread))
        seen, rows, labels = text > 0, grid[:, :-1], grid[:, 1:]
        if disturbed:
            drawn = self.drawn[height]
            kept = (drawn.kept >= plan.drop_text)[:, None]
            text, spread = text * kept, spread * kept
            hit = (drawn.chances < plan.drop_codes) & (rows < decoder.eos_token_id)
            rows = torch.where(hit, drawn.others, rows)
        self.network.dropout = plan.dropout if disturbed else 0.0
        logits, lost = self.network(text, seen, rows, aim, spread)
        logits = logits.float().flatten(0, 2)
        each = F.cross_entropy(logits, torch.where(learnt, labels, 0).flatten(), reduction="none").view(labels.shape)
        sums, counts = (each * learnt).sum((0, 1)), learnt.sum((0, 1)).float()
        mean = (sums * self.channel_weights).sum() / (counts * self.channel_weights).sum()
        return mean, sums.detach(), counts, lost

    @torch.no_grad()
    def evaluate(self, held_out: Data, size: int = 4) -> list[float]:
        """The loss of each channel on held-out dialogues."""
        sums = counts = torch.zeros_like(self.sums)
        order = torch.from_numpy(np.argsort(held_out.rows, kind="stable"))
        for items in order.split(size):
            height = held_out.height(items.numpy())
            _, more_sums, more_counts, _ = self.loss(items.to(held_out.device), height, data=held_out)
            sums, counts = sums + more_sums, counts + more_counts
        losses: list[float] = (sums / counts).tolist()
        return losses

    def seen(self) -> list[float]:
        """The loss of each channel since this was asked last."""
        losses: list[float] = (self.sums / self.counts).tolist()
        self.sums.zero_()
        self.counts.zero_()
        return losses

    def capture(self) -> None:
        """Make the graph of each height; leave weights and the optimizer as they were. Needs a GPU."""
        torch.cuda.synchronize()
        pool = None
        for height in reversed(self.data.heights):
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # with rate 0
                    self.optimizer.zero_grad(set_to_none=True)
                    self._body(height)
                self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._body(height)
            self._graphs[height], pool = graph, graph.pool()
            self._gradients.append([weight.grad for weight in self.weights.values()])
        with torch.no_grad():
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.sums.zero_()
            self.counts.zero_()
        torch.cuda.synchronize()

    def _body(self, height: int) -> None:
        loss, sums, counts, lost = self.loss(self.drawn[height].items, height, disturbed=True)
        (loss + self.guide * lost).backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.plan.clip)
        self.optimizer.step()
        self.sums += sums
        self.counts += counts

    def _optimizer(self) -> torch.optim.AdamW:
        """That of `dia-fast train`: weight decay pulls at matrices, not at norms nor at embeddings."""
        free = {name for name, weight in self.weights.items() if weight.ndim < 2 or name.endswith(".embedding")}
        groups = [
            {"params": [self.weights[name] for name in self.weights if (name in free) is spared], "weight_decay": decay}
            for spared, decay in ((False, self.plan.weight_decay), (True, 0.0))
        ]
        rate = torch.zeros((), device=self.data.device) if self.on_gpu else 0.0
        betas = 0.9, self.plan.beta2
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True, capturable=self.on_gpu)

    def save(self, path: Path, done: int) -> None:
        """Write the state after so many steps."""
        save({"done": done, "weights": self.weights, "optimizer": self.optimizer.state_dict()}, path)

    def restore(self, path: Path) -> int:
        """Go on from a state; return the steps that were done."""
        state = torch.load(path, map_location=self.data.device, weights_only=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        held, saved = self.optimizer.state_dict()["state"], state["optimizer"]["state"]
        if not held:
            self.optimizer.load_state_dict(state["optimizer"])
        for index, values in held.items():  # in place: captured graphs have these addresses, the rate's among them
            for name, value in values.items():
                value.copy_(saved[index][name])
        return int(state["done"])


def steps_of(source: Dialogues, data: Data, plan: Plan, first: int) -> Iterator[tuple[int, int, Tensor]]:
    """`(number, height, items)` from step `first` on; data is filled anew for each epoch.

    A run that goes on begins an epoch of its own, which its number decides.
    """
    number = first
    while number <= plan.steps:
        short = number <= plan.short * plan.steps
        seed = plan.seed * 1_000_003 + number
        data.fill(source.draw(seed, len(data.rows), (1,) if short else TURNS))
        for height, items in data.batches(plan.rows, seed):
            if number > plan.steps or short is not (number <= plan.short * plan.steps):
                break
            yield number, height, items
            number += 1


def train(source: Dialogues, held_out: Sequence[Dialogue], untrained: Path, output: Path, plan: Plan) -> Path:
    """Train, or go on, and write a checkpoint in the layout of transformers; return its folder, `output`.

    The state lies beside it, in `OUTPUT.state`; the log in `OUTPUT.log`.
    Raises InputError if the loss is not finite.
    """
    checkpoint = open_checkpoint(untrained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Data(source.draw(plan.seed, plan.epoch), checkpoint.config, device)
    unseen = Data(held_out, checkpoint.config, device)
    run, state = Training(checkpoint.load(torch.float32, device), data, plan), output.with_name(f"{output.name}.state")
    if run.on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would compile a plan for each length
        run.capture()
    done = run.restore(state) if state.is_file() else 0
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(f"{output.name}.log").open("a") as log:
        for number, height, items in steps_of(source, data, plan, done + 1):
            run.step(number, height, items)
            if number % plan.look == 0 or number == plan.steps:
                if run.on_gpu:
                    torch.cuda.synchronize()
                seen = run.seen()
                if not np.isfinite(seen).all():
                    raise InputError(f"training diverged before step {number}: the loss of the channels is {seen}")
                run.save(state, number)
                seconds = time.monotonic() - started
                line = f"{number} {seconds:.0f} s, {_said(seen)}; held out {_said(run.evaluate(unseen))}"
                log.write(f"{line}\n")
                log.flush()
                print(line, flush=True)
    dtypes = {name: checkpoint.stored_dtype(name) for name in run.weights}
    return write_checkpoint(
        output, checkpoint.config, dtypes, lambda name: run.weights[name].detach().to("cpu", dtypes[name])
    )


def _said(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.2f}" for loss in losses)


def sources(codes: Path, config: DiaConfig, count: int = 32) -> tuple[Dialogues, list[Dialogue]]:
    """Dialogues to learn from, and some of held-out texts."""
    turns, silence = read(codes)
    longest = HEIGHTS[-1] - 1 - max(config.delay_pattern)
    known = [turn for turn in turns if turn.voice not in HELD_OUT_VOICES]
    training, unseen = (
        Dialogues([turn for turn in known if text_is_held_out(turn.text) is held_out], silence, longest)
        for held_out in (False, True)
    )
    return training, unseen.draw(0, count)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("codes", "untrained", "output"):
        parser.add_argument(name, type=Path)
    for field in fields(Plan):
        if field.name != "channel_weights":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    codes, untrained, output = (options.pop(name) for name in ("codes", "untrained", "output"))
    source, held_out = sources(codes, open_checkpoint(untrained).config)
    train(source, held_out, untrained, output, Plan(**options))


if __name__ == "__main__":
    main()
