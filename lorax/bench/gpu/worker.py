"""A process that measures. Names of measurements come in, a line each; JSON lines go out:

{"machine": {...}, "small": bool}     once, when the device is there
{"row": {...}}                        a row of the measurement
{"end": "done", "why": ""}            or "failed", "skipped"; {"broken": true} if the device
                                      can't compute any more
"""

import importlib.metadata
import json
import os
import platform
import sys


def main(arguments: list[str]) -> None:
    """arguments: the side, and "small" or "auto"."""
    side, asked = arguments
    # What libraries print must not come between the lines.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    say = lambda **line: print(json.dumps(line, allow_nan=False), file=out, flush=True)

    import jax

    from lorax.bench import timing
    from lorax.bench.gpu.measurements import measurements
    from lorax.bench.gpu.rows import SkippedError
    from lorax.bench.gpu.sizes import FULL, SMALL
    from lorax.errors import reason

    device = jax.devices()[0]
    small = asked == "small" or device.platform == "cpu"
    say(machine=_machine(device, timing.machine()), small=small)
    listed = {m.name: m for m in measurements(SMALL if small else FULL)}
    for line in sys.stdin:
        failed = ""
        try:
            for row in listed[line.strip()].run():
                failed = failed or row.get("failed", "")
                say(row=row)
            end = ("failed", failed) if failed else ("done", "")
        except SkippedError as why:
            end = "skipped", str(why)
        except Exception as error:  # whatever a compiler or a driver raises
            end = "failed", reason(error)[:300]
        say(end=end[0], why=end[1], broken=end[0] == "failed" and not _computes(side))


def _machine(device, name: str) -> dict:
    versions = {"python": platform.python_version()}
    for package in (
        "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft", "bitsandbytes",
    ):  # fmt: skip
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    more = {"memory": stats.get("bytes_limit"), "cores": os.cpu_count()}
    return {"name": name, "platform": device.platform, "versions": versions, **more}


def _computes(side: str) -> bool:
    """Whether the device still computes, after an error that may have broken its context."""
    try:
        if side == "torch":
            import torch

            from lorax.bench import peft_models

            return float(torch.ones(8, device=peft_models.device()).sum()) == 8
        import jax.numpy as jnp

        return float(jnp.ones(8).sum()) == 8
    except Exception:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
