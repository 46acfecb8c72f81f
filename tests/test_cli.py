"""The command: run, status, diff, doctor."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT

import lwpf_patch
from lwpf_patch.cli import main
from lwpf_patch.cli.status import CommandStatus, HostReport
from lwpf_patch.patching import schema
from lwpf_patch.settings import SettingsStatus

ATTEND = """
import torch, timm.layers
print(timm.layers.Attention(12, num_heads=3)(torch.randn(1, 2, 12)).shape, timm.layers.Attention(16).func_d)
"""


def test_run_is_the_script_itself(python, tmp_path):
    (tmp_path / "train.py").write_text(
        "import sys, os, timm.layers\n"
        "print(__name__, sys.argv, sys.stdin.read(), __file__, timm.layers.Attention(12, num_heads=3).func_d)\n"
        "sys.exit(7)\n"
    )
    out = python("-m", "lwpf_patch", "run", "train.py", "--lr", "1", "--func-d", "x", input="hello", check=False)
    assert out.returncode == 7
    assert out.stdout.split("\n")[0] == (
        "__main__ ['train.py', '--lr', '1', '--func-d', 'x'] hello " + str(tmp_path / "train.py") + " ReLU()"
    )


def test_run_with_every_option(python, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text("import os, sys\nprint(sys.argv[1:])\n" + ATTEND)
    options = [
        "--patch",
        "timm",
        "--func-d",
        "pfu:mu=0.1",
        "--masking",
        "paper",
        "--backend",
        "eager",
        "--include",
        "*",
    ]
    out = python("-m", "lwpf_patch", "run", *options, "-m", "package.train", "-x", "--patch", "no")
    assert "['-x', '--patch', 'no']" in out.stdout
    assert "PFU(mu=0.1, bias=mu, sigma=0.01, masking=paper, backend=eager)" in out.stdout


def test_run_takes_the_environment_and_its_options_go_first(python, tmp_path):
    (tmp_path / "train.py").write_text(ATTEND)
    variables = dict(LWPF_FUNC_D="pfu:mu=0.2", LWPF_MASKING="paper")
    out = python("-m", "lwpf_patch", "run", "--masking", "exclude", "train.py", **variables)
    assert "PFU(mu=0.2, bias=mu, sigma=0.01)" in out.stdout


def test_run_passes_signals_on(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "lwpf_patch", "run", str(script)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "no script is given, and no module with -m"),
        (["run", "missing.py"], "there is no script 'missing.py' in"),
        (["run", "--patch", "tim", "x.py"], "unknown host 'tim' (from --patch): allowed are"),
        (["run", "--func-d", "reul", "x.py"], "unknown func_d 'reul' (from --func-d)"),
        (["run", "--masking", "no", "x.py"], "unknown masking 'no' (from --masking)"),
        (["run", "--backend", "no", "x.py"], "unknown backend 'no' (from --backend)"),
        (["run", "--include", "*no_such*", "x.py"], "include pattern '*no_such*' (from --include)"),
        (["run", "--fun", "relu", "x.py"], None),
        (["diff", "tim"], "unknown host 'tim' (from lwpf diff)"),
        (["diff", "timm", "--include", "*no_such*"], "include pattern '*no_such*' (from --include)"),
        (["stauts"], "invalid choice: 'stauts'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_requests_exit_with_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message is None or message in error
    assert "Traceback" not in error


def test_run_refuses_where_the_variable_would_have_no_effect(python, tmp_path):
    (tmp_path / "train.py").write_text(ATTEND)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lwpf_patch.cli import main; sys.exit(main())"
    isolated = ["-S", "-c", code, "run", "train.py"]
    site_packages = next(p for p in sys.path if p.endswith("site-packages"))
    out = python(*isolated, check=False, PYTHONPATH=site_packages)
    assert out.returncode == 2
    assert "the start-up hook lwpf_patch.pth is in no site-packages folder" in out.stderr
    assert "torch" not in out.stdout


def test_diff_shows_the_two_lines_of_the_paper(capsys):
    assert main(["diff", "timm", "--include", "timm.layers.attention.*"]) == 0
    diff = capsys.readouterr().out
    changes = [line for line in diff.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert changes == 2 * [
        "-            x = F.scaled_dot_product_attention(",
        "+            x = self.func_d.scaled_dot_product_attention(",
        "-            attn = attn.softmax(dim=-1)",
        "+            attn = self.func_d.softmax(attn, dim=-1)",
    ]
    assert main(["diff", "timm", "--include", "*Rope", "--color", "always"]) == 0
    coloured = capsys.readouterr().out
    assert coloured.count("\x1b[32m+") == 2
    assert coloured.count("\x1b[31m-") == 2


def test_the_patch_applies(tmp_path, capsys):
    """The diff is one that patch(1) understands, and gives what runs."""
    import inspect

    import timm.layers.attention as module

    main(["diff", "timm", "--include", "timm.layers.attention.*"])
    diff = capsys.readouterr().out
    file = tmp_path / "timm" / "layers" / "attention.py"
    file.parent.mkdir(parents=True)
    file.write_text(inspect.getsource(module))
    subprocess.run(["git", "apply", "-p0", "-"], input=diff.replace(" (upstream)", "").replace(" (patched)", ""),
                   text=True, cwd=tmp_path, check=True)  # fmt: skip
    lwpf_patch.apply("timm")
    for cls in (module.Attention, module.AttentionRope):
        # For tracebacks, some lines have a comment that says what to do where they fail.
        assert re.sub(r"  # lwpf_patch: .*", "", inspect.getsource(cls.forward)) in file.read_text()


def test_status(python):
    shown = python("-m", "lwpf_patch", "status", LWPF_PATCH="timm")
    plain = shown.stdout
    assert shown.stderr == ""
    assert "patch timm; func_d relu, masking exclude" in plain
    assert f"lwpf_patch {lwpf_patch.__version__}, Python {sys.version.split()[0]}" in plain
    assert "LWPF_PATCH=timm" in plain
    assert "timm.layers.attention.AttentionRope" in plain
    data = json.loads(python("-m", "lwpf_patch", "status", "--json").stdout)
    names = [site["name"] for site in data["hosts"]["timm"]["sites"]]
    assert len(names) > 50
    assert {"timm.layers.attention.Attention", "timm.models.swin_transformer.WindowAttention"} <= set(names)
    assert data["backend"].startswith("auto (triton on CUDA of capability 8.0 and later; cpu for many scores")
    assert data["hook"]
    wrong = python("-m", "lwpf_patch", "status", LWPF_PATCH="tim").stdout
    assert "WRONG: unknown host 'tim' (from LWPF_PATCH)" in wrong


def test_status_and_the_command_have_one_schema(python):
    """What both tell of a host has the same keys and values; all keys are those of the types."""
    code = """
import json, sys
import lwpf_patch, deeprc.architectures, timm
lwpf_patch.apply("timm,deeprc", func_d="pfu:mu=1", uhop="on", exclude_models="x")
print(json.dumps(lwpf_patch.status()))
"""
    ours = json.loads(python(code=code).stdout.splitlines()[-1])
    variables = dict(LWPF_PATCH="timm,deeprc", LWPF_FUNC_D="pfu:mu=1", LWPF_UHOP="yes", LWPF_EXCLUDE_MODELS="x")
    theirs = json.loads(python("-m", "lwpf_patch", "status", "--json", **variables).stdout)
    assert set(ours) == keys(schema.Status)
    assert set(theirs) == keys(CommandStatus)
    assert theirs["request"] == {"hosts": ["timm", "deeprc"], **ours["hosts"]["timm"]["settings"]}
    assert set(ours["hosts"]["timm"]["settings"]) == keys(SettingsStatus)
    for name in ("timm", "deeprc"):
        mine, other = ours["hosts"][name], theirs["hosts"][name]
        assert set(mine) == keys(schema.HostStatus) - {"problem"}
        assert set(other) == keys(HostReport) - {"problem"}
        for key in keys(schema.HostDescription) - {"problem", "sites"}:
            assert mine[key] == other[key], key
        # Some modules may not have been imported, or later.
        assert mine["sites"]
        assert all(site in other["sites"] for site in mine["sites"])
        assert all(set(site) == keys(schema.SiteStatus) for site in mine["sites"])
        assert all(set(shim) == keys(schema.AppliedShimStatus) for shim in mine["shims"])
        assert all(set(shim) == keys(schema.ShimStatus) for shim in other["shims"])
        assert [{**shim, "state": ""} for shim in mine["shims"]] == [{**shim, "state": ""} for shim in other["shims"]]
    assert ours["hosts"]["deeprc"]["shims"]
    assert set(ours["hosts"]["timm"]["feature_maps"]) == keys(schema.FeatureMapsStatus)
    assert ours["hosts"]["hflayers"]["state"] == "off"
    wrong = json.loads(python("-m", "lwpf_patch", "status", "--json", LWPF_PATCH="tim").stdout)["request"]
    assert list(wrong) == ["problem"]


def keys(typed_dict):
    return typed_dict.__required_keys__ | typed_dict.__optional_keys__


def test_status_of_a_host_that_cannot_be_patched(python, tmp_path):
    (tmp_path / "timm" / "layers").mkdir(parents=True)
    for name in ("__init__.py", "layers/__init__.py", "layers/attention.py"):
        (tmp_path / "timm" / name).touch()
    hosts = json.loads(python("-m", "lwpf_patch", "status", "--json").stdout)["hosts"]
    assert set(hosts["timm"]) == keys(HostReport) - {"sites", "shims"}
    assert not hosts["timm"]["patchable"]
    assert "has no Attention.forward" in hosts["timm"]["problem"]


@pytest.mark.drawn(days=2)
def test_doctor(python, tmp_path):
    out = python("-m", "lwpf_patch", "doctor")
    assert "timm: LWPF_PATCH=timm takes effect in a new interpreter" in out.stdout


@pytest.mark.drawn(days=2)
@pytest.mark.parametrize("way", ["-S", "PYTHONPATH"])
def test_where_the_hook_is_not_read(tmp_path, way):
    """`doctor` says so, and `run` refuses, where site-packages are on the path but no interpreter reads their hooks."""
    (tmp_path / "train.py").write_text("print('went on')")
    venv.create(tmp_path / "bare", symlinks=True)
    interpreter = [sys.executable, "-S"] if way == "-S" else [str(tmp_path / "bare" / "bin" / "python")]
    folders = [str(ROOT), *(folder for folder in sys.path if folder.endswith("site-packages"))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LWPF_")}
    environment["PYTHONPATH"] = os.pathsep.join(folders)

    def lwpf(*arguments):
        command = [*interpreter, "-m", "lwpf_patch", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    doctor = lwpf("doctor")
    assert doctor.returncode == 1
    assert "timm: LWPF_PATCH=timm has NO effect in a new interpreter" in doctor.stdout
    assert "takes effect" not in doctor.stdout
    assert "The hook lwpf_patch.pth does not run" in doctor.stdout
    run = lwpf("run", "train.py")
    assert run.returncode != 0
    assert "went on" not in run.stdout
    assert "the script would run unpatched" in run.stderr


def test_help_and_version(capsys):
    for arguments in (["--help"], ["run", "--help"], ["status", "--help"], ["diff", "--help"], ["doctor", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "pfu:mu=dmedian,bias=mu,sigma=0.01" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"lwpf_patch {lwpf_patch.__version__}"


def test_on_a_terminal_that_knows_ascii_alone(python, tmp_path):
    """Every help text is in ASCII; the source that a diff shows need not be."""
    package = tmp_path / "fake" / "timm"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "layers" / "__init__.py").touch()
    attention = Path(importlib.util.find_spec("timm").origin).parent / "layers" / "attention.py"
    source = attention.read_text().replace("attn = attn.softmax(dim=-1)", "attn = attn.softmax(dim=-1)  # 1 = Σ")
    (package / "layers" / "attention.py").write_text(source, encoding="utf-8")
    code = """
import sys
sys.path.insert(0, "fake")
from lwpf_patch import cli
for command in ([], ["run"], ["status"], ["diff"], ["doctor"]):
    try:
        cli.main([*command, "--help"])
    except SystemExit as stop:
        assert not stop.code
sys.exit(cli.main(["diff", "timm"]))
"""
    out = python(code=code, PYTHONIOENCODING="ascii")
    assert "usage: lwpf run" in out.stdout
    help_texts, _, diff = out.stdout.partition("--- timm/layers")
    assert "\\" not in help_texts
    assert "attn = attn.softmax(dim=-1)  # 1 = \\u03a3" in diff


def test_a_reader_that_leaves_early(tmp_path):
    command = f"{sys.executable} -m lwpf_patch diff timm | head -n 1"
    out = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    assert out.stderr == ""
