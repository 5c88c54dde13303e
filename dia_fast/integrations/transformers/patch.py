"""`accelerate`: a model of transformers whose `generate` runs on the engine.

`generate` of transformers stays in charge of arguments, settings, checks and the shape of the result. What is replaced
is the loop at its end (`_sample`), and the two preparations that only that loop needs (the encoder's pass and the
cache); they are put off until it is known who generates, and done then if it is the model itself.
"""

import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import DiaForConditionalGeneration

from dia_fast.engine import Engine, Request
from dia_fast.errors import InputError
from dia_fast.generation.sampling_params import RANDOM_SEED, SamplingParams
from dia_fast.integrations.transformers import calls, fallback, loop, modules, weights
from dia_fast.integrations.transformers.binding import WeakMethod
from dia_fast.model.config import DiaConfig
from dia_fast.model.device import choose_ops
from dia_fast.model.model import DiaModel
from dia_fast.utils.ambient import isolated
from dia_fast.utils.forks import check_device, renew_in_child

STATE = "_dia_fast"
AnyModel = TypeVar("AnyModel", bound=nn.Module)
# What prepares the encoder's output: version 5, version 4.57.
_ENCODER_HOOKS = ("_maybe_prepare_encoder_kwargs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation")
_CACHE_HOOK, _LOOP = "_prepare_cache_for_generation", "_sample"


class State:
    """The state of an accelerated model: the engine's model on its weights, made again when those have changed."""

    def __init__(self, backend: str, share_memory: bool, replaced: list[str]) -> None:
        self.backend, self.share_memory, self.replaced = backend, share_memory, replaced
        self._watch: weights.Watch | None = None
        self._fingerprint: list[int] | None = None
        self._obstacle: str | None = None
        self._ours: DiaModel | None = None
        self._engine: Engine | None = None
        self._renew()
        renew_in_child(self)

    def _renew(self) -> None:
        """In a new process: a lock and an engine of its own. The parent's is not freed."""
        self.lock = threading.RLock()
        self._left, self._engine = self._engine, None

    def forget(self) -> None:
        """Let go of the engine and its model; the next call makes them again."""
        self._watch = self._ours = self._obstacle = self._engine = self._fingerprint = None

    @isolated()
    def obstacle(self, model: DiaForConditionalGeneration) -> str | None:
        """Name what keeps the engine from standing in for the model now, or None; bring its weights up to date."""
        if self._watch is None or self._watch.changed(model) or self._rewritten(model):
            self.forget()
            self._obstacle = weights.foreign_module(model)
            if self._obstacle is None:
                config = weights.read_config(model)
                # The default length limit of transformers' settings goes beyond the positions by the longest delay.
                rows = config.decoder.max_position_embeddings + max(config.delay_pattern)
                self._load(model, config.encoder.max_position_embeddings, rows)
            self._watch = weights.Watch(model)
        elif self._ours is not None and not self._ours.packed:
            weights.renew(model, self._ours)
        if self._ours is None:
            return self._obstacle
        weights.rotate_alike(model, self._ours)
        return self._watch.obstacle(modules.FORWARDS) or weights.altered(model, self._ours.config)

    def _rewritten(self, model: DiaForConditionalGeneration) -> bool:
        """Tell whether weights differ from those that were packed into a form of which nothing can be read back."""
        return self._fingerprint is not None and self._fingerprint != weights.fingerprint(model)

    @property
    def config(self) -> DiaConfig:
        """The sizes of the engine's model."""
        assert self._ours is not None
        return self._ours.config

    def model_for(self, model: DiaForConditionalGeneration, text: int, rows: int) -> DiaModel:
        """The engine's model, with positions for so much text and so many rows: RoPE knows no limit of its own."""
        assert self._ours is not None
        there = self._ours.config
        longest = there.encoder.max_position_embeddings, there.decoder.max_position_embeddings
        if text > longest[0] or rows > longest[1]:
            self._ours = None  # its memory first
            self._ours = self._load(model, max(text, longest[0]), max(rows, longest[1]))
        return self._ours

    def engine_for(self, model: DiaModel, requests: Sequence[Request]) -> Engine:
        """An engine with room for these requests: that of the last call if it has it, so that graphs are kept."""
        wanted = loop.sizes_with_room(model, requests)
        if self._engine is None or self._engine.model is not model or not loop.holds(self._engine.state.sizes, wanted):
            self._engine = None  # its memory first
            check_device(model.device)
            self._engine = Engine(model, sizes=wanted)
        return self._engine

    def _load(self, model: DiaForConditionalGeneration, text: int, rows: int) -> DiaModel:
        config = weights.read_config(model)
        packed = weights.pack(model, config, share=self.share_memory)
        encoder = replace(config.encoder, max_position_embeddings=text)
        decoder = replace(config.decoder, max_position_embeddings=rows)
        ours = DiaModel(replace(config, encoder=encoder, decoder=decoder), choose_ops(self.backend, model.device))
        self._ours = ours.load(packed) if self.share_memory else ours.load(packed).pack()
        self._fingerprint = weights.fingerprint(model) if self._ours.packed else None
        weights.rotate_alike(model, self._ours)
        return self._ours

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        return State(self.backend, self.share_memory, list(self.replaced))

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled model is unpickled with transformers' own methods.
        return type(None), ()


@dataclass
class _Call:
    """A call of `generate` under way: what was put off, and the seeds."""

    seed: int | list[int] | None
    texts: Tensor | None = None
    postponed: dict[str, Callable[..., Any]] = field(default_factory=dict)


_CALL: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("dia_fast_call", default=None)


def accelerate(
    model: AnyModel,
    *,
    generate: bool = True,
    rms_norm: bool = False,
    glu: bool = False,
    rope_attention: bool = False,
    backend: str = "auto",
    share_memory: bool = True,
) -> AnyModel:
    """Make a model generate on the engine of dia-fast, in place, and return it.

    The weights may be trained, loaded, moved and cast as before, by whatever means: `generate` reads them again, and
    what follows from them is computed at each call. (With share_memory=False and 16-bit weights on a CPU it compares
    checksums of all weights instead.) `generate` keeps its arguments and results, and takes `seed` beside them (an int
    for all texts, or a list). Where a call asks for something that the engine has no counterpart of, the model serves
    it as if it were not accelerated, with a `FallbackWarning` that names the argument. Calling `accelerate` again
    replaces the choices of the last call.

    Args:
        model: A `DiaForConditionalGeneration`, or what `torch.compile` or PEFT have made of one: the model inside is
            accelerated. While adapters are neither merged (`merge_adapter`) nor disabled, calls go the model's own way.
        generate: Replace the decoding loop.
        rms_norm: Take a single op of `dia_kernels` in the model's own modules, for `model(**inputs)`: training,
            scoring, and calls that the engine cannot serve.
        glu: As `rms_norm`.
        rope_attention: As `rms_norm`.
        backend: As in `dia_kernels.get_ops`.
        share_memory: At the first call the model's parameters become views of the tensors that the engine streams, so
            that there is one copy of the weights. With False the engine has a copy, in the form that its ops multiply
            fastest: on a CPU with 16-bit weights that is faster, elsewhere it makes no difference.

    Raises:
        InputError: For another model or a backend that cannot run.
        CheckpointError: For a configuration that dia-fast does not compute.
    """
    own = _unwrapped(model)
    unaccelerate(own)
    weights.read_config(own)
    choose_ops(backend, own.device)
    state = State(backend, share_memory, [])
    if generate:
        hooks: dict[str, Any] = {"generate": _generate, _LOOP: _sample, _CACHE_HOOK: _prepare_cache, "_apply": _apply}
        hooks |= {name: _prepare_encoder for name in _ENCODER_HOOKS if hasattr(own, name)}
        if len(hooks) != 5 or not all(hasattr(own, name) for name in hooks):
            raise InputError(f"transformers {transformers.__version__} is not supported; 4.57 and 5 are")
        for name, hook in hooks.items():
            hook.__name__ = name  # by which a bound method is pickled
            setattr(own, name, WeakMethod(hook, own))
        state.replaced = list(hooks)
    modules.patch(own, backend, rms_norm=rms_norm, glu=glu, rope_attention=rope_attention)
    setattr(own, STATE, state)
    return model


def unaccelerate(model: AnyModel) -> AnyModel:
    """Give a model its own methods back and return it; the weights stay where they are. Harmless on any model.

    Args:
        model: As in `accelerate`.
    """
    own = _unwrapped(model)
    state = own.__dict__.pop(STATE, None)
    modules.unpatch(own)
    for name in state.replaced if state is not None else ():
        own.__dict__.pop(name, None)
    return model


def _unwrapped(model: Any) -> DiaForConditionalGeneration:
    """The model inside what `torch.compile` and PEFT make of one. Raises InputError, with what to pass."""
    found = model
    while not isinstance(found, DiaForConditionalGeneration):
        if isinstance(found, nn.Module) and "_orig_mod" in found._modules:
            found = found._modules["_orig_mod"]
        elif isinstance(found, nn.Module) and callable(getattr(type(found), "get_base_model", None)):
            found = found.get_base_model()  # type: ignore[operator]
        else:
            inside = [
                name
                for name, part in getattr(model, "_modules", {}).items()
                if isinstance(part, DiaForConditionalGeneration)
            ]
            hint = f": pass its .{inside[0]}" if inside else ""
            raise InputError(
                f"model must be a DiaForConditionalGeneration of transformers, not {type(model).__name__}{hint}"
            )
    return found


def refresh(model: Any) -> None:
    """Make the engine read an accelerated model's weights again.

    It is hardly ever needed: every call of `generate` notices what has been written since the last one.
    """
    state = _unwrapped(model).__dict__.get(STATE)
    if state is None:
        raise InputError("model is not accelerated; there is nothing to refresh")
    state.forget()


_signature = functools.lru_cache(inspect.signature)


@functools.wraps(DiaForConditionalGeneration.generate)
def _generate(self: Any, *args: Any, seed: int | list[int] | None = None, **kwargs: Any) -> Any:
    own = type(self).generate
    bound = _signature(own).bind(self, *args, **kwargs)
    state: State = self.__dict__[STATE]
    with state.lock:
        reason = fallback.asks_for_more(bound) or state.obstacle(self)
    if reason is not None:
        fallback.say(reason)
        with fallback.own_random_numbers(self, seed):
            return own(self, *args, **kwargs)
    token = _CALL.set(_Call(seed))
    try:
        return own(self, *args, **kwargs)
    finally:
        _CALL.reset(token)


def _prepare_encoder(self: Any, inputs: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Put the encoder's pass off."""
    name = next(name for name in _ENCODER_HOOKS if hasattr(type(self), name))
    own = functools.partial(getattr(type(self), name), self, inputs, dict(model_kwargs), *args, **kwargs)
    call = _CALL.get()
    if call is None:
        return own()
    call.texts, call.postponed["encoder"] = inputs, own
    return model_kwargs


def _prepare_cache(self: Any, config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Put the allocation of a cache off."""
    own = functools.partial(getattr(type(self), _CACHE_HOOK), self, config)
    call = _CALL.get()
    if call is None:
        return own(model_kwargs, *args, **kwargs)
    call.postponed["cache"] = lambda later: own(later, *args, **kwargs)
    return False


def _sample(
    self: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    call = _CALL.get()
    arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
    own = functools.partial(getattr(type(self), _LOOP), self, *arguments, synced_gpus=synced_gpus, streamer=streamer)
    if call is None:
        return own(**model_kwargs)
    try:
        reason = fallback.asks_for_more_in_config(generation_config) or ("synced_gpus" if synced_gpus else None)
        if reason is not None:
            raise calls.NotOurs(reason)
        rows = _speak(self, call, *arguments, streamer, model_kwargs)
    except calls.NotOurs as error:
        fallback.say(str(error))
        if "encoder" in call.postponed:
            model_kwargs["encoder_outputs"] = call.postponed["encoder"]()["encoder_outputs"]
        if "cache" in call.postponed:
            call.postponed["cache"](model_kwargs)
        with _no_call(), fallback.own_random_numbers(self, call.seed):
            return own(**model_kwargs)
    if not generation_config.return_dict_in_generate:
        return rows
    return transformers.generation.GenerateEncoderDecoderOutput(sequences=rows)


@isolated()
def _speak(
    self: Any, call: _Call, start: Tensor, processors: Any, criteria: Any, generation: Any, streamer: Any, given: Any
) -> Tensor:
    """The rows that the engine makes of a prepared call. Raises NotOurs."""
    state: State = self.__dict__[STATE]
    config = state.config
    params = calls.read_params(processors, criteria, generation, config)
    batch, known = start.shape[0] // config.decoder.num_channels, start.shape[1]
    if call.texts is None or call.texts.ndim != 2 or call.texts.is_floating_point():
        raise calls.NotOurs("encoder_outputs")
    mask = given.get("attention_mask")
    texts = calls.read_texts(call.texts[:batch], None if mask is None else mask[:batch])
    masks = given["decoder_delay_mask"], given["decoder_attention_mask"]
    delayed_codes, pads = calls.read_delayed_codes(*masks, known, config)
    seeds = _seeds(call.seed, batch, sampled=params.temperature > 0)
    requests = calls.make_requests(texts, delayed_codes, params, known, seeds)
    with state.lock:
        model = state.model_for(self, max(map(len, texts)), params.max_length)
        engine = state.engine_for(model, requests)
    heard = None if streamer is None else loop.Columns(streamer, known, pads, config.decoder.pad_token_id)
    spoken = loop.speak(engine, requests, heard)
    rows = calls.assemble(start, spoken, pads, params, config)
    if heard is not None:
        heard.end(rows)
    return rows


@isolated()
def _seeds(seed: int | list[int] | None, batch: int, sampled: bool) -> list[int | None]:
    """A seed for each text: as given, or drawn from torch's random numbers, which greedy decoding leaves alone.

    Raises InputError for seeds that cannot be.
    """
    if isinstance(seed, int) and seed == RANDOM_SEED:
        seed = None
    if isinstance(seed, list | tuple):
        if len(seed) != batch:
            raise InputError(f"seed has {len(seed)} entries for {batch} texts: give one for each, or one int for all")
        return [SamplingParams(seed=item).seed for item in seed]
    if seed is not None or not sampled:
        return [SamplingParams(seed=0 if seed is None else seed).seed] * batch
    return torch.randint(0, 2**63 - 1, (batch,), dtype=torch.int64, device="cpu").tolist()


def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`.to()` and its kin give parameters other memory; the engine must not hold on to the old one meanwhile."""
    self.__dict__[STATE].forget()
    return type(self)._apply(self, *args, **kwargs)


@contextlib.contextmanager
def _no_call() -> Iterator[None]:
    token = _CALL.set(None)
    try:
        yield
    finally:
        _CALL.reset(token)
