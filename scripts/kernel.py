"""The kernel that papermill starts is this interpreter, whatever kernels are installed elsewhere under the name of python3."""

import json
import os
from pathlib import Path

from ipykernel.kernelspec import get_kernel_dict


def own_kernel(folder: Path, *arguments: str) -> dict[str, str]:
    """Write a kernelspec `python3` of this interpreter into a folder of ours; returns the variables that make Jupyter take it.

    Merge them into the environment in which papermill or JupyterLab runs. The kernel keeps its own startup files and history there, and says
    nothing of its network. arguments: further ones of ipykernel's command line.
    """
    # ipykernel 7 warns at each start that it uses TCP
    spec = get_kernel_dict(["--log-level=CRITICAL", *arguments])
    folder = folder.resolve()
    path = folder / "kernels" / "python3" / "kernel.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    os.replace(part, path)
    others = [os.environ["JUPYTER_PATH"]] if os.environ.get("JUPYTER_PATH") else []
    return {
        "JUPYTER_PATH": os.pathsep.join([str(folder), *others]),
        "IPYTHONDIR": str(folder / "ipython"),
    }
