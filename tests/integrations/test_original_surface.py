"""Names, arguments and values that programs for the original package use beyond `generate`: both generations, weights
by the original's names, the codec, the configuration, and settings at the edges."""

import io
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from bench.tools.codec_files import save_official
from bench.tools.pairs import pack
from bench.tools.tiny_models import make_original_checkpoint, original_state, random_state, tiny_config
from dia_fast.audio.codec import Codec, load_codec
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.engine import generate
from dia_fast.engine.request import AnyRequest, Request
from dia_fast.errors import CheckpointError, InputError
from dia_fast.integrations.original import Dia, OriginalConfig, config
from dia_fast.model.config import DiaConfig
from dia_fast.model.model import DiaModel
from dia_fast.text.tokenizer import TextWarning, encode_text
from dia_kernels import get_ops, reference
from tests.helpers.codecs import imported_dac
from tests.helpers.front import make_codec
from tests.helpers.tolerance import EVALUATIONS, nudged

TEXT = "[S1] Did you hear that? [S2] Hear what?"
CPU = torch.device("cpu")
CONFIG = tiny_config({}, {"max_position_embeddings": 384})
FIRST = replace(CONFIG, first_generation=True)
STATE = random_state(CONFIG, 3)
WEIGHTS = original_state(CONFIG, STATE)


def silent(configuration: DiaConfig = CONFIG, **options: Any) -> Dia:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Dia(configuration, device=CPU, load_dac=False, **options)


@pytest.fixture(scope="module")
def loaded() -> Dia:
    dia = silent()
    dia.model.load_state_dict(WEIGHTS)
    return dia


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_codec(tmp_path_factory.mktemp("codec"))


def codes_of(model: DiaModel, text: str = TEXT, **settings: Any) -> np.ndarray:
    request = AnyRequest(encode_text(text), max_new_tokens=60, **{"temperature": 0.0, "top_k": 45} | settings)
    return generate(model, [request])[0].frames.numpy()


def own(configuration: DiaConfig) -> DiaModel:
    return DiaModel(configuration, get_ops("torch")).load(pack(configuration, STATE))


@pytest.mark.parametrize("configuration", [CONFIG, FIRST], ids=["second", "first"])
def test_servers_load_weights_themselves(configuration: DiaConfig) -> None:
    """Config, module, `load_state_dict`, `to`, `eval`: before there are weights, and again after they were used."""
    dia = silent(configuration)
    assert isinstance(dia.model, nn.Module) and dia.model.to(CPU) is dia.model and dia.model.eval() is dia.model
    missing, unexpected = dia.model.load_state_dict(WEIGHTS, strict=True)
    assert missing == unexpected == []
    wanted = codes_of(own(configuration), guidance_scale=3.0)
    for _ in range(2):
        assert np.array_equal(dia.generate(TEXT, 60, temperature=0.0), wanted)
        saved = dia.model.state_dict()
        assert saved.keys() == WEIGHTS.keys() and all(torch.equal(saved[name], WEIGHTS[name]) for name in saved)
        dia.model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()})
        dia.model.load_state_dict(STATE)  # transformers' names
    dia.model.load_state_dict(WEIGHTS | {"extra": torch.zeros(1)}, strict=False)
    dia.model.half().float()
    assert next(iter(dia.model.parameters())).dtype is torch.float32


def test_first_generation_is_not_the_second() -> None:
    first, second = (codes_of(own(item), guidance_scale=3.0) for item in (FIRST, CONFIG))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("wrap", ["original", "compiled", "ours"])
def test_a_module_may_be_assigned(wrap: str) -> None:
    """A program may build, load and compile it itself."""

    class Theirs(nn.Module):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            return WEIGHTS

    module: Any = {"original": Theirs(), "compiled": torch.compile(Theirs()), "ours": own(CONFIG)}[wrap]
    dia = silent()
    dia.model = module
    assert np.array_equal(dia.generate(TEXT, 60, temperature=0.0), codes_of(own(CONFIG), guidance_scale=3.0))
    with pytest.raises(CheckpointError, match="must be a module"):
        dia.model = 3


def test_weights_that_cannot_be() -> None:
    dia, name = silent(), "decoder.norm.weight"
    short = {key: value for key, value in WEIGHTS.items() if key != name}
    for given, message in (
        (short, "norm.weight"),
        (WEIGHTS | {name: torch.ones(3)}, "norm.weight"),
        (WEIGHTS | {name: torch.full_like(WEIGHTS[name], math.nan)}, "NaN"),
        (WEIGHTS | {name: 3}, "is a int"),
        ({"a": torch.ones(1)}, "not those of Dia"),
    ):
        with pytest.raises(RuntimeError, match=message):
            dia.model.load_state_dict(given)
    with pytest.raises(CheckpointError, match="missing"):
        dia.model.load_state_dict(short, strict=False)
    with pytest.raises(CheckpointError, match="no weights"):
        dia.model.state_dict()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_files_of_training_scripts(tmp_path: Path, prefix: str, key: str | None) -> None:
    folder = make_original_checkpoint(tmp_path, CONFIG, 3, file="dia.pth")
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    torch.save(state if key is None else {key: state, "step": 3, "optimizer": {"state": {}}}, folder / "dia.pth")
    model = DiaModel(CONFIG, get_ops("torch")).load(open_checkpoint(folder).load(torch.float32))
    assert np.array_equal(codes_of(model), codes_of(own(CONFIG)))
    torch.save(WEIGHTS | {name: tensor.clone() for name, tensor in state.items()}, folder / "dia.pth")
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(folder)


def reference_weights(logits: Tensor, scale: float, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The original's rules from guidance to probabilities, with none of our bounds. logits: cond, uncond."""
    cond, uncond = logits.double()
    guided = cond + scale * (cond - uncond)
    kept = torch.full_like(cond, -math.inf).scatter(-1, guided.topk(top_k).indices, 0.0) + cond
    kept[0, 1025:] = kept[1:, 1024:] = -math.inf
    kept = kept / temperature
    best = kept.argmax(-1)
    kept[best != 1024, 1024] = -math.inf
    kept[best == 1024, :1024] = -math.inf
    if top_p < 1:
        ordered, order = kept.softmax(-1).sort(-1, descending=True)
        out = (ordered.cumsum(-1) > top_p).roll(1, -1)
        out[..., 0] = False
        kept = kept.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -math.inf)
    return kept.softmax(-1)


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.25, 1.0, 3.0, 150.0])
@pytest.mark.parametrize("top_p", [-1.0, 0.0, 0.9, 1.0, 7.0])
@pytest.mark.parametrize("temperature", [1e-3, 1.2, 150.0])
def test_values_at_the_edges_mean_what_they_mean_in_the_original(
    scale: float, top_p: float, temperature: float
) -> None:
    from dia_fast.integrations.original.model import _settings

    logits = torch.randn(2, 9, 1028, generator=torch.Generator().manual_seed(5)) * 3
    wanted = reference_weights(logits, scale, temperature, top_p, 45)
    request = AnyRequest([1], **_settings(scale, temperature, top_p, 45))
    params = request.params
    given = logits if params.guidance_scale is not None else logits[:1].expand(2, -1, -1)
    one = torch.ones(1)
    got = reference.sample_weights(
        given, one * (params.guidance_scale or 0.0), one * params.temperature,
        torch.tensor([params.top_k], dtype=torch.int32), one * params.top_p, eos=1024,
    ).double()  # fmt: skip
    moved = [reference_weights(nudged(logits, seed), scale, temperature, top_p, 45) for seed in range(1, EVALUATIONS)]
    # Weights are whole numbers of 2^-30; the best has 1.
    allowed = 4 * max((item - wanted).abs().max() for item in moved) + 2.0**-23 + 1028 * 2.0**-30
    assert (got[0] / got[0].sum(-1, keepdim=True) - wanted).abs().max() <= allowed


@pytest.mark.parametrize("scale", [-2.0, 0.25, 0.999, 150.0])
def test_any_guidance_runs(loaded: Dia, scale: float) -> None:
    codes = loaded.generate(TEXT, 60, scale, 0.0)
    assert np.array_equal(codes, codes_of(own(CONFIG), guidance_scale=scale))
    with pytest.raises(InputError, match="guidance_scale"):
        Request([1], guidance_scale=scale)  # the bounds of every other door


def test_settings_that_keep_all_or_the_best_alone(loaded: Dia) -> None:
    greedy = loaded.generate(TEXT, 60, temperature=0.0)
    for top_p in (0, -1, 0.0):
        assert np.array_equal(loaded.generate(TEXT, 60, top_p=top_p, seed=3), greedy)
    every = loaded.generate(TEXT, 60, top_p=1.0, cfg_filter_top_k=None, seed=3)
    for options in ({"top_p": 1.5}, {"top_p": math.inf}, {"cfg_filter_top_k": 0, "top_p": 1}):
        assert np.array_equal(loaded.generate(TEXT, 60, **{"cfg_filter_top_k": None} | options, seed=3), every)


@pytest.mark.parametrize("text", ["", "  ", "[S1]", "[S1] [S2]"])
def test_texts_without_words(loaded: Dia, text: str) -> None:
    with pytest.warns(TextWarning, match="no words"):
        codes = loaded.generate(text, 60, temperature=0.0)
    assert codes.shape[1] == 9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = loaded.generate([text, TEXT], 60, temperature=0.0)
    assert np.array_equal(both[0], codes) and np.array_equal(both[1], loaded.generate(TEXT, 60, temperature=0.0))


def test_seeds(loaded: Dia) -> None:
    """As `torch.manual_seed` takes them; -1 is a new one each time."""

    def spoken(seed: int) -> np.ndarray:
        return loaded.generate(TEXT, 60, seed=seed)

    for seed in (2**32, 2**63, 2**64 - 1, -2, -(2**63)):
        assert np.array_equal(spoken(seed), spoken(seed % 2**64))
    assert not np.array_equal(spoken(-1), spoken(-1)) and not np.array_equal(spoken(2**63), spoken(2**63 + 1))
    for seed in (2**64, -(2**63) - 1, 1.5):
        with pytest.raises(InputError, match="seed"):
            spoken(seed)  # type: ignore[arg-type]


def test_arguments_of_forks(loaded: Dia) -> None:
    class Bar:
        steps = 0

        def update(self, steps: int) -> None:
            assert steps > 0
            self.steps += steps

    from dia_fast.integrations.original import model

    bar = Bar()
    model._told.clear()
    with pytest.warns(UserWarning, match="text_to_generate_size of a fork"):
        loaded.generate(TEXT, 60, pbar=bar, text_to_generate_size=12, temperature=0.0)
    assert 20 < bar.steps <= 61
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.generate(TEXT, 60, text_to_generate_size=12)


@pytest.mark.parametrize("rate", [44_100, 22_050])
def test_forks_encode_prompts(codec: Path, rate: int) -> None:
    dia = Dia(CONFIG, device=CPU, dac_model_path=codec)
    wave = 0.1 * torch.randn(rate // 4)
    same = dia.encode_audio_prompt(wave, rate)
    assert same.dtype is torch.int32 and same.shape == (22, 9)
    for shaped in (wave[None], wave[None, None], wave[None, None].expand(1, 2, -1)):
        assert torch.equal(dia.encode_audio_prompt(shaped, rate), same)
    whole = (wave * 32767).round().short()
    assert torch.equal(dia.encode_audio_prompt(whole, rate), dia.encode_audio_prompt(whole.float() / 32767, rate))
    dia.reset_state()


def test_the_codec_is_a_dac(codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name for name, shape for shape, and where the package itself can be had, number for number."""
    native = load_codec(codec)
    dia = Dia(CONFIG, device=CPU)
    dia.dac_model = native
    ours = dia.dac_model
    assert isinstance(ours, nn.Module) and ours.to(CPU) is ours and ours.eval() is ours and ours.device == CPU
    assert len(list(ours.parameters())) > 9
    for package in imported_dac(monkeypatch):
        assert package is not None
        theirs = load_codec(f"descript:{save_official(native, tmp_path / 'w.pth', 'old')}").network.model
        wave = 0.1 * torch.randn(2, 1, 5000)
        padded = ours.preprocess(wave, 44_100)
        assert torch.equal(padded, theirs.preprocess(wave, 44_100)) and padded.shape == (2, 1, 5120)
        for count in (None, 4):
            mine, his = ours.encode(padded, count), theirs.encode(padded, count)
            assert len(mine) == len(his) == 5 and torch.equal(mine.codes, his[1])
            for a, b in zip(mine, his, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-4)
        z, latents, _ = ours.quantizer.from_codes(mine.codes)
        torch.testing.assert_close(z, theirs.quantizer.from_codes(his[1])[0].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latents, theirs.quantizer.from_codes(his[1])[1].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).detach(), rtol=1e-3, atol=1e-4)
        assert ours(wave, 44_100)["audio"].shape == theirs(wave, 44_100)["audio"].shape
        for name in ("sample_rate", "hop_length", "n_codebooks", "codebook_size", "latent_dim"):
            assert getattr(ours, name) == getattr(theirs, name)
    for wrong in (torch.zeros(1, 2, 512), torch.zeros(512)):
        with pytest.raises(InputError, match=r"\[batch, 1, n\]"):
            ours.encode(wrong)
    with pytest.raises(InputError, match="44100"):
        ours.preprocess(torch.zeros(1, 1, 512), 48_000)
    assert isinstance(native, Codec)


FIRST_FIELDS = {
    "data": ["text_length", "audio_length", "channels", "text_pad_value", "audio_eos_value", "audio_pad_value",
             "audio_bos_value", "delay_pattern"],
    "model": ["encoder", "decoder", "src_vocab_size", "tgt_vocab_size", "normalization_layer_epsilon", "dropout",
              "weight_dtype", "rope_min_timescale", "rope_max_timescale"],
    "training": ["dtype", "logits_dot_in_fp32"],
}  # fmt: skip


def test_configurations_have_the_fields_of_both_generations() -> None:
    for given in (CONFIG, FIRST):
        have = OriginalConfig(given)
        for part, names in FIRST_FIELDS.items():
            for name in names:
                getattr(getattr(have, part), name)
        assert have.data.audio_length == 384 and have.model.decoder.n_layer == 2 and have.model.encoder.n_embd == 32
        assert have.encoder_config.norm_eps == have.norm_eps == 1e-5 and have.model_type == "dia"
        assert have.decoder_config.model_type == "dia_decoder" and have.encoder_config.hidden_act == "silu"
        again = OriginalConfig.model_validate(json.loads(json.dumps(have.model_dump())))
        assert again == have and again.native.first_generation == given.first_generation
        assert OriginalConfig.model_validate_json(have.model_dump_json()) == have
    assert "data" in OriginalConfig(FIRST).model_dump() and "data" not in OriginalConfig(CONFIG).model_dump()


def test_classes_of_the_first_generation() -> None:
    dumped = OriginalConfig(FIRST).model_dump()
    parts = dumped["model"]
    built = OriginalConfig(
        version="1.0",
        model=config.ModelConfig(
            **parts | {"encoder": config.EncoderConfig(**parts["encoder"]),
                       "decoder": config.DecoderConfig(**parts["decoder"])}
        ),
        training=config.TrainingConfig(),
        data=config.DataConfig(**dumped["data"]),
    )  # fmt: skip
    assert built.native == FIRST and built.model.decoder.gqa_query_heads == 4
    assert silent(dumped).config == built
    with pytest.raises(InputError, match=r"needs a value for .*n_hidden"):
        config.EncoderConfig(n_layer=3, n_embd=4)
    with pytest.raises(InputError, match="cannot be changed"):
        built.data.audio_length = 3
    assert built.data.model_copy(update={"audio_length": 64}).audio_length == 64


SOUND = 0.3 * np.sin(np.arange(3000) / 20).astype(np.float32)


@pytest.mark.parametrize(
    ("audio", "shape"),
    [
        (SOUND, (3000,)),
        (torch.from_numpy(SOUND), (3000,)),
        ((SOUND * 32767).astype(np.int16), (3000,)),
        (SOUND[:, None], (3000,)),
        (np.stack((SOUND, -SOUND), 1), (3000, 2)),
        (SOUND.astype(np.float64) * 9, (3000,)),
        (SOUND[:0], (0,)),
        (list(map(float, SOUND[:50])), (50,)),
    ],
)
@pytest.mark.parametrize("extension", ["wav", "aiff", "aif", "flac", "ogg", "AIFF", "au", "mp3"])
def test_saving(loaded: Dia, tmp_path: Path, audio: Any, shape: tuple[int, ...], extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    loaded.save_audio(str(path), audio)
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == 44_100
    if extension == "mp3" or (extension == "flac" and not len(audio)):
        assert len(samples) >= 1 and samples.shape[1:] == shape[1:]  # neither kind can hold no samples at all
        return
    assert samples.shape == shape
    plain = np.asarray(audio)
    whole = plain.astype(np.float64) / (32768 if plain.dtype == np.int16 else 1)
    if extension not in ("ogg",):
        assert np.abs(samples - np.clip(whole, -1, 1).reshape(shape)).max(initial=0) <= 2**-15


def test_sound_that_cannot_be_saved(loaded: Dia, tmp_path: Path) -> None:
    for audio, message in (
        (np.zeros((2, 3, 4)), r"shape \[n\] or \[n, channels\]"),
        (np.zeros(3, complex), "complex"),
        (np.zeros(3, np.int64), "16 or 32 bits"),
        (np.zeros((4, 0), np.float32), "channels"),
        ("abc", "numbers"),
    ):
        with pytest.raises(InputError, match=message):
            loaded.save_audio(str(tmp_path / "a.wav"), audio)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"use \.wav"):
        loaded.save_audio(str(tmp_path / "a.docx"), SOUND)
    assert not list(tmp_path.iterdir())
    loaded.save_audio(str(tmp_path / "a.opus"), SOUND)
    assert soundfile.read(io.BytesIO((tmp_path / "a.opus").read_bytes()))[1] == 48_000
