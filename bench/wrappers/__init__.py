"""Programs that others have written for the original package, run as they are on dia-fast and on their own code.

    python -m bench.wrappers --original CHECKOUT dia-tts-server=CHECKOUT vox-box=FOLDER ...

Nothing of theirs is kept here. `programs` drives each one as its users do; `stand_ins` holds small replacements for
what a machine without their dependencies lacks (torchaudio, the codec's package, gradio, ComfyUI); weights are tiny and
random.
"""
