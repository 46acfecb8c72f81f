"""The environment variable: no change to the script, in any kind of process; what is said if nothing came of it."""

from __future__ import annotations

import os
import py_compile
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from conftest import require_host

import lwpf_patch
from lwpf_patch.settings import PATCH, VARIABLES

USE = """
import timm, torch
from timm.models.vision_transformer import VisionTransformer
model = VisionTransformer(img_size=16, patch_size=4, num_classes=5, embed_dim=24, depth=1, num_heads=3)
model(torch.randn(1, 3, 16, 16))
print(getattr(model.blocks[0].attn, "func_d", None))
"""


def test_the_package_alone_imports_no_torch(python):
    out = python(
        "-c", "import sys, lwpf_patch; lwpf_patch.apply('timm'); lwpf_patch.status(); print('torch' in sys.modules)"
    )
    assert out.stdout.strip() == "False"


def test_no_setting_has_torch_loaded_at_start_up(python):
    """A variable is read by every interpreter that is started, most of which do not train."""
    given = {"SEP": "entmax15", "MASKING": "paper", "BACKEND": "cpu", "VERIFY": "off", "INCLUDE": "*Attention",
             "EXCLUDE": "*Rope", "EXCLUDE_MODELS": "teacher", "PARTIAL": "error", "COMPAT": "off",
             "FUNC_D": "pfu:mu=0.5", "UNPICKLE": "patch", "OBSERVE": "every=7"}  # fmt: skip
    each_alone = {"UHOP": "on", "BLOCKS": "6-"}  # they do not go together
    names = {f"LWPF_{name}" for name in given | each_alone}
    assert names == {each.variable for each in VARIABLES} - {PATCH.variable}
    heavy = ("torch", "entmax", "timm", "wrapt", "numpy")
    for name, text in each_alone.items():
        out = python(
            "-c", f"import sys; print([name for name in {heavy} if name in sys.modules], 'lwpf_patch' in sys.modules)",
            LWPF_PATCH="timm", **{f"LWPF_{name}": text for name, text in (given | {name: text}).items()},
        )  # fmt: skip
        assert out.stdout.strip() == "[] True"


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="before PyTorch 2.8 vmap loads the compiler")
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_process_that_compiles_nothing_loads_no_compiler(python, backend):
    """torch._dynamo, which brings SymPy and Triton, takes 2 s and 150 MB; hflayers and DeepRC do without it."""
    code = f"""
import sys, torch
import lwpf_patch, lwpf_patch.uhop
query = torch.randn(2, 8, 4, requires_grad=True)
for func_d, sep in (("relu", "softmax"), ("pfu", "softmax_n"), ("none", "softmax")):
    out = lwpf_patch.lwpf_attention(query, query, query, func_d=func_d, sep=sep, backend={backend!r})
    out.sum().backward()
phi = lwpf_patch.FeatureMap(4)
phi.separate(torch.randn(9, 4), iters=3)
print([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules])
"""
    code = code.replace('("none", "softmax")', "") if backend == "cpu" else code
    assert python(code=code).stdout.strip() == "[]"


def test_unset_nothing_of_ours_is_loaded(python):
    out = python("-c", "import sys; print([name for name in sys.modules if 'lwpf' in name])")
    assert out.stdout.strip() == "[]"


def test_an_unmodified_script_is_patched(python):
    whole = {"PYTHONPATH": ""}  # of timm
    assert python(code=USE, **whole).stdout.strip() == "None"
    out = python(code=USE, LWPF_PATCH="timm", **whole)
    assert out.stdout.strip() == "ReLU()"
    line, backend = out.stderr.strip().splitlines()
    assert line.startswith("lwpf_patch: timm 1.")
    assert backend == "lwpf_patch: timm: attention is computed by backend eager: there are few scores"
    assert "classes (lwpf status lists them) patched; func_d relu, masking exclude, backend auto" in line


@pytest.mark.drawn(days=3)
def test_the_settings_in_variables(python):
    variables = dict(
        LWPF_PATCH=" timm ", LWPF_FUNC_D="pfu:mu=0.5,bias=0,sigma=0", LWPF_MASKING="paper", LWPF_BACKEND="eager"
    )
    out = python(code=USE, **variables)
    assert out.stdout.strip() == "PFU(mu=0.5, bias=0.0, sigma=0.0, masking=paper, backend=eager)"
    assert python(code=USE, LWPF_PATCH="timm", LWPF_INCLUDE="*Rope").stdout.strip() == "None"
    assert python(code=USE, LWPF_PATCH="timm", LWPF_EXCLUDE="*Rope").stdout.strip() == "ReLU()"


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize("flag", ["-I", "-O", "-X dev"])
def test_flags_of_the_interpreter(python, flag):
    out = python(*flag.split(), "-W", "ignore", "-c", USE, LWPF_PATCH="timm")
    assert out.stdout.strip() == "ReLU()"


@pytest.mark.drawn(days=2)
def test_standard_input_as_script(python):
    assert python("-", input=USE, LWPF_PATCH="timm").stdout.strip() == "ReLU()"


@pytest.mark.drawn(cases=1)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_processes(python, method):
    code = f"""
import multiprocessing

def work(queue):
    import timm.layers
    queue.put(repr(timm.layers.Attention(12, num_heads=3).func_d))

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
    import torch, timm.layers
    timm.layers.Attention(12, num_heads=3)(torch.randn(1, 2, 12))
"""
    out = python(code=code, LWPF_PATCH="timm")
    assert out.stdout.strip() == "ReLU()"
    assert out.stderr.count("patched; func_d") == 1
    assert "nothing ran" not in out.stderr


@pytest.mark.drawn(days=2)
def test_under_torchrun(python, tmp_path):
    (tmp_path / "train.py").write_text(USE)
    out = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py", LWPF_PATCH="timm"
    )  # fmt: skip
    assert out.stdout.count("ReLU()") == 2
    assert out.stderr.count("patched; func_d") == 1  # rank 0 speaks
    assert "nothing ran" not in out.stderr


WRONG = [
    (dict(LWPF_PATCH="tim"), r"unknown host 'tim' (from LWPF_PATCH): allowed are", "did you mean 'timm'"),
    (dict(LWPF_PATCH="timm", LWPF_FUNC_D="reul"), "unknown func_d 'reul' (from LWPF_FUNC_D)", "did you mean 'relu'"),
    (dict(LWPF_PATCH="timm", LWPF_FUNC_D="pfu:mu=x"), "mu='x' in 'pfu:mu=x' (from LWPF_FUNC_D)", "or 'dmedian'"),
    (dict(LWPF_PATCH="timm", LWPF_MASKING="no"), "unknown masking 'no' (from LWPF_MASKING)", "exclude, paper"),
    (dict(LWPF_PATCH="timm", LWPF_BACKEND="gpu"), "unknown backend 'gpu' (from LWPF_BACKEND)", "auto, cpu, eager"),
    (dict(LWPF_PATCH="timm", LWPF_INCLUDE="*none*"), "include pattern '*none*' (from LWPF_INCLUDE)", "its sites are"),
    (dict(LWPF_PACTH="timm"), "unknown variable 'LWPF_PACTH' (from the environment)", "did you mean 'LWPF_PATCH'"),
    (dict(LWPF_FUNC_D="relu"), "LWPF_FUNC_D is set but LWPF_PATCH is not", "unset LWPF_FUNC_D"),
]


@pytest.mark.parametrize(("variables", "message", "advice"), WRONG)
@pytest.mark.parametrize("library", ["torch", "timm"])
def test_a_wrong_request_stops_the_script(python, library, variables, message, advice):
    code = f"""
print("started")
try:
    import {library}
except ImportError:
    pass
print("went on")
"""
    out = python(code=code, check=False, **variables)
    assert out.returncode == 1
    assert out.stdout.strip() == "started"
    assert message in out.stderr
    assert advice in out.stderr


def test_a_host_that_is_not_installed(python, tmp_path):
    code = """
import importlib.util, lwpf_patch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "timm" else find_spec(name, *more)
lwpf_patch.apply("timm")
"""
    out = python(code=code, check=False)
    assert out.returncode == 1
    assert "timm was asked to be patched, but it is not installed here: pip install timm" in out.stderr


def test_a_version_without_the_sites(python, tmp_path):
    package = tmp_path / "fake" / "timm"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").write_text("from .layers import attention\n__version__ = '9.9'\n")
    (package / "layers" / "__init__.py").write_text("")
    (package / "layers" / "attention.py").write_text("class Attention:\n    def forward(self, x):\n        return x\n")
    out = python(
        "-c", "import timm; print('went on')", check=False, LWPF_PATCH="timm", PYTHONPATH=str(tmp_path / "fake")
    )
    assert out.returncode == 1
    assert "went on" not in out.stdout
    assert "timm.layers.attention.Attention.forward cannot be patched" in out.stderr
    assert "attention.py:2 has no softmax over keys" in out.stderr
    (package / "layers" / "attention.py").write_text("")
    out = python(
        "-c", "import timm; print('went on')", check=False, LWPF_PATCH="timm", PYTHONPATH=str(tmp_path / "fake")
    )
    assert out.returncode == 1
    assert "has no Attention.forward in timm.layers.attention or timm.models.vision_transformer" in out.stderr


@pytest.mark.drawn(days=3)
def test_a_request_without_effect_is_reported_at_exit(python):
    code = "import timm, torch; timm.create_model('test_resnet')(torch.randn(2, 3, 64, 64))"
    message = (
        "timm was patched, but no patched forward was ever called: nothing ran with partial forgetting. The model uses "
        r"none of its \d+ classes \(lwpf status lists them\)"
    )
    assert re.search(message, python("-c", code, LWPF_PATCH="timm").stderr.splitlines()[-1])
    assert "nothing ran" not in python("-c", code, LWPF_PATCH="timm", RANK="1").stderr


@pytest.mark.drawn(days=3)
def test_nothing_is_reported_after_a_traceback(python):
    out = python("-c", "import timm, torch; torch.nn.ReLU()(torch.ones(1)); 1 / 0", check=False, LWPF_PATCH="timm")
    assert out.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.drawn(days=2, cases=1)
@pytest.mark.parametrize("way", ["torch.compile(model, backend='eager')", "torch.jit.script(model)"])
def test_compiled_models_count_as_called(python, way):
    code = USE.replace("model(torch", f"model = {way}\nmodel(torch").replace("print(", "(")
    assert "nothing ran" not in python(code=code, LWPF_PATCH="timm").stderr


def test_the_line_goes_to_the_log_of_a_script_that_has_one(python):
    code = "import logging; logging.basicConfig(format='LOG %(levelname)s %(message)s', level='INFO')\n" + USE
    out = python(code=code, LWPF_PATCH="timm")
    line, backend = out.stderr.strip().splitlines()
    assert line.startswith("LOG INFO lwpf_patch: timm 1.")
    assert backend.startswith("LOG INFO lwpf_patch: timm: attention is computed by backend ")


@pytest.mark.drawn(days=2)
def test_apply_before_and_after_the_import(python):
    before = "import lwpf_patch; lwpf_patch.apply('timm', func_d=lwpf_patch.PFU())\n"
    assert python(code=before + USE).stdout.strip() == "PFU(mu=dmedian, bias=mu, sigma=0.01)"
    within = "import timm.layers\n" + before + "from timm.layers.attention import Attention\n"
    assert python(code=within + USE).stdout.strip() == "PFU(mu=dmedian, bias=mu, sigma=0.01)"
    reverted = before + "lwpf_patch.revert()\n"
    assert python(code=reverted + USE).stdout.strip() == "None"


# --- where hosts lie ------------------------------------------------------------------------------------------------

#: Prints which hflayers this is, and the func_d that it computes with.
USE_HFLAYERS = """
import os, hflayers, torch
from hflayers.activation import HopfieldCore
x = torch.randn(3, 1, 8)
core = HopfieldCore(embed_dim=8, num_heads=2)
core(x, x, x)
print(os.path.dirname(hflayers.__file__), core.func_d)
"""


def test_the_shims_of_a_host_without_its_requirements(python):
    """`doctor` and `status()` tell about DeepRC where neither NumPy nor pandas, which it requires, are installed."""
    code = """
import sys
from importlib import metadata

def version(name, _version=metadata.version):
    if name in ("numpy", "pandas"):
        raise metadata.PackageNotFoundError(name)
    return _version(name)

metadata.version = version
sys.modules.update(numpy=None, pandas=None)
import lwpf_patch
from lwpf_patch.settings import PATCH, VARIABLES
lwpf_patch.apply("deeprc")
print([shim["state"] for shim in lwpf_patch.status()["hosts"]["deeprc"]["shims"]])
"""
    needed = "waiting for its import"
    assert python(code=code).stdout.strip() == str(["not needed", "not needed", needed, needed])


def _folder(name: str) -> Path:
    require_host(name)
    return Path(__import__(name).__file__).parent


@pytest.fixture(scope="module")
def without_hosts(tmp_path_factory):
    """Runs an interpreter whose environment has everything but the hosts, of which it has the metadata alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for place in (Path(p) for p in sys.path if p.endswith("site-packages")):
        for entry in place.iterdir():
            if entry.name not in ("timm", "hflayers", "deeprc", "lwpf_patch") and entry.suffix != ".pth":
                target = site_packages / entry.name
                if not target.exists():
                    target.symlink_to(entry)
    package = Path(lwpf_patch.__file__).parent
    (site_packages / "lwpf_patch").symlink_to(package)
    shutil.copy(package / "lwpf_patch.pth", site_packages)

    def run(*arguments, cwd, check=True, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")}
        result = subprocess.run(
            [folder / "bin" / "python", *arguments], cwd=cwd, capture_output=True, text=True,
            env=environment | {"OMP_NUM_THREADS": "1", **variables},
        )  # fmt: skip
        assert not check or result.returncode == 0, result.stderr
        return result

    return run


@pytest.mark.drawn(days=2)
def test_a_host_beside_the_script(without_hosts, tmp_path):
    """The folder of the script comes on sys.path after the start-up hook has run."""
    shutil.copytree(_folder("hflayers"), tmp_path / "hflayers")
    (tmp_path / "train.py").write_text(USE_HFLAYERS)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(USE_HFLAYERS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ways = [
        (["../train.py"], elsewhere, {"LWPF_PATCH": "hflayers"}),
        (["-m", "lwpf_patch", "run", "--patch", "hflayers", "../train.py"], elsewhere, {}),
        (["-m", "lwpf_patch", "run", "--patch", "hflayers", "-m", "package.train"], tmp_path, {}),
    ]
    for arguments, folder, variables in ways:
        out = without_hosts(*arguments, cwd=folder, **variables)
        assert out.stdout.splitlines()[-1] == f"{tmp_path / 'hflayers'} ReLU()"
        # The metadata of an installed hflayers say nothing about these files.
        line = out.stderr.splitlines()[0]
        assert line.startswith(f"lwpf_patch: hflayers of unknown version at {tmp_path / 'hflayers'}: hopfield_core")
    doctor = without_hosts("-m", "lwpf_patch", "doctor", cwd=elsewhere)
    assert "hflayers: LWPF_PATCH=hflayers takes effect in a new interpreter" in doctor.stdout
    assert "a copy beside a script is patched when the script imports it" in doctor.stdout


@pytest.mark.drawn(days=2)
def test_a_host_that_nobody_finds(without_hosts, tmp_path):
    """An import stops the script, whatever it catches; a question whether it is there is answered."""
    (tmp_path / "ask.py").write_text(
        "import importlib.util\n"
        "print(importlib.util.find_spec('timm'))\n"
        "try:\n    importlib.util.find_spec('timm.layers')\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        "import torch\ntorch.nn.Linear(2, 2)(torch.zeros(2))\n"
    )
    (tmp_path / "try.py").write_text("try:\n    import timm.layers\nexcept ImportError:\n    pass\nprint('went on')\n")
    out = without_hosts("-m", "lwpf_patch", "run", "ask.py", cwd=tmp_path)
    assert out.stdout.splitlines() == ["None", "No module named 'timm'"]
    assert "timm was asked to be patched, but this program never imported it" in out.stderr
    for arguments in (["try.py"], ["-m", "lwpf_patch", "run", "try.py"]):
        out = without_hosts(*arguments, cwd=tmp_path, check=False, LWPF_PATCH="timm")
        assert out.returncode == 1
        assert out.stdout == ""
        expected = f"timm was asked to be patched, but it is not installed here: {tmp_path / 'try.py'}:2 imports it"
        assert f"HostNotInstalledError: {expected}" in out.stderr
        assert "pip install timm" in out.stderr
    assert "No module named 'timm'" in without_hosts("-c", "import timm", cwd=tmp_path, check=False).stderr
    out = without_hosts("-c", "import lwpf_patch; lwpf_patch.apply('hflayers')", cwd=tmp_path, check=False)
    assert "hflayers was asked to be patched, but it is not installed here: pip install" in out.stderr


@pytest.mark.drawn(days=3)
def test_a_fork_is_announced_with_its_own_version(python, tmp_path):
    package = tmp_path / "timm"
    shutil.copytree(_folder("timm"), package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "version.py").write_text("__version__ = '1.0.31+mine'\n")
    out = python(code=USE, LWPF_PATCH="timm")
    assert re.match(r"lwpf_patch: timm 1.0.31\+mine: \d+ classes \(lwpf status lists them\) patched", out.stderr)
    assert out.stdout.strip() == "ReLU()"


@pytest.mark.drawn(days=3)
def test_a_host_in_a_zip_file(python, tmp_path):
    (tmp_path / "content").mkdir()
    shutil.copytree(
        _folder("hflayers"), tmp_path / "content" / "hflayers", ignore=shutil.ignore_patterns("__pycache__")
    )
    archive = shutil.make_archive(str(tmp_path / "hosts"), "zip", tmp_path / "content")
    for variables, code in (
        ({"LWPF_PATCH": "hflayers"}, ""),
        ({}, "import lwpf_patch; lwpf_patch.apply('hflayers')\n"),
    ):
        out = python(code=code + USE_HFLAYERS, PYTHONPATH=archive, **variables)
        assert out.stdout.splitlines()[-1] == f"{archive}/hflayers ReLU()"


@pytest.mark.parametrize("way", ["variable", "apply"])
def test_a_host_without_its_sources(python, tmp_path, way):
    layers = tmp_path / "timm" / "layers"
    layers.mkdir(parents=True)
    (tmp_path / "attention.py").write_text("class Attention:\n    def forward(self, x):\n        return x\n")
    py_compile.compile(str(tmp_path / "attention.py"), cfile=str(layers / "attention.pyc"))
    (tmp_path / "attention.py").unlink()
    (layers / "__init__.py").write_text("")
    (tmp_path / "timm" / "__init__.py").write_text("from .layers import attention\n")
    code = "import lwpf_patch; lwpf_patch.apply('timm')\n" if way == "apply" else ""
    out = python(code=code + "import timm\nprint('went on')", check=False, **({} if code else {"LWPF_PATCH": "timm"}))
    assert out.returncode == 1
    assert out.stdout == ""
    assert (
        "timm.layers.attention cannot be patched: lwpf_patch rewrites source code, and there is none in" in out.stderr
    )
    assert "install the library with its sources" in out.stderr


@pytest.mark.drawn(days=3)
def test_apply_while_another_thread_imports(python, tmp_path):
    """What that thread had begun to import before apply was called is waited for, and what it comes to is seen."""
    for module in ("functional", "activation"):
        folder = tmp_path / module
        shutil.copytree(_folder("hflayers"), folder / "hflayers", ignore=shutil.ignore_patterns("__pycache__"))
        with (folder / "hflayers" / f"{module}.py").open("a") as file:
            file.write("\n\nimport time as _time\n\n_time.sleep(1)\n")
        code = f"""
import sys, threading, time, torch, lwpf_patch
thread = threading.Thread(target=lambda: __import__("hflayers"))
thread.start()
while "hflayers.{module}" not in sys.modules:
    time.sleep(0.001)
lwpf_patch.apply("hflayers")
thread.join()
state = lwpf_patch.status()["hosts"]["hflayers"]
print(state["state"], len(state["sites"]))
"""
        out = python(code=code + USE_HFLAYERS, PYTHONPATH=str(folder))
        assert out.stdout.splitlines() == ["patched 2", f"{folder / 'hflayers'} ReLU()"]


@pytest.mark.drawn(days=2)
def test_apply_while_torch_is_being_imported(python):
    """Its module class is not there yet; classes that come later are seen all the same, or looked for."""
    code = """
import importlib.abc, sys

class Early(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn.parameter":  # imported by torch.nn.modules.module before its class is defined
            sys.meta_path.remove(self)
            import lwpf_patch
            lwpf_patch.apply("timm")

sys.meta_path.insert(0, Early())
import torch
from timm.layers.attention import Attention
print(Attention(8, num_heads=2).func_d)
"""
    assert python(code=code).stdout.strip() == "ReLU()"
