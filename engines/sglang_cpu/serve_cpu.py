"""Starts SGLang's server on a machine without a GPU: `python serve_cpu.py <sglang serve arguments>`.

SGLang imports torchvision at start. Next to a CPU build of torch, PyPI's torchvision fails to import because
its compiled operators are absent; text models need none of them, so declaring the two schemas that its Python
files refer to is enough. SGLang spawns workers that import this main module again, hence at top level.
"""

from __future__ import annotations

import runpy

import torch

_torchvision_schemas = [
    ("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
]
for _name, _schema in _torchvision_schemas:
    torch.library.define(_name, _schema)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
