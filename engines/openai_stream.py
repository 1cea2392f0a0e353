"""The OpenAI-compatible chat stream: what a request says, and bytes of server-sent events into chunks. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from engines.base import Chunk, Engine, Request, SpeculationCounters, Usage

ERROR_CHARACTERS = 500


class ChatStreamParser:
    """Feeds on blocks of bytes cut anywhere, gives whole chunks. One parser per request."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, block: bytes) -> list[Chunk]:
        *lines, self._rest = (self._rest + block).split(b"\n")
        chunks = []
        for line in lines:
            payload = line.strip()
            if payload.startswith(b"data:"):
                payload = payload[5:].strip()
                if payload and payload != b"[DONE]":
                    chunks.append(parse_chunk(payload))
        return chunks


def parse_chunk(payload: bytes) -> Chunk:
    """One event's JSON. What is no chunk (an error object, broken JSON) becomes a chunk that carries an error."""
    try:
        event = json.loads(payload)
    except ValueError:
        return Chunk(error=f"The engine sent something that is not JSON: {payload[:120].decode(errors='replace')}")
    if not isinstance(event, dict):
        return Chunk(error="The engine sent an event that is not an object.")
    if event.get("error") is not None:
        return Chunk(error=f"The engine reported an error: {_error_text(event['error'])}")
    usage = _usage(event)
    choices = event.get("choices") or []
    if not choices:  # the closing usage comes without choices
        return Chunk(usage=usage)
    delta = choices[0].get("delta") or {}
    return Chunk(
        text=delta.get("content") or "",
        # vLLM calls it reasoning, SGLang reasoning_content.
        reasoning=delta.get("reasoning") or delta.get("reasoning_content") or "",
        usage=usage,
        finish_reason=choices[0].get("finish_reason"),
    )


def _usage(event: dict[str, Any]) -> Usage | None:
    value, speculation = event.get("usage"), _speculation(event.get("sglext"))
    if not isinstance(value, dict):
        return Usage(speculation=speculation) if speculation else None
    details = value.get("prompt_tokens_details") or {}
    return Usage(value.get("prompt_tokens"), value.get("completion_tokens"), details.get("cached_tokens"), speculation)


def _speculation(extension: Any) -> SpeculationCounters | None:
    """SGLang's own count of one request, which it sends with the last chunk when asked."""
    details = extension.get("spec_tokens_details") if isinstance(extension, dict) else None
    if not isinstance(details, dict):
        return None
    steps_with = details.get("spec_correct_drafts_histogram") or []  # steps in which 0, 1, 2 ... were accepted
    return SpeculationCounters(
        steps=details.get("spec_verify_ct", 0),
        drafted=details.get("spec_num_proposed_drafts", 0),
        accepted=details.get("spec_num_correct_drafts", 0),
        accepted_at=tuple(sum(steps_with[place:]) for place in range(1, len(steps_with))),
    )


def _error_text(value: Any) -> str:
    text = value.get("message") if isinstance(value, dict) else value
    return str(text)[:ERROR_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running engine answers: `base_url` without /v1, and the model id that its requests name."""

    engine: Engine
    base_url: str
    model: str

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "stream": True,
            **self.engine.request_fields(request),
        }
