"""Runs SGLang on a plain CPU through its platform seam, and starts its server.

Loaded inside SGLang's own environment, never by the app: this folder is put on PYTHONPATH, where the
`.dist-info` folder beside this file makes it a distribution that SGLang finds by its entry point.
SGLANG_PLATFORM=bakeoff_cpu selects it. The ordinary server module is then started by `serve_cpu.py`.

SGLang's own CPU kernels (package sgl-kernel-cpu) are not on PyPI and need AMX to be fast; this platform
asks for the `torch_native` attention backend and the `native` operators instead, so its numbers are
SGLang *without* its fast CPU kernels, and the app says so beside them.
"""

from __future__ import annotations


def activate() -> str:
    """The entry point: SGLang asks which platform class this plugin offers."""
    return "bakeoff_sglang_cpu_platform.PlainTorchPlatform"
