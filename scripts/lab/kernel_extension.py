"""What a kernel of the lab knows more than others: it runs in the project's folder, reloads modules that a saved chapter has rewritten, and says so."""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
AFTERMATH = "Unless an error says otherwise, functions and classes are the new ones; what was made with the old ones (models, results, constants imported by name) is as it was. Restart the kernel to begin anew."


class Watch:
    """The modules of the package that this kernel has imported, each with the time of its file then."""

    def __init__(self, reloader):
        self.reloader, self.seen, self.began = reloader, {}, time.time_ns()

    def files(self) -> dict[str, int]:
        """Every imported module of the package, and when its file was written last, in ns."""
        own = {
            name: module
            for name, module in list(sys.modules.items())
            if name.startswith("speedrun.")
        }
        paths = {name: getattr(module, "__file__", None) for name, module in own.items()}
        return {n: os.stat(p).st_mtime_ns for n, p in paths.items() if p and os.path.exists(p)}

    def before_cell(self, *_) -> None:
        files = self.files()
        changed = sorted(name for name in files if self.seen.get(name, files[name]) != files[name])
        if changed:
            have = "has" if len(changed) == 1 else "have"
            print(
                f"{', '.join(changed)} {have} changed and will be imported again. {AFTERMATH}",
                file=sys.stderr,
            )
        self.seen |= files
        self.began = time.time_ns()

    def after_cell(self, *_) -> None:
        """Note what the cell has imported. A file that was written meanwhile may not be what was imported."""
        for name, written in self.files().items():
            if name not in self.seen:
                self.seen[name] = written if written < self.began else 0
                if not self.seen[name]:
                    self.reloader.modules_mtimes[name] = 0


def load_ipython_extension(shell) -> None:
    os.chdir(ROOT)
    shell.run_line_magic("load_ext", "autoreload")
    watch = Watch(shell.magics_manager.registry["AutoreloadMagics"]._reloader)
    shell.events.register("pre_run_cell", watch.before_cell)
    shell.events.register("post_run_cell", watch.after_cell)
    shell.run_line_magic("autoreload", "2")
