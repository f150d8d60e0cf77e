"""Which fwm this is."""

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def written_by() -> dict[str, str]:
    """What a run notes of the fwm that trains it: `version`, and in a checkout `commit`.

    The commit ends with -dirty where files are changed.
    """
    folder = Path(__file__).parents[1]
    commit = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*"]
    if not (folder / ".git").exists():  # Else git would look further up.
        return {"version": __version__}
    try:
        found = subprocess.run([*commit, "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # No git here, or no commit yet.
        return {"version": __version__}
    return {"version": __version__, "commit": found.stdout.strip()}
