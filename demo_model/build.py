"""Trains the bundled model anew: `python -m demo_model.build [--out FOLDER] [options of demo_model.train]`.

Training needs torch and transformers, so it runs in the Transformers engine's environment, made first if need be.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from demo_model.bundled import WEIGHTS
from engines import engine_named
from engines.base import EngineError
from engines.environments import Environment
from engines.hardware import this_machine


def main() -> int:
    environment = Environment(engine_named("transformers"), this_machine().device)
    try:
        environment.ensure(lambda message: print(message, flush=True))
    except EngineError as error:
        print(f"{error}\n{error.log_tail}", file=sys.stderr)
        return 1
    given = sys.argv[1:]
    out = [] if "--out" in given else ["--out", str(WEIGHTS)]
    os.chdir(Path(__file__).parent.parent)
    python = environment.program("python")
    os.execv(python, [python, "-m", "demo_model.train", *out, *given])


if __name__ == "__main__":
    sys.exit(main())
