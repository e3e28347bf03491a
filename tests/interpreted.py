"""Imported before any module with kernels: they are made for Triton's interpreter, or for a GPU, when they are defined."""

from speedrun.lab.hardware import setup

machine = setup()
