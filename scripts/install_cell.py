"""What the first cell of a downloaded chapter runs. scripts/downloads.py copies this function's source into the notebook."""


def install(repository, folder):
    """Make `import speedrun` work in this kernel: from where the project is, else from a clone of its repository."""
    import importlib.util
    import os
    import runpy
    import subprocess
    from pathlib import Path

    script, clone = Path("scripts", "install_here.py"), Path(folder).expanduser().resolve()
    spec = importlib.util.find_spec("speedrun")
    places = [Path(spec.origin).resolve().parents[1]] if spec and spec.origin else []
    place = next((each for each in [*places, clone] if (each / script).is_file()), None)
    if place is None and not repository:
        where = "between the quotes of REPOSITORY above, and run this cell again"
        raise RuntimeError(f"Write the address of the book's repository {where}.")
    if place is None:
        print(f"Cloning {repository} into {clone} …", flush=True)
        command = ["git", "clone", "-q", "--depth", "1", repository, str(clone)]
        quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a notebook cannot answer questions
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=quiet)
        except FileNotFoundError:
            raise RuntimeError("git is not installed here: install it, run this again") from None
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip()
            raise RuntimeError(f"Are the address, FOLDER and the network right? git says: {reason}")
    runpy.run_path(str((place or clone) / script))["install"]()
