"""Trains the demo voice's Dia on a GPU in a minute or two: what `dia-fast train` learns, but never waiting for the CPU.

A model this small would leave a GPU idle between launches. So all data lie on it, padded on the right; recordings of
like length make a batch; and a whole step (forward, loss, backward, clipping, AdamW) is one CUDA graph for each of a
few lengths. Forward and loss are those of `dia_fast.training` in plain torch, as a test holds them to. Batches and what
disturbs them follow from the seed, sums on a GPU do not: two runs differ in their last digits.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dia_fast.audio.codec import load_codec
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import write_checkpoint
from dia_fast.errors import InputError
from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.device import DTYPES
from dia_fast.model.model import rope_table
from dia_fast.training import Example, TrainOptions, load_dataset, read_recordings
from dia_fast.training.data import split

HEIGHTS = (112, 160, 208, 320)  # rows of the grid, of which each batch takes the smallest that holds it
ALIKE = 16  # batches are made of as many times their size, put into order of length
LOOK = 500  # steps between lines of the log


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
    """Examples as tensors on a device, padded on the right.

    text: `[items, length]` int16, 0 behind the text. grid: `[items, heights[-1] + 1, channels]` int16, delayed as in
    `dia_fast.training.build_batch`, PAD behind EOS. rows: of the grid that each item needs, int64 on the CPU.
    """

    def __init__(
        self, examples: Sequence[Example], config: DiaConfig, device: torch.device, heights: Sequence[int] = HEIGHTS
    ) -> None:
        """Raise InputError if an example is longer than the largest of heights."""
        decoder, delay = config.decoder, config.delay_pattern
        self.config, self.device, self.heights = config, device, heights
        self.rows = np.array([len(example.codes) + 1 + max(delay) for example in examples])
        if self.rows.max() > heights[-1]:
            raise InputError(f"a recording needs {self.rows.max()} rows, and {heights[-1]} are prepared")
        width = -(-max(len(example.text) for example in examples) // 16) * 16
        text = torch.zeros(len(examples), width, dtype=torch.int16)
        shape = (len(examples), heights[-1] + 1, len(delay))
        grid = torch.full(shape, decoder.pad_token_id, dtype=torch.int16)
        for item, example in enumerate(examples):
            text[item, : len(example.text)] = torch.tensor(example.text, dtype=torch.int16)
            for channel, late in enumerate(delay):
                end = 1 + late + len(example.codes)
                grid[item, : 1 + late, channel] = decoder.bos_token_id
                grid[item, 1 + late : end, channel] = example.codes[:, channel]
                grid[item, end, channel] = decoder.eos_token_id
        self.text, self.grid = text.to(device), grid.to(device)

    def height(self, items: Any) -> int:
        """The smallest that holds all items."""
        return min(height for height in self.heights if height >= self.rows[items].max())

    def batches(self, size: int, seed: int) -> Iterator[tuple[int, Tensor]]:
        """Endless `(height, items)`, epoch after epoch, each but for a few items that fill no batch."""
        draw = np.random.default_rng(seed)
        while True:
            order, made = draw.permutation(len(self.rows)), []
            for first in range(0, len(order), ALIKE * size):
                part = order[first : first + ALIKE * size]
                part = part[np.argsort(self.rows[part], kind="stable")]
                skipped = int(draw.integers(len(part) % size + 1))
                made += [part[start : start + size] for start in range(skipped, len(part) - size + 1, size)]
            if not made:
                raise InputError(f"{len(order)} recordings do not fill a batch of {size}")
            draw.shuffle(made)
            items = torch.from_numpy(np.stack(made)).to(self.device)
            yield from ((self.height(batch), items[number]) for number, batch in enumerate(made))


class Network:
    """`dia_fast.training.forward.Forward` on padding at the right, so that no mask is needed but that of the text.

    weights: packed, float32. dtype: of matrix products; the residual stream stays in float32.
    """

    def __init__(self, config: DiaConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        device = next(iter(weights.values())).device
        self._rotations = {part: rope_table(config, part, device) for part in ("encoder", "decoder")}

    def __call__(self, text: Tensor, seen: Tensor, rows: Tensor) -> Tensor:
        """Logits `[batch, steps, channels, vocab]` of text and its mask `[batch, length]`, rows `[.., channels]`."""
        encoder, decoder = self.config.encoder, self.config.decoder
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        bias = bias.masked_fill(~seen, float("-inf"))[:, None, None, :]
        # A mask of the full shape, as the fast kernels of attention want it.
        mask = bias.expand(-1, encoder.num_attention_heads, text.shape[1], -1)
        x = _Rows.apply(self.weights["encoder.embedding"], text, self.dtype)
        for layer in range(encoder.num_hidden_layers):
            x = x + self._self_attention(x, f"encoder.layers.{layer}.", encoder, mask)
            x = x + self._mlp(x, f"encoder.layers.{layer}.", encoder.norm_eps)
        memory = self._norm(x, "encoder.norm", encoder.norm_eps)
        offsets = torch.arange(rows.shape[2], device=rows.device) * decoder.vocab_size
        mask = bias.expand(-1, decoder.cross_num_attention_heads, rows.shape[1], -1)
        x = _Rows.apply(self.weights["decoder.embedding"], rows + offsets, self.dtype)
        for layer in range(decoder.num_hidden_layers):
            x = x + self._self_attention(x, f"decoder.layers.{layer}.", decoder, None)
            x = x + self._cross_attention(x, f"decoder.layers.{layer}.", memory, mask)
            x = x + self._mlp(x, f"decoder.layers.{layer}.", decoder.norm_eps)
        logits = self._linear(self._norm(x, "decoder.norm", decoder.norm_eps), "decoder.head")
        return logits.view(*rows.shape, decoder.vocab_size)

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

    def _cross_attention(self, x: Tensor, prefix: str, memory: Tensor, mask: Tensor) -> Tensor:
        decoder = self.config.decoder
        q = self._linear(self._norm(x, f"{prefix}cross_norm", decoder.norm_eps), f"{prefix}cross_q")
        kv = self._linear(memory, f"{prefix}cross_kv").view(*memory.shape[:2], -1, decoder.cross_head_dim)
        k, v = kv.chunk(2, 2)
        return self._linear(
            _attention(q.view(*q.shape[:2], -1, decoder.cross_head_dim), k, v, mask), f"{prefix}cross_o"
        )

    def _mlp(self, x: Tensor, prefix: str, eps: float) -> Tensor:
        gate, up = self._linear(self._norm(x, f"{prefix}mlp_norm", eps), f"{prefix}gate_up").chunk(2, -1)
        return self._linear(F.silu(gate) * up, f"{prefix}down")

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[name], eps).to(self.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name].to(self.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """At scale 1, all `[batch, length, heads, head_dim]`: `[batch, length, heads * head_dim]`; causal without mask."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=1.0)
    return out.transpose(1, 2).flatten(2)


class Training:
    """Weights, optimizer, and steps over data; on a GPU a step is a graph that reads its batch from fixed places."""

    def __init__(self, weights: Mapping[str, Tensor], data: Data, options: TrainOptions) -> None:
        """weights: packed, float32, on the device of data; they are trained in place."""
        self.data, self.options, self.on_gpu = data, options, data.device.type == "cuda"
        self.weights = {name: weight.requires_grad_(True) for name, weight in weights.items()}
        self.network = Network(data.config, self.weights, DTYPES[options.dtype])
        channels = data.config.decoder.num_channels
        self.channel_weights = torch.tensor(options.channel_weights or (1.0,) * channels, device=data.device)
        self.optimizer = self._optimizer()
        shape = (options.batch_size, data.heights[-1], channels)
        self.items = torch.zeros(shape[0], dtype=torch.int64, device=data.device)
        self.kept, self.chances = torch.zeros(shape[0], device=data.device), torch.zeros(shape, device=data.device)
        self.others = torch.zeros(shape, dtype=torch.int64, device=data.device)
        self.sums, self.counts = (torch.zeros(channels, device=data.device) for _ in range(2))
        self._draw = torch.Generator(data.device).manual_seed(options.seed)
        self._batches = data.batches(options.batch_size, options.seed)
        self._graphs: dict[int, Any] = {}
        self._gradients: list[list[Tensor | None]] = []  # of each graph, which writes to them where they are
        self._stream = torch.cuda.Stream() if self.on_gpu else None

    def step(self, number: int) -> None:
        """Take a step, counted from 1."""
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            height, items = next(self._batches)
            self.items.copy_(items)
            self.kept.uniform_(generator=self._draw)
            self.chances.uniform_(generator=self._draw)
            self.others.random_(0, self.data.config.decoder.eos_token_id, generator=self._draw)
            rate = self.options.rate(number)
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
        """`(weighted mean over the labels, sums [channels], counts [channels])` of items of data (default: its own).

        disturbed: some texts are dropped and some codes replaced, as the last step has drawn it.
        """
        data, decoder, options = data or self.data, self.data.config.decoder, self.options
        text = data.text.index_select(0, items).long()
        grid = data.grid[:, : height + 1].index_select(0, items).long()
        seen, rows, labels = text > 0, grid[:, :-1], grid[:, 1:]
        if disturbed:
            text = text * (self.kept >= options.drop_text)[:, None]
            hit = (self.chances[:, :height] < options.drop_codes) & (rows < decoder.eos_token_id)
            rows = torch.where(hit, self.others[:, :height], rows)
        known = labels <= decoder.eos_token_id
        logits = self.network(text, seen, rows).float().flatten(0, 2)
        each = F.cross_entropy(logits, torch.where(known, labels, 0).flatten(), reduction="none").view(labels.shape)
        sums, counts = (each * known).sum((0, 1)), known.sum((0, 1)).float()
        mean = (sums * self.channel_weights).sum() / (counts * self.channel_weights).sum()
        return mean, sums.detach(), counts

    @torch.no_grad()
    def evaluate(self, held_out: Data) -> list[float]:
        """The loss of each channel on held-out examples."""
        sums = counts = torch.zeros_like(self.sums)
        order = torch.from_numpy(np.argsort(held_out.rows, kind="stable"))
        for items in order.split(self.options.batch_size):
            height = held_out.height(items.numpy())
            _, more_sums, more_counts = self.loss(items.to(held_out.device), height, data=held_out)
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
        self.items.copy_(torch.arange(len(self.items)))
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
        loss, sums, counts = self.loss(self.items, height, disturbed=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.options.clip)
        self.optimizer.step()
        self.sums += sums
        self.counts += counts

    def _optimizer(self) -> torch.optim.AdamW:
        """That of `dia-fast train`: weight decay pulls at matrices, not at norms nor at embeddings."""
        free = {name for name, weight in self.weights.items() if weight.ndim < 2 or name.endswith(".embedding")}
        groups = [
            {"params": [self.weights[name] for name in self.weights if (name in free) is spared], "weight_decay": decay}
            for spared, decay in ((False, self.options.weight_decay), (True, 0.0))
        ]
        rate = torch.zeros((), device=self.data.device) if self.on_gpu else 0.0
        betas = self.options.beta1, self.options.beta2
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=self.on_gpu, capturable=self.on_gpu)


def train(options: TrainOptions, cache: Path, output: Path, device: torch.device) -> Path:
    """Train as the options say and write a checkpoint in the layout of transformers; return its folder, `output`.

    options: those of `dia-fast train`, without LoRA and accumulation; something must be held out. cache: the folder
    of codes.
    Raises InputError for what cannot be used, or if the loss is not finite.
    """
    checkpoint = open_checkpoint(options.model)
    codec = load_codec(options.codec, device)
    dataset = load_dataset(read_recordings(options.data), checkpoint.config, codec, cache)
    training, held_out = (
        Data(part.examples, checkpoint.config, device) for part in split(dataset, options.eval_share, options.seed)
    )
    run = Training(checkpoint.load(torch.float32, device), training, options)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would compile a plan for each length
        run.capture()
    started = time.monotonic()
    for number in tqdm(range(1, options.steps + 1), unit="step", dynamic_ncols=True):
        run.step(number)
        if number % LOOK == 0 or number == options.steps:
            if run.on_gpu:
                torch.cuda.synchronize()
            seen, unseen = run.seen(), run.evaluate(held_out)
            if not np.isfinite(seen).all():
                raise InputError(f"training diverged before step {number}: the loss of the channels is {seen}")
            tqdm.write(f"step {number}, {time.monotonic() - started:.0f} s; loss of each channel: {_said(seen)}")
            tqdm.write(f"    of recordings that were held out: {_said(unseen)}")
    dtypes = {name: checkpoint.stored_dtype(name) for name in run.weights}
    return write_checkpoint(
        output, checkpoint.config, dtypes, lambda name: run.weights[name].detach().to("cpu", dtypes[name])
    )


def _said(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.2f}" for loss in losses)
