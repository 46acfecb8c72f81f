"""What the user gets to see, whatever the script does to logging, and what is said at exit: only what is true."""

from __future__ import annotations

import io
import logging
import multiprocessing
import sys
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn

import lwpf_patch
from lwpf_patch import reporting
from lwpf_patch.patching import exit_report

pytestmark = pytest.mark.drawn(days=3)

# --- messages get through, and do no harm ---------------------------------------------------------------------------

LOGGING = """
import logging.config
config = dict(version=1, handlers=dict(h={"class": "logging.StreamHandler", "formatter": "f"}),
              formatters=dict(f=dict(format="LOG %(levelname)s %(message)s")), root=dict(handlers=["h"]))
"""


@pytest.mark.drawn(days=3)
def test_a_script_that_configures_logging_silences_nothing(python):
    """``dictConfig`` disables the loggers that exist, unless it is told not to."""
    configure = "logging.config.dictConfig(config)\n"
    use = "timm.create_model('test_resnet')(torch.randn(2, 3, 64, 64))\n"
    before = python(code=f"{LOGGING}{configure}import timm, torch\n{use}", LWPF_PATCH="timm").stderr.strip()
    banner, of_model, report = before.splitlines()
    assert of_model.startswith("LOG WARNING lwpf_patch: timm: test_resnet has no softmax attention")
    assert banner.startswith("LOG INFO lwpf_patch: timm 1.")
    assert report.startswith("LOG WARNING lwpf_patch: timm was patched, but no patched forward was ever called")
    without_handlers = f"import timm, torch{LOGGING}del config['root']\n{configure}{use}"
    banner, _, report = python(code=without_handlers, LWPF_PATCH="timm").stderr.strip().splitlines()
    assert banner.startswith("lwpf_patch: timm 1.")
    assert report.startswith("lwpf_patch: timm was patched, but no patched forward was ever called")


def test_a_level_that_is_set_before_anything_is_said_holds(python):
    code = """
import logging, lwpf_patch
logging.getLogger("lwpf_patch").setLevel({level})
import torch
func_d, x = lwpf_patch.HostFuncD("relu", "timm"), torch.ones(1, 1, 2, 2)
func_d.scaled_dot_product_attention(x, x, x)
"""
    assert "attention is computed by backend" in python(code=code.format(level="logging.DEBUG")).stderr
    assert python(code=code.format(level="logging.ERROR")).stderr == ""


def _speak(monkeypatch):
    """As a process that is no worker of pytest-xdist, and has no handlers of pytest's."""
    monkeypatch.setattr(reporting, "is_helper_process", lambda: False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def test_a_level_silences_and_a_message_resets_what_logging_config_disables(monkeypatch, capsys):
    _speak(monkeypatch)
    monkeypatch.setattr(reporting.logger, "disabled", True)
    reporting.info("said")
    monkeypatch.setattr(reporting.logger, "level", logging.ERROR)
    reporting.logger.manager._clear_cache()
    reporting.warn("not said")
    reporting.logger.manager._clear_cache()
    assert capsys.readouterr().err == "lwpf_patch: said\n"


def test_a_stderr_that_cannot_be_written_to_harms_nobody(monkeypatch, python):
    _speak(monkeypatch)
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None, open("/dev/full", "w")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        reporting.warn("message")
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(closed)])  # the script's
    reporting.warn("message")
    monkeypatch.undo()
    code = "import logging, sys\nlogging.basicConfig()\nsys.stderr.close()\nimport timm\nprint('went on')"
    assert python(code=code, LWPF_PATCH="timm").stdout.strip() == "went on"


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, True),
        (dict(RANK="0", LOCAL_RANK="0", GROUP_RANK="0"), True),
        (dict(RANK="8", LOCAL_RANK="0"), False),
        (dict(LOCAL_RANK="0", NODE_RANK="0"), True),  # Lightning's own launcher
        (dict(LOCAL_RANK="1", NODE_RANK="0"), False),
        (dict(LOCAL_RANK="0", NODE_RANK="1"), False),
        (dict(SLURM_PROCID="0", LOCAL_RANK="1"), False),  # the same, in a batch job of one task
        (dict(SLURM_PROCID="3"), False),
        (dict(OMPI_COMM_WORLD_RANK="2", LOCAL_RANK="0"), False),
        (dict(RANK=""), True),
    ],
)
def test_one_rank_speaks(monkeypatch, capsys, variables, speaks):
    _speak(monkeypatch)
    for name in reporting.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    reporting.info("message")
    assert bool(capsys.readouterr().err) == speaks


@pytest.mark.parametrize(
    ("command", "helps"),
    [
        (["train.py"], False),
        (["/usr/bin/accelerate", "launch", "train.py"], True),
        (["-m", "accelerate.commands.launch", "train.py"], True),
        (["/usr/bin/torchrun", "train.py"], True),
    ],
)
def test_launchers_do_not_speak_for_their_scripts(monkeypatch, command, helps):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "orig_argv", ["python", *command])
    assert reporting.is_helper_process() == helps


# --- at exit --------------------------------------------------------------------------------------------------------

RESNET = "import timm, torch; timm.create_model('test_resnet')(torch.randn(2, 3, 64, 64))"


def test_a_process_that_computes_nothing_says_nothing(python):
    """A launcher, whose child computes, and a script whose arguments are wrong, both after they have made a model."""
    code = f"""
import argparse, subprocess, sys, timm, torch
timm.create_model("test_resnet")
child = subprocess.run([sys.executable, "-c", {RESNET!r}], stderr=subprocess.PIPE, text=True)
print(child.stderr)
argparse.ArgumentParser().parse_args(["--model"])
"""
    out = python(code=code, check=False, LWPF_PATCH="timm")
    assert "lwpf_patch: timm was patched, but no patched forward was ever called: nothing ran with" in out.stdout
    assert "unrecognized arguments" in out.stderr
    assert "nothing ran" not in out.stderr
    assert python("-c", "import torch", LWPF_PATCH="timm").stderr == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import torch; torch.nn.Linear(2, 2)(torch.randn(2))", "this program never imported it: nothing ran"),
        (
            "import timm, torch; model = timm.create_model('test_resnet').eval()\n"
            "torch.compile(lambda x: model(x), backend='eager')(torch.randn(1, 3, 64, 64))",
            "no patched forward was ever called",
        ),
    ],
)
def test_a_request_without_effect_is_reported(python, code, message):
    assert message in python("-c", code, LWPF_PATCH="timm").stderr.splitlines()[-1]


@pytest.mark.drawn(days=2)
def test_pytest_and_its_workers(python, tmp_path):
    (tmp_path / "test_timm.py").write_text(
        "import timm, torch\ndef test_timm():\n    timm.layers.Attention(12, num_heads=3)(torch.randn(1, 2, 12))\n"
    )
    out = python("-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "test_timm.py", LWPF_PATCH="timm")
    assert "1 passed" in out.stdout
    assert "nothing ran" not in out.stdout + out.stderr


def test_listening_leaves_no_trace():
    """Neither for torch.compile, which guards on global hooks and warns of them, nor after revert."""
    call = nn.Module.__call__
    original = call.__code__
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager", fullgraph=True)
    called, exit_report._called = exit_report._called, False
    try:
        lwpf_patch.apply("timm")
        assert nn.Module.__call__ is call
        assert call.__code__ is not original
        lwpf_patch.revert()
        assert call.__code__ is original
        lwpf_patch.apply("timm")
        with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                model(torch.randn(2, 2))
                assert call.__code__ is original
        assert exit_report.has_computed()
    finally:
        exit_report._called = called


def test_a_call_that_dynamo_sees_first_is_traced_as_it_would_be():
    class Outer(nn.Linear):
        def __call__(self, *args):
            return super().__call__(*args)

    outer, x = Outer(2, 2), torch.randn(1, 2)
    called, exit_report._called = exit_report._called, False
    try:
        lwpf_patch.apply("timm")
        run = torch.compile(lambda x: outer(x) + 1, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(x), x @ outer.weight.T + outer.bias + 1)
    finally:
        exit_report._called = called
