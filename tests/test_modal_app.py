"""What `modal deploy modal_app.py` puts on Modal, deployed to a control plane on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from modal_proto import api_pb2

import modal_app
from engines import ENGINES
from engines.base import Engine
from engines.environments import REQUIREMENTS_FOLDER, environment_name
from engines.modal_cloud import APP_NAME, class_name
from tests.loopback import ControlPlane, client_environment, running_control_plane

PROJECT = Path(__file__).parent.parent
CLASSES = [class_name(engine.name) for engine in ENGINES]
SNAPSHOTS = ["VllmEngineSnapshot", "SglangEngineSnapshot"]


@pytest.fixture(scope="module")
def deployed() -> Iterator[tuple[ControlPlane, str]]:
    """After `modal deploy modal_app.py`, as its users type it: the control plane, and what was printed."""
    with running_control_plane() as (plane, url):
        budget = {"BAKEOFF_BUDGET_DAY": "25", "HF_TOKEN": "secret-of-mine", "BAKEOFF_PUBLIC_RUNS_PER_HOUR": "3"}
        ended = subprocess.run(
            [sys.executable, "-m", "modal", "deploy", "modal_app.py"],
            cwd=PROJECT,
            env={**os.environ, **client_environment(url), **budget},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        yield plane, ended.stdout


def test_deploying_prints_no_secret(deployed: tuple[ControlPlane, str]) -> None:
    assert "secret-of-mine" not in deployed[1]


def test_every_engine_has_a_class_and_the_page_a_function(deployed: tuple[ControlPlane, str]) -> None:
    plane, _ = deployed

    assert set(plane.apps) == {APP_NAME}
    assert set(plane.functions) == {f"{name}.*" for name in CLASSES + SNAPSHOTS} | {"page", "download"}


@pytest.mark.parametrize("name", CLASSES + SNAPSHOTS)
def test_a_class_asks_for_what_an_engine_needs(deployed: tuple[ControlPlane, str], name: str) -> None:
    plane, _ = deployed
    function = plane.functions[f"{name}.*"]
    resources, scaling = function.resources, function.autoscaler_settings

    assert (resources.gpu_config.gpu_type, resources.gpu_config.count) == ("L4", 1)
    assert (resources.milli_cpu, resources.memory_mb) == (4000, 32 * 1024)
    assert (function.timeout_secs, function.startup_timeout_secs) == (3600, 900)
    assert (scaling.min_containers, scaling.scaledown_window) == (0, 20)
    assert function.retry_policy.retries == 0
    assert plane.mounted_volumes(function) == {
        "/cache/weights": f"{APP_NAME}-weights",
        "/cache/compiled": f"{APP_NAME}-compiled",
    }
    assert plane.secret_keys(function) == {"HF_TOKEN"}
    assert set(function.method_definitions) == {"hello", "measure"}
    schema = {one.name: one.has_default for one in function.class_parameter_info.schema}
    assert schema == {"model": False, "draft_model": True, "features": True}


@pytest.mark.parametrize("name", CLASSES + SNAPSHOTS)
def test_only_the_snapshot_classes_start_from_a_snapshot(deployed: tuple[ControlPlane, str], name: str) -> None:
    function = deployed[0].functions[f"{name}.*"]

    assert function.checkpointing_enabled == (name in SNAPSHOTS)
    assert function.experimental_options.get("enable_gpu_snapshot") == ("True" if name in SNAPSHOTS else None)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_an_image_is_built_from_the_pins_of_the_local_host(deployed: tuple[ControlPlane, str], engine: Engine) -> None:
    plane, _ = deployed
    lines = "\n".join(plane.dockerfile(plane.functions[f"{class_name(engine.name)}.*"]))
    pins = engine.requirements["cuda"]
    folder = f"/opt/bakeoff/environments/{environment_name(engine, 'cuda', '3.11')}"

    assert "FROM nvidia/cuda:13.0.1-devel-ubuntu24.04" in lines
    assert any(f"--python {folder}/bin/python install" in line and pins in line for line in lines.splitlines())
    assert f"> {folder}/complete.json" in lines
    assert "ENV VLLM_CACHE_ROOT=/cache/compiled/vllm" in lines.replace('"', "").replace("'", "")
    assert (REQUIREMENTS_FOLDER / pins).is_file()


def test_each_engine_has_an_image_of_its_own(deployed: tuple[ControlPlane, str]) -> None:
    plane, _ = deployed

    assert len({plane.functions[f"{name}.*"].image_id for name in CLASSES}) == len(CLASSES)


def test_the_page_is_one_container_for_many_visitors_and_has_no_gpu(deployed: tuple[ControlPlane, str]) -> None:
    plane, _ = deployed
    page = plane.functions["page"]

    assert page.autoscaler_settings.max_containers == 1
    assert page.max_concurrent_inputs == 1000
    assert page.timeout_secs == 24 * 3600  # an open page's stream lives as long as that
    assert page.webhook_config.type == api_pb2.WEBHOOK_TYPE_ASGI_APP
    assert not page.webhook_config.requires_proxy_auth  # a public page: its budgets guard it
    assert not page.resources.gpu_config.count
    assert plane.mounted_volumes(page) == {"/cache/results": f"{APP_NAME}-results"}
    budgets = {"BAKEOFF_BUDGET_RUN", "BAKEOFF_BUDGET_VISITOR", "BAKEOFF_BUDGET_DAY"}
    assert plane.secret_keys(page) == budgets | {"BAKEOFF_PUBLIC_RUNS_PER_HOUR"}


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as /root is in an engine's container: our code, and nothing else of the project."""
    root = tmp_path_factory.mktemp("root")
    shutil.copy(PROJECT / "modal_app.py", root)
    for part in modal_app.PARTS:
        shutil.copytree(PROJECT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("name", CLASSES + SNAPSHOTS)
def test_a_container_finds_its_class_with_the_code_that_it_has(
    deployed: tuple[ControlPlane, str], container: Path, name: str
) -> None:
    function = deployed[0].functions[f"{name}.*"]
    program = (
        "import sys; from modal_proto import api_pb2;"
        "from modal._runtime.user_code_imports import _get_cls_or_user_cls;"
        "found = _get_cls_or_user_cls(api_pb2.Function.FromString(sys.stdin.buffer.read()), None);"
        "print(found, 'gradio' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=container,
        env={"PATH": os.environ["PATH"]},
        input=function.SerializeToString(),
        capture_output=True,
        timeout=60,
    )

    assert ended.returncode == 0, ended.stderr.decode()
    assert name in ended.stdout.decode() and b"False" in ended.stdout


def test_measuring_needs_nothing_that_a_container_lacks(container: Path) -> None:
    program = "import experiments.container, engines.load_process, engines.sglang_cpu; print('loaded')"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=container,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        timeout=60,
    )

    assert ended.stdout == b"loaded\n", ended.stderr.decode()
