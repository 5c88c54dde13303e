"""Tiny random weights in all the places where programs for Dia look for the real ones."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file

from bench.tools.codec_files import save_official
from bench.tools.tiny_models import original_state, random_state, tiny_config
from dia_fast.audio.codec import CodecConfig, random_codec

SIZES = tiny_config({}, {"max_position_embeddings": 384})
REPOSITORIES = ("nari-labs/Dia-1.6B", "nari-labs/Dia-1.6B-0626", "ttj/dia-1.6b-safetensors")
REVISION = "0" * 40


def make(folder: Path, generation: str) -> dict[str, str]:
    """Make a hub, a codec, a ComfyUI's folder of models and a voice; return the environment that leads to them.

    generation: "first" or "second": what all names stand for. No special code ever has the best logit, since the
    copies of the original differ in how they treat the end, and some forget to mask the others.
    """
    config = replace(SIZES, first_generation=generation == "first")
    state = random_state(SIZES, 5)
    head = state["logits_dense.weight"].view(config.decoder.num_channels, config.decoder.vocab_size, -1)
    head[:, config.decoder.eos_token_id :] = 0
    weights = {name: tensor.contiguous() for name, tensor in original_state(SIZES, state).items()}
    fields = config.to_original()
    if config.first_generation:
        fields["training"] = {"dtype": "float32"}  # early copies compute in it, and on a CPU in nothing else
    hub = folder / "hub"
    for repository in REPOSITORIES:
        place = hub / f"models--{repository.replace('/', '--')}"
        snapshot = place / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(REVISION)
        _model(snapshot, fields, weights)
    codec = random_codec(CodecConfig(encoder_hidden_size=4, decoder_hidden_size=32))
    snapshot = hub / "models--descript--dac_44khz" / "snapshots" / REVISION
    codec.save_pretrained(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(REVISION)
    comfy = folder / "comfy"
    (comfy / "TTS" / "DAC.speech.v1.0").mkdir(parents=True)
    (comfy / "TTS" / "Dia-1.6B").mkdir()
    (comfy / "diffusion_models").mkdir()
    _model(comfy / "TTS" / "Dia-1.6B", fields, weights)
    save_official(codec, comfy / "TTS" / "DAC.speech.v1.0" / "weights_44khz_8kbps_0.0.1.pth", "old")
    save_file(weights, comfy / "diffusion_models" / "dia.safetensors")
    time = np.arange(44_100 // 3) / 44_100
    noise = np.random.default_rng(1).standard_normal(len(time))
    soundfile.write(folder / "voice.wav", 0.3 * np.sin(2 * np.pi * 180 * time) + 0.02 * noise, 44_100, subtype="FLOAT")
    (folder / "codes").mkdir()
    return {
        "RECORDED_CODES": str(folder / "codes"),
        "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "STAND_IN_CODEC": str(snapshot), "STAND_IN_COMFY": str(comfy),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "BROWSER": "true",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "stand_ins"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip


def _model(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    torch.save(weights, folder / "dia-v0_1.pth")
    for name in ("model.safetensors", "dia-v0_1.safetensors"):
        save_file(weights, folder / name)
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "dia-v0_1_bf16.safetensors")
