"""What is made of Modal's answers, prices and failures. Nothing here calls Modal."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from modal import exception

from engines import ENGINES
from engines.base import EngineError
from engines.cloud import WIRE_VERSION, ContainerFacts, Rates, Rental
from engines.modal_cloud import (
    DEPLOY,
    class_name,
    failures_told,
    read_facts,
    read_stamp,
    recognised_rates,
    sentence,
    stamped,
)
from tests.conftest import MACHINE

RENTAL = Rental("vllm", "owner/model", gpu="L40S", gpu_count=2)
LISTED = Rates({"L4": 0.0002, "L40S": 0.0005, "A100-80GB": 0.0007}, 0.00001, 0.000002, "by hand")


def test_the_modal_package_is_not_loaded_before_something_is_rented() -> None:
    program = "import sys, engines.modal_cloud; print('modal' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ended.stdout.strip() == "False"


def test_every_engine_has_a_class_of_its_own_with_and_without_a_snapshot() -> None:
    assert (class_name("vllm"), class_name("vllm", snapshot=True)) == ("VllmEngine", "VllmEngineSnapshot")
    names = {class_name(engine.name, snapshot) for engine in ENGINES for snapshot in (False, True)}
    assert len(names) == 2 * len(ENGINES)
    assert all(name.isidentifier() for name in names)


# Prices that the account tells


def test_prices_are_recognised_per_second_and_per_hour() -> None:
    told = {
        "gpu_l4": 0.00025,
        "GPU L40S (hour)": 2.16,  # 2.16 / 3600 = 0.0006
        "gpu.a100_80gb.hourly": 3.24,  # 3.24 / 3600 = 0.0009
        "cpu_core": 0.00002,
        "memory_gib_hour": 0.0108,  # 0.0108 / 3600 = 0.000003
    }
    rates = recognised_rates(told, LISTED)
    assert rates.gpus == pytest.approx({"L4": 0.00025, "L40S": 0.0006, "A100-80GB": 0.0009})
    assert (rates.core, rates.gibibyte) == (0.00002, pytest.approx(0.000003))
    assert rates.source == "Modal's prices for this account today"


def test_what_is_not_told_stays_as_listed() -> None:
    rates = recognised_rates({"gpu_l4": 0.00025}, LISTED)
    assert rates.gpus == {**LISTED.gpus, "L4": 0.00025}
    assert (rates.core, rates.gibibyte) == (LISTED.core, LISTED.gibibyte)


@pytest.mark.parametrize(
    "value",
    [
        0.0002 * 3.1,
        0.0002 / 3.1,
        0.72 * 3.1,  # 0.0002 * 3600 = 0.72 per hour
        0.72 / 3.1,
        0.012,  # per minute: 0.0002 * 60
        0.0,
        -0.0002,
        float("nan"),
        float("inf"),
    ],
)
def test_a_price_that_is_far_from_the_listed_one_is_in_another_unit(value: float) -> None:
    rates = recognised_rates({"gpu_l4": value, "gpu_l40s": 0.0006}, LISTED)
    assert rates.gpus == {**LISTED.gpus, "L40S": 0.0006}


def test_of_several_prices_the_one_that_is_plausible_counts() -> None:
    assert recognised_rates({"l4_per_day": 17.28, "l4_per_hour": 0.9}, LISTED).gpus["L4"] == pytest.approx(0.9 / 3600)


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"gpu_l4": 5.0},
        {"l400": 0.0002, "al4": 0.0002, "a100": 0.0007, "A100-40GB": 0.0007},
        {"cpu": 0.00002, "memory": 0.000003},
    ],
)
def test_where_no_gpus_price_is_recognised_the_listed_ones_count(told: dict[str, float]) -> None:
    assert recognised_rates(told, LISTED) is LISTED


# What a container says of itself


FACTS = ContainerFacts("ta-123", MACHINE, 12.5, 2.5, 0, "eu-west", from_snapshot=True)


def test_facts_survive_the_way_as_a_dictionary() -> None:
    assert read_facts(asdict(FACTS)) == FACTS


@pytest.mark.parametrize("version", [WIRE_VERSION + 1, WIRE_VERSION - 1, None, str(WIRE_VERSION)])
def test_a_container_of_another_version_is_to_be_deployed_again(version: object) -> None:
    with pytest.raises(EngineError, match="of another version than this one. Deploy it again") as caught:
        read_facts({**asdict(FACTS), "wire_version": version})
    assert DEPLOY in caught.value.message


def test_a_container_from_before_there_were_versions_is_to_be_deployed_again() -> None:
    with pytest.raises(EngineError, match="another version"):
        read_facts({"hello": "there"})


# What a container yields


def stamps(call_id: str, *items: str) -> list[tuple[str, int, str]]:
    return [read_stamp(item) for item in stamped(call_id, items)]


def test_items_are_numbered_after_the_calls_own_id() -> None:
    found = stamps("fc-123", "[]", '[["Status", {"phase": "loading  weights"}]]', "")
    assert [(number, payload) for _, number, payload in found] == [
        (0, "fc-123"),
        (1, "[]"),
        (2, '[["Status", {"phase": "loading  weights"}]]'),
        (3, ""),
    ]
    assert len({life for life, _, _ in found}) == 1


def test_every_life_of_a_container_has_another_name() -> None:
    assert stamps("fc-123")[0][0] != stamps("fc-123")[0][0]


def test_a_call_without_an_id_says_so() -> None:
    assert [(number, payload) for _, number, payload in stamps("")] == [(0, "")]


def test_the_calls_id_is_told_before_anything_has_happened() -> None:
    never = iter(lambda: pytest.fail("it was asked for what happened first"), None)
    assert read_stamp(next(stamped("fc-123", never)))[1:] == (0, "fc-123")


@pytest.mark.parametrize("item", ["", "[]", "restarted", "a1b2 first fc-123", "a1b2 -1 fc-123", "a1b2  1"])
def test_an_item_without_a_stamp_cannot_be_read(item: str) -> None:
    with pytest.raises(EngineError, match="sent something that cannot be read: ") as caught:
        read_stamp(item)
    assert caught.value.message.endswith(item)


def test_of_a_long_item_that_cannot_be_read_the_beginning_is_told() -> None:
    with pytest.raises(EngineError) as caught:
        read_stamp("x" * 10_000)
    assert caught.value.message.endswith(f": {'x' * 120}")


# Failures, in Modal's own words, and what is said of them

FAILURES: dict[str, tuple[BaseException, list[str]]] = {
    "no token": (
        exception.AuthError("Token missing. Could not authenticate client."),
        ["There is no Modal token here.", "`modal setup`", "MODAL_TOKEN_ID", "start the app again"],
    ),
    "wrong token": (
        exception.AuthError("Token ID is malformed or was revoked."),
        ["does not accept this token", "`modal token new`", "start the app again"],
    ),
    "not deployed": (
        exception.NotFoundError("App 'llm-inference-bake-off' not found in environment 'main'."),
        ["not on Modal yet", DEPLOY, "press Run again"],
    ),
    "not allowed": (
        exception.PermissionDeniedError("Forbidden."),
        ["may not call the app", "Use one of the workspace in which it was deployed"],
    ),
    "exhausted": (
        exception.ResourceExhaustedError("Too many inputs."),
        ["all the GPUs that its plan allows", "`modal app list`", "choose fewer engines"],
    ),
    "time-out": (
        exception.FunctionTimeoutError("Task's current input hit its timeout of 3600s"),
        ["took longer", "fewer repeats", "run it again"],
    ),
    "no connection": (
        exception.ConnectionError("Deadline exceeded"),
        ["cannot be reached (Deadline exceeded)", "Check the network", "run it again"],
    ),
    "no connection, no words": (exception.ConnectionError(), ["cannot be reached (ConnectionError)"]),
    "service": (exception.ServiceError("unavailable"), ["cannot be reached (unavailable)", "run it again"]),
    "socket": (socket.gaierror("Name or service not known"), ["cannot be reached (Name or service not known)"]),
    "old package": (exception.VersionError("Client too old."), ["no longer speaks", "raise it in requirements.txt"]),
    "inside Modal": (
        exception.InternalError("id 7"),
        ["broke inside Modal (id 7)", "Run it again", "status.modal.com"],
    ),
    "inside Modal, unsaid": (exception.InternalFailure("id 8"), ["broke inside Modal (id 8)", "status.modal.com"]),
    "image": (
        exception.ImageBuildError("Image build for im-123 failed. See build logs for more details.", "im-123"),
        ["The image of vllm could not be built", "`modal app logs`", "mend engines/requirements, and deploy again"],
    ),
    "image, from afar": (
        exception.RemoteError("Image build for im-123 failed with the exception:\nNo matching distribution"),
        ["The image of vllm could not be built", "deploy again"],
    ),
    "memory": (
        exception.RemoteError("Container was killed (exit code 137)."),
        ["ran out of memory", "smaller model", "deploy again"],
    ),
    "memory of the GPU": (
        exception.RemoteError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ["The GPU's memory (L40S:2) is too small", "larger GPU"],
    ),
    "preemption": (
        exception.RemoteError("Worker was preempted."),
        ["took the container away", "Run it again"],
    ),
    "spend limit": (
        exception.PermissionDeniedError("Workspace has reached its spend limit."),
        ["spending limit", "modal.com/settings/usage"],
    ),
    "GPU limit": (
        exception.ResourceExhaustedError("GPU limit of 10 reached for this workspace."),
        ["all the GPUs that its plan allows", "`modal app list`"],
    ),
    "unknown GPU": (
        exception.InvalidError("Invalid GPU type: L40S."),
        ["does not know the GPU L40S:2", "Choose another one"],
    ),
}


@pytest.mark.parametrize(("failure", "parts"), FAILURES.values(), ids=FAILURES)
def test_a_failure_is_told_with_the_next_step(failure: BaseException, parts: list[str]) -> None:
    said = sentence(failure, RENTAL)
    for part in parts:
        assert part in said
    assert said.endswith(".")


@pytest.mark.parametrize(("failure", "parts"), FAILURES.values(), ids=FAILURES)
def test_whatever_modal_raises_becomes_an_error_in_words(failure: Exception, parts: list[str]) -> None:
    with pytest.raises(EngineError) as caught, failures_told(RENTAL):
        raise failure
    assert caught.value.message == sentence(failure, RENTAL)
    assert caught.value.__cause__ is failure


def test_an_unknown_failure_keeps_its_own_words() -> None:
    assert "something new" in sentence(exception.RemoteError("something new"), RENTAL)
    assert "RemoteError" in sentence(exception.RemoteError(), RENTAL)


@pytest.mark.parametrize("words", ["something new", ""])
def test_an_unknown_failure_is_told_with_the_next_step(words: str) -> None:
    said = sentence(exception.RemoteError(words), RENTAL)
    assert "`modal app logs" in said and "again" in said


def test_the_end_of_a_long_message_stands_where_logs_are_shown() -> None:
    lines = [f"line {number}" for number in range(100)]
    with pytest.raises(EngineError) as caught, failures_told(RENTAL):
        raise exception.RemoteError("\n".join(["Image build for im-123 failed:", *lines]))
    assert caught.value.log_tail.splitlines() == lines[-30:]
    with pytest.raises(EngineError) as short, failures_told(RENTAL):
        raise exception.NotFoundError("Not found.")
    assert short.value.log_tail == ""


def test_what_is_in_words_already_stays_as_it_is() -> None:
    failure = EngineError("In words already.", "its log")
    with pytest.raises(EngineError) as caught, failures_told(RENTAL):
        raise failure
    assert caught.value is failure


def test_a_fault_of_our_own_code_in_a_container_names_itself() -> None:
    with pytest.raises(EngineError, match="failed: ZeroDivisionError: by nothing") as caught, failures_told(RENTAL):
        raise ZeroDivisionError("by nothing")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_who_stops_a_run_is_told_of_no_failure() -> None:
    with pytest.raises(asyncio.CancelledError), failures_told(RENTAL):
        raise asyncio.CancelledError
