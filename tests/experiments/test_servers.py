"""Runs against servers that somebody else has started, and what becomes of the keys that were typed for them."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmark.running import RunningTruth
from benchmark.truth import Schedule
from engines.server import free_port
from engines.url_host import UrlHost
from experiments import EXPERIMENTS_BY_NAME, baseline, concurrency, prefix_caching, speculation
from experiments.__main__ import main
from experiments.base import Event, Experiment, PlanError, RunEnded
from experiments.report import csv_bytes, notes, text_table
from experiments.result import ExperimentResult
from experiments.resume import measured_already
from experiments.run import run
from experiments.servers import (
    POLITE_USERS,
    SERVER_SETTINGS,
    UNKNOWN_LABEL,
    NamedServer,
    look_for_models,
    own_settings,
    read_run,
    read_server,
    read_servers,
    servers_of,
    url_settings,
)
from tests.scripted_server import scripted_server

KEY = "sk-a/very+secret=key"
SHORT: dict[str, Any] = {"repeats": 2, "warmups": 1, "max_tokens": 8}


def named(url: str, key: str = "", model: str = "", preset: str = "any", place: int = 1) -> NamedServer:
    return read_server(place, preset, url, key, model)


def measured(experiment: Experiment, *servers: NamedServer, host: UrlHost | None = None, **values: Any) -> Any:
    """The result, and every event of the run."""
    events: list[Event] = []
    plan, machine = read_run(experiment, host or UrlHost(), servers, {**SHORT, **values})
    return asyncio.run(run(experiment, plan, machine, events.append)), events


# What is typed


def test_the_page_asks_for_three_servers_beside_the_experiments_own_settings() -> None:
    names = [setting.name for setting in url_settings(baseline.EXPERIMENT)]
    assert names[:2] == ["prompt", "repeats"] and names[-4:] == ["preset_3", "url_3", "key_3", "model_3"]
    assert len(SERVER_SETTINGS) == 12


def test_settings_that_speak_of_our_own_engines_are_left_out() -> None:
    own = {setting.name: setting for setting in own_settings(concurrency.EXPERIMENT)}
    assert "measure_all" not in own and "sequential_limit" not in own
    assert own["levels"].default == "1, 4, 8, 16, 32" and own["most_users"].default == POLITE_USERS


def test_servers_are_read_from_the_fields_of_the_places_that_were_chosen() -> None:
    values = {
        "url_1": "gpu-box:8000/v1",
        "preset_1": "vLLM",
        "url_2": "",
        "preset_3": "openrouter",
        "url_3": "https://openrouter.ai/api/v1",
        "key_3": f" {KEY} ",
        "model_3": "some/model",
    }
    first, third = read_servers(["server-1", "server-2", "server-3"], values)
    assert (first.url.base_url, first.title, first.engine) == ("http://gpu-box:8000", "Server 1 (vLLM)", "server-1")
    assert (third.key, third.model, third.title) == (KEY, "some/model", "Server 3 (OpenRouter)")
    assert read_servers(["server-3"], values) == (third,)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({}, "url_1", "address of at least one server"),
        ({"url_2": "ftp://x"}, "url_2", "Server 2: The address must begin with"),
        ({"url_1": "x", "key_1": "sk-se cret"}, "key_1", "Server 1: the key holds"),
        ({"url_1": "x", "key_1": "sk-secret\r\nHost: y"}, "key_1", "Server 1: the key holds"),
        ({"url_1": "x", "key_1": "sk-secrét"}, "key_1", "Server 1: the key holds"),
        ({"url_1": "x", "key_1": "sk-secret" * 100}, "key_1", "Server 1: the key holds"),
        ({"url_1": "x", "model_1": "a\nb"}, "model_1", "no name of a model"),
        ({"url_1": "x", "preset_1": "triton"}, "preset_1", "no kind of server"),
    ],
)
def test_what_cannot_be_is_told_where_it_was_typed(values: dict[str, str], field: str, words: str) -> None:
    with pytest.raises(PlanError) as refused:
        read_servers(["server-1", "server-2", "server-3"], values)
    assert refused.value.field == field and words in refused.value.message
    assert "sk-" not in refused.value.message


def test_more_users_than_is_polite_are_asked_for_on_purpose_only() -> None:
    server = named("http://gpu-box")
    with pytest.raises(PlanError) as refused:
        read_run(concurrency.EXPERIMENT, UrlHost(), (server,), {"levels": "1, 64"})
    assert refused.value.field == "levels" and "64 users" in refused.value.message
    plan, _ = read_run(concurrency.EXPERIMENT, UrlHost(), (server,), {"levels": "1, 64", "most_users": 64})
    assert plan.levels == (1, 64)  # type: ignore[attr-defined]
    suggested = next(one.default for one in concurrency.EXPERIMENT.settings if one.name == "levels")
    plan, _ = read_run(concurrency.EXPERIMENT, UrlHost(), (server,), {"levels": suggested})
    assert max(plan.levels) == POLITE_USERS  # type: ignore[attr-defined]


def test_the_command_lines_servers_have_names_keys_and_models_of_their_own() -> None:
    typed = ["mine=http://gpu-box:8000/v1", "https://openrouter.ai/api"]
    first, second = servers_of(typed, "m", ["Server 2=other/model"], {"Server 2": KEY}, ["mine=vllm"])
    assert (first.title, first.model, first.key, first.preset.name) == ("mine", "m", "", "vllm")
    assert (second.title, second.model, second.key) == ("Server 2", "other/model", KEY)
    (only,) = servers_of(typed[:1], "", ["a"], {"": KEY}, ["ollama"])
    assert (only.model, only.key, only.preset.name) == ("a", KEY, "ollama")


@pytest.mark.parametrize(
    ("typed", "models", "keys", "words"),
    [
        ([], [], {}, "Name one to 3 servers"),
        (["a=http://x"] * 2, [], {}, "a name of its own"),
        (["a=http://x", "b=http://y"], [], {"": KEY}, "say whose key it is"),
        (["a=http://x"], [], {"b": KEY}, "no server called b"),
        (["a=http://x", "b=http://y"], ["m"], {}, "needs a server's name"),
    ],
)
def test_a_key_never_goes_to_a_server_that_it_was_not_meant_for(
    typed: list[str], models: list[str], keys: dict[str, str], words: str
) -> None:
    with pytest.raises(PlanError) as refused:
        servers_of(typed, "", models, keys, [])
    assert words in refused.value.message and KEY not in refused.value.message


# What is measured


def test_a_server_is_measured_as_it_is_and_what_is_unknown_stays_unknown() -> None:
    with scripted_server(usage="final") as one, scripted_server(usage="none") as two:
        result, _ = measured(baseline.EXPERIMENT, named(one), named(f"{two}/v1", place=2))
    first, second = result.engines
    assert (result.host, result.model, result.hardware) == (
        "url",
        "scripted",
        {"words": "hardware not known: somebody else's server"},
    )
    assert first.config == {"url": one, "preset": "any", "model": "scripted"}
    assert (first.version, first.command, first.installed, first.start_phases) == (None, "", {}, {})
    assert first.as_it_is and first.network_seconds > 0 and "there and back" in first.caveat
    assert [row.timeline.token_source for row in result.measured("server-1")] == ["final usage"] * 2
    assert [row.timeline.token_source for row in result.measured("server-2")] == ["estimated"] * 2
    assert (result.model_shape, result.bandwidth, result.price) == (None, None, None)
    said = notes(result)
    assert UNKNOWN_LABEL in said and any("estimated" in note for note in said)
    assert not any("share" in note and "cores" in note for note in said)
    assert ExperimentResult.from_json(result.to_json()).to_json() == result.to_json()
    assert "Server 1" in text_table(result) and csv_bytes(result)


def test_the_moments_are_the_true_ones(truth: RunningTruth) -> None:
    truth.follow(Schedule(first_token=0.05, gap=0.01))
    result, _ = measured(baseline.EXPERIMENT, named(f"{truth.base_url}/v1"), repeats=1, warmups=0)
    (row,), (true,) = result.measured("server-1"), truth.answers()
    assert row.metrics.ttft == pytest.approx(true.ttft, abs=0.02)
    assert row.metrics.tpot == pytest.approx(true.tpot, abs=0.003)
    assert row.metrics.output_tokens == 8


def test_a_server_of_a_chosen_kind_is_asked_as_that_kind_and_named_after_it() -> None:
    with scripted_server() as url:
        result, _ = measured(baseline.EXPERIMENT, named(url, preset="vllm"), fixed_length=True)
    (row,) = result.engines
    assert row.config["preset"] == "vllm" and row.label == "Server 1 (vLLM)"
    assert "exact number" not in row.caveat


def test_a_server_with_several_models_wants_one_chosen() -> None:
    with scripted_server(models=["small", "large"]) as url:
        result, _ = measured(baseline.EXPERIMENT, named(url))
        assert result.engines[0].error == "It serves 2 models. Choose one of them: small, large"
        chosen, _ = measured(baseline.EXPERIMENT, named(url, model="large"))
        other, _ = measured(baseline.EXPERIMENT, named(url, model="huge"))
    assert chosen.model == "large" and not chosen.engines[0].error
    assert "does not have huge" in other.engines[0].caveat


@pytest.mark.parametrize("status", [200, 500])
def test_a_server_whose_list_cannot_be_read_is_measured_when_its_model_is_typed(
    status: int,
) -> None:
    async def measure(model: str) -> ExperimentResult:
        async def silent(request: web.Request) -> web.Response:
            return web.Response(status=status)

        async def answer(request: web.Request) -> web.Response:
            event = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\n'
            return web.Response(body=event, content_type="text/event-stream")

        application = web.Application()
        application.router.add_get("/v1/models", silent)
        application.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            server = named(f"http://127.0.0.1:{runner.addresses[0][1]}", model=model)
            plan, machine = read_run(baseline.EXPERIMENT, UrlHost(), (server,), SHORT)
            return await run(baseline.EXPERIMENT, plan, machine, lambda event: None)
        finally:
            await runner.cleanup()

    (row,) = asyncio.run(measure("m")).engines
    assert row.error is None and "⚠" in (row.caveat or "")
    (row,) = asyncio.run(measure("")).engines
    assert row.error


def test_one_server_that_is_not_there_does_not_end_the_run() -> None:
    with scripted_server() as url:
        gone = named(f"http://127.0.0.1:{free_port()}", place=2)
        result, _ = measured(baseline.EXPERIMENT, named(url), gone)
    assert len(result.measured("server-1")) == 2
    assert "nothing answers at port" in result.engines[1].error


def test_too_many_requests_are_failed_requests_with_their_reason() -> None:
    with scripted_server(refused_above=2, gap=0.05) as url:
        result, _ = measured(
            concurrency.EXPERIMENT, named(url), levels="4", spacing_ms=0, repeats=1, warmups=0, fixed_length=False
        )
    errors = [row.timeline.error for row in result.failures("server-1")]
    assert len(errors) == 2 and all("HTTP 429" in error and "Too many requests" in error for error in errors)
    assert len(result.measured("server-1")) == 4


def test_a_prefix_is_new_in_each_series_because_no_cache_can_be_emptied() -> None:
    with scripted_server(prefix_caching=True, seconds_per_prompt_word=0.001) as url:
        result, _ = measured(prefix_caching.EXPERIMENT, named(url), prefix_times=100)
    (row,) = result.engines
    assert not row.variant and [trial.caches_emptied for trial in result.trials] == [None] * len(result.trials)
    firsts = [one.metrics.cached_tokens for one in result.measured("server-1", "prefix 1")]
    lasts = [one.metrics.cached_tokens for one in result.measured("server-1", "prefix 3")]
    assert firsts == [0, 0] and lasts == [103, 103]  # the new word, the prefix, and "What is"
    assert prefix_caching.cold_start_verified(result, "server-1")
    words = EXPERIMENTS_BY_NAME["prefix-caching"].headline(result)
    assert words.startswith("Server 1, as it is:") and "once the prefix has been read" in words
    assert any("reports up to 103 cached tokens" in note for note in notes(result))
    drawn = {chart.name: chart.draw(result) for chart in prefix_caching.EXPERIMENT.charts}
    assert drawn["ttft"] and drawn["cached"]


def test_a_cache_that_answers_repeats_is_told_in_the_baseline() -> None:
    with scripted_server(prefix_caching=True) as url:
        result, _ = measured(baseline.EXPERIMENT, named(url))
    assert any("from its cache, which nobody here can empty" in note for note in notes(result))


def test_speculation_cannot_be_switched_and_every_lane_says_so() -> None:
    with scripted_server(draft_tokens=2) as url:
        result, events = measured(speculation.EXPERIMENT, named(url), method="draft_model", repeats=1, warmups=0)
    plain, switched = result.engines
    assert len(result.measured("server-1")) == 4 and not plain.unavailable
    assert "cannot be switched from outside" in switched.unavailable
    words = speculation.EXPERIMENT.headline(result)
    assert words.startswith("Speculation cannot be switched from outside. Server 1 decodes")
    assert "report no drafts" in words and "cannot speculate here" not in words
    assert all(chart.draw(result) is None or chart.name != "acceptance" for chart in speculation.EXPERIMENT.charts)


@pytest.mark.parametrize("experiment", EXPERIMENTS_BY_NAME.values(), ids=lambda one: one.name)
def test_every_experiment_has_its_table_its_charts_and_its_words(experiment: Experiment) -> None:
    values = {"repeats": 1, "levels": "1, 2", "spacing_ms": 5, "prefix_times": 20, "draft_tokens": "2"}
    with scripted_server() as url:
        result, _ = measured(experiment, named(url), **values)
    assert result.measured("server-1") and not result.failures("server-1")
    assert experiment.headline(result) and text_table(result)
    for chart in experiment.charts:
        chart.draw(result)


def test_a_race_does_not_claim_that_servers_share_a_machine() -> None:
    with scripted_server() as one, scripted_server() as two:
        result, _ = measured(baseline.EXPERIMENT, named(one), named(two, place=2), race=True)
    assert any("the servers were asked at the same time" in label for label in result.labels)
    assert not any("not speeds of their own" in label for label in result.labels)


def test_only_the_same_servers_answer_a_question_that_was_measured_already(tmp_path: Path) -> None:
    with scripted_server() as one, scripted_server() as two:
        first, second = named(one, model="scripted"), named(two, model="scripted")
        result, _ = measured(baseline.EXPERIMENT, first)
        result.save(tmp_path)
        for server, found in ((first, {"baseline"}), (second, set())):
            plan, machine = read_run(baseline.EXPERIMENT, UrlHost(), (server,), SHORT)
            assert set(measured_already([(baseline.EXPERIMENT, plan)], machine, tmp_path)) == found


def test_a_public_page_measures_no_private_address() -> None:
    with scripted_server() as url:
        result, _ = measured(baseline.EXPERIMENT, named(url), host=UrlHost(public=True))
        looked = asyncio.run(look_for_models(named(url), public=True))
    assert "does not call 127.0.0.1" in result.engines[0].error and result.requests == ()
    assert looked.problem and "does not call 127.0.0.1" in looked.words


# Keys


def test_a_key_opens_the_server_and_is_in_nothing_that_is_kept_or_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    with scripted_server(key=KEY, fault="key in the answer", fault_after_tokens=2) as url:
        server = named(url, KEY)
        result, events = measured(baseline.EXPERIMENT, server)
        looked = asyncio.run(look_for_models(server))
    assert looked.models == ("scripted",) and len(result.measured("server-1")) == 2
    assert "[key]" in result.requests[0].timeline.text
    path = result.save(tmp_path)
    for kept in (path.read_text(), repr(events), repr(server), repr(result), caplog.text, csv_bytes(result).decode()):
        assert "sk-a" not in kept and "secret" not in kept
    assert b"secret" not in pickle.dumps([event for event in events if not isinstance(event, RunEnded)])
    assert json.loads(path.read_text())["engines"][0]["config"]["url"] == url


def test_a_wrong_key_is_told_without_repeating_it() -> None:
    with scripted_server(key="sk-the-right-one") as url:
        result, events = measured(baseline.EXPERIMENT, named(url, KEY))
        looked = asyncio.run(look_for_models(named(url, KEY)))
    assert "does not take this key" in result.engines[0].error and looked.problem
    assert "sk-a" not in repr(events) + result.to_json() + looked.words


def test_a_key_that_is_refused_in_mid_run_is_covered_in_the_failed_requests() -> None:
    # Its list is open to everybody, as OpenRouter's is: the wrong key shows with the first request.
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def refuse(request: web.Request) -> web.Response:
        said = "x" * 480 + request.headers["Authorization"]  # cut in the middle of the key
        return web.json_response({"error": {"message": said}}, status=401)

    async def measure() -> ExperimentResult:
        application = web.Application()
        application.router.add_get("/v1/models", models)
        application.router.add_post("/v1/chat/completions", refuse)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            server = named(f"http://127.0.0.1:{runner.addresses[0][1]}", KEY)
            plan, machine = read_run(baseline.EXPERIMENT, UrlHost(), (server,), SHORT)
            return await run(baseline.EXPERIMENT, plan, machine, lambda event: None)
        finally:
            await runner.cleanup()

    result = asyncio.run(measure())
    errors = [row.timeline.error or "" for row in result.failures("server-1")]
    assert len(errors) == 2 and all("HTTP 401" in error for error in errors)
    assert "sk-a" not in result.to_json()


# The command line


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAKEOFF_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_the_command_line_measures_a_server_with_a_key_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    out = tmp_path / "out"
    options = ["baseline", "--host", "url", "--repeats", "1", "--warmups", "0", "--tokens", "6", "--out", str(out)]
    with scripted_server(key=KEY) as url:
        where = ["--server", f"mine={url}/v1"]
        assert main([*options, *where, "--look"]) == 1
        assert "wants a key" in capsys.readouterr().out
        assert main([*options, *where, "--look", "--key-variable", "MY_KEY"]) == 0
        assert "1 model." in capsys.readouterr().out
        assert main([*options, *where, "--key-variable", "mine=MY_KEY"]) == 0
    told = capsys.readouterr()
    (path,) = out.iterdir()
    result = ExperimentResult.from_json(path.read_text())
    assert result.host == "url" and result.engines[0].label == "mine" and "mine decodes" in told.out
    assert KEY not in told.out + told.err + path.read_text()


@pytest.mark.usefixtures("own_cache")
def test_the_command_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert main(["baseline", "--host", "url"]) == 2
    assert "Name one to 3 servers" in capsys.readouterr().err
    assert main(["baseline", "--host", "url", "--server", "http://x", "--key-variable", "NO_SUCH_KEY"]) == 2
    assert "NO_SUCH_KEY is not set" in capsys.readouterr().err
