"""Servers that somebody else has started and that speak OpenAI's chat API: what each kind understands and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines import sglang
from engines.base import Engine, EngineConfig, EngineError, Request, usage_with_each_chunk

AS_IT_IS = "It is measured as it is: what a server keeps or guesses cannot be switched from outside."


def plain_fields(request: Request) -> dict[str, Any]:
    """What every compatible server understands or passes over: the token counts once, at the end."""
    return {"stream_options": {"include_usage": True}}


def llama_cpp_fields(request: Request) -> dict[str, Any]:
    fields = plain_fields(request)
    if request.fixed_length:
        fields["ignore_eos"] = True
    return fields


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of server. `url`: where it answers unless told otherwise; `start`: the command that starts it.

    `reports` and `cannot`: what its answers tell beside their text, and what it cannot be asked for. `owner`: what it
    calls itself in its list of models (`owned_by`), where that tells it from others. `exact`: it can be made to write
    an exact number of tokens.
    """

    name: str
    label: str
    url: str
    start: str
    docs: str
    fields: Callable[[Request], dict[str, Any]]
    reports: str
    exact: bool = False
    owner: str = ""
    needs_key: bool = False


ANY = Preset(
    "any",
    "Any OpenAI-compatible server",
    "",
    "",
    "",
    plain_fields,
    "token counts once, at the end of an answer, if it reports any",
)
PRESETS: tuple[Preset, ...] = (
    ANY,
    Preset(
        "vllm",
        "vLLM",
        "http://127.0.0.1:8000",
        "vllm serve MODEL --enable-prompt-tokens-details",
        "https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html",
        usage_with_each_chunk,
        "token counts with every chunk; cached tokens when started with --enable-prompt-tokens-details",
        exact=True,
        owner="vllm",
    ),
    Preset(
        "sglang",
        "SGLang",
        "http://127.0.0.1:30000",
        "python -m sglang.launch_server --model-path MODEL --enable-cache-report",
        "https://docs.sglang.ai/basic_usage/openai_api.html",
        sglang.request_fields,
        "token counts with every chunk, accepted drafts; cached tokens when started with --enable-cache-report",
        exact=True,
        owner="sglang",
    ),
    Preset(
        "ollama",
        "Ollama",
        "http://127.0.0.1:11434",
        "ollama serve",
        "https://docs.ollama.com/api/openai-compatibility",
        plain_fields,
        "token counts at the end of an answer",
        owner="library",
    ),
    Preset(
        "mlx",
        "MLX",
        "http://127.0.0.1:8080",
        "mlx_lm.server --model MODEL",
        "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/SERVER.md",
        plain_fields,
        "token counts and cached tokens at the end of an answer",
    ),
    Preset(
        "llama.cpp",
        "llama.cpp",
        "http://127.0.0.1:8080",
        "llama-server -m MODEL.gguf",
        "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
        llama_cpp_fields,
        "token counts, cached tokens and accepted drafts at the end of an answer",
        exact=True,
        owner="llamacpp",
    ),
    Preset(
        "lm-studio",
        "LM Studio",
        "http://127.0.0.1:1234",
        "lms server start",
        "https://lmstudio.ai/docs/developer/core/server",
        plain_fields,
        "token counts at the end of an answer",
        owner="organization_owner",
    ),
    Preset(
        "openrouter",
        "OpenRouter",
        "https://openrouter.ai/api",
        "",
        "https://openrouter.ai/docs/api-reference/overview",
        plain_fields,
        "token counts and cached tokens at the end of an answer",
        needs_key=True,
    ),
)


def preset_named(name: str) -> Preset:
    """Raises EngineError."""
    for preset in PRESETS:
        if preset.name == name:
            return preset
    known = ", ".join(preset.name for preset in PRESETS)
    raise EngineError(f"There is no kind of server called {name!r}. Known kinds: {known}.")


def guessed(preset: Preset, owner: str, base_url: str = "") -> Preset:
    """The kind that a server of no chosen kind says it is; the chosen kind otherwise."""
    if preset is not ANY:
        return preset
    by_address = next((one for one in PRESETS if one.needs_key and base_url.startswith(one.url)), None)
    return by_address or next((one for one in PRESETS if one.owner and one.owner == owner), ANY)


def server_engine(name: str, label: str, colour: str, preset: Preset = ANY) -> Engine:
    """A row for the table of engines that stands for somebody else's server. It can be asked, and nothing else."""

    def serve_command(config: EngineConfig) -> list[str]:
        raise EngineError(f"{label} is somebody else's server. {AS_IT_IS}")

    return Engine(
        name=name,
        label=label,
        colour=colour,
        package="",
        serve_command=serve_command,
        variables=lambda config: {},
        request_fields=preset.fields,
        as_it_is=True,
    )
