"""What travels and what does not, each with its reason. Checked against vLLM 0.24.0 and SGLang 0.5.16.

"By reading" means: every import of it in the engine's sources is inside a function, under a condition or in a `try`
that does not hold while a plain text model is served on a Hopper GPU; the servers were also imported without it.
"""

from __future__ import annotations

import fnmatch
import re

# Distribution -> why the machine's own, in whatever version, serves as well as the pinned one.
ANY_BASE: dict[str, str] = {
    "llvmlite": "belongs to the machine's numba",
    "numba": "vLLM's n-gram speculation alone compiles with it; must fit the machine's numpy",
    "opencv-python-headless": "decodes video, which no text model is given",
    "pandas": "read by the engines' own benchmarks only",
    "pyarrow": "read by the package datasets, for the engines' own benchmarks only",
    "scipy": "must fit the machine's numpy; the engines resample audio with it, the app takes one quantile",
}

# Distribution -> why it does not travel although its engine lists it.
LEFT_OUT: dict[str, str] = {
    "cuda-tile": "CUDA tile kernels for Blackwell, by reading",
    "flash-attn-4": "attention for Blackwell in SGLang, in a try; vLLM has its own copy inside",
    "flashinfer-cubin": "448 MB of FlashInfer's kernels; without them it compiles what is asked of it",
    "nvidia-cuda-cccl": "headers of the CUDA toolkit, which the machine has",
    "nvidia-cuda-crt": "headers of the CUDA toolkit, which the machine has",
    "nvidia-cuda-nvcc": "the CUDA compiler, which the machine has",
    "nvidia-cuda-nvdisasm": "the CUDA disassembler: nothing imports it",
    "nvidia-cuda-tileiras": "assembler of CUDA tile kernels for Blackwell",
    "nvidia-cutlass-dsl-libs-cu12": "the build for CUDA 12",
    "nvidia-mathdx": "headers for transforms, by reading",
    "nvidia-nvvm": "a part of the CUDA compiler, which the machine has",
    "py-spy": "a profiler, by reading",
    "tilelang": "kernels for DeepSeek's attention, by reading",
    "tokenspeed-mla": "kernels for latent attention on Blackwell, by reading",
    "tokenspeed-triton": "a second Triton for tokenspeed-mla",
    "z3-solver": "used by tilelang alone",
}

# The same for one engine: engine -> distribution -> why.
LEFT_OUT_OF: dict[str, dict[str, str]] = {
    "sglang": {
        # vLLM keeps these: its attention for heads wider than 256 is written in this language.
        "nvidia-cutlass-dsl": "SGLang's kernels in it are for Blackwell, by reading",
        "nvidia-cutlass-dsl-libs-base": "the compiler of that language",
        "nvidia-cutlass-dsl-libs-core": "the compiler of that language",
        "nvidia-cutlass-dsl-libs-cu13": "the compiler of that language",
        "quack-kernels": "kernels in that language",
    },
}

# (distribution, pattern of the path inside the wheel, reason)
STRIPPED: list[tuple[str, str, str]] = [
    ("vllm", "vllm/vllm_flash_attn/_vllm_fa2_C.*", "FlashAttention 2; Hopper uses 3, the import is in a try"),
    ("vllm", "vllm/vllm-rs", "the front end in Rust, off unless VLLM_USE_RUST_FRONTEND=1"),
    ("vllm", "vllm/third_party/fmha_sm100/*", "attention for Blackwell, imported inside functions"),
    ("sglang-kernel", "sgl_kernel/sm100/*", "the build for other GPUs; Hopper loads sm90, see load_utils.py"),
]


def reason_to_leave_out(environment: str, distribution: str) -> str | None:
    return LEFT_OUT.get(distribution) or LEFT_OUT_OF.get(environment, {}).get(distribution)


def reason_to_strip(distribution: str, path: str, python: str) -> str | None:
    """Why this file of a wheel stays behind; None when it travels. `python` as in "3.12"."""
    for name, pattern, reason in STRIPPED:
        if name == distribution and fnmatch.fnmatchcase(path, pattern):
            return reason
    tag = re.search(r"\.cpython-(\d+)-[^/]*\.so$", path)
    if tag and tag.group(1) != python.replace(".", ""):
        return "an extension module for another Python"
    return None
