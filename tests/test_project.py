"""What must hold for the project as a whole: layers, imports, chapters, environment files, messages, notices."""

import ast
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tokenize
import tomllib
from collections import defaultdict
from pathlib import Path

import jupytext
import pytest
import yaml

from speedrun.config import config_from_json, schedule_of
from speedrun.lab.provenance import imported_names, module_hashes, root
from speedrun.presets import preset

ROOT = root()
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "speedrun").rglob("*.py")
    if path.stem != "__init__"
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
SHARED_BY_MEASUREMENTS = ("speedrun.measure.runs", "speedrun.measure.study")
LAYERS = [  # imports point from a later line to an earlier one, or stay on one line
    {"speedrun.lab", "speedrun.params"},
    {"speedrun.data"},
    {"speedrun.kernels"},
    {"speedrun.schedule"},
    {"speedrun.model", "speedrun.optim"},
    {"speedrun.config", "speedrun.presets", "speedrun.history", "speedrun.cpu_size"},
    {"speedrun.ranks", "speedrun.checkpoint", "speedrun.tracking"},
    {"speedrun.heartbeat"},
    {"speedrun.run", "speedrun.command", "speedrun.trouble", "speedrun.passes"},
    {"speedrun.train"},
    {"speedrun.supervise"},
    {"speedrun.launch", "speedrun.report", "speedrun.sample", "speedrun.evaluate"},
    {"speedrun.measure"},
]


PARTS = ("added", "begin_forward", "attention_half", "mlp_half", "end_forward", "call_directly")


def layer(module: str) -> int:
    return next(
        n
        for n, names in enumerate(LAYERS)
        if any(module == name or module.startswith(name + ".") for name in names)
    )


def source_of(module: str) -> str:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def tokens_of_code(text: str) -> int:
    """Tokens of Python that are neither layout nor comments nor part of a docstring."""
    words = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                words |= set(range(child.lineno, (child.end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}  # fmt: skip
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in layout and token.start[0] not in words for token in found)


class TestLayers:
    @pytest.mark.parametrize("module", MODULES)
    def test_imports_point_downwards(self, module):
        ours = {name for name in imported_names(source_of(module)) if name in MODULES}
        for other in ours:
            assert layer(other) <= layer(module), f"{module} imports {other}"
            sides = {module.split(".")[1], other.split(".")[1]}
            assert sides != {"model", "optim"}
            if other.startswith(
                "speedrun.measure"
            ):  # what measuring modules share, and nobody else uses
                assert other in SHARED_BY_MEASUREMENTS and "measure" in module.split(".")

    def test_nothing_imports_in_a_circle(self):
        """Nor does the launcher need the trainer: it starts it."""
        needs = {m: {o for o in imported_names(source_of(m)) if o in MODULES} for m in MODULES}
        on_demand = {("speedrun.history", "speedrun.presets")}  # data, which presets read by name
        on_demand |= {(f"speedrun.kernels.head_{form}", "speedrun.kernels.loss") for form in ("bf16", "reference")}  # fmt: skip
        while needs:
            free = [m for m, others in needs.items() if not {o for o in others if o in needs and (m, o) not in on_demand}]  # fmt: skip
            assert free, f"in a circle: {sorted(needs)}"
            for module in free:
                del needs[module]
        for module in ("speedrun.launch", "speedrun.supervise"):
            assert "speedrun.train" not in module_hashes([module])

    @pytest.mark.parametrize("module", ["train", "run", "command", "ranks", "checkpoint", "heartbeat", "supervise", "launch"])  # fmt: skip
    def test_a_room_of_the_trainer_can_be_read_at_one_sitting(self, module):
        assert len(source_of(f"speedrun.{module}").splitlines()) <= 450

    def test_history_is_imported_on_demand_only(self):
        for module in MODULES:
            for node in ast.parse(source_of(module)).body:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    assert "speedrun.history" not in imported_names(ast.unparse(node)), module

    def test_the_record_run_is_small(self):
        # what a run imports only when it is named, or has no GPU with units for eight bits
        elsewhere = (
            "speedrun.history",
            "speedrun.kernels.head_bf16",
            "speedrun.kernels.head_reference",
            "speedrun.model.baseline",
            "speedrun.model.masks",
            "speedrun.optim.soap",
            "speedrun.optim.sparse",
            "speedrun.data.tokenizer",
            "speedrun.model.backends",
            "speedrun.tracking",
            "speedrun.trouble",
        )
        tokens = {
            module: tokens_of_code(source_of(module))
            for module in module_hashes(["speedrun.train"])
            if module not in elsewhere
        }
        # upstream's trainer with its two files of kernels: 32,205 at record 89
        blocks = sum(tokens.pop(f"speedrun.kernels.{name}") for name in ("mlp", "rotary"))
        kernels = sum(tokens.pop(name) for name in [*tokens] if ".kernels." in name)
        compiling = tokens.pop("speedrun.lab.compile") + tokens.pop("speedrun.model.compiled")
        assert kernels <= 8_850 and blocks <= 4_450, tokens
        source = source_of("speedrun.model.gpt")  # what a compiler sees one at a time
        parts = [
            tokens_of_code(ast.get_source_segment(source, node) or "")
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name in PARTS
        ]
        assert len(parts) == len(PARTS) and compiling + sum(parts) <= 1_285, (compiling, parts)
        assert sum(tokens.values()) - sum(parts) <= 38_650, tokens
        code = "import sys, speedrun.train; print(*[m for m in sys.modules if m in sys.argv[1:]])"
        command = [sys.executable, "-c", code, *elsewhere]
        assert not subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()


class TestImports:
    def test_importing_everything_touches_nothing(self):
        """No CUDA, no network, no process group, no environment variable is read; and Triton may be missing."""
        code = f"""
import os, socket, sys
sys.modules["triton"] = None
import torch, huggingface_hub, tiktoken, tyro, matplotlib, papermill, nbconvert, psutil, scipy.stats, tqdm, safetensors.torch
def refuse(*args, **kwargs): raise AssertionError("touched at import")
socket.socket.connect = refuse
torch.cuda.init = torch.cuda._lazy_init = torch.distributed.init_process_group = refuse
class Watched(dict):
    pass
read = []
class Environment(type(os.environ)):
    def __getitem__(self, key):
        read.append(key); return super().__getitem__(key)
    def get(self, key, default=None):
        read.append(key); return super().get(key, default)
os.environ.__class__ = Environment
for name in {MODULES!r}:
    before = len(read)
    __import__(name)
    mine = [key for key in read[before:] if not key.startswith(("TORCH", "PYTORCH", "TRITON", "CUDA"))]
    assert not mine, (name, mine)
assert not torch.cuda.is_initialized()
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)

    def test_training_and_sampling_work_without_triton(self, brief, tmp_path):
        """As on macOS and Windows: blocked, not only missing."""
        from speedrun.presets import as_arguments

        flags = ["--out", str(tmp_path), *as_arguments(brief)]
        code = f"""
import sys
sys.modules["triton"] = None
from speedrun import sample, train
assert train.main({flags!r}) == 0
assert sample.main([{str(tmp_path)!r}, "--tokens", "20"]) == 0
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    def test_nothing_of_the_trainer_knows_about_notebooks(self):
        for module in MODULES:
            if layer(module) <= layer("speedrun.train"):
                assert not {
                    "nbformat",
                    "papermill",
                    "jupytext",
                    "IPython",
                    "nbconvert",
                } & imported_names(source_of(module))

    def test_the_root_is_named_when_there_is_none(self, tmp_path):
        shutil.copytree(
            ROOT / "speedrun", tmp_path / "speedrun", ignore=shutil.ignore_patterns("__pycache__")
        )
        code = "from speedrun.lab.results import root; root()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode
            and "there is no project around" in done.stderr
            and "pip install -e ." in done.stderr
        )


def cells_of(path: Path):
    return jupytext.read(path, fmt="py:percent").cells


def exported(cell) -> bool:
    return cell.cell_type == "code" and any(
        line.startswith("#| export") for line in cell.source.splitlines()[:3]
    )


def is_long_by_right(source: str) -> bool:
    """Field tables and import cells may be longer: what is left without them has at most 25 lines."""
    tree = ast.parse(source)
    return all(isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)) or len(ast.unparse(node).splitlines()) <= 25 for node in tree.body)  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestChapters:
    def test_it_begins_as_chapters_do(self, path):
        first = cells_of(path)[0].source
        assert (
            first.startswith("# ")
            and "```{admonition} Cost box" in first
            and "## The problem" in first
        )

    def test_it_asks_for_a_prediction_and_has_exercises(self, path):
        text = "\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "markdown")
        assert "```{admonition} Prediction" in text and "## Exercises" in text

    def test_exported_cells_are_short_and_asserted_at_once(self, path):
        waiting = 0
        for cell in (cell for cell in cells_of(path) if cell.cell_type == "code"):
            lines = [
                line
                for line in cell.source.splitlines()
                if line.strip() and not line.startswith("#|")
            ]
            if exported(cell):
                waiting += 1
                assert len(lines) <= 25 or is_long_by_right(cell.source), cell.source[:80]
                assert waiting <= 5, (
                    f"five exported cells in a row without an assertion, at {cell.source[:80]}"
                )
            elif "assert" in cell.source:
                waiting = 0
        assert waiting == 0

    def test_it_is_long_enough_and_not_longer(self, path):
        words = sum(
            len(cell.source.split()) for cell in cells_of(path) if cell.cell_type == "markdown"
        )
        assert 1400 <= words <= 3600

    def test_figures_have_descriptions(self, path):
        for cell in cells_of(path):
            if cell.cell_type == "code" and "plt.show()" in cell.source:
                assert cell.metadata["mystnb"]["image"]["alt"]

    def test_no_notebook_speaks_of_this_machine(self, path):
        assert not re.search(r"/wor[k]/|/roo[t]/", path.read_text(encoding="utf-8"))


class TestEnvironment:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def test_every_pin_has_its_reason(self):
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        block = text[text.index("dependencies = [") : text.index("[tool.setuptools")]
        pins = [line for line in block.splitlines() if line.strip().startswith('"')]
        bare = [
            line
            for line in pins
            if "#" not in line and not re.search(r'"(pytest|hypothesis|ruff|mypy|pyyaml)', line)
        ]
        assert pins and not bare

    def test_the_pins_that_were_promised(self):
        needs = self.project["dependencies"]
        assert "torch>=2.11,<2.14" in needs and "triton>=3.6,<3.8; sys_platform == 'linux'" in needs
        assert self.project["requires-python"] == ">=3.11"
        assert {"gpu", "book", "dev", "fa4", "wandb"} == set(self.project["optional-dependencies"])
        named = {
            "torch",
            "triton",
            "jupyterlab",
            "jupytext",
            "nbconvert",
            "matplotlib",
            "tiktoken",
            "numpy",
            "papermill",
        }
        every = needs + [
            need for extra in self.project["optional-dependencies"].values() for need in extra
        ]
        assert named <= {re.split(r"[<>=;\[ ]", need)[0] for need in every}

    def test_conda_and_docker_install_from_pyproject(self):
        conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
        (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
        docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        for spec in (*pip, *re.findall(r'--editable "?([^"\s]+)', docker)):
            extras = set(re.search(r"\.\[(.*)\]", spec)[1].split(","))
            assert extras <= set(self.project["optional-dependencies"])
        python = next(entry for entry in conda["dependencies"] if str(entry).startswith("python"))
        assert self.project["requires-python"].removeprefix(">=") in python
        pinned = [
            entry
            for entry in conda["dependencies"]
            if isinstance(entry, str) and not entry.startswith("python")
        ]
        assert not any(re.search("[<>=]", entry) for entry in pinned), (
            "versions stand in pyproject.toml"
        )

    def test_the_dockerfile_passes_hadolint(self):
        subprocess.run(["hadolint", str(ROOT / "Dockerfile")], check=True)

    def test_what_is_missing_is_named(self):
        import environment

        assert environment.missing(
            ["torch>=2.11", "no-such-package>=1", "torch<2; python_version < '3'"]
        ) == ["no-such-package>=1"]
        assert environment.missing(["torch>=99"]) == ["torch>=99"]
        with pytest.raises(SystemExit, match="there is no extra"):
            environment.requirements(["nonsense"])


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what make needs, in a folder with a space and a quote in its name, with a stand-in for every script."""
    folder = tmp_path / "it's my repo"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("environment", "old_python"):
        shutil.copy(ROOT / "scripts" / f"{name}.py", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "scripts" / "run_speedrun.py").write_text("import sys; print(sys.argv[1:])")
    return folder


def make(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["make", "-C", str(folder), "--no-print-directory", *words]
    environment = os.environ | {"MAKEFLAGS": "", **variables}
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


def python_that(folder: Path, script: str) -> Path:
    """An executable called python in a folder with a space, which is this shell script."""
    folder = folder / "py dir"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "python").chmod(0o755)
    return folder / "python"


OLD_PYTHONS = [path for version in ("3.6", "3.8", "3.10") for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
class TestMake:
    def test_a_variable_is_one_word_and_args_are_several(self, checkout):
        """Spaces, quotes and dollars in the interpreter, the data folder, the preset; a tilde is the home folder."""
        python = python_that(
            checkout,
            f"""case "$1" in */environment.py|scripts/environment.py) echo "$0" ;; *) exec {sys.executable} "$@" ;; esac""",
        )
        values = {"PRESET": "a b", "GPUS": "1 2", "DATA": "~/it's $$my; data"}
        words = [f"{name}={value}" for name, value in values.items()]
        done = make(checkout, "speedrun", f"PYTHON={python}", *words, "ARGS=--seed 1 'x y'")
        home = os.path.expanduser("~")
        assert ast.literal_eval(done.stdout) == ["--preset", "a b", "--gpus", "1 2", "--data", f"{home}/it's $my; data", "--seed", "1", "x y"]  # fmt: skip

    def test_every_target_quotes_what_is_the_users(self):
        """What a user may set, or a path, never stands bare in a recipe; lists of words are named here."""
        for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines():
            if line.startswith("\t"):
                bare = re.sub(
                    r"\$\(call q,[^)]*\)|\$\(if [^,]*,|\$\(foreach word,\$\(NB\),", "", line
                )
                found = set(re.findall(r"\$\(([A-Z]+)\)", bare))
                assert found <= {"ARGS", "TESTS"}, line

    def test_nothing_needs_a_newer_make(self):
        """macOS has GNU make 3.81: no .ONESHELL, no $(file …), no !=; and its shell lacks -e unless a recipe says so."""
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert not re.search(r"\.ONESHELL|\$\((file|intcmp|let) |!=|::=", text)
        assert "python = set -eu" in text

    @pytest.mark.parametrize("target", ["doctor", "speedrun", "tangle", "tangle-check", "test"])
    @pytest.mark.parametrize("python", OLD_PYTHONS, ids=lambda path: path.parts[-3])
    def test_an_old_python_is_told_so(self, checkout, python, target):
        shutil.copy(ROOT / "scripts" / "tangle.py", checkout / "scripts")
        done = make(checkout, target, f"PYTHON={python}", LC_ALL="C")
        assert done.returncode and "is too old: the project needs 3.11" in done.stderr
        assert "make PYTHON=python3.12" in done.stderr and "Traceback" not in done.stderr

    def test_all_that_an_old_python_reads_is_in_its_grammar(self):
        for name in ("old_python", "environment", "tangle"):
            source = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
            tree = ast.parse(source, feature_version=(3, 6))
            first = next(node for node in tree.body if not isinstance(node, ast.Expr))
            assert name == "old_python" or first.names[0].name == "old_python"


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
class TestInstalling:
    """scripts/environment.py with a pip that only writes down what it is asked."""

    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        """install() on a machine of the given kind → the calls of pip, and what was said."""
        import environment

        def play(capfd, answers="0", config="", system="linux", machine="x86_64", nvidia=None):
            log = tmp_path / "calls"
            log.write_text("")
            python = python_that(
                tmp_path,
                f"""shift 2; echo "$PIP_USER $@" >> "{log}"
case "$1" in config) echo '{config}' ;; index) exit {answers} ;; esac""",
            )
            monkeypatch.setattr(environment.sys, "platform", system)
            monkeypatch.setattr(environment.platform, "machine", lambda: machine)
            monkeypatch.setattr(environment.shutil, "which", lambda name: nvidia)
            monkeypatch.setattr(environment, "DRIVER_FILES", ())
            environment.install(python, ["book"])
            return [line for line in log.read_text().splitlines() if "config" not in line], capfd.readouterr().err  # fmt: skip

        return play

    def test_no_gpu_takes_the_small_build(self, asked, capfd):
        (index, torch, project), said = asked(capfd)
        assert "--retries 0 --timeout 5" in index and "whl/cpu" in index and "torch" in index
        assert "whl/cpu" in torch and "torch>=" in torch and "timeout" not in torch
        assert "--editable" in project and "[book]" in project and "whl/cpu" not in project
        assert "200 MB" in said and all(call.startswith("0 ") for call in (index, torch, project))

    def test_an_index_that_does_not_answer_costs_seconds(self, asked, capfd):
        (index, project), said = asked(capfd, answers="1")
        assert "--editable" in project and "the default index" in said

    def test_an_index_that_hangs_is_given_up(self, tmp_path, monkeypatch):
        import environment

        python = python_that(tmp_path, "exec sleep 60")
        real = subprocess.run
        monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: real(*a, **{**k, "timeout": 0.2}))  # fmt: skip
        assert environment.answers(python, environment.CPU_INDEX) is False

    @pytest.mark.parametrize(
        "case",
        [
            {"config": "global.index-url=https://mirror"},
            {"config": ":env:.find-links=/wheels"},
            {"config": "global.no-index=true"},
            {"system": "darwin", "machine": "arm64"},
            {"machine": "aarch64"},
            {"nvidia": "/usr/bin/nvidia-smi"},
        ],
        ids=str,
    )
    def test_elsewhere_nothing_is_special(self, asked, capfd, case):
        (project,), _ = asked(capfd, **case)
        assert "--editable" in project

    def test_a_venv_that_cannot_be_used_is_left_alone(self, tmp_path, monkeypatch):
        import environment

        folder = tmp_path / ".venv"
        for content in ("exit 1", None):  # of an older Python; of one that was removed
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "bin").mkdir(parents=True)
            python = folder / "bin" / "python"
            if content is None:
                python.symlink_to("/no/such/python")
            else:
                shutil.copy(python_that(tmp_path, content), python)
            monkeypatch.setattr(environment, "ROOT", tmp_path)
            monkeypatch.setattr(environment, "VENV_PYTHON", python)
            with pytest.raises(SystemExit, match="mv .venv .venv-old"):
                environment.make_venv()
            assert os.path.lexists(python)

    def test_half_a_venv_is_not_left_behind(self, tmp_path, monkeypatch):
        """As on Debian without python3-venv, where the folder is made and ensurepip fails."""
        import environment

        script = f'mkdir -p "{tmp_path}/.venv/bin"; echo ensurepip is not available; exit 1'
        monkeypatch.setattr(environment, "ROOT", tmp_path)
        monkeypatch.setattr(environment.sys, "executable", str(python_that(tmp_path, script)))
        with pytest.raises(SystemExit, match="apt-get install python3-venv"):
            environment.make_venv()
        assert not (tmp_path / ".venv").exists()

    def test_ctrl_c_is_no_traceback(self, checkout, tmp_path):
        """While a child works: here is_ours, which asks an interpreter what it imports."""
        package = tmp_path / "slow" / "speedrun"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"open({str(tmp_path / 'there')!r}, 'w').close(); import time; time.sleep(60)")  # fmt: skip
        command = [sys.executable, str(checkout / "scripts" / "environment.py"), "--check"]
        environment = os.environ | {"PYTHONPATH": str(package.parent)}
        live = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "there").exists():
            time.sleep(0.05)
        live.send_signal(signal.SIGINT)
        assert live.communicate(timeout=30)[1] == "" and live.returncode == 130

    def test_without_pip_and_packaging_all_is_missing(self, monkeypatch):
        import environment

        for name in ("packaging.requirements", "pip._vendor.packaging.requirements"):
            monkeypatch.setitem(sys.modules, name, None)
        assert environment.missing(["torch>=2.11"]) == ["torch>=2.11"]


class TestEncodings:
    """Nothing is read, written or shown in whatever encoding happens to be the system's."""

    SCRIPTS = ("ablate", "book", "environment", "execute", "bibliography", "downloads", "exercises", "history_links", "mentions", "toc", "lab/__main__", "lab/contents", "lab/jupyter_config", "lab/kernel_extension", "kernel", "measure", "tangle")  # fmt: skip
    FILES = [ROOT / "scripts" / f"{name}.py" for name in SCRIPTS] + sorted((ROOT / "speedrun" / "lab").glob("*.py"))  # fmt: skip

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
    def test_text_says_its_encoding(self, path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                binary = "b" in "".join(ast.unparse(argument) for argument in node.args[1:2])
                if name in ("read_text", "write_text") or (name == "open" and not binary and getattr(node.func, "id", "")):  # fmt: skip
                    assert "encoding" in given, ast.unparse(node)
                assert "text" not in given or "encoding" in given, ast.unparse(node)

    @pytest.mark.parametrize("script", ["ablate", "execute", "tangle"])
    def test_help_is_shown_where_the_console_lacks_signs(self, script):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0 and b"usage" in done.stdout and not done.stderr

    @pytest.mark.parametrize(
        "script",
        ["ablate", "execute", "measure", "book", "downloads", "exercises", "toc", "lab/__main__"],
    )
    def test_every_script_goes_through_the_one_door(self, script):
        text = (ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8")
        assert "sys.exit(run_main(" in text and "except UserError" not in text


class TestKernel:
    def test_it_is_this_python_whatever_else_is_called_python3(self, tmp_path, monkeypatch):
        from jupyter_client.kernelspec import KernelSpecManager
        from kernel import own_kernel

        foreign = tmp_path / "foreign" / "kernels" / "python3"
        foreign.mkdir(parents=True)
        spec = {"argv": ["/usr/bin/false"], "display_name": "P", "language": "python"}
        (foreign / "kernel.json").write_text(json.dumps(spec))
        monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
        assert KernelSpecManager().get_kernel_spec("python3").argv == ["/usr/bin/false"]
        monkeypatch.chdir(tmp_path)
        given = own_kernel(Path("ours"))
        assert given["JUPYTER_PATH"].split(os.pathsep)[1:] == [str(tmp_path / "foreign")]
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir("/")
        argv = KernelSpecManager().get_kernel_spec("python3").argv
        assert argv[0] == sys.executable and "--log-level=CRITICAL" in argv

    def test_papermill_takes_it_and_it_is_quiet(self, tmp_path, monkeypatch):
        import nbformat
        from kernel import own_kernel

        code = "import sys; print(sys.executable)"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "P", "language": "python"}  # fmt: skip
        nbformat.write(notebook, tmp_path / "in.ipynb")
        startup = tmp_path / "home" / ".ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "mine.py").write_text("import sys; sys.executable = 'somebody elses'")
        environment = os.environ | {"HOME": str(tmp_path / "home"), **own_kernel(tmp_path / "j")}
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "encryption" not in done.stderr, done.stderr
        (cell,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
        assert cell.outputs[0].text.strip() == sys.executable


class TestMessages:
    """The troubleshooting page and the messages in the code, held together in both directions."""

    page = (ROOT / "book" / "troubleshooting.md").read_text(encoding="utf-8")

    @staticmethod
    def messages() -> dict[str, str]:
        """First constant words of every UserError that the package raises → the module."""
        found = {}
        for module in MODULES:
            tree = ast.parse(source_of(module))
            named = {}
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Assign)
                    and len(node.targets) == 1
                    and isinstance(node.targets[0], ast.Name)
                ):
                    named.setdefault(node.targets[0].id, []).append(node.value)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                    "UserError",
                    "bad_shard",
                ):
                    value = node.args[-1] if node.func.id == "bad_shard" else node.args[0]
                    for text in named.get(value.id, []) if isinstance(value, ast.Name) else [value]:
                        parts = [
                            p.value
                            for p in ast.walk(text)
                            if isinstance(p, ast.Constant) and isinstance(p.value, str)
                        ]
                        words = max((part.strip(" :,.“”()") for part in parts), key=len, default="")
                        if len(words) > 7:
                            found[words] = module
        return found

    def test_every_message_is_explained(self):
        missing = {
            words: module for words, module in self.messages().items() if words not in self.page
        }
        assert not missing

    def test_every_entry_is_a_message(self):
        code = [
            node.value
            for module in MODULES
            for node in ast.walk(ast.parse(source_of(module)))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        for heading in re.findall(r"^### (.*)$", self.page, re.MULTILINE):
            key = heading.strip("`")
            assert any(key in text for text in code), f"nothing in the code says “{key}”"

    def test_symptoms_lead_to_the_entries(self):
        """The page begins with a list of symptoms; each leads to a section that has words and entries."""
        before, *sections = re.split(r"^## ", self.page, flags=re.MULTILINE)
        titles = [section.partition("\n")[0] for section in sections]
        listed = re.findall(r"\| \[(.*)\]\(#(.*)\) \|", before)
        assert [title for title, _ in listed] == titles
        for title, anchor in listed:
            assert anchor == re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for symptom in ("driver", "NCCL", "Slurm", "Out of memory", "NaN", "hang", "download", "compiler"):  # fmt: skip
            assert any(symptom in title for title in titles), symptom
        for section in sections:
            text, *entries = re.split(r"^### .*$", section, flags=re.MULTILINE)
            assert entries and all(len(entry.split()) > 4 for entry in [text, *entries]), text


class TestContents:
    """One table, book/contents.csv, from which the list in the README, the first page and the sidebar are made."""

    def test_every_chapter_has_a_row_with_words(self):
        import toc

        rows = toc.contents()
        assert [row.slug for row in rows if row.slug] == sorted(path.stem for path in NOTEBOOKS)
        assert all(row.words and row.part and row.title for row in rows)
        assert all(row.question.endswith("?") for row in rows if row.slug)
        words = [word.lower() for row in rows for word in row.words]
        assert len(words) == len(set(words)), "a word leads to one chapter"
        assert not any(set(word) & set(",|`*[]!") for word in words), "they are an index directive"

    def test_the_readme_has_todays_list(self):
        import toc

        text = (ROOT / "README.md").read_text(encoding="utf-8")
        assert toc.with_list(text) == text, "python scripts/toc.py writes it"

    def test_it_says_what_is_missing(self, monkeypatch, tmp_path):
        import toc

        from speedrun.lab.errors import UserError

        for folder in ("book", "notebooks"):
            (tmp_path / folder).mkdir()
        (tmp_path / "notebooks" / "06_rotary.py").write_text("# %% [markdown]\n# # Rotary\n", encoding="utf-8")  # fmt: skip
        monkeypatch.setattr(toc, "root", lambda: tmp_path)
        head = "number,part,title,records,words,question\n"
        for rows, said in {
            "05,A,Block,,norm,\n": "has no row for chapter 06",
            "06,A,,,RoPE,Where?\n07,A,,,skip,\n": "chapter 07 has neither a notebook nor a title",
        }.items():
            (tmp_path / "book" / "contents.csv").write_text(head + rows, encoding="utf-8")
            with pytest.raises(UserError, match=said):
                toc.contents.__wrapped__()
        (tmp_path / "book" / "contents.csv").write_text(head + "06,A,,2 17,RoPE; rotary,Where?\n07,A,Skips,,skip,\n", encoding="utf-8")  # fmt: skip
        written, planned = toc.contents.__wrapped__()
        assert written.heading == "06 · Rotary" and written.slug == "06_rotary"
        assert written.words == ("RoPE", "rotary") and written.records == (2, 17)
        assert planned.title == "Skips" and not planned.slug


class TestMentions:
    """What a page says of chapters, records and people becomes links when the book is built."""

    @pytest.mark.parametrize(
        "text, found",
        {
            "see chapter 13's grid": ["chapter 13"],
            "chapters 05 to 08 change": ["chapters 05", "08"],
            "records 5, 8 and 9 cost 30 s": ["records 5", "8", "9"],
            "Record 4 (Keller Jordan), 13 (@fernbear.bsky.social).": ["Record 4", "13", "@fernbear.bsky.social"],
            "records 1–21 halved": ["records 1", "21"],
            "record 89: 1,285 steps": ["record 89"],
            "records 35 to 80, then 10": ["records 35", "80"],
            "record 31 and 40% less": ["record 31"],
            "in 2024 a record of 12 minutes": [],
            "by @leloykun, @dualverse-ai.": ["@leloykun", "@dualverse-ai"],
        }.items(),
    )  # fmt: skip
    def test_they_are_found(self, text, found):
        from mentions import mentions

        assert [text[begin:end] for begin, end, *_ in mentions(text)] == found

    def test_every_record_and_every_person_has_a_place(self):
        import history_links

        named = {name for row in history_links.records().values() for name in history_links.PERSON.findall(row["contributors"])}  # fmt: skip
        assert sorted(history_links.records()) == list(range(1, 93))
        assert named <= set(history_links.people())
        assert history_links.pull_request(history_links.records()[31]).endswith("/pull/122")
        assert history_links.folder(history_links.records()[31]).endswith("/2025-09-10_Yarn")


def test_every_contributor_is_credited():
    from speedrun.lab.results import public_table

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == "MIT" and any(
        "modded-nanogpt" in str(ref) for ref in citation["references"]
    )
    names = {
        n for row in public_table("records") for n in re.findall(r"@[\w.-]+", row["contributors"])
    }
    import book

    table = book.records_table().replace("&#64;", "@")
    assert all(name in table for name in names)


def test_only_text_is_tracked():
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True
    ).stdout.splitlines()
    assert not [path for path in tracked if path.endswith((".ipynb", ".bin", ".safetensors"))]


class TestReadme:
    """The numbers on the front page are those of the committed results."""

    text = (ROOT / "README.md").read_text(encoding="utf-8")

    @staticmethod
    def runs(name: str) -> list[dict]:
        from speedrun.lab.results import load_result

        return load_result("speedrun", name)["data"]["runs"]

    def test_the_laptops_run(self):
        import math

        (run,) = self.runs("cpu")
        loss = run["curve"][-1]["val_loss"]
        nats = loss / run["bytes_per_token"]
        assert nats <= 1.0, "the aim of the five-minute run"
        (gpt2,) = self.runs("cpu_gpt2")
        before = gpt2["curve"][-1]["val_loss"] / gpt2["bytes_per_token"]
        minutes = f"{gpt2['seconds'] / 60:.1f} minutes"
        assert f"(`cpu_gpt2`): {before:.2f} nats a byte after {minutes}" in self.text
        assert f"a {run['parameters'] / 1e6:.2f}M-parameter GPT" in self.text
        assert f"{loss:.2f} nats a token" in self.text and f"{nats:.2f} nats a byte" in self.text
        assert f"{nats / math.log(2):.2f} bits a byte" in self.text
        assert f"{run['seconds'] / 60:.1f} minutes of training" in self.text

    def test_muons_lead(self):
        from statistics import mean

        from speedrun.lab.results import load_result

        clock, won = (load_result("newton_schulz", name)["data"]["arms"] for name in ("clock", "winners"))  # fmt: skip
        adamw, muon = (mean(run["val_loss"] for run in runs) for runs in (clock["adamw"], won["muon"]))  # fmt: skip
        assert f"{adamw - muon:.2f} nats a token lower with Muon" in self.text
        best = won["muon"][0]["config"]
        assert (
            f"--optim.matrix-lr {best['optim']['matrix_lr']} --optim.adam.lr {best['optim']['adam']['lr']} "
            in self.text
        )

    def test_the_gpu_runs(self):
        from speedrun.launch import memory_needed_gb

        for name in ("small_gpt2_muon", "small_gpt2_adamw"):
            runs = self.runs(name)
            losses = ", ".join(f"{run['curve'][-1]['val_loss']:.3f}" for run in runs)
            (line,) = [line for line in self.text.splitlines() if losses in line]
            assert f"| {runs[0]['seconds']:.0f} s | {runs[0]['steps_ms'][49]:.0f} ms |" in line
            assert runs[0]["config"]["steps"] == preset("small_gpt2").steps
        (row,) = [line for line in self.text.splitlines() if line.startswith("| one NVIDIA GPU")]
        small = self.runs("small")
        assert all(f"{run['curve'][-1]['val_loss']:.3f}" in row for run in small)
        assert f"{small[0]['seconds']:.0f} s" in row
        assert f"{small[0]['memory_mb']['reserved'] / 1024:.0f} GB" in row
        for name, run in (("small_gpt2", self.runs("small_gpt2_muon")[0]), ("small", small[0])):
            then, now = config_from_json(run["config"]), preset(name)
            assert (then.model, then.optim, then.schedule) == (now.model, now.optim, now.schedule)
        for run in [self.runs(f"record1_{n}gpu")[0] for n in (1, 2)]:
            withdrawn = f"{run['curve'][-1]['val_loss']:.3f}"  # pytorch#193061, chapter 16
            assert withdrawn not in self.text
            assert f"{1000 * run['seconds'] / run['step']:,.0f} ms" in self.text
        names = (
            "record_200m",
            "record_200m_sampled",
            "record_200m_fp8_head",
            "record_200m_plain_head",
            "record_200m_4gpu",
        )
        runs = [run for name in names for run in self.runs(name)]
        whole, second, *_ = runs
        assert f"{memory_needed_gb('record', runs):.0f} GB" in self.text
        for run in runs:
            assert f"{run['curve'][-1]['val_loss']:.3f} after {run['seconds']:.0f} s" in self.text
        loss_of = {name: [r["curve"][-1]["val_loss"] for r in self.runs(name)] for name in names}
        mean = {name: sum(values) / len(values) for name, values in loss_of.items()}
        took = {name: sum(r["seconds"] for r in self.runs(name)) for name in names}
        shorter = 1 - took["record_200m"] / took["record_200m_plain_head"]
        lost = mean["record_200m"] - mean["record_200m_plain_head"]
        assert f"the time fell by {shorter:.0%}, for six thousandths of a nat" in self.text
        assert round(1000 * lost) == 6
        two, four = loss_of["record_200m_plain_head"], loss_of["record_200m_4gpu"]
        worlds = max(abs(a - b) for a, b in zip(two, four))
        seeds = max(abs(a - b) for a, b in (two, four))
        assert f"at most {worlds:.4f}; two seeds differ by up to {seeds:.4f}" in self.text
        then, now = config_from_json(whole["config"]), preset("record_200m")
        assert (then.model, then.optim, then.schedule) == (now.model, now.optim, now.schedule)
        predicted = f"in {self.least():.0f} to {self.most():.0f} s"
        assert f"{predicted} on eight H200s" in self.text
        assert f"{2 * whole['seconds'] / 3600:.2f} hours of one GPU" in self.text
        intro = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
        ends = [run["curve"][-1]["val_loss"] for run in (whole, second)]
        on_two = f"{ends[0]:.3f} and {ends[1]:.3f} after {whole['seconds']:.0f} s on two H200s"
        assert on_two in intro and predicted in intro
        assert f"{whole['parameters'] / 1e6:.0f} million parameters" in intro
        assert f"{preset('record').steps:,} steps" in self.text

    def longer(self) -> float:
        """By how much more `record` reads than `record_200m`."""
        plans = [(schedule_of(run), run.steps) for run in map(preset, ("record", "record_200m"))]
        read, before = (plan.tokens_before(steps) for plan, steps in plans)
        return read / before

    def saved(self) -> float:
        """Seconds that head, MLP, and norm and rotary save `record` on eight GPUs: a quarter of what they save on two."""
        from statistics import mean

        names = ("record_200m_plain_head", "record_200m")
        before, since = (mean(run["seconds"] for run in self.runs(name)) for name in names)
        return (before - since) * self.longer() / 4

    def least(self) -> float:
        """Seconds for `record` on eight GPUs, if they are twice as fast as four."""
        return self.runs("record_200m_4gpu")[0]["seconds"] * self.longer() / 2 - self.saved()

    def most(self) -> float:
        """The same, if what does not shrink from two GPUs to four does not shrink again."""
        from statistics import median

        from speedrun.lab.results import load_result

        found = [load_result("many_gpus", f"run_{w}")["data"]["stages"] for w in (2, 4)]
        pairs = [[median(stage["ms"]) for stage in pair] for pair in zip(*found)]
        steps = preset("record").steps / len(pairs)
        return sum(four - (two - four) / 2 for two, four in pairs) * steps / 1000 - self.saved()

    def test_muon_is_there_sooner(self):
        from statistics import mean

        curves = {
            n: [run["curve"] for run in self.runs(f"small_gpt2_{n}")] for n in ("adamw", "muon")
        }
        end = mean(curve[-1]["val_loss"] for curve in curves["adamw"])
        shares = []
        for key in ("step", "train_time_ms"):
            there = []
            for curve in curves["muon"]:
                a, b = next((a, b) for a, b in zip(curve, curve[1:]) if b["val_loss"] <= end)
                way = (a["val_loss"] - end) / (a["val_loss"] - b["val_loss"])
                there.append(a[key] + way * (b[key] - a[key]))
            shares.append(mean(there) / curves["adamw"][0][-1][key])
        steps, time = shares
        assert f"after {steps:.0%} of the steps and {time:.0%} of the time" in self.text

    def test_no_placeholder_is_left(self):
        assert not re.search(r"@\w+@", self.text)

    def test_its_commands_exist(self):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in set(re.findall(r"\bmake ([a-z-]+)", self.text)) - {"is"}:
            assert f"\n{target}:" in makefile, target
        for path in re.findall(r"\]\(((?:notebooks|book|CONTRIBUTING)[^)#]*)\)", self.text):
            assert (ROOT / path).exists(), path


def test_every_text_in_notebooks_is_a_chapter():
    """Others would be left out of the package and of the book, silently."""
    from tangle import chapter_paths

    assert NOTEBOOKS and chapter_paths(ROOT) == NOTEBOOKS


TERMS = ["resid_lambdas", "x0_lambdas", "lr_mul", "wd_mul", "softcap", "lm_head", "qk_bank", "vo_bank", "mlp_bank", "max_seq_len", "block_size", "grad_accum_steps", "device_batch_size", "cooldown_frac", "warmdown_ratio", "exp_avg", "exp_avg_sq", "momentum_buffer", "world_size", "ReLU²", "QK-norm", "NorMuon", "RoPE", "YaRN", "ZeRO", "FlexAttention", "FlashAttention", "smear", "backout", "mantissa", "untie"]  # fmt: skip
TERMS += ["batch size", "learning rate", "weight decay", "weight tying", "gradient accumulation"]
TERMS += ["logit softcap", "value embedding", "Polar Express", "Newton–Schulz", "CUDA graph"]
TERMS += [
    "cautious weight decay",
    "document mask",
    "sliding window",
    "reduce-scatter",
    "all-gather",
]
TERMS += ["bits per byte", "Gram Newton–Schulz", "micro-batch", "U-net", "perplexity"]


@functools.cache
def texts_used() -> dict[str, str]:
    """Every module of the package and every chapter, by its name."""
    paths = [*NOTEBOOKS, *(ROOT / "speedrun").rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


@functools.cache
def names_used() -> dict[str, list[str]]:
    """Every identifier of the package and the chapters, and the files that have it."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, text in texts_used().items():
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        for name in {token.string for token in tokens if token.type == tokenize.NAME}:
            found[name].append(path)
    return found


def where(ours: str) -> list[str]:
    """The files in which a word is an identifier; of what is no word but a pattern, those that it is found in."""
    if ours.isidentifier():
        return names_used().get(ours, [])
    return [path for path, text in texts_used().items() if re.search(ours, text, re.MULTILINE)]


@functools.cache
def book_text() -> str:
    """All chapters, in lower case."""
    return "\n".join(path.read_text(encoding="utf-8") for path in NOTEBOOKS).lower()


ORDINARY = {"chance", "deviation"}  # which a cell may call something else


class TestFieldsWords:
    @pytest.mark.parametrize("words", ["CODE_WORDS", "UPSTREAM_WORDS"])
    def test_a_retired_name_does_not_come_back(self, words):
        """A word, as an identifier: prose may use it. A pattern, anywhere."""
        import migrate

        for ours, new in getattr(migrate, words).items():
            found = where(ours)
            if ours in ORDINARY:
                found = [path for path in found if path.startswith("speedrun")]
            assert not found, f"{found[0]}: {ours} is now {new}"

    @pytest.mark.parametrize("term", TERMS)
    def test_whoever_searches_for_the_fields_word_finds_it(self, term):
        assert term.lower() in book_text()


class TestPagesOfTheBook:
    """What scripts/book.py makes of an executed chapter."""

    def test_solutions_and_bare_assertions_are_folded_under_a_word(self):
        from nbformat.v4 import new_code_cell, new_notebook

        import book

        sources = {
            "rows = table()\nprint(rows)": "",
            "assert 2**25 == 33_554_432": "Check",
            "#| export\ndef f(): ...": "",
            "assert f() is None": "",
            "assert f() == f(), 'behind an exported cell, all that follow at once'": "",
            "def answer(): ...": "Solution",
            "assert answer() is None, 'the grade'": "",
            "x = 1": "",
            "assert x == 1\nassert x != 2": "Check",
        }
        cells = [new_code_cell(source) for source in sources]
        cells[5].metadata["tags"] = ["solution"]
        notebook = new_notebook(cells=cells)
        book.fold_cells(notebook)
        for cell, label in zip(notebook.cells, sources.values()):
            assert ("hide-cell" in cell.metadata.get("tags", [])) == bool(label), cell.source
            assert cell.metadata.get("mystnb", {}).get("code_prompt_show", "") == label

    def test_provenance_is_one_line(self, monkeypatch):
        import book

        facts = {"cores": 2, "date": "2026-11-30T01:02:03", "seconds": 7.6, "state": {"device": "cpu", "versions": {"torch": "2.11"}}}  # fmt: skip
        monkeypatch.setattr(book, "results_of", lambda facts: [])
        shown = book.provenance_of(facts)
        assert "page executed 2026-11-30 in 8 s on 2 CPU cores, torch 2.11" in shown
        stamp = {"gpu": "", "cpu": "a CPU", "torch": "2.11", "date": "2026-11-01"}
        found = [(f"a/{name}", {"stamp": stamp, "kind": name}) for name in ("fresh", "stale", "old")]  # fmt: skip
        monkeypatch.setattr(book, "results_of", lambda facts: found)
        monkeypatch.setattr(book, "freshness", lambda result: {"old": "stale"}.get(result["kind"], result["kind"]))  # fmt: skip
        first, *rest = book.provenance_of(facts).split("\n")
        assert first == ":::{dropdown} page executed 2026-11-30 · 3 measurements: 1 fresh, 2 stale"
        assert sum(line.startswith("- ") for line in rest) == 2 and rest[-1] == ":::"

    def test_a_table_that_a_cell_shows_has_the_books_class(self):
        from nbformat.v4 import new_code_cell, new_output

        import book

        html = "<table><tr></tr></table><table border=1 class='x'></table>"
        shown = new_output("display_data", data={"text/html": html})
        cell = new_code_cell("show()", outputs=[shown])
        book.with_table_class(cell)
        assert cell.outputs[0].data["text/html"].count("table") == 5
        assert cell.outputs[0].data["text/html"].startswith('<table class="table">')
