"""jax.export of a trained run: one file that needs jax to run, and neither fwm nor the workdir.

    pip install flatbuffers                          # jax writes and reads such files with it
    python -m examples.export_model runs/a 4 64      # the run, rows, tokens

The file computes log p of the next token, [rows, n_token], from tokens [rows, tokens] (int32).
Sizes are fixed: they decide how the work is cut, so export once for every shape. Symbolic sizes
are refused.
"""

import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp

import fwm.workdir


def export(workdir, rows, length):
    """The best checkpoint of a run as a `jax.export.Exported`."""
    run = fwm.workdir.open(workdir)
    function = lambda tokens: run.model.apply(run.variables, tokens, method="log_probs")[0]
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    # The weights become constants of the program; devices that are not here may be named too.
    return jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(tokens)


if __name__ == "__main__":
    file = Path(sys.argv[1], "next_token.jax")
    file.write_bytes(export(sys.argv[1], *map(int, sys.argv[2:])).serialize())
    loaded = jax.export.deserialize(bytearray(file.read_bytes()))
    (tokens,) = loaded.in_avals
    log_probs = loaded.call(jnp.zeros(tokens.shape, tokens.dtype))
    print(f"{file}: {tokens.str_short()} -> {log_probs.shape}, {file.stat().st_size:,} bytes")
