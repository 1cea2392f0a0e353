"""Kinds of servers, and the row that stands for one of them."""

from __future__ import annotations

import pytest

from engines.addresses import read_url
from engines.base import EngineConfig, EngineError, Request
from engines.compatible import ANY, PRESETS, guessed, preset_named, server_engine
from engines.openai_stream import Endpoint

FIXED, FREE = Request("Why?", 5, fixed_length=True), Request("Why?", 5, fixed_length=False)


def test_every_kind_asks_for_the_token_counts() -> None:
    for preset in PRESETS:
        assert preset.fields(FREE)["stream_options"]["include_usage"] is True


def test_only_kinds_that_know_it_are_asked_for_an_exact_length() -> None:
    asked = {preset.name for preset in PRESETS if preset.fields(FIXED).get("ignore_eos")}
    assert asked == {preset.name for preset in PRESETS if preset.exact} == {"vllm", "sglang", "llama.cpp"}
    assert not any("ignore_eos" in preset.fields(FREE) for preset in PRESETS)


def test_only_kinds_that_know_it_are_asked_for_counts_with_every_chunk() -> None:
    asked = {one.name for one in PRESETS if one.fields(FREE)["stream_options"].get("continuous_usage_stats")}
    assert asked == {"vllm", "sglang"}


def test_every_kind_has_an_address_of_its_own_that_can_be_read() -> None:
    for preset in PRESETS:
        assert preset is ANY or read_url(preset.url).base_url == preset.url
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)


def test_a_server_of_no_chosen_kind_is_what_it_calls_itself() -> None:
    assert guessed(ANY, "vllm").name == "vllm"
    assert guessed(ANY, "llamacpp").name == "llama.cpp"
    assert guessed(ANY, "") is ANY
    assert guessed(ANY, "somebody") is ANY
    assert guessed(ANY, "", "https://openrouter.ai/api").name == "openrouter"
    assert guessed(preset_named("ollama"), "vllm").name == "ollama"


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EngineError) as refused:
        preset_named("triton")
    assert "'triton'" in refused.value.message and "lm-studio" in refused.value.message


def test_somebody_elses_server_cannot_be_started() -> None:
    engine = server_engine("server-1", "Mine", "#000000", preset_named("vllm"))
    with pytest.raises(EngineError) as refused:
        engine.serve_command(EngineConfig("m"))
    assert "cannot be switched from outside" in refused.value.message
    assert engine.as_it_is and not engine.empty_caches_path and engine.read_counters is None


def test_an_endpoint_shows_no_key() -> None:
    endpoint = Endpoint(server_engine("server-1", "Mine", "#000000"), "http://gpu-box", "m", "sk-secret-secret")
    assert "secret" not in repr(endpoint)
    assert "secret" not in str(endpoint.body(FREE))
