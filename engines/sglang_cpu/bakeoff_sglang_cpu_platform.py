"""The platform class itself: apart from the entry point, because importing it loads torch and SGLang."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class PlainTorchPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU without SGLang's own kernels: everything on plain PyTorch operators."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False
