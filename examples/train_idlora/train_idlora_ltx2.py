#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-idlora[train]"]
# ///
"""
Train an ID-LoRA for LTX-2 or LTX-2.3 on clips that prepare_dataset.py prepared.

Run it with `accelerate launch train_idlora_ltx2.py --config configs/celebvhq.yaml --instance_data_root FOLDER`;
`--help` lists every option.
"""

import ctypes
import signal
import sys
from collections.abc import Sequence

from diffusers_idlora.training.arguments import parse_arguments
from diffusers_idlora.training.finish import finish
from diffusers_idlora.training.trainer import BadSteps, Trainer


PR_SET_PDEATHSIG = 1


def stop_with_the_launcher() -> None:
    """On Linux: asks for a SIGTERM when the launcher dies, which does not hand on its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a training from its command line; returns the exit code."""
    stop_with_the_launcher()
    try:
        trainer = Trainer(parse_arguments(arguments))
        trainer.check_hub()
        trainer.load_model()
        trainer.run()
        if not trainer.was_stopped:
            finish(trainer, trainer.validate())
            trainer.end()
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except BadSteps as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        print(f"Error: a file could not be written ({error}); the last checkpoint is intact.", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
