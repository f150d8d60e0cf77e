"""A config file that lies anywhere: running it, and saying in a sentence what is wrong with it."""

import importlib.machinery
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from ml_collections import ConfigDict

from fwm.errors import UserError

EXPECTED = "expected a ConfigDict, best made with fwm.config.build(options, **changes)"


def load(value: str) -> ConfigDict:
    """What `get_config(options)` returns of a file, named as `FILE:options` or `FILE`.

    Raises:
        UserError: there is no such file, it fails, or its get_config returns something else.
    """
    file, colon, options = value.partition(":")
    if not Path(file).is_file():
        places = [Path(f"{file}.py"), Path(sys.argv[0]).parent / file] if file else []
        like = next((f"; there is {path}" for path in places if path.is_file()), "")
        raise UserError(
            f"--config={value} names no file in {Path.cwd()}{like}: expected the path of a config "
            "file, such as configs/dpfp_delta.py or configs/dpfp_delta.py:small."
        )
    loader = importlib.machinery.SourceFileLoader("config_file", file)
    module = importlib.util.module_from_spec(ModuleSpec(loader.name, loader, origin=file))
    sys.modules[loader.name] = module  # Flax looks there for the classes that a file defines.
    try:
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"{file} defines no get_config: {EXPECTED}.")
        config = get_config(*[options] * bool(colon))
    except UserError:
        raise
    except Exception as error:  # Whatever somebody's own file may do.
        raise UserError(
            f"--config={value} fails{_line(error, file)} with {type(error).__name__} ({error}): "
            "correct the file, or the options after the colon."
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {file} returns {type(config).__name__}: {EXPECTED}.")
    return config.lock()


def _line(error: BaseException, file: str) -> str:
    """Where in a file an error comes from, as ` in line 3`."""
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    trace, lines = error.__traceback__, []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" in line {lines[-1]}" if lines else ""
