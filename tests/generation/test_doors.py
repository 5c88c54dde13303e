"""One model at every door: names, adapters, codecs that lie beside it, and the settings that it brings."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from dia_fast import Dia, InputError, SamplingParams, demo_voice
from dia_fast.audio.codec import codec_for
from dia_fast.checkpoint.loading import open_checkpoint
from dia_fast.checkpoint.saving import convert, save_pretrained
from dia_fast.cli import main
from dia_fast.cli.app import build_parser, in_options
from dia_fast.cli.speak import at_once, wav_header
from dia_fast.errors import CheckpointError
from dia_fast.generation.sampling_params import from_generation_config
from dia_fast.model.config import DiaConfig
from dia_fast.model.device import choose_device
from dia_fast.training.lora import make_adapters, save_adapters
from tests.helpers.front import TEXT, TINY, make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    folder = make_model(tmp_path_factory.mktemp("doors") / "base")
    (folder / "codec").mkdir()
    (folder / "codec" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of every kind of projection, with weights in both of its factors."""
    torch.manual_seed(4)
    adapters = make_adapters(TINY, ("qkv", "o", "cross_q", "cross_kv", "down"), 3, 5.0, seed=1)
    for one in adapters.values():
        torch.nn.init.normal_(one.b)
    save_adapters(tmp_path / "adapter", TINY, adapters, str(base))
    checkpoint = open_checkpoint(base)
    weights = checkpoint.load()
    save_pretrained(
        tmp_path / "merged",
        TINY,
        {name: adapters[name].merged(weight) if name in adapters else weight for name, weight in weights.items()},
    )
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_an_adapter_is_the_merged_model_to_the_bit(adapter: Path, dtype: torch.dtype | None) -> None:
    found, merged = open_checkpoint(adapter).load(dtype), open_checkpoint(adapter.parent / "merged").load(dtype)
    assert found.keys() == merged.keys() and all(torch.equal(found[name], merged[name]) for name in found)
    plain = open_checkpoint(open_checkpoint(adapter).files[0].parent).load(dtype)
    assert any(not torch.equal(found[name], plain[name]) for name in found)


def test_an_adapter_finds_a_base_beside_it_and_its_codec(adapter: Path, base: Path) -> None:
    shutil.copytree(base, adapter / "below")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "below"}))
    assert open_checkpoint(adapter).files[0].parent == adapter / "below"
    assert codec_for(adapter) == str(adapter / "below" / "codec")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 4}, "the base asks for"),
        ({"lora_alpha": None}, "lora_alpha a number"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ],
)
def test_an_adapter_that_is_not_computed_here_is_refused(
    adapter: Path, change: dict[str, object], message: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(adapter)


def test_the_codec_lies_beside_the_weights(base: Path) -> None:
    assert codec_for(base) == codec_for(base / "model.safetensors") == str(base / "codec")
    assert codec_for("demo") == str(demo_voice() / "codec")


def test_conversion_takes_codec_and_settings_along(tmp_path: Path) -> None:
    folder = convert("demo", tmp_path / "out")
    for file in (demo_voice() / "codec").iterdir():
        assert (folder / "codec" / file.name).read_bytes() == file.read_bytes()
    assert open_checkpoint(folder).defaults == open_checkpoint("demo").defaults
    assert open_checkpoint("demo").defaults == SamplingParams(temperature=0.5)


def test_python_and_the_command_line_speak_alike(tmp_path: Path) -> None:
    text = "[S1] Please open the red door."
    with Dia.from_pretrained("demo", device="cpu") as dia:
        expected = dia.generate(text, seed=7)
        usual = dia.generate(text, seed=7, temperature=1.2)
    expected.save(tmp_path / "python.wav")
    assert usual.samples.tobytes() != expected.samples.tobytes()
    script = tmp_path / "in.jsonl"
    script.write_text(json.dumps({"id": "a", "text": text, "seed": 7}))
    speak = ["speak", text, "--model", "demo", "--device", "cpu", "--seed", "7", "-q", "-o", str(tmp_path / "cli.wav")]
    assert main(speak) == 0
    assert main(["batch", str(script), str(tmp_path / "many"), "--model", "demo", "--device", "cpu", "-q"]) == 0
    files = (tmp_path / "python.wav", tmp_path / "cli.wav", tmp_path / "many" / "a.wav")
    assert len({file.read_bytes() for file in files}) == 1


def test_settings_of_a_checkpoint() -> None:
    usual = SamplingParams()
    assert from_generation_config({"max_length": 9, "bos_token_id": 3, "temperature": None}) == usual
    assert from_generation_config({"top_k": 0, "temperature": 0.7}) == replace(usual, top_k=None, temperature=0.7)
    with pytest.raises(InputError, match="top_p"):
        from_generation_config({"top_p": 3})


@pytest.mark.parametrize("content", ["[]", "{", '{"temperature": -1}', "[" * 200_000])
def test_damaged_settings_name_their_file(base: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="generation_config.json"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        (["speak"], "max_batch must be from 1 to 32, not 64", "--max-batch must be from 1 to 32, not 64"),
        (["batch", "a", "b"], "max_batch must be from 1 to 32, not 64", "--batch-size must be from 1 to 32, not 64"),
        (["speak"], "may not be downloaded (local_files_only)", "may not be downloaded (--offline)"),
        (["speak"], "temperature must be a number", "--temperature must be a number"),
        (["speak"], "the text holds a seed", "the text holds a seed"),
        (["speak"], "cannot read my/max_new_tokens", "cannot read my/max_new_tokens"),
        (["info", "m"], "max_batch is no option here", "max_batch is no option here"),
    ],
)
def test_messages_name_options(command: list[str], message: str, expected: str) -> None:
    assert in_options(message, build_parser().parse_args(command)) == expected


def test_speak_runs_one_sequence_unless_pieces_are_independent() -> None:
    def count(text: str, *more: str) -> int:
        return at_once(build_parser().parse_args(["speak", *more]), text)

    assert count(TEXT) == count(TEXT * 100) == count(TEXT * 100, "--stream") == 1
    assert count(TEXT * 100, "--stream", "--prompt-text", "x") == 2, "the segment that is heard and the next"
    assert count(TEXT * 100, "--prompt", "a.wav", "--prompt-text", "[S1] x") == 32
    assert count(TEXT, "--max-batch", "3") == 3


def test_speak_plans_memory_for_one_sequence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []
    whole = Dia.from_pretrained.__func__  # type: ignore[attr-defined]

    def spied(cls: type[Dia], name: str, **more: object) -> Dia:
        seen.append(more["max_batch"])  # type: ignore[arg-type]
        return whole(cls, name, **more)  # type: ignore[no-any-return]

    monkeypatch.setattr(Dia, "from_pretrained", classmethod(spied))
    assert main(["speak", "[S1] yes.", "--device", "cpu", "-q", "--seed", "1", "-o", str(tmp_path / "a.wav")]) == 0
    assert seen == [1]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_wav_stream_begins_with_its_rate(rate: int) -> None:
    samples, found = soundfile.read(io.BytesIO(wav_header(rate) + b"\1\0" * 100), dtype="int16")
    assert found == rate and samples.tolist() == [1] * 100


def test_format_is_for_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["speak", TEXT, "--format", "wav", "-o", str(tmp_path / "a.wav")]) == 2
    assert "--format is for -o -" in capfd.readouterr().err


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without an Apple GPU")
def test_an_unusable_device_is_told_in_a_sentence() -> None:
    with pytest.raises(InputError, match="device 'mps' cannot be used: torch .* cannot compute on mps") as caught:
        choose_device("mps")
    assert len(str(caught.value)) < 200 and caught.value.__suppress_context__


@pytest.mark.parametrize("command", [["info"], ["speak", TEXT, "--model"]])
def test_an_unreachable_hub_is_asked_once(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []

    def refuse(self: object, name: str, *, revision: str | None = None, timeout: float) -> None:
        asked.append(timeout)
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    assert main([*command, "nobody/nothing-at-all"]) == 2
    assert len(asked) == 1 and asked[0] <= 10
    assert capfd.readouterr().err.count("the Hub cannot be reached: no route to host") == 1


def test_a_failure_of_the_hub_has_no_chain_of_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: 1 / 0)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("nobody/nothing-at-all")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_the_config_is_the_base_s(adapter: Path) -> None:
    assert isinstance(open_checkpoint(adapter).config, DiaConfig) and open_checkpoint(adapter).config == TINY
