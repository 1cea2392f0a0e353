"""The bake-off on Modal: `modal deploy modal_app.py` builds the images, puts one GPU class per engine there, and prints
the page's public link.

Every engine has an image of its own with the same pinned set of packages as the local host uses on a GPU, in an
environment apart from Modal's own Python. A class is parametrised by model and configuration, so that every variant
has containers of its own; the GPU is chosen at call time. Measuring happens inside: see `experiments/container.py`.

Deploying reads these variables: HF_TOKEN (for models that ask for one), BAKEOFF_BUDGET_RUN, BAKEOFF_BUDGET_VISITOR and
BAKEOFF_BUDGET_DAY (in $; what the public page may spend), BAKEOFF_ADMIN_TOKEN and BAKEOFF_PUBLIC_... (other limits).
"""

# No `from __future__ import annotations`: modal reads the parameters' types from the class itself.
import json
import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import modal
import modal.experimental

from engines import ENGINES
from engines.base import Engine
from engines.environments import CACHE_VARIABLE, MARKER, REQUIREMENTS_FOLDER, environment_name
from engines.modal_cloud import APP_NAME, IDLE_SECONDS, MACHINE, class_name, stamped

PROJECT = Path(__file__).parent
PYTHON = "3.11"
# CUDA 13.0 with its compiler, for the kernels that FlashInfer and Triton compile at the first start; torch brings its
# own libraries of the same version.
CUDA_IMAGE = "nvidia/cuda:13.0.1-devel-ubuntu24.04"
OPT = "/opt/bakeoff"  # where the image holds the engine's environment
WEIGHTS, COMPILED, RESULTS = "/cache/weights", "/cache/compiled", "/cache/results"
RUN_SECONDS = 3600  # the longest that one contender may take, its start included
START_SECONDS = 900
# A page that stays open holds a stream open; Modal ends it with its function's time, not with the 150 s in which an
# answer must begin (github.com/modal-labs/modal-client/issues/2752: seen to end after the function's hour).
PAGE_SECONDS = 24 * 3600
PARTS = ("engines", "experiments", "demo_model")
PAGE_PARTS = (*PARTS, "ui", "recordings")
IGNORED = ["**/__pycache__/**", "**/*.pyc"]
ADMIN_TOKEN = "BAKEOFF_ADMIN_TOKEN"
BUDGETS = {"BAKEOFF_BUDGET_RUN": "1", "BAKEOFF_BUDGET_VISITOR": "2", "BAKEOFF_BUDGET_DAY": "10"}

# What an engine compiles or downloads is kept here from one container to the next.
CACHES = {
    "HF_HOME": WEIGHTS,
    "HF_XET_HIGH_PERFORMANCE": "1",
    "VLLM_CACHE_ROOT": f"{COMPILED}/vllm",
    "SGLANG_CACHE_DIR": f"{COMPILED}/sglang",
    "TRITON_CACHE_DIR": f"{COMPILED}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{COMPILED}/inductor",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more leave processes behind that a snapshot cannot hold
    "DG_JIT_CACHE_DIR": f"{COMPILED}/deepgemm",
    "SGLANG_DG_CACHE_DIR": f"{COMPILED}/deepgemm",
    "FLASHINFER_WORKSPACE_BASE": f"{COMPILED}/flashinfer",
    "CUDA_CACHE_PATH": f"{COMPILED}/cuda",
}

app = modal.App(APP_NAME, tags={"project": APP_NAME})
weights = modal.Volume.from_name(f"{APP_NAME}-weights", create_if_missing=True)
compiled = modal.Volume.from_name(f"{APP_NAME}-compiled", create_if_missing=True)
results = modal.Volume.from_name(f"{APP_NAME}-results", create_if_missing=True)
token = modal.Secret.from_dict({"HF_TOKEN": os.environ.get("HF_TOKEN", "")})
rules: dict[str, str | None] = {
    name: value for name, value in os.environ.items() if name.startswith("BAKEOFF_PUBLIC_") or name == ADMIN_TOKEN
}
limits = {name: os.environ.get(name, default) for name, default in BUDGETS.items()}
budgets = modal.Secret.from_dict({**limits, **rules})


def engine_image(engine: Engine) -> modal.Image:
    """The engine's pinned set in an environment of its own, the app's own packages beside it, and our code on top.

    In the order of how seldom they change: a change of our code builds nothing anew.
    """
    pins = engine.requirements["cuda"]
    folder = f"{OPT}/environments/{environment_name(engine, 'cuda', PYTHON)}"
    image = (
        modal.Image.from_registry(CUDA_IMAGE, add_python=PYTHON)
        .entrypoint([])
        .apt_install("git", "build-essential")
        .add_local_file(REQUIREMENTS_FOLDER / pins, f"/build/{pins}", copy=True)
        .run_commands(
            f"python -m venv --without-pip {folder}",
            f"python -m pip --python {folder}/bin/python install --no-cache-dir --no-deps --requirement /build/{pins}",
            # What the local host writes when an environment is whole.
            f"echo '{json.dumps({'engine': engine.name, 'device': 'cuda'})}' > {folder}/{MARKER}",
        )
        .pip_install_from_requirements(str(PROJECT / "requirements.txt"))
        .env({**CACHES, CACHE_VARIABLE: OPT})
    )
    return with_code(image, PARTS)


def page_image() -> modal.Image:
    """The page and nothing that computes."""
    image = modal.Image.debian_slim(PYTHON).pip_install_from_requirements(str(PROJECT / "requirements.txt"))
    image = image.env({CACHE_VARIABLE: RESULTS, "HF_HOME": WEIGHTS, "GRADIO_ANALYTICS_ENABLED": "False"})
    return with_code(image, PAGE_PARTS).add_local_file(PROJECT / "app.py", "/root/app.py")


def with_code(image: modal.Image, parts: tuple[str, ...]) -> modal.Image:
    for part in parts:
        image = image.add_local_dir(PROJECT / part, f"/root/{part}", ignore=IGNORED)
    return image


IMAGES = {engine.name: engine_image(engine) for engine in ENGINES}


def define(engine: Engine, snapshot: bool) -> type:
    """The class of one engine. With `snapshot` its containers start from a picture of a running engine's memory."""

    class Bench:
        model: str = modal.parameter()
        draft_model: str = modal.parameter(default="")
        features: str = modal.parameter(default="{}")

        def _make(self) -> Any:
            from experiments.container import Bench as Inside

            path = Path(os.environ.get(CACHE_VARIABLE, OPT))
            return Inside(engine.name, self.model, self.draft_model, self.features, path, can_sleep=snapshot)

        if snapshot:

            @modal.enter(snap=True)
            def freeze(self) -> None:
                self.inside = self._make()
                self.inside.freeze()

            @modal.enter(snap=False)
            def thaw(self) -> None:
                self.inside.thaw()

        else:

            @modal.enter()
            def begin(self) -> None:
                self.inside = self._make()

        @modal.method()
        def hello(self) -> dict[str, Any]:
            return self.inside.hello()  # type: ignore[no-any-return]

        @modal.method()
        def measure(self, order: str) -> Generator[str, None, None]:
            """Yields its own id first, so that the page can cancel it, then lists of events as JSON.

            No coroutine, because `.local()` of modal 1.6.4 cannot run one that yields. A cancelled call raises here.
            """
            with closing(self.inside.measure(order)) as items:
                yield from stamped(modal.current_function_call_id() or "", items)
            if json.loads(order)["leave"] and not modal.is_local():
                modal.experimental.stop_fetching_inputs()  # the container ends with this call

        @modal.exit()
        def end(self) -> None:
            self.inside.close()

    Bench.__name__ = Bench.__qualname__ = class_name(engine.name, snapshot)
    Bench.__module__ = __name__
    options: dict[str, Any] = {"enable_memory_snapshot": snapshot}
    if snapshot:
        options["experimental_options"] = {"enable_gpu_snapshot": True}
    return app.cls(
        image=IMAGES[engine.name],
        gpu="L4",  # every call names its own
        cpu=MACHINE.cores,
        memory=int(MACHINE.gibibytes * 1024),
        volumes={WEIGHTS: weights, COMPILED: compiled},
        secrets=[token],
        timeout=RUN_SECONDS,
        startup_timeout=START_SECONDS,
        scaledown_window=IDLE_SECONDS,
        min_containers=0,
        retries=0,
        **options,
    )(Bench)


# Under the name by which a container looks its class up in this module.
for one in ENGINES:
    globals()[class_name(one.name)] = define(one, snapshot=False)
    if one.sleep_path:
        globals()[class_name(one.name, snapshot=True)] = define(one, snapshot=True)


@app.function(
    image=page_image(),
    volumes={RESULTS: results},
    secrets=[budgets],
    cpu=2.0,
    memory=2048,
    timeout=PAGE_SECONDS,
    scaledown_window=300,
    max_containers=1,  # visitors of one page must meet in one process
)
@modal.concurrent(max_inputs=1000)
@modal.asgi_app()
def page() -> Any:
    """The public page. It rents from this same app."""
    from app import hosted_on_modal

    return hosted_on_modal()


@app.function(image=page_image(), volumes={WEIGHTS: weights}, secrets=[token], timeout=RUN_SECONDS, cpu=4.0)
def download(model: str) -> str:
    """Download a model into the volume, where no GPU has to be paid for meanwhile."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(model, token=os.environ.get("HF_TOKEN") or None)
    weights.commit()
    return str(folder)


@app.local_entrypoint()
def fetch(model: str = "Qwen/Qwen3.5-4B") -> None:
    """`modal run modal_app.py --model Qwen/Qwen3.5-4B`: before the first run with a model."""
    print(download.remote(model))
