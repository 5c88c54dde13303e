"""The part of ComfyUI that nodes use."""

from comfy import utils  # noqa: F401
