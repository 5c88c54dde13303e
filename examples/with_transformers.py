"""The three programs of the model card, on transformers, before and after `accelerate`.

    python -m examples.with_transformers generate|clone|train [--before] [--tiny] [--out FOLDER]

Before and after differ by the line that calls `accelerate`. With --tiny a random checkpoint is made on the spot and
nothing is downloaded; without it the official weights are (3.2 GB). Needs `pip install dia-fast[transformers]`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import soundfile
import torch

from examples import tiny

TEXT = "[S1] Dia is an open weights text to dialogue model. [S2] You get full control over scripts and voices."
VOICE_SAYS = "[S1] This is how I sound. [S2] And this is me."
SETTINGS = {"guidance_scale": 3.0, "temperature": 1.8, "top_p": 0.90, "top_k": 45}


def load(name: str, before: bool, device: str) -> tuple[Any, Any]:
    """The processor and the model."""
    from transformers import AutoProcessor, DiaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(name)
    model = DiaForConditionalGeneration.from_pretrained(name).to(device)
    if not before:
        from dia_fast.integrations.transformers import accelerate

        # The flags take single kernels for model(**inputs), too.
        accelerate(model, rms_norm=True, glu=True, rope_attention=True)
    return processor, model


def generate(processor: Any, model: Any, out: Path, limit: int) -> str:
    """A text becomes speech."""
    inputs = processor(text=[TEXT], padding=True, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=limit, **SETTINGS)
    processor.save_audio(processor.batch_decode(outputs), str(out / "generated.wav"))
    return f"{outputs.shape[1]} rows in {out / 'generated.wav'}"


def clone(processor: Any, model: Any, voice: Path, out: Path, limit: int) -> str:
    """A text becomes speech in the voice of a recording; the text begins with what the recording says."""
    import soxr

    samples, rate = soundfile.read(voice, dtype="float32", always_2d=True)
    audio = soxr.resample(samples.mean(axis=1), rate, 44_100)
    inputs = processor(text=[f"{VOICE_SAYS} {TEXT}"], audio=audio, padding=True, return_tensors="pt").to(model.device)
    prompt = processor.get_audio_prompt_len(inputs["decoder_attention_mask"])
    outputs = model.generate(**inputs, max_new_tokens=limit, **SETTINGS)
    processor.save_audio(processor.batch_decode(outputs, audio_prompt_len=prompt), str(out / "cloned.wav"))
    return f"{outputs.shape[1]} rows, {prompt} of them the voice's, in {out / 'cloned.wav'}"


def train(processor: Any, model: Any, voice: Path) -> str:
    """A forward pass with labels, its loss, and its gradients."""
    import soxr

    samples, rate = soundfile.read(voice, dtype="float32", always_2d=True)
    audio = soxr.resample(samples.mean(axis=1), rate, 44_100)
    inputs = processor(
        text=[VOICE_SAYS], audio=audio, generation=False, output_labels=True, padding=True, return_tensors="pt"
    ).to(model.device)
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    return f"loss {loss.item():.4f}, gradients of norm {norm.item():.4f}"


def main() -> None:
    """Run one of the programs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=("generate", "clone", "train"))
    parser.add_argument("--before", action="store_true", help="as it was, without dia-fast")
    parser.add_argument("--tiny", action="store_true", help="with a random checkpoint instead of the official one")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for everything (%(default)s)")
    parser.add_argument("--voice", type=Path, help="a recording, for clone and train")
    options = parser.parse_args()
    name, voice, limit = "nari-labs/Dia-1.6B-0626", options.voice, 3072
    if options.tiny:
        model_folder, _, made = tiny.make(options.out)
        name, voice, limit = str(model_folder), voice or made, 60
    elif voice is None and options.program != "generate":
        parser.error("--voice is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    processor, model = load(name, options.before, "cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    if options.program == "generate":
        result = generate(processor, model, options.out, limit)
    elif options.program == "clone":
        result = clone(processor, model, voice, options.out, limit)
    else:
        result = train(processor, model, voice)
    print(f"{options.program}: {result} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
