"""Nodes for ComfyUI: Dia on dia-fast. Copy this folder into `custom_nodes` and `pip install dia-fast` there.

Two nodes: one loads a model, one speaks. A voice is what a "Load Audio" node gives, with the words that are said in it.
"""

from typing import Any, cast

import comfy.utils
import numpy as np
import torch

from dia_fast import Audio, Dia
from dia_fast.errors import DiaFastError

MODELS = ["nari-labs/Dia-1.6B-0626", "nari-labs/Dia-1.6B", "demo"]
CATEGORY = "audio/dia-fast"


class DiaFastLoad:
    """Load a model: one of the Hub's, a folder, or the voice that comes with dia-fast."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", ("DIA_FAST",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODELS,),
                "dtype": (["auto", "bfloat16", "float16", "float32"],),
            },
            "optional": {"path": ("STRING", {"default": "", "tooltip": "a folder or repository instead of the list"})},
        }

    def load(self, model: str, dtype: str, path: str = "") -> tuple[Dia]:
        """Load once; ComfyUI keeps what a node returned while its inputs stay the same."""
        return (Dia.from_pretrained(path.strip() or model, dtype=None if dtype == "auto" else dtype),)


class DiaFastSpeak:
    """Speak a transcript, in the voice of a recording if there is one."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "speak", ("AUDIO",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("DIA_FAST",),
                "text": ("STRING", {"multiline": True, "default": "[S1] Hello. [S2] Hi, how are you?"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
                "max_tokens": ("INT", {"default": 3072, "min": 17, "max": 3072}),
                "cfg_scale": ("FLOAT", {"default": 3.0, "min": 1.0, "max": 10.0, "step": 0.1}),
                "temperature": ("FLOAT", {"default": 1.2, "min": 0.0, "max": 3.0, "step": 0.05}),
                "top_p": ("FLOAT", {"default": 0.95, "min": 0.05, "max": 1.0, "step": 0.01}),
                "top_k": ("INT", {"default": 45, "min": 1, "max": 1024}),
                "speed": ("FLOAT", {"default": 1.0, "min": 0.25, "max": 4.0, "step": 0.05}),
                "trim_silence": ("BOOLEAN", {"default": False}),
            },
            "optional": {
                "voice": ("AUDIO",),
                "voice_text": ("STRING", {"multiline": True, "default": ""}),
            },
        }

    def speak(
        self,
        model: Dia,
        text: str,
        seed: int,
        max_tokens: int,
        cfg_scale: float,
        temperature: float,
        top_p: float,
        top_k: int,
        speed: float,
        trim_silence: bool,
        voice: dict[str, Any] | None = None,
        voice_text: str = "",
    ) -> tuple[dict[str, Any]]:
        """Return the sound as ComfyUI has it: `[1, 1, n]` and its rate."""
        bar = comfy.utils.ProgressBar(max_tokens)
        try:
            [audio] = cast(
                "list[Audio]",
                model.generate(
                    [text],
                    audio_prompt=None if voice is None else _mono(voice),
                    prompt_text=voice_text.strip() or None if voice is not None else None,
                    split=None if voice is not None and not voice_text.strip() else "auto",
                    add_tag=True,
                    seed=seed,
                    max_new_tokens=max_tokens,
                    guidance_scale=None if cfg_scale == 1 else cfg_scale,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    speed=speed,
                    trim_silence=trim_silence,
                    progress=lambda steps: bar.update_absolute(steps),
                ),
            )
        except DiaFastError as error:
            raise ValueError(str(error)) from error  # which ComfyUI shows at the node
        return ({"waveform": torch.from_numpy(audio.samples)[None, None], "sample_rate": audio.sample_rate},)


def _mono(voice: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The first sound of ComfyUI's `[batch, channels, n]`, its channels mixed."""
    return voice["waveform"][0].float().mean(0).cpu().numpy(), int(voice["sample_rate"])


NODE_CLASS_MAPPINGS = {"DiaFastLoad": DiaFastLoad, "DiaFastSpeak": DiaFastSpeak}
NODE_DISPLAY_NAME_MAPPINGS = {"DiaFastLoad": "Dia: load (dia-fast)", "DiaFastSpeak": "Dia: speak (dia-fast)"}
