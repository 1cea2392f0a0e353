"""Public mode: its rules, who a visitor is, what a run may need, and what is left of the limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from engines.cloud import GPU_CHOICES
from engines.local import LocalHost
from engines.rented import RentedHost
from engines.spending import Spent
from engines.timeline import Arrival, Timeline
from engines.url_host import UrlHost
from experiments.base import PlanError, RequestEnded, Spending, TokensArrived, Trial
from experiments.baseline import EXPERIMENT as BASELINE
from experiments.concurrency import EXPERIMENT as CONCURRENCY
from experiments.prefix_caching import EXPERIMENT as PREFIX
from experiments.rehearsal import RehearsalCloud
from experiments.rented import MODELS, Rent, RentedMachine
from experiments.result import RequestRow
from experiments.servers import ServersMachine, read_server
from experiments.tokens import count_tokens
from tests.experiments.test_result import result_of
from ui.owner import NOT_THE_OWNER, TOO_MANY, NotTheOwner, check_owner
from ui.policy import ContentPolicy, UploadLimit
from ui.public import DAY, HOUR, Load, PublicRules, Tally, Use, Watch, address_of, in_words, load_of, public_rules
from ui.results import ALL, add_file, delete_run, open_runs, results_tab
from ui.session import Sessions
from ui.tab import experiment_tab, run_in_tab, visitor_of

TOKEN = "correct horse battery staple"
RULES = PublicRules(admin_token=TOKEN)
MakeHost = Callable[..., LocalHost]
MakeEngine = Callable[..., Any]


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


# When the page is public, and by which rules


def test_a_page_of_ones_own_has_no_rules() -> None:
    assert public_rules(environment={}) is None
    assert public_rules(environment={"BAKEOFF_ADMIN_TOKEN": TOKEN}) is None


@pytest.mark.parametrize(
    ("asked", "hosted", "environment"),
    [
        (True, False, {}),
        (False, False, {"BAKEOFF_PUBLIC": "1"}),
        (False, True, {}),
        (False, False, {"SPACE_ID": "me/x"}),
    ],
)
def test_an_option_a_variable_and_every_host_of_strangers_make_it_public(
    asked: bool, hosted: bool, environment: dict[str, str]
) -> None:
    rules = public_rules(asked, environment, hosted)
    assert rules is not None and rules.models == tuple(model.id for model in MODELS)
    assert rules.url_hosts == () and not rules.admits("") and not rules.admits(None)
    assert rules.behind_proxy == bool(hosted or environment.get("SPACE_ID"))


def test_only_in_so_many_words_is_a_hosted_page_not_public() -> None:
    assert public_rules(environment={"BAKEOFF_PUBLIC": "0", "SPACE_ID": "me/x"}) is None


def test_every_limit_is_a_variable() -> None:
    environment = {
        "BAKEOFF_PUBLIC_RUNS_PER_HOUR": "2",
        "BAKEOFF_PUBLIC_MODELS": "bundled, Qwen/Qwen3.5-4B",
        "BAKEOFF_PUBLIC_URL_HOSTS": "api.example.com",
        "BAKEOFF_ADMIN_TOKEN": TOKEN,
    }
    rules = public_rules(True, environment)
    assert rules is not None
    assert (rules.runs_per_hour, rules.models) == (2, ("bundled", "Qwen/Qwen3.5-4B"))
    assert rules.url_hosts == ("api.example.com",) and rules.admits(TOKEN) and rules.admits(f" {TOKEN} ")
    assert not rules.admits(TOKEN[:-1]) and not rules.admits("tökën")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"BAKEOFF_PUBLIC_LINE": "many"}, "must be a whole number, not 'many'"),
        ({"BAKEOFF_PUBLIC_LINE": "0"}, "BAKEOFF_PUBLIC_LINE must be 1 or more"),
        ({"BAKEOFF_ADMIN_TOKEN": "short"}, "16 characters or more"),
        ({"BAKEOFF_PUBLIC": "perhaps"}, "must be 1 or 0"),
    ],
)
def test_rules_that_cannot_be_are_told(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        public_rules(True, environment)


def test_the_token_is_in_no_words_about_the_rules() -> None:
    assert TOKEN not in repr(RULES) and TOKEN not in str(RULES)


# Who somebody is


@pytest.mark.parametrize(
    ("client", "forwarded", "behind_proxy", "address"),
    [
        ("203.0.114.7", "", False, "203.0.114.7"),
        ("203.0.114.7", "8.8.8.8", False, "203.0.114.7"),  # on one's own machine nobody is believed
        ("203.0.114.7", "8.8.8.8", True, "203.0.114.7"),  # nor where the server itself saw the visitor
        ("10.16.3.80", "8.8.8.8, 203.0.114.7", True, "203.0.114.7"),  # only what the proxy added itself
        ("10.16.3.80", "8.8.8.8, 203.0.114.7, 10.0.0.2", True, "203.0.114.7"),
        ("10.16.3.80", "8.8.8.8", False, "10.16.3.80"),
        ("10.16.3.80", "unknown, <b>", True, "10.16.3.80"),
        ("2a00:1450:4001:82b::200e", "", False, "2a00:1450:4001:82b::/64"),
        ("::ffff:203.0.114.7", "", False, "203.0.114.7"),
    ],
)
def test_a_visitor_is_the_address_that_nobody_can_choose(
    client: str, forwarded: str, behind_proxy: bool, address: str
) -> None:
    assert address_of(client, forwarded, behind_proxy) == address


def test_addresses_are_kept_as_a_hash_whose_key_stays(tmp_path: Path) -> None:
    name = Tally(tmp_path).name_of("203.0.114.7")
    assert name == Tally(tmp_path).name_of("203.0.114.7") != Tally().name_of("203.0.114.7")
    assert (tmp_path / "visitor-key").stat().st_mode & 0o077 == 0
    tally = Tally(tmp_path)
    tally.add(Use(name, runs=1))
    assert "203.0" not in (tmp_path / "visits.jsonl").read_text()


def test_in_public_mode_a_forged_header_makes_nobody_new() -> None:
    sessions = Sessions(rules=RULES)
    requests = [
        SimpleNamespace(headers={"x-forwarded-for": f"8.8.8.{n}"}, client=SimpleNamespace(host="203.0.114.7"))
        for n in (1, 2)
    ]
    names = {visitor_of(request, sessions) for request in requests}  # type: ignore[arg-type]
    assert len(names) == 1 and "203" not in names.pop()


# What a run may need


def rented(model: str = "bundled") -> RentedMachine:
    host = RentedHost(RehearsalCloud(), (), model=model)
    return RentedMachine(host, Rent(model, GPU_CHOICES[0].exactly))


def local(make_host: MakeHost, scripted: MakeEngine) -> LocalHost:
    return make_host(scripted("one"), scripted("two"))


def test_a_runs_requests_and_tokens_are_counted_over_all_engines_and_warm_ups(
    make_host: MakeHost, scripted: MakeEngine
) -> None:
    host = local(make_host, scripted)
    plan = BASELINE.read_plan(("one", "two"), {"repeats": 3, "warmups": 2, "max_tokens": 64})
    load = load_of(BASELINE, plan, host, RULES)
    assert (load.requests, load.tokens, load.gpus) == (2 * 5, 2 * 5 * 64, 0)
    plan = CONCURRENCY.read_plan(("one",), {"levels": (1, 4), "repeats": 2, "warmups": 1, "max_tokens": 64})
    load = load_of(CONCURRENCY, plan, host, RULES)
    assert (load.requests, load.tokens) == (15, 10 * 64 + 5 * 16)


@pytest.mark.parametrize("experiment", [BASELINE, CONCURRENCY, PREFIX])
def test_what_the_page_suggests_is_allowed(experiment: Any, make_host: MakeHost, scripted: MakeEngine) -> None:
    host = make_host(scripted("vllm"), scripted("sglang"), scripted("transformers"))
    plan = experiment.read_plan(("vllm", "sglang", "transformers"), {})
    assert load_of(experiment, plan, host, RULES).requests <= RULES.requests_per_run


@pytest.mark.parametrize(
    ("experiment", "typed", "words"),
    [
        (
            CONCURRENCY,
            {"levels": (512, 511, 510, 509, 508), "repeats": 20},
            "requests; on this page a run may take 2,500",
        ),
        (BASELINE, {"repeats": 20, "max_tokens": 2048}, "output tokens; on this page a run may take 60,000"),
        (BASELINE, {"prompt": "word " * 20_001}, "100,000 characters at most"),
        (BASELINE, {"prompt": "word " * 17_000}, "has 17,000 tokens|has 1[67],[0-9]{3} tokens"),
        (
            PREFIX,
            {"prefix": "poem", "prefix_times": 19_000},
            "has 19,0[0-9]{2} tokens; on this page it may have 16,384",
        ),
        (PREFIX, {"prompt": "\n".join(map(str, range(65)))}, "64 questions at most"),
    ],
)
def test_what_is_too_much_for_one_run_is_refused_with_the_limit(
    experiment: Any, typed: dict[str, Any], words: str, make_host: MakeHost, scripted: MakeEngine
) -> None:
    plan = experiment.read_plan(("one", "two"), typed)
    with pytest.raises(PlanError, match=words):
        load_of(experiment, plan, local(make_host, scripted), replace(RULES, tokens_per_run=60_000))


def test_tokens_are_counted_by_the_models_own_tokenizer_or_bounded_by_bytes(model: str) -> None:
    assert count_tokens(model, "poem " * 2000) == (2002, True)
    assert count_tokens("bundled", "poem " * 2000) == (2002, True)
    assert count_tokens("nobody/has-this", "ä" * 10) == (20, False)
    assert count_tokens("", "four") == (4, False)


def test_without_the_tokenizer_the_words_say_that_bytes_were_counted() -> None:
    plan = BASELINE.read_plan(("vllm",), {"prompt": "x" * 20_000})
    machine = rented("Qwen/Qwen3.5-4B")
    machine.engines = ()
    with pytest.raises(PlanError, match="may have up to 20,000 tokens .its bytes"):
        load_of(replace(BASELINE, contenders=lambda plan, host: (), trials=asks_once), plan, machine, RULES)


def asks_once(plan: Any, contenders: Any) -> Any:
    return (Trial("once", 1, False, (plan.prompt,)),)


def test_only_listed_models_are_rented_and_nobody_types_a_price() -> None:
    plan = BASELINE.read_plan(("vllm",), {})
    nothing = replace(BASELINE, contenders=lambda plan, host: (), trials=lambda plan, contenders: ())
    assert load_of(nothing, plan, rented(), RULES).gpus == 1
    for model in ("rehearse/no-gpu", "someone/model", "../etc"):
        machine = rented()
        machine.model = model
        with pytest.raises(PlanError, match="these models only: Qwen") as refused:
            load_of(nothing, plan, machine, RULES)
        assert refused.value.field == "model"
    with pytest.raises(PlanError, match="the price is the cloud's own"):
        load_of(nothing, replace(plan, dollars_per_hour=0.0), rented(), RULES)


def test_servers_are_asked_by_their_address_only_where_the_list_has_their_host() -> None:
    plan = BASELINE.read_plan(("server-1",), {})
    server = read_server(1, "any", "http://API.example.com:8000/v1", "")
    none = ServersMachine(UrlHost(public=True, allowed=()), [server])
    listed = ServersMachine(UrlHost(public=True, allowed=("api.example.com",)), [server])
    with pytest.raises(PlanError, match="no servers by their address, not api.example.com"):
        load_of(BASELINE, plan, none, RULES)
    assert load_of(BASELINE, plan, listed, RULES).requests == 5


# What is left


def test_a_visitors_runs_per_hour_end_with_the_limit_and_when_it_frees() -> None:
    clock = Clock()
    tally, rules = Tally(now=clock), replace(RULES, runs_per_hour=2)
    one = Use("me", runs=1, requests=1, tokens=1)
    for _ in range(2):
        assert tally.refusal(rules, one) == ""
        tally.add(one)
        clock.now += 600
    refused = tally.refusal(rules, one)
    assert "You have used 2 of 2 runs per hour" in refused and "about 40 minutes from now" in refused
    assert "UTC" in refused
    assert tally.refusal(rules, replace(one, visitor="you")) == ""
    clock.now += 2400
    assert tally.refusal(rules, one) == ""


@pytest.mark.parametrize(
    ("rule", "use", "wanted", "words"),
    [
        (
            "all_runs_per_hour",
            Use("a", runs=3),
            Use("b", runs=1),
            "All visitors together have used 3 of 3 runs per hour",
        ),
        (
            "requests_per_day",
            Use("b", requests=3),
            Use("b", runs=1, requests=1),
            "You have used 3 of 3 requests per day",
        ),
        ("all_tokens_per_day", Use("a", tokens=3), Use("b", runs=1, tokens=2), "this needs 2 more"),
        ("gpu_seconds_per_day", Use("b", gpu_seconds=3.0), Use("b", runs=1), "3 of 3 GPU-seconds per day"),
        ("uploads_per_hour", Use("b", uploads=3), Use("b", uploads=1), "3 of 3 uploads per hour"),
    ],
)
def test_every_limit_of_a_visitor_and_of_all_is_held(rule: str, use: Use, wanted: Use, words: str) -> None:
    tally = Tally()
    tally.add(use)
    assert words in tally.refusal(replace(RULES, **{rule: 3}), wanted)
    assert tally.refusal(replace(RULES, **{rule: 100}), wanted) == ""


def test_what_runs_counts_as_foreseen_until_it_is_known() -> None:
    tally = Tally()
    begun = tally.begin(Use("me", runs=1, requests=100))
    assert tally.refusal(replace(RULES, requests_per_day=150), Use("me", runs=1, requests=100))
    tally.settle(begun, replace(begun, requests=10))
    assert tally.refusal(replace(RULES, requests_per_day=150), Use("me", runs=1, requests=100)) == ""


def test_limits_outlive_a_restart_and_a_broken_line(tmp_path: Path) -> None:
    Tally(tmp_path).add(Use("me", runs=1))
    with (tmp_path / "visits.jsonl").open("a") as file:
        file.write('{"visitor": "me", "at": 99\n[1]\n{"at": "x"}\n')
    tally = Tally(tmp_path)
    assert tally.refusal(replace(RULES, runs_per_hour=1), Use("me", runs=1))
    assert len(tally.within(DAY)) == 1


def test_the_wait_is_foretold_from_finished_runs_of_the_same_experiment_alone() -> None:
    tally = Tally()
    load = Load("baseline", 10, 1000)
    assert tally.foreseen_seconds(load) is None
    for seconds in (10.0, 30.0, 20.0):
        tally.add(Use("me", runs=1, experiment="baseline", planned_tokens=500, seconds=seconds))
    tally.add(Use("me", runs=1, experiment="baseline", planned_tokens=500))  # stopped
    tally.add(Use("me", runs=1, experiment="speculation", planned_tokens=500, seconds=900.0))
    assert tally.foreseen_seconds(load) == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "less than a minute"), (60, "about 1 minute"), (170, "about 3 minutes"), (3 * HOUR, "about 3 hours")],
)
def test_waits_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


# What a run under way uses


def watch_of(tally: Tally, stopped: list[str], load: Load | None = None, **rules: Any) -> Watch:
    return Watch(replace(RULES, **rules), load or Load("baseline", 5, 10), "me", tally, lambda: stopped.append("stop"))


def test_a_run_is_stopped_at_its_requests_and_tokens_however_its_users_ask_again() -> None:
    row = RequestRow("one", 1, False, Timeline(0.0))
    for rule, event in (
        ("requests_per_run", RequestEnded(row)),
        ("tokens_per_run", TokensArrived("one", Arrival(0.1, "x", tokens=1))),
    ):
        stopped: list[str] = []
        tally = Tally()
        watch = watch_of(tally, stopped, **{rule: 3})
        for _ in range(3):
            watch.take(event)
        assert stopped == []
        watch.take(event)
        watch.take(event)
        assert stopped == ["stop"] and "Stopped at 3" in watch.reason
        watch.close(None)
        (use,) = tally.within(DAY)
        assert (use.requests or use.tokens) == 5 and use.seconds is None


def test_gpu_seconds_are_the_meters_or_the_runs_own_time() -> None:
    stopped: list[str] = []
    tally = Tally()
    tally.add(Use("me", runs=1, gpu_seconds=90))
    watch = watch_of(tally, stopped, Load("baseline", 1, 1, gpus=2), gpu_seconds_per_day=100)
    assert watch.seconds == pytest.approx(5.0)  # ten GPU-seconds are left, and two GPUs
    watch.take(Spending(Spent(4, 9.0, 0.1, ""), None))
    assert stopped == []
    watch.take(Spending(Spent(6, 11.0, 0.1, ""), None))
    assert stopped == ["stop"] and "GPU-seconds" in watch.reason
    watch.close(result_of(one=[1.0]))
    assert tally.within(DAY)[-1].gpu_seconds == 11.0


# The tab


def frames(host: LocalHost, sessions: Sessions, values: list[Any], visitor: str = "me") -> list[str]:
    with gr.Blocks():
        tab = experiment_tab(BASELINE, host, sessions)

    async def collect() -> list[str]:
        told = run_in_tab(BASELINE, host, sessions, tab, *values, session="s", visitor=visitor)
        return [frame[tab.progress] async for frame in told if tab.progress in frame]

    return asyncio.run(collect())


def test_runs_are_counted_and_refused_in_the_tab(make_host: MakeHost, scripted: MakeEngine, tmp_path: Path) -> None:
    host = make_host(scripted("one"))
    values = default_values(host)
    sessions = Sessions(tmp_path / "results", tmp_path / "none", replace(RULES, runs_per_hour=1))
    assert "role='alert'" not in frames(host, sessions, values)[-1]
    (use,) = sessions.tally.within(HOUR)
    assert (use.visitor, use.runs, use.requests, use.experiment) == ("me", 1, 1, "baseline")
    assert use.seconds is not None and use.tokens == 8
    assert "1 of 1 runs per hour" in frames(host, sessions, values)[-1]
    sessions.close_for_today()
    assert "closed for today" in frames(host, sessions, values, "you")[-1]
    sessions.close_for_today(False)
    assert "role='alert'" not in frames(host, sessions, values, "you")[-1]


def default_values(host: LocalHost) -> list[Any]:
    typed = {"repeats": 1, "warmups": 0, "max_tokens": 8, "race": True}
    values = []
    for setting in BASELINE.settings:
        value = typed.get(setting.name, setting.default)
        words = next((word for word, meant in setting.choices.items() if meant == value), value)
        values.append(words)
    return [[engine.name for engine in host.engines], *values]


# What is uploaded


def test_an_upload_is_one_visitors_alone_and_gone_with_the_page(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "results", tmp_path / "none", RULES)
    with gr.Blocks():
        tab = results_tab(sessions)
    replace(result_of(quick=[50.0]), id="shared").save(tmp_path / "results")
    path = replace(result_of(quick=[51.0]), id="shared").save(tmp_path / "upload")
    shown = add_file(sessions, tab, str(path), ALL, "mine")
    own = shown[tab.run]["value"]
    assert own != "shared" and "Only you see" in shown[tab.said] and "?run=" not in shown[tab.said]
    assert {entry.id for entry in sessions.entries("", "mine")} == {own, "shared"}
    assert {entry.id for entry in sessions.entries("", "yours")} == {"shared"}
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["shared.json"]
    assert "role='alert'" in open_runs(sessions, tab, own, session="yours")[tab.said]
    assert "role='alert'" not in open_runs(sessions, tab, own, "shared", session="mine")[tab.said]
    sessions.leave("mine")
    assert "role='alert'" in open_runs(sessions, tab, own, session="mine")[tab.said]


def test_uploads_have_a_size_and_a_number(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "results", tmp_path / "none", replace(RULES, upload_megabytes=1))
    with gr.Blocks():
        tab = results_tab(sessions)
    path = result_of(quick=[51.0]).save(tmp_path / "upload")
    for _ in range(5):
        assert "role='alert'" not in add_file(sessions, tab, str(path), ALL, "mine")[tab.said]
    assert "You have added 5 files" in add_file(sessions, tab, str(path), ALL, "mine")[tab.said]
    path.write_text(" " * 1_000_001)
    assert "larger than 1 MB" in add_file(sessions, tab, str(path), ALL, "yours")[tab.said]


def test_nobody_deletes_a_run_from_the_results_in_public_mode(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "results", tmp_path / "none", RULES)
    replace(result_of(quick=[50.0]), id="shared").save(tmp_path / "results")
    with gr.Blocks():
        tab = results_tab(sessions)
    assert "only its owner" in delete_run(sessions, tab, "shared", ALL)[tab.said]
    assert (tmp_path / "results" / "shared.json").is_file()


# The owner


def test_the_owner_is_whoever_has_the_token_and_guessing_ends() -> None:
    sessions = Sessions(rules=RULES)
    check_owner(sessions, "me", TOKEN)
    for _ in range(10):
        with pytest.raises(NotTheOwner, match=NOT_THE_OWNER):
            check_owner(sessions, "thief", "guess")
    with pytest.raises(NotTheOwner, match=TOO_MANY):
        check_owner(sessions, "thief", TOKEN)
    check_owner(sessions, "me", TOKEN)


def test_without_a_token_and_without_public_mode_nobody_is_the_owner() -> None:
    for rules in (None, PublicRules()):
        for typed in ("", None, "anything"):
            with pytest.raises(NotTheOwner):
                check_owner(Sessions(rules=rules), "me", typed)  # type: ignore[arg-type]


def test_closed_for_today_outlives_a_restart_and_ends_with_the_day(tmp_path: Path) -> None:
    day = datetime(2026, 11, 24, 23, 59, tzinfo=UTC)
    Sessions(tmp_path / "results", rules=RULES, now=lambda: day).close_for_today()
    assert Sessions(tmp_path / "results", rules=RULES, now=lambda: day).closed
    assert not Sessions(tmp_path / "results", rules=RULES, now=lambda: day.replace(day=25)).closed


# What goes through the server


def served(middleware: list[Middleware]) -> TestClient:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    routes = [Route("/gradio_api/upload", answer, methods=["GET", "POST"]), Route("/", answer)]
    return TestClient(Starlette(routes=routes, middleware=middleware), client=("203.0.114.7", 5))


def test_every_answer_forbids_other_hosts() -> None:
    headers = served([Middleware(ContentPolicy)]).get("/").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["img-src"] == "'self' data: blob:" and policy["object-src"] == "'none'"
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"


def test_uploads_are_limited_before_they_are_read() -> None:
    rules = replace(RULES, uploads_per_hour=2, upload_megabytes=1)
    client = served([Middleware(UploadLimit, rules=rules, tally=Tally())])
    assert client.post("/gradio_api/upload", content=b"x" * 2_000_000).status_code == 413
    assert client.post("/gradio_api/upload", content=iter([b"x"])).status_code == 413  # says no length
    for _ in range(2):
        assert client.post("/gradio_api/upload", content=b"x").text == "1"
    forged = client.post("/gradio_api/upload", content=b"x", headers={"X-Forwarded-For": "8.8.8.8"})
    assert forged.status_code == 429 and "2 of 2 uploads per hour" in forged.text
    assert client.get("/").status_code == 200


def test_a_visit_is_one_line_of_json(tmp_path: Path) -> None:
    Tally(tmp_path).add(Use("me", runs=1, tokens=7))
    entry = json.loads((tmp_path / "visits.jsonl").read_text())
    assert (entry["visitor"], entry["runs"], entry["tokens"]) == ("me", 1, 7)
