"""The OpenAI-compatible chat stream: what a request says, and bytes of server-sent events into chunks. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from engines.base import Chunk, Engine, Request, SpeculationCounters, Usage

ERROR_CHARACTERS = 500
KEY_COVER = "[key]"
SHORTEST_KEY = 8  # characters; a shorter one ("none", "EMPTY") is a word that answers may hold, and no secret


class ChatStreamParser:
    """Feeds on blocks of bytes cut anywhere, gives whole chunks. One parser per request.

    `key`: what the request was allowed with; a server that repeats it does not get it shown.
    """

    def __init__(self, key: str = "") -> None:
        self._rest = b""
        self._key = key

    def feed(self, block: bytes) -> list[Chunk]:
        *lines, self._rest = (self._rest + block).split(b"\n")
        chunks = []
        for line in lines:
            payload = line.strip()
            if payload.startswith(b"data:"):
                payload = payload[5:].strip()
                if payload and payload != b"[DONE]":
                    chunks.append(parse_chunk(payload, self._key))
        return chunks


def without_key(text: str, key: str) -> str:
    """The text with every appearance of the key covered, also where JSON or a URL writes it another way."""
    if not key:
        return text
    for written in {key, json.dumps(key)[1:-1], key.replace("/", "\\/"), quote(key, safe="")}:
        text = text.replace(written, KEY_COVER)
    return text


def parse_chunk(payload: bytes, key: str = "") -> Chunk:
    """One event's JSON. What is no chunk (an error object, broken JSON) becomes a chunk that carries an error."""
    try:
        event = json.loads(payload)
    except ValueError:
        said = without_key(payload.decode(errors="replace"), key)[:120]  # covered first: a cut key is no match
        return Chunk(error=f"The engine sent something that is not JSON: {said}")
    if not isinstance(event, dict):
        return Chunk(error="The engine sent an event that is not an object.")
    if event.get("error") is not None:
        return Chunk(error=f"The engine reported an error: {_error_text(event['error'], key)}")
    usage = _usage(event)
    choices = event.get("choices") or []
    if not choices:  # the closing usage comes without choices
        return Chunk(usage=usage)
    delta = choices[0].get("delta") or {}
    text, reasoning = delta.get("content") or "", delta.get("reasoning") or delta.get("reasoning_content") or ""
    ended = choices[0].get("finish_reason")
    if len(key) >= SHORTEST_KEY:
        text, reasoning = without_key(text, key), without_key(reasoning, key)
        ended = without_key(ended, key) if ended else ended
    return Chunk(
        text=text,
        reasoning=reasoning,  # vLLM calls it reasoning, SGLang reasoning_content
        usage=usage,
        finish_reason=ended,
    )


def _usage(event: dict[str, Any]) -> Usage | None:
    value = event.get("usage")
    speculation = _speculation(event.get("sglext")) or _drafted(event.get("timings"))
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


def _drafted(timings: Any) -> SpeculationCounters | None:
    """llama.cpp's own count of one request, in the timings of its last chunk where a draft model took part."""
    if not isinstance(timings, dict) or not isinstance(timings.get("draft_n"), int):
        return None
    return SpeculationCounters(drafted=timings["draft_n"], accepted=int(timings.get("draft_n_accepted") or 0))


def _error_text(value: Any, key: str) -> str:
    text = value.get("message") if isinstance(value, dict) else value
    return without_key(str(text), key)[:ERROR_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running engine answers: `base_url` without /v1, and the model id that its requests name.

    `key`: what its owner wants to see with each request. `address`: the IP address to connect to, where the name in
    the URL must not be looked up again; empty: whatever the name leads to.
    """

    engine: Engine
    base_url: str
    model: str
    key: str = field(default="", repr=False)
    address: str = ""

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
