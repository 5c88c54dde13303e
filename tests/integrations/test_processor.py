"""transformers' processor for a checkpoint with a codec of its own."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, DiaForConditionalGeneration

from dia_fast import Dia, demo_voice
from dia_fast.audio.codec import load_codec
from dia_fast.errors import CheckpointError
from dia_fast.integrations.transformers import processor
from dia_fast.text.tokenizer import encode_text
from tests.helpers.codecs import assert_same_sound

TEXTS = ["[S1] The red book.", "[S1] Yes, thank you. [S2] Good morning."]


def test_text_becomes_what_the_demo_voice_reads_and_its_rows_become_sound() -> None:
    model = DiaForConditionalGeneration.from_pretrained(demo_voice(), dtype=torch.float32)
    ours = processor("demo")
    inputs = ours(text=TEXTS, padding=True)
    for row, mask, text in zip(inputs["input_ids"], inputs["attention_mask"], TEXTS, strict=True):
        assert row[mask.bool()].tolist() == list(encode_text(text))
    decoder = model.config.decoder_config
    special = {decoder.bos_token_id, decoder.pad_token_id}
    assert set(inputs["decoder_input_ids"].unique().tolist()) <= special
    alone = ours(text=TEXTS[:1])
    rows = model.generate(**alone, max_new_tokens=60, do_sample=False)
    [sound] = ours.batch_decode(rows)
    with Dia.from_pretrained(demo_voice(), backend="torch", device="cpu") as dia:
        [codes] = dia.generate_codes(TEXTS[0], max_new_tokens=60, do_sample=False)
        expected = dia.codec.decode(codes)
        assert_same_sound(sound[: len(expected)], expected, dia.codec)


def test_a_prompt_becomes_the_codes_of_the_codec_beside_the_weights() -> None:
    codec = load_codec(demo_voice() / "codec")
    wave = (0.1 * np.random.default_rng(1).normal(size=20 * codec.hop_length)).astype(np.float32)
    given = processor(demo_voice())(text=TEXTS[:1], audio=[wave])["decoder_input_ids"][0]
    codes = codec.encode(torch.from_numpy(wave))
    assert torch.equal(given[1 : 1 + len(codes), 0].int(), codes[:, 0].int())
    assert torch.equal(given[9 : 1 + len(codes), 1].int(), codes[: len(codes) - 8, 1].int())


def test_arguments_of_a_call_come_first() -> None:
    ours = processor(demo_voice())
    for given in ({"bos_token_id": 5}, {"audio_kwargs": {"bos_token_id": 5}}):
        assert ours(text=TEXTS, padding=True, **given)["decoder_input_ids"].min() == 5


def test_saved_it_is_what_their_own_class_loads(tmp_path: Path) -> None:
    ours = processor(demo_voice())
    ours.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert theirs.audio_tokenizer.config.sampling_rate == theirs.feature_extractor.sampling_rate == 16_000
    given = {name: ours.defaults[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sampling_rate")}
    for name, tensor in theirs(text=TEXTS, padding=True, **given).items():
        assert torch.equal(tensor, ours(text=TEXTS, padding=True)[name])


def test_a_model_without_a_codec_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no folder 'codec': use transformers' AutoProcessor"):
        processor(tmp_path)
