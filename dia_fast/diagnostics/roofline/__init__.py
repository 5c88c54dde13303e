"""Prediction of a decode step's time on a GPU from counted bytes and compiled code: `dia-fast plan`.

`work` counts, `figures` holds what the compiler made of the kernels, `devices` what vendors publish, `assumptions` what
nobody does; `predict` puts them together. `measure` times the same launches on a GPU; `published` is what others found.
"""
