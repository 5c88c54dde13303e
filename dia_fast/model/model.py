"""Dia's encoder and decoder over the op set of `dia_kernels`. docs/dia.md says what is computed.

Two ways through the decoder. `decode_step` is the one that costs: one step of every request, all of its work in
`8 * layers + 3` op calls on buffers of a `DecodeState`, so that it can be captured in a graph. The others, `encode`,
`prefill` and `forward_logits`, take a whole sequence of one request at a time, so that what a request computes does
not depend on what else is in the batch; their large matrix products are torch's.

The unconditional branch reads a text of zeros. All its encoder positions are equal, so whatever the attention weights
are, its cross-attention adds the same vector everywhere: `DecoderLayer.uncond_cross`, computed once by `finalize`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_fast.errors import InputError
from dia_fast.model.config import DecoderConfig, DiaConfig, EncoderConfig
from dia_fast.model.cpu_weights import pack_matrices, refuse_packed, set_matrix
from dia_fast.model.decode_state import DecodeState, cross_pages
from dia_fast.model.fused_weights import fused_shapes
from dia_fast.model.kv_cache import BlockTable, PagePool
from dia_fast.model.verify_state import Attended, VerifyState
from dia_fast.utils.ambient import isolated
from dia_fast.utils.forks import OneProcess
from dia_kernels.reference import PackedWeight

Shapes = Mapping[str, tuple[int, ...]]


class _Past(NamedTuple):
    """Keys and values of sequences in pages: block table `[sequences, max_pages]` and lengths `[sequences]`, int32."""

    pool: PagePool
    table: Tensor
    lengths: Tensor


class _LayerPast(NamedTuple):
    """`_Past` in one layer; slot_mapping: `[tokens]` int64, where the tokens at hand go."""

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    slot_mapping: Tensor | None


class EncoderLayer(nn.Module):
    """Packed weights of one layer, `[out, in]`: qkv is q|k|v, gate_up is gate|up."""

    self_norm: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for name, shape in shapes.items():
            _declare(self, name, shape)


class DecoderLayer(EncoderLayer):
    """As in the encoder, with cross-attention (cross_kv is k|v) and what it adds to unconditional rows, `[hidden]`."""

    cross_norm: Tensor
    cross_q: Tensor
    cross_kv: Tensor
    cross_o: Tensor
    uncond_cross: Tensor


class Stack(nn.Module):
    """Embedding, layers and final norm of the encoder or the decoder; the decoder also has a head."""

    embedding: Tensor
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    cross_cos: Tensor
    cross_sin: Tensor

    def __init__(self, shapes: Shapes, layer: type[EncoderLayer], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(_below(shapes, f"layers.{index}.")) for index in range(count))
        for name, shape in shapes.items():
            if not name.startswith("layers."):
                _declare(self, name, shape)


class DiaModel(OneProcess, nn.Module):
    """The model; its `state_dict` holds the packed weights by the names of `fused_weights.fused_shapes`.

    config: sizes. ops: an op set, see `dia_kernels.get_ops`. The new model has no memory: give it weights with `load`.
    """

    def __init__(self, config: DiaConfig, ops: ModuleType) -> None:
        super().__init__()
        shapes = fused_shapes(config)
        self.config, self.ops, self.packed = config, ops, False
        self.revision = 0  # grows when the weights change
        self.encoder = Stack(_below(shapes, "encoder."), EncoderLayer, config.encoder.num_hidden_layers)
        self.decoder = Stack(_below(shapes, "decoder."), DecoderLayer, config.decoder.num_hidden_layers)

    @isolated()
    def load(self, weights: Mapping[str, Tensor | PackedWeight]) -> "DiaModel":
        """Take the fused weights as they are, without a copy, and compute what follows from them.

        Matrices in 8 bits (`Int8Weight`) are for inference alone: afterwards the model is as a packed one, see `pack`.
        """
        matrices = {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
        for path, weight in matrices.items():
            module, _, name = path.rpartition(".")
            expected = self.get_parameter(path).shape
            if weight.shape != expected:
                raise InputError(f"{path} has shape {list(weight.shape)}; expected {list(expected)}")
            set_matrix(self.get_submodule(module), name, weight)
        tensors = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        if matrices:
            self._take(tensors)
        else:
            self.load_state_dict(tensors, strict=True, assign=True)
        self.requires_grad_(False)
        self.finalize()
        self.packed = bool(matrices)
        return self

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """`load_state_dict` for the parameters that are left when others are matrices in 8 bits."""
        places = dict(self.named_parameters())
        if odd := sorted(places.keys() ^ tensors.keys()):
            raise InputError(f"weights are missing or are none of this model: {', '.join(odd[:3])}")
        for path, tensor in tensors.items():
            module, _, name = path.rpartition(".")
            if tensor.shape != places[path].shape:
                raise InputError(f"{path} has shape {list(tensor.shape)}; expected {list(places[path].shape)}")
            self.get_submodule(module).register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @isolated()
    def pack(self, product: bool | str = True, *, progress: bool = False) -> "DiaModel":
        """Lay the matrices out as this processor multiplies them fastest, where that is another way than they lie.

        On an x86 CPU 16-bit inference needs it to be fast; on a GPU, and under other ops than torch's, nothing is done.
        Afterwards the matrices are no tensors any more: the model only infers, `state_dict`, `load`, `finalize`, `to`
        and training raise InputError. Memory stays at one copy.

        Args:
            product: True for what the table in `dia_fast.model.cpu_weights` says, names of products, False to do
                nothing.
            progress: draw a bar where somebody may be looking.

        Raises:
            InputError: for a product that is unknown or does not run here.
        """
        if self.device.type == "cpu" and self.ops.name == "torch":
            self.revision += 1
            self.packed |= pack_matrices(self, product, progress)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "DiaModel":
        if requires_grad and self.packed:
            refuse_packed("trained")
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiaModel":
        if self.packed:
            refuse_packed("moved or converted")
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return self.decoder.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embedding.dtype

    @isolated()
    def finalize(self) -> None:
        """Compute the rotation tables and the unconditional constants; call it when the weights have changed.

        The constants are computed in float32 and rounded once: an error in them would push every step the same way.
        """
        if self.packed:
            refuse_packed("read as tensors")
        parts = [(self.encoder, "encoder", ""), (self.decoder, "decoder", "")]
        if self.config.first_generation:
            parts.append((self.decoder, "cross", "cross_"))
        for stack, part, prefix in parts:
            cos, sin = rope_table(self.config, part, self.device)
            _keep(stack, f"{prefix}cos", cos)
            _keep(stack, f"{prefix}sin", sin)
        self.finalize_constants()

    @isolated()
    def finalize_constants(self) -> None:
        """Compute the unconditional constants, in place, so that captured steps read the new ones."""
        if self.packed:
            refuse_packed("read as tensors")
        self.revision += 1
        memory = self._encode([0], torch.float32)
        config = self.config.decoder
        groups = config.cross_num_attention_heads // config.cross_num_key_value_heads
        for layer in self._decoder_layers():
            if isinstance(layer.cross_kv, PackedWeight):
                values = _linear(memory, layer.cross_kv).chunk(2, 1)[1]
            else:
                values = _linear(memory, layer.cross_kv.chunk(2)[1])
            values = values.view(-1, config.cross_head_dim)
            added = _linear(values.repeat_interleave(groups, 0).view(1, -1), layer.cross_o)[0]
            _keep(layer, "uncond_cross", added.to(self.dtype))

    @isolated()
    def decode_step(
        self,
        s: DecodeState,
        *,
        in_step: Callable[[], object] | None = None,
        sample: Callable[[], object] | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        """Run one step of every request: form its next input from what was sampled and sample the codes after it.

        Exactly `8 * layers + 3` op calls; nothing is allocated (the torch ops aside) and nothing is waited for.

        in_step: called between heads and sampling; sample: called in the place of the op; layers: those that are
        computed, the others are passed by and get no keys and values.
        """
        self._form(s, s.sampled)
        # All that attention reads but q and the new token is ready: `embed_codes` lets no launch begin early.
        self._run_layers(s, [Attended(s.qkv, s.table, s.positions, s.attended, True)], layers)
        self._heads(s.x, s.logits)
        if in_step is not None:
            in_step()
        if sample is not None:
            sample()
            return
        self._sample(s, s.logits, s.step, s.sampled, s.status)

    @isolated()
    def verify(self, s: DecodeState, v: VerifyState) -> None:
        """Run several steps of every request at once, formed from `v.inputs`, and sample what follows each.

        Weights are read once. All that is computed has the bits of as many calls of `decode_step`, since a row's result
        does not depend on the rows beside it; self-attention alone takes one step after the other. Afterwards the state
        is behind the last step; see `VerifyState.keep`.
        """
        v.begin(s)
        for j, inputs in enumerate(v.inputs):
            self._form(s, inputs)
            v.take(j, s)
        self._run_layers(v, v.parts)
        self._heads(v.x, v.flat_logits)
        v.order_logits()
        for j in range(v.steps):
            self._sample(s, v.logits[j], v.step[j], v.chosen[j], v.status[j])

    def _form(self, s: DecodeState, sampled: Tensor) -> None:
        """Form the next codes of every request from what was sampled, and embed them."""
        config = self.config.decoder
        self.ops.embed_codes(
            sampled, s.prompt_codes, s.step, s.first_step, s.end_step, s.eos_step, s.delay, self.decoder.embedding,
            s.codes, s.positions, s.finished, s.x, eos=config.eos_token_id, pad=config.pad_token_id,
        )  # fmt: skip

    def _run_layers(
        self, s: DecodeState | VerifyState, parts: Sequence[Attended], layers: Collection[int] | None = None
    ) -> None:
        """Run the decoder's layers on `s.x`, in place; self-attention one part after the other."""
        ops, stack, eps, rotation = self.ops, self.decoder, self.config.decoder.norm_eps, {}
        if self.config.first_generation:
            rotation = {"cos": stack.cross_cos, "sin": stack.cross_sin, "positions": s.positions_cond}
        for i, layer in enumerate(self._decoder_layers()):
            if layers is not None and i not in layers:
                continue
            keys, values = s.pool.keys[i], s.pool.values[i]
            ops.rms_norm_linear(s.x, layer.self_norm, layer.qkv, eps, s.qkv)
            for part in parts:
                ops.rope_attention(
                    part.qkv, stack.cos, stack.sin, keys, values, part.table, part.positions, part.out, s.workspace,
                    kv_ready=part.kv_ready,
                )  # fmt: skip
            ops.linear_residual(s.attended, layer.o, s.x)
            ops.rms_norm_linear(s.x_cond, layer.cross_norm, layer.cross_q, eps, s.cross_q)
            keys, values = s.cross_pool.keys[i], s.cross_pool.values[i]
            ops.cross_attention(
                s.cross_q, keys, values, s.cross_table, s.text_lengths, s.cross_attended, s.cross_workspace,
                kv_ready=True, **rotation,
            )  # fmt: skip
            ops.linear_residual(s.cross_attended, layer.cross_o, s.x, layer.uncond_cross if s.guided else None)
            ops.rms_norm_glu(s.x, layer.mlp_norm, layer.gate_up, eps, s.gated)
            ops.linear_residual(s.gated, layer.down, s.x)

    def _heads(self, x: Tensor, logits: Tensor) -> None:
        self.ops.codebook_logits(x, self.decoder.norm, self.decoder.head, self.config.decoder.norm_eps, logits)

    def _sample(self, s: DecodeState, logits: Tensor, step: Tensor, out: Tensor, status: Tensor) -> None:
        self.ops.sample(
            logits, step, s.seed, s.guidance_scale, s.temperature, s.top_k, s.top_p, out, status,
            eos=self.config.decoder.eos_token_id, first_generation=self.config.first_generation,
        )  # fmt: skip

    @isolated()
    def encode(self, text_ids: Sequence[int] | Tensor) -> Tensor:
        """The encoder's output for one text: `[len(text_ids), encoder hidden]`. A tensor of ids is on the device."""
        return self._encode(text_ids, self.dtype)

    @isolated()
    def store_text(self, text_ids: Sequence[int] | Tensor, pool: PagePool, slot_mapping: Tensor) -> None:
        """Encode a text and write the cross-attention keys and values of every layer to its pages.

        slot_mapping: `[len(text_ids)]` int64, see `BlockTable.slot_mapping`.
        """
        memory = self.encode(text_ids)
        config = self.config.decoder
        positions = torch.arange(len(text_ids), dtype=torch.int32, device=self.device)
        page, offset = slot_mapping // pool.shape.page_size, slot_mapping % pool.shape.page_size
        for layer, keys, values in zip(self._decoder_layers(), pool.keys, pool.values, strict=True):
            both = _linear(memory, layer.cross_kv)
            if self.config.first_generation:
                stack = self.decoder
                self.ops.rope(both, stack.cross_cos, stack.cross_sin, positions, config.cross_num_key_value_heads)
            both = both.view(len(text_ids), -1, config.cross_head_dim)
            keys[page, :, offset], values[page, :, offset] = both.chunk(2, 1)

    @isolated()
    def prefill(
        self, delayed_codes: Tensor, s: DecodeState, table_idx: int, text_length: int | None, *, first: int = 0
    ) -> None:
        """Compute the keys and values of steps `first` and following of a request, of one of its two rows.

        delayed_codes: `[steps, channels]`. The text of `text_length` ids, the steps before `first` and the
        pages must be there. A prompt cut in other places gives the same values, but not to the bit.

        text_length: None for the unconditional row. The rows are computed one after the other, so that neither's bits
        depend on whether the other one is computed as well.
        """
        table_row, text = s.unconditional(table_idx), None
        if text_length is not None:
            table_row = table_idx
            text = _Past(s.cross_pool, s.cross_blocks.pages_of([table_idx]), self._length(text_length))
        total = first + delayed_codes.shape[0]
        slot_mapping = s.blocks.slot_mapping(table_row, total, first)
        past = _Past(s.pool, s.blocks.pages_of([table_row]), self._length(total))
        self._decode_codes(delayed_codes.to(self.device), text, past, slot_mapping, first)

    @isolated()
    def forward_logits(
        self, text_ids: Sequence[Sequence[int]], delayed_codes: Tensor, guidance: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing: predict what follows each of the given codes.

        text_ids: one text per request; delayed_codes: `[batch, steps, channels]`, from step 0.
        Returns `(cond, uncond)`, each `[batch, steps, channels, vocab]` float32; without guidance uncond is None.
        """
        config, total = self.config.decoder, delayed_codes.shape[1]
        shape = cross_pages(self.config)
        size = (len(text_ids), total, config.num_channels, config.vocab_size)
        branches = [torch.empty(size, device=self.device, dtype=torch.float32) for _ in range(2 if guidance else 1)]
        for request, ids in enumerate(text_ids):
            pool = PagePool(shape, shape.pages(len(ids)), self.dtype, self.device)
            blocks = BlockTable(pool, 1, len(ids), self.device)
            blocks.grow(0, len(ids))
            self.store_text(ids, pool, blocks.slot_mapping(0, len(ids)))
            text = _Past(pool, blocks.table, self._length(len(ids)))
            for branch, of in zip(branches, (text, None), strict=False):
                x = self._decode_codes(delayed_codes[request].to(self.device), of)
                logits = _linear(self._normed(x, self.decoder.norm, config.norm_eps), self.decoder.head)
                branch[request] = logits.view(size[1:])
        return branches[0], branches[1] if guidance else None

    def _length(self, length: int) -> Tensor:
        return torch.full((1,), length, dtype=torch.int32, device=self.device)

    def _decoder_layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], self.decoder.layers)

    def _encode(self, text_ids: Sequence[int] | Tensor, dtype: torch.dtype) -> Tensor:
        """`encode` in a given dtype, weights converted one at a time where they have another."""
        stack, config = self.encoder, self.config.encoder
        ids = text_ids
        if not isinstance(ids, Tensor):
            ids = torch.tensor(ids, dtype=torch.int64, device="cpu").to(self.device)
        positions = torch.arange(len(text_ids), dtype=torch.int32, device=self.device)
        starts = torch.arange(2, dtype=torch.int32, device=self.device) * len(text_ids)
        x = stack.embedding[ids].to(dtype)
        for layer in cast(list[EncoderLayer], stack.layers):
            self._self_attention(x, layer, stack, config, positions, starts)
            self._mlp(x, layer, config.norm_eps)
        return self._normed(x, stack.norm, config.norm_eps)

    def _decode_codes(
        self,
        delayed_codes: Tensor,
        text: "_Past | None",
        past: "_Past | None" = None,
        slot_mapping: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """The decoder over steps of one row of a request: `[n, hidden]`.

        delayed_codes: `[n, channels]`, from step `first` on; text: its keys and values, None for the unconditional
        row; past: where those of self-attention go, at `slot_mapping`, `[n]`, and where the steps before `first` are.
        """
        ops, stack, config = self.ops, self.decoder, self.config.decoder
        total = delayed_codes.shape[0]
        positions = torch.arange(first, first + total, dtype=torch.int32, device=self.device)
        starts = torch.arange(2, dtype=torch.int32, device=self.device) * total
        x = self._embed(delayed_codes)
        for i, layer in enumerate(self._decoder_layers()):
            layer_past = past and _LayerPast(
                past.pool.keys[i], past.pool.values[i], past.table, past.lengths, slot_mapping
            )
            self._self_attention(x, layer, stack, config, positions, starts, layer_past, first > 0, causal=True)
            if text is None:
                x += layer.uncond_cross
            else:
                q = _linear(self._normed(x, layer.cross_norm, config.norm_eps), layer.cross_q)
                if self.config.first_generation:
                    ops.rope(q, stack.cross_cos, stack.cross_sin, positions, 0)
                q = q.view(total, -1, config.cross_head_dim)
                attended = q.new_empty(total, layer.cross_q.shape[0])
                ops.ragged_attention(
                    q, text.pool.keys[i], text.pool.values[i], starts, attended,
                    causal=False, block_table=text.table, kv_lengths=text.lengths,
                )  # fmt: skip
                x += _linear(attended, layer.cross_o)
            self._mlp(x, layer, config.norm_eps)
        return x

    def _embed(self, delayed_codes: Tensor) -> Tensor:
        """Sum of the table rows of all channels, in float32 and in channel order, rounded once: `[n, hidden]`."""
        channels, vocab = self.config.decoder.num_channels, self.config.decoder.vocab_size
        index = delayed_codes.long() + torch.arange(channels, device=self.device, dtype=torch.int64) * vocab
        total = self.decoder.embedding[index[:, 0]].float()
        for channel in range(1, channels):
            total += self.decoder.embedding[index[:, channel]]
        return total.to(self.dtype)

    def _self_attention(
        self,
        x: Tensor,
        layer: EncoderLayer,
        stack: Stack,
        config: EncoderConfig | DecoderConfig,
        positions: Tensor,
        starts: Tensor,
        past: "_LayerPast | None" = None,
        continues: bool = False,
        causal: bool = False,
    ) -> None:
        """Add self-attention to the packed sequences of `x`, `[n, hidden]`, in place; store k and v in `past`.

        continues: tokens before those of `x` are in `past` and are attended to as well.
        """
        head_dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        qkv = _linear(self._normed(x, layer.self_norm, config.norm_eps), layer.qkv)
        store = (past.keys, past.values, past.slot_mapping) if past is not None else ()
        self.ops.rope(qkv, stack.cos, stack.sin, positions, kv_heads, *store)
        q, k, v = qkv.view(x.shape[0], -1, head_dim).split((heads, kv_heads, kv_heads), 1)
        attended = x.new_empty(x.shape[0], heads * head_dim)
        if past is not None and continues:
            self.ops.ragged_attention(
                q, past.keys, past.values, starts, attended,
                causal=causal, block_table=past.table, kv_lengths=past.lengths,
            )  # fmt: skip
        else:
            self.ops.ragged_attention(q, k, v, starts, attended, causal=causal)
        x += _linear(attended, layer.o)

    def _mlp(self, x: Tensor, layer: EncoderLayer, eps: float) -> None:
        """Add the MLP to `x`, `[n, hidden]`, in place."""
        both = _linear(self._normed(x, layer.mlp_norm, eps), layer.gate_up)
        x += _linear(self.ops.glu(both, both.new_empty(x.shape[0], both.shape[1] // 2)), layer.down)

    def _normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return cast(Tensor, self.ops.rms_norm(x, weight.to(x.dtype), eps, torch.empty_like(x)))


def rope_table(config: DiaConfig, part: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the tables of RoPE. Source: Su et al. 2021, "RoFormer".

    Frequencies and angles are float32, as in transformers: at scale 1.0 the difference to float64 would show. The code
    of the first generation divides by the wavelength instead.

    Args:
        config: Of the model.
        part: "encoder", "decoder", or "cross" for cross-attention, which only the first generation rotates.
        device: Of the tables.

    Returns:
        Cosines and sines, each `[positions + 1, head_dim / 2]` float32: a request of the greatest length has its last
        step beyond the positions.
    """
    stack = config.encoder if part == "encoder" else config.decoder
    head_dim, positions = stack.head_dim, stack.max_position_embeddings
    if part == "cross":
        head_dim = config.decoder.cross_head_dim
        positions = max(positions, config.encoder.max_position_embeddings)  # of the text as well
    wavelengths = stack.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    steps = torch.arange(positions + 1, dtype=torch.int64, device="cpu")[:, None].float()
    angles = steps / wavelengths if config.first_generation else steps * (1.0 / wavelengths)
    return angles.cos().to(device), angles.sin().to(device)


def _linear(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """`x @ weight.T` for the many rows of a whole sequence, rounded once to the dtype of `x`.

    Most CPUs have no 16-bit matrix product worth the name: there it is faster, by a factor of five, to widen first.
    """
    if isinstance(weight, PackedWeight):
        return weight.linear(x).to(x.dtype)
    if x.device.type == "cpu" and x.dtype != torch.float32:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), weight.to(wide)).to(x.dtype)
    return F.linear(x, weight.to(x.dtype))


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _keep(module: nn.Module, name: str, value: Tensor) -> None:
    """Store a derived value, at its old address if there is one."""
    there = module._buffers.get(name)
    if there is None or (there.shape, there.dtype, there.device) != (value.shape, value.dtype, value.device):
        module.register_buffer(name, value, persistent=False)
    else:
        there.copy_(value)


def _declare(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    module.register_parameter(
        name, nn.Parameter(torch.empty(shape, device="meta", dtype=torch.float32), requires_grad=False)
    )
