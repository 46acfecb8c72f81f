"""Hosts that other packages declare by an entry point, and docs/own_host.md, whose code is run as it is printed."""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import oracle
import pytest
import torch
from conftest import ROOT, environment_of_a_child, require_host
from oracle import Forgetting

import lwpf_patch
from lwpf_patch import SettingsError
from lwpf_patch.hosting import FuncDAttachment, RewrittenHost, Site
from lwpf_patch.hosts import HOSTS, IN_THE_BOX

pytestmark = pytest.mark.drawn(days=3)

PAGE = ROOT / "docs" / "own_host.md"
#: The blocks of the page: the file that the line before names, or none; the language; the text.
BLOCKS = re.findall(r"(?:`([\w./]+\.\w+)`:\n\n)?```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
FILES = {name: text for name, _, text in reversed(BLOCKS) if name}  # the first of each


WITH_U_HOP = [text for name, _, text in BLOCKS if name == "windows_lwpf.py"][1]


def _install(folder: Path, points: dict[str, str], package: str = "windows-lwpf", version: str = "1.0") -> None:
    """Writes what pip writes of a package that declares hosts."""
    metadata_of = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    metadata_of.mkdir(parents=True)
    (metadata_of / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (metadata_of / "entry_points.txt").write_text("\n".join(["[lwpf_patch.hosts]", *lines]) + "\n")


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FILES[name])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder on sys.path, and on that of child interpreters, with the package of the page and its declaration."""
    folder = tmp_path / "installed"
    _write(folder, "windows/__init__.py", "windows/attention.py", "windows_lwpf.py")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    before = set(sys.modules)
    yield folder
    lwpf_patch.revert()
    for name in set(HOSTS) - set(IN_THE_BOX):
        del HOSTS[name]
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _declare(folder: Path, text: str, name: str = "windows_lwpf.py") -> None:
    (folder / name).write_text(text)
    importlib.invalidate_caches()


# --- the page -------------------------------------------------------------------------------------------------------


def _run(command: str, folder: Path) -> str:
    """Runs a command as a user does, and returns what it prints, standard error first."""
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = environment_of_a_child(PATH=scripts)
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
    command = re.sub(r"\blwpf (?=run|diff|status|doctor)", f"{sys.executable} -m lwpf_patch ", command)
    out = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, f"{command}: {out.stderr}"
    return out.stderr + out.stdout


def test_the_page(tmp_path):
    """Each file is written when the page shows it, each command is run, and prints the lines that the page shows."""
    shutil.copytree(_folder_of("hflayers"), tmp_path / "my_hopfield")
    for name, language, text in BLOCKS:
        if name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        elif language == "python":
            (tmp_path / "block.py").write_text(text)
            _run("python block.py", tmp_path)
        else:
            assert language == "console"
            for each in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, *expected = each.splitlines()
                if command == "pip install -e .":
                    _install_project(tmp_path)
                    continue
                lines = iter(_run(command, tmp_path).splitlines())
                for line in expected:
                    pattern = line.replace("[", "[[]").replace("...", "*")
                    assert any(fnmatch.fnmatchcase(found, pattern) for found in lines), f"{command}: no {line!r}"


def _install_project(folder: Path) -> None:
    text = (folder / "pyproject.toml").read_text()
    points = text.partition('[project.entry-points."lwpf_patch.hosts"]\n')[2].partition("\n\n")[0]
    name, version = (re.search(rf'^{key} = "(.*)"', text, re.MULTILINE)[1] for key in ("name", "version"))
    pairs = (line.split(" = ") for line in points.splitlines())
    _install(folder, {key: value.strip('"') for key, value in pairs}, name, version)


def _folder_of(package: str) -> Path:
    require_host(package)
    return Path(importlib.util.find_spec(package).origin).parent


@pytest.mark.parametrize("uhop", [None, "iters=1"])
def test_the_attention_of_the_page_equals_the_oracle(installed, caplog, uhop):
    """Under its entry point alone; the keys that its mask of -100 hides are excluded."""
    _install(installed, {"windows": "windows_lwpf:HOST"})
    _declare(installed, WITH_U_HOP)
    lwpf_patch.apply("windows", func_d="pfu:mu=0.02,bias=-0.2,sigma=0", uhop=uhop)
    layer = importlib.import_module("windows.attention").WindowAttention(dim=8, heads=2).double()
    assert "has not been tested" not in caplog.text  # its source is known
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    hidden = torch.rand(5, 5) < 0.4
    phi = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    if uhop is not None:
        torch.nn.init.normal_(layer.feature_map.weight, std=0.3)
        phi = phi + layer.feature_map.weight.detach()
    out = layer(x, torch.zeros(5, 5, dtype=torch.float64).masked_fill(hidden, -100.0))
    q, k, v = torch.nn.functional.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, -1)
    q, k, v = (each.reshape(3, 5, 2, 4).transpose(1, 2) for each in (q, k, v))
    q, k = (each @ phi.transpose(1, 2) for each in (q, k))
    attended = oracle.attention(q, k, v, func_d=Forgetting("pfu", 0.02, -0.2), attn_mask=~hidden)
    expected = attended.transpose(1, 2).reshape(3, 5, 8) @ layer.proj.weight.T + layer.proj.bias
    oracle.assert_equal(out, expected)
    cotangent = torch.randn_like(out)
    gradients = [torch.autograd.grad(each, [x, layer.qkv.weight], cotangent) for each in (out, expected)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_module_of_one_file(installed, caplog):
    """As projects have them whose model lies beside the script."""
    (installed / "model.py").write_text(FILES["windows/attention.py"])
    text = FILES["windows_lwpf.py"].replace('"windows"', '"model"').replace("windows.attention", "model")
    _declare(installed, text, "model_lwpf.py")
    lwpf_patch.register_host(importlib.import_module("model_lwpf").HOST)
    lwpf_patch.apply("model")
    layer = importlib.import_module("model").WindowAttention(8, 2)
    assert repr(layer.func_d) == "ReLU()"
    assert f"model of unknown version at {installed / 'model.py'}: WindowAttention patched" in caplog.text


def test_the_script_itself_is_no_host():
    with pytest.raises(SettingsError, match=r"has attention in __main__.*move the class into a module of its own"):
        lwpf_patch.register_host(RewrittenHost("__main__", "", sites=(Site("__main__", "Attention.forward", {}),)))


# --- entry points ---------------------------------------------------------------------------------------------------


def test_a_host_of_an_entry_point_in_python(installed):
    _install(installed, {"windows": "windows_lwpf:HOST"})
    assert "windows" not in HOSTS
    with lwpf_patch.patched("windows"):
        layer = importlib.import_module("windows.attention").WindowAttention(8, 2)
        assert repr(layer.func_d) == "ReLU()"
        assert lwpf_patch.status()["hosts"]["windows"]["state"] == "patched"
    assert not hasattr(layer, "func_d")
    lwpf_patch.apply(["timm", "windows"])
    lwpf_patch.revert("windows")
    assert lwpf_patch.status()["hosts"]["windows"]["state"] == "off"


def test_the_hosts_in_the_box_read_no_entry_points(monkeypatch, python):
    monkeypatch.setattr(metadata, "entry_points", lambda **_: pytest.fail("entry points were read"))
    lwpf_patch.apply("timm,hflayers")
    lwpf_patch.status()
    lwpf_patch.revert("timm")
    modules = ("lwpf_patch.hosts.entry_points", "torch")
    code = f"import sys; print([name for name in {modules} if name in sys.modules])"
    assert python("-c", code, LWPF_PATCH="timm,deeprc").stdout == "[]\n"


def test_a_declaration_inside_of_the_package(installed, python):
    """Its import brings the package in at start-up, and torch, which a declaration beside the package does not."""
    light = "import sys; print('torch' in sys.modules)"
    _install(installed, {"windows": "windows_lwpf:HOST"})
    assert python("-c", light, LWPF_PATCH="windows").stdout == "False\n"
    (installed / "windows_lwpf.py").rename(installed / "windows" / "lwpf.py")
    (installed / "windows" / "__init__.py").write_text("from .attention import WindowAttention\n")
    shutil.rmtree(installed / "windows_lwpf-1.0.dist-info")
    _install(installed, {"windows": "windows.lwpf:HOST"})
    code = "import torch\nfrom windows import WindowAttention\nprint(WindowAttention(8, 2).func_d)\n"
    assert python("-c", code, LWPF_PATCH="windows", LWPF_FUNC_D="pfu:mu=0.5").stdout.startswith("PFU(mu=0.5")


def test_a_package_in_a_folder_that_a_later_file_adds(tmp_path):
    """As an editable install has them; the hook comes before. With `-I` and with a sitecustomize, too."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site_packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    package = Path(lwpf_patch.__file__).parent
    (site_packages / "lwpf_patch").symlink_to(package)
    shutil.copy(package / "lwpf_patch.pth", site_packages)
    (site_packages / "zzz.pth").write_text(str(tmp_path / "project"))
    _write(tmp_path / "project", "windows/__init__.py", "windows_lwpf.py")
    _install(tmp_path / "project", {"windows": "windows_lwpf:HOST"})
    code = "import sys, lwpf_patch; print('json.tool' in sys.modules, lwpf_patch.status()['hosts']['windows']['state'])"

    def run(*flags: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")}
        environment |= {"LWPF_PATCH": "windows", "PYTHONPATH": str(tmp_path / "first")}
        command = [tmp_path / "venv" / "bin" / "python", *flags, "-c", code]
        out = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return out.stdout

    assert run("-I") == "False waiting for its import\n"
    # Before the standard library, where Debian's Python has one of its own.
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text("import json.tool\n")
    assert run() == "True waiting for its import\n"


def test_lwpf_status_says_who_declares_a_host(installed, capsys, monkeypatch):
    from lwpf_patch.cli import main
    from lwpf_patch.cli import status as verb

    _install(installed, {"windows": "windows_lwpf:HOST", "deeprc": "windows_lwpf:HOST", "gone": "gone_lwpf:HOST"})
    listed = {name: each for name, each in verb.every_host().items() if name not in ("timm", "torch")}
    monkeypatch.setattr(verb, "every_host", lambda: listed)
    assert main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)["hosts"]
    by = "entry point windows_lwpf:HOST of windows-lwpf 1.0"
    assert status["windows"]["declared_by"] == by
    assert status["windows"]["patchable"]
    assert (status["deeprc"]["declared_by"], status["deeprc"]["not_used"]) == ("lwpf_patch", by)
    assert status["hflayers"]["not_used"] == ""
    assert not status["gone"]["patchable"]
    assert "cannot be loaded: ModuleNotFoundError: No module named 'gone_lwpf'" in status["gone"]["problem"]
    assert main(["status"]) == 0
    text = capsys.readouterr().out
    assert f"\nwindows unknown (declared by {by}): these would be patched\n  windows.attention.WindowAttention " in text
    assert f"not used: {by}, since lwpf_patch has a host of this name" in text
    assert "\ngone (declared by entry point gone_lwpf:HOST of windows-lwpf 1.0): cannot be patched: host 'gone'" in text
    assert "windows" not in sys.modules


def test_lwpf_doctor(installed, monkeypatch, capsys):
    from lwpf_patch.cli import doctor

    _install(installed, {"windows": "windows_lwpf:HOST", "gone": "gone_lwpf:HOST"})
    for name in ("print_native", "check_kernels"):
        monkeypatch.setattr(doctor, name, lambda: True)
    listed = doctor.every_host()
    monkeypatch.setattr(doctor, "every_host", lambda: {name: listed[name] for name in ("windows", "gone")})
    assert doctor._doctor(None) == 0
    out = capsys.readouterr().out
    assert "windows (declared by entry point windows_lwpf:HOST of windows-lwpf 1.0): LWPF_PATCH=windows takes" in out
    assert "gone (declared by entry point gone_lwpf:HOST of windows-lwpf 1.0): host 'gone': entry point" in out


# --- what is wrong --------------------------------------------------------------------------------------------------

#: The declaration, the entry point, and what the error says.
WRONG = {
    "no module": ("", "nowhere:HOST", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"),
    "no such name": ("", "windows_lwpf:HOSTS", "cannot be loaded: AttributeError: module 'windows_lwpf' has no"),
    "an error": ("1 / 0", "windows_lwpf:HOST", "ZeroDivisionError: division by zero. Repair or reinstall windows-l"),
    "no host": ("HOST = 'windows'", "windows_lwpf:HOST", "is no host but an object of type str: have it name an"),
    "another name": (
        FILES["windows_lwpf.py"].replace('"windows"', '"window"'),
        "windows_lwpf:HOST",
        "is the host 'window': give the entry point in the metadata of windows-lwpf 1.0 the name",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_entry_point_that_is_wrong(installed, what):
    text, value, message = WRONG[what]
    _declare(installed, text)
    _install(installed, {"windows": value})
    with pytest.raises(
        SettingsError, match=rf"host 'windows': entry point {value} of windows-lwpf 1.0.*{re.escape(message)}"
    ):
        lwpf_patch.apply("timm, windows")
    assert all(host["state"] != "patched" for host in lwpf_patch.status()["hosts"].values())
    assert lwpf_patch.status()["hosts"]["timm"]["state"] == "off"
    lwpf_patch.apply("timm")  # what is asked for is not concerned


def test_two_packages_that_claim_one_name(installed):
    _install(installed, {"windows": "windows_lwpf:HOST"})
    _install(installed, {"windows": "other:HOST"}, "other-windows", "2.0")
    message = r"of windows-lwpf 1.0.*other:HOST of other-windows 2.0.*|of other-windows 2.0.*of windows-lwpf 1.0.*"
    with pytest.raises(SettingsError, match=f"({message})claim the same name: uninstall all of these packages but one"):
        lwpf_patch.apply("windows")


def test_an_unknown_host_among_those_that_there_are(installed, python):
    _install(installed, {"windows": "windows_lwpf:HOST"})
    hosts = ", ".join(sorted([*IN_THE_BOX, "windows"]))
    expected = rf"unknown host 'windws' \(from {{}}\): allowed are {hosts}; did you mean 'windows'\?"
    with pytest.raises(SettingsError, match=expected.format(r"apply\(\)")):
        lwpf_patch.apply("windws")
    out = python("-m", "lwpf_patch", "run", "--patch", "windws", "train.py", check=False)
    assert out.returncode == 2
    assert re.search(expected.format("--patch"), out.stderr)
    out = python("-c", "import torch; print('went on')", check=False, LWPF_PATCH="windws")
    assert (out.returncode, out.stdout) == (1, "")
    assert re.search(expected.format("LWPF_PATCH"), out.stderr)


def test_a_wrong_declaration_that_has_imported_torch(installed, python):
    """No import of torch or of the package is left that could fail: the first forward pass does."""
    _declare(installed, "import torch, windows.attention\n1 / 0\n")
    _install(installed, {"windows": "windows_lwpf:HOST"})
    code = (
        "import torch\nfrom windows.attention import WindowAttention\nprint('imported')\n"
        "try:\n    WindowAttention(8, 2)(torch.randn(1, 3, 8))\nexcept ImportError:\n    pass\nprint('went on')\n"
    )
    out = python(code=code, check=False, LWPF_PATCH="windows")
    assert (out.returncode, out.stdout) == (1, "imported\n")
    assert "SettingsError: host 'windows': entry point windows_lwpf:HOST of windows-lwpf 1.0" in out.stderr
    assert "ZeroDivisionError: division by zero" in out.stderr


def test_a_host_that_is_registered_already_comes_first(installed):
    """The entry point is not asked, which is another one."""
    _install(installed, {"windows": "nowhere:HOST"})
    site = Site("windows.attention", "WindowAttention.forward", {}, (FuncDAttachment(),))
    lwpf_patch.register_host(RewrittenHost("windows", "pip install windows", sites=(site,)))
    lwpf_patch.apply("windows")
    assert "func_d" in dict(importlib.import_module("windows.attention").WindowAttention(8, 2).named_children())


def test_a_model_that_was_pickled_has_its_host_found(installed, python, tmp_path):
    _install(installed, {"windows": "windows_lwpf:HOST"})
    lwpf_patch.apply("windows", func_d="pfu")
    torch.save(importlib.import_module("windows.attention").WindowAttention(8, 2), tmp_path / "model.pt")
    load = "import torch\nprint(torch.load('model.pt', weights_only=False).func_d)"
    assert python("-c", load, LWPF_UNPICKLE="patch").stdout.startswith("PFU(")
