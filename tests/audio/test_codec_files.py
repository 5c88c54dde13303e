"""Codec files: both layouts give the same tensors, and whatever is damaged, unsafe or does not fit is named."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bench.tools.codec_files import save_official
from dia_fast.audio.codec import Codec, CodecConfig, load_codec, random_codec
from dia_fast.audio.codec.weights import fold_weight_norm, rename_official
from dia_fast.errors import CheckpointError, InputError
from tests.helpers.codecs import SMALL, assert_same_sound, imported_dac, random_codes

# The dac package uses the old spelling of weight norm.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return random_codec(SMALL)


@pytest.fixture
def dac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield from imported_dac(monkeypatch)


@pytest.fixture
def folder(codec: Codec, tmp_path: Path) -> Path:
    return codec.save_pretrained(tmp_path / "new" / "codec")


def same_tensors(left: Codec, right: Codec, tolerance: float = 0.0) -> bool:
    one, other = left.network.tensors(), right.network.tensors()
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=tolerance, atol=0.0) for name in one
    )


def test_the_transformers_layout_round_trips(codec: Codec, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    loaded = load_codec(folder)
    assert loaded.config == SMALL
    assert same_tensors(codec, loaded)
    assert load_codec(str(folder), dtype=torch.bfloat16).network.decoder.conv1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("spelling", ["old", "parametrization", "folded"])
def test_the_official_layout_gives_the_same_tensors(codec: Codec, tmp_path: Path, spelling: str) -> None:
    path = save_official(codec, tmp_path / "weights.pth", spelling)
    loaded = load_codec(path)
    assert loaded.config == SMALL
    assert same_tensors(codec, loaded, 0.0 if spelling == "folded" else 3e-7)  # g and v were rounded on their way
    assert same_tensors(loaded, load_codec(tmp_path))  # a folder that holds just this file


def test_an_old_style_torch_file(codec: Codec, tmp_path: Path) -> None:
    """Before 1.6 torch wrote no zip archives; those cannot be memory-mapped."""
    path = save_official(codec, tmp_path / "weights.pth", "folded", zipped=False)
    assert same_tensors(codec, load_codec(path))


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), width=st.integers(1, 4))
def test_folding_undoes_weight_norm(rows: int, columns: int, width: int) -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(columns, rows, width))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.7)
    folded = fold_weight_norm({f"a.{name}": tensor for name, tensor in layer.state_dict().items()}, Path("f"))
    assert folded.keys() == {"a.weight", "a.bias"}
    # A norm is a sum of squares and a root; then a division and a product. Both sides round, each in its own order.
    rounding = (columns * width + 8) * 2.0**-24
    torch.testing.assert_close(folded["a.weight"], layer.weight.detach(), rtol=rounding, atol=0)


def test_official_names_of_two_block_networks() -> None:
    """Spot checks by hand: one of each kind of place, in either half."""
    expected = {
        "encoder.block.0.weight_g": "encoder.conv1.weight_g",
        "encoder.block.2.block.0.block.0.alpha": "encoder.block.1.res_unit1.snake1.alpha",
        "encoder.block.2.block.2.block.3.bias": "encoder.block.1.res_unit3.conv2.bias",
        "encoder.block.1.block.3.alpha": "encoder.block.0.snake1.alpha",
        "encoder.block.1.block.4.weight_v": "encoder.block.0.conv1.weight_v",
        "encoder.block.3.alpha": "encoder.snake1.alpha",
        "encoder.block.4.bias": "encoder.conv2.bias",
        "quantizer.quantizers.2.in_proj.weight_v": "quantizer.quantizers.2.in_proj.weight_v",
        "decoder.model.0.parametrizations.weight.original0": "decoder.conv1.parametrizations.weight.original0",
        "decoder.model.1.block.0.alpha": "decoder.block.0.snake1.alpha",
        "decoder.model.1.block.1.weight_g": "decoder.block.0.conv_t1.weight_g",
        "decoder.model.2.block.2.block.1.bias": "decoder.block.1.res_unit1.conv1.bias",
        "decoder.model.2.block.4.block.2.alpha": "decoder.block.1.res_unit3.snake2.alpha",
        "decoder.model.3.alpha": "decoder.snake1.alpha",
        "decoder.model.4.bias": "decoder.conv2.bias",
    }
    zeros = dict.fromkeys(expected, torch.zeros(1))
    assert list(rename_official(zeros, SMALL)) == list(expected.values())


def test_odd_and_reordered_ratios_survive(tmp_path: Path) -> None:
    config = CodecConfig(
        encoder_hidden_size=2,
        downsampling_ratios=(2, 3),
        decoder_hidden_size=8,
        upsampling_ratios=(2, 3),
        hidden_size=5,
        sampling_rate=24_000,
    )
    codec = random_codec(config)
    for path in (codec.save_pretrained(tmp_path / "a"), save_official(codec, tmp_path / "b.pth", "folded")):
        loaded = load_codec(path)
        assert loaded.config == config
        assert loaded.decode(torch.zeros(4, 9, dtype=torch.int64)).shape == (config.samples_of(4),)
        assert config.samples_of(4) == 23


def test_the_preprocessor_says_the_sampling_rate(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", sampling_rate=48_000)
    assert load_codec(folder).sample_rate == 48_000
    (folder / "preprocessor_config.json").unlink()
    assert load_codec(folder).sample_rate == 8_000


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


NAME = "decoder.block.1.snake1.alpha"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(NAME), f"1 tensors are missing, the first is {NAME}"),
    "extra": (lambda t: t.update(more=torch.zeros(1)), "1 tensors are not part of the codec, the first is more"),
    "misshapen": (
        lambda t: t.update({NAME: torch.zeros(1, 7, 1)}),
        rf"{NAME} is \[1, 7, 1\]; .* needs shape \[1, 8, 1\]",
    ),
    "integers": (lambda t: t.update({NAME: torch.ones(1, 8, 1, dtype=torch.int32)}), rf"{NAME} \(torch.int32\)"),
    "NaN": (lambda t: t[NAME].mul_(float("nan")), f"{NAME} .* is not made of finite"),
    "half of weight norm": (lambda t: t.update({"a.weight_g": torch.ones(3, 1, 1)}), "tensor a.weight_v is missing"),
    "weight norm that does not fit": (
        lambda t: t.update({"a.weight_g": torch.ones(3, 1, 1), "a.weight_v": torch.ones(2, 4, 1)}),
        r"a.weight_g of shape \[3, 1, 1\] does not fit a.weight_v of shape \[2, 4, 1\]",
    ),
    "weight norm of nothing": (
        lambda t: t.update(
            {"encoder.conv2.weight_g": torch.ones(16), "encoder.conv2.weight_v": torch.zeros(16, 16, 3)}
        ),
        "encoder.conv2.weight .* is not made of finite",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(folder: Path, case: str) -> None:
    edit, message = BAD_TENSORS[case]
    edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message):
        load_codec(folder)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "dia"}, "model_type is 'dia'; only 'dac'"),
    "text for a number": ({"n_codebooks": "9"}, "n_codebooks must be a whole number from 1 to 128, not '9'"),
    "zero": ({"codebook_size": 0}, "codebook_size must be .* not 0"),
    "a fraction": ({"codebook_dim": 1.5}, "codebook_dim must be .* not 1.5"),
    "truth": ({"encoder_hidden_size": True}, "encoder_hidden_size must be .* not True"),
    "ratios of one": ({"downsampling_ratios": [1, 8]}, r"downsampling_ratios must be .* not \[1, 8\]"),
    "no list": ({"downsampling_ratios": 8}, "downsampling_ratios must be .* not 8"),
    "no ratios": ({"downsampling_ratios": []}, r"downsampling_ratios must be .* not \[\]"),
    "products differ": ({"upsampling_ratios": [4, 4]}, "their products differ"),
    "odd width": ({"decoder_hidden_size": 18}, "decoder_hidden_size 18 cannot be halved 2 times"),
    "hop": ({"hop_length": 512}, "hop_length is 512, but .* multiply to 8"),
    "negative rate": ({"sampling_rate": -1}, "sampling_rate must be"),
    "more codebooks than tensors": ({"n_codebooks": 4}, "5 tensors are missing, the first is quantizer.quantizers.3"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_that_cannot_work(folder: Path, case: str) -> None:
    values, message = BAD_CONFIGS[case]
    (folder / "preprocessor_config.json").unlink()
    edit_json(folder / "config.json", **values)
    with pytest.raises(CheckpointError, match=f"{folder}.*: .*{message}"):
        load_codec(folder)


@pytest.mark.parametrize("contents", ["", "{", "[]", "null", "\udcff"])
def test_configurations_that_are_not_objects(folder: Path, contents: str) -> None:
    (folder / "config.json").write_bytes(contents.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="config.json is not JSON|expected an object"):
        load_codec(folder)


def test_damaged_and_missing_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for contents in (whole[:-100], whole[:50], b"", b"not tensors" * 100):
        weights.write_bytes(contents)
        with pytest.raises(CheckpointError, match="model.safetensors is truncated"):
            load_codec(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: missing"):
        load_codec(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no codec here: expected config.json and model.safetensors"):
        load_codec(folder)


class Malicious:
    """A pickle of this runs `os.mkdir` when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "descript:"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, dac: object, zipped: bool, prefix: str) -> None:
    path, trap = tmp_path / "weights.pth", tmp_path / "trap"
    contents = {"state_dict": {}, "metadata": {"kwargs": {}, "x": Malicious(trap)}}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="refused: .* could run code"):
        load_codec(prefix + str(path))
    assert not trap.exists()


def test_files_that_are_not_codecs(tmp_path: Path, codec: Codec) -> None:
    path = tmp_path / "weights.pth"
    whole = save_official(codec, path, "old").read_bytes()
    for contents in (whole[: len(whole) // 2], whole[:100], b"", b"junk" * 500, pickle.dumps([1, 2], 2)):
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match="weights.pth(: not a| is refused| is truncated)"):
            load_codec(path)
    for wrong in ([1], {"state_dict": {}}, {"state_dict": 3, "metadata": {}}, {"metadata": {"kwargs": {}}}):
        torch.save(wrong, path)
        with pytest.raises(CheckpointError, match="not a descript-audio-codec file"):
            load_codec(path)
    torch.save({"state_dict": {}, "metadata": {}}, path)
    with pytest.raises(CheckpointError, match="metadata.kwargs"):
        load_codec(path)
    torch.save({"state_dict": {"encoder.block.0.weight_g": 3}, "metadata": {"kwargs": SMALL.to_official()}}, path)
    with pytest.raises(CheckpointError, match="entry 'encoder.block.0.weight_g' is a int"):
        load_codec(path)


def test_codebooks_of_several_widths_are_refused() -> None:
    kwargs = SMALL.to_official() | {"codebook_dim": [4, 4, 8]}
    with pytest.raises(CheckpointError, match=r"codebook_dim must be a whole number from 1 to 4096, not \[4, 4, 8\]"):
        CodecConfig.from_official(kwargs)
    assert CodecConfig.from_official(kwargs | {"codebook_dim": [4, 4, 4]}) == SMALL


@pytest.mark.parametrize("name", ["no-such-codec", "./none/here", "a/b/c", "/none/here"])
def test_names_that_are_neither_paths_nor_repositories(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder, and not the name of a repository|no codec here"):
        load_codec(name)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for options in ({"local_files_only": True}, {"revision": "main", "local_files_only": True}):
        with pytest.raises(
            CheckpointError,
            match=r"some/codec-name is neither a local folder nor in the cache of the Hub.*local_files_only",
        ):
            load_codec("some/codec-name", **options)  # type: ignore[arg-type]


def test_a_snapshot_of_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, codec: Codec) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def fetch(name: str, file: str, revision: str | None) -> Path:
        asked.append((name, file, revision))
        return folder / file

    monkeypatch.setattr("dia_fast.checkpoint.hub.file_names", lambda name, revision: ["README.md", *os.listdir(folder)])
    monkeypatch.setattr("dia_fast.checkpoint.hub.fetch_file", fetch)
    assert same_tensors(load_codec("some/codec-name", revision="v2"), codec)
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    assert asked == [("some/codec-name", file, "v2") for file in files]


def test_a_codec_is_asked_for_once_where_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(self: object, name: str, *, revision: str | None = None, timeout: float) -> None:
        asked.append(timeout)
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(CheckpointError, match="nobody/no-codec is neither .*: no route to host") as caught:
        load_codec("nobody/no-codec")
    assert len(asked) == 1 and asked[0] <= 10
    assert caught.value.__cause__ is None


def test_a_failed_save_leaves_nothing(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot make the folder"):
        codec.save_pretrained(tmp_path / "file" / "codec")

    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*model.safetensors"):
            codec.save_pretrained(tmp_path / "codec")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "codec").iterdir())


def test_saving_over_a_codec_replaces_it(folder: Path) -> None:
    other = random_codec(SMALL, seed=1)
    other.save_pretrained(folder)
    assert same_tensors(load_codec(folder), other)
    assert len(list(folder.iterdir())) == 3


def test_descript_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dac", None)
    with pytest.raises(CheckpointError, match=r'codec="descript" needs .* pip install "dia-fast\[dac\]"'):
        load_codec("descript")


def test_descript_files_that_do_not_fit(tmp_path: Path, dac: object, codec: Codec) -> None:
    with pytest.raises(CheckpointError, match="none.pth: no such file"):
        load_codec(f"descript:{tmp_path / 'none.pth'}")
    path = tmp_path / "weights.pth"
    for contents in ({"state_dict": {}, "metadata": {"kwargs": SMALL.to_official()}}, [1], {}):
        torch.save(contents, path)
        with pytest.raises(CheckpointError, match="does not fit descript-audio-codec"):
            load_codec(f"descript:{path}")


def test_others_may_read_the_files_as_the_umask_says(tmp_path: Path, codec: Codec) -> None:
    before = os.umask(0o027)
    try:
        folder = codec.save_pretrained(tmp_path / "codec")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()} == dict.fromkeys(
        ["config.json", "model.safetensors", "preprocessor_config.json"], 0o640
    )


def test_descript_downloads_its_weights(
    tmp_path: Path, dac: Any, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_official(codec, tmp_path / "weights.pth", "old")
    monkeypatch.setattr(dac.utils, "download", lambda model_type: path)
    loaded = load_codec("descript")
    assert loaded.config == SMALL
    assert same_tensors(loaded, codec, 3e-7)
    codes = random_codes(12)
    assert_same_sound(loaded.decode(codes), codec.decode(codes), codec)

    def offline(model_type: str) -> Path:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(dac.utils, "download", offline)
    with pytest.raises(CheckpointError, match="could not download .* no route to host"):
        load_codec("descript")
