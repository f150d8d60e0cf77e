"""What ends a run and is no fault of the program: it becomes one sentence and exit status 2."""

import errno

# Of these an OSError names no file.
OF_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOMEM)


class UserError(ValueError):
    """Wrong input from outside: says what was wrong, what was expected and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or a closed terminal's SIGHUP, where what is under way ends as after Ctrl-C."""


def sentence(error: Exception) -> str:
    """What a user reads of an error: of a UserError, or of what the machine has refused.

    Empty where the program is to blame, which a traceback tells better.
    """
    text = ""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = (
            f"there is not enough memory ({error}): make batches or the model smaller, or compute "
            "a batch in parts with --config.train.batch_chunk."
        )
    elif isinstance(error, OSError) and error.filename is not None:
        text = (
            f"{error.filename} cannot be used ({error.strerror}): make it readable and writable, "
            "with room on its disk, or choose another path."
        )
    elif isinstance(error, OSError) and error.errno in OF_MACHINE:
        text = f"{error.strerror}: make room and run the same command again."
    elif isinstance(error, FileNotFoundError):  # Of no file: of os.getcwd.
        text = "the current folder is gone: change to one that is there."
    return " ".join(text.split())
