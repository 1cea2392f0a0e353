"""Starts `transformers serve` for a model that has a shape and no weights: `python serve_random.py serve <arguments>`.

The server is Transformers' own; only what it calls to read a model is replaced. The weights are drawn on the device
itself: 50 GB of random numbers take a GPU seconds and a CPU many minutes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.cli.serving import utils as serving
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.transformers import app


def load_model(self: ModelManager, model_id_and_revision: str, *arguments: Any, **settings: Any) -> Any:
    folder = model_id_and_revision.rpartition("@")[0]
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, config.architectures[0])
    with torch.device(self.device):
        model = architecture._from_config(config, dtype=self.dtype, attn_implementation=self.attn_implementation)
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.name_or_path = folder
    return model.eval()


def load_processor(self: ModelManager, model_id_and_revision: str, *arguments: Any, **settings: Any) -> Any:
    """The tokenizer alone: what makes pictures into tokens may need packages that are not here."""
    return transformers.AutoTokenizer.from_pretrained(model_id_and_revision.rpartition("@")[0])


ModelManager._load_model = load_model
ModelManager._load_processor = load_processor
# Random words hold no thoughts and no calls of tools. Looking for them by the real model's marks, which our template
# does not have, the server would send the prompt back as the answer's first piece, before the model has begun.
serving._RESPONSE_TEMPLATE_FALLBACKS.clear()

if __name__ == "__main__":
    app()  # without the look for a newer version that the `transformers` command begins with
