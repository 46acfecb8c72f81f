"""``lwpf compare``: arms, seeds, resuming, metrics, statistics, report, and what it refuses.

The scripts need no torch: they tell their arm from the variables that `lwpf run` sets, and leave by os._exit, so that
nothing is said of a host that was never imported. One test trains a network of timm.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import require_host
from scipy import stats

from lwpf_patch.cli import main
from lwpf_patch.comparing import scheduling, statistics
from lwpf_patch.comparing.metrics import read_metric, read_time, settle
from lwpf_patch.comparing.runs import Run

pytestmark = pytest.mark.drawn(days=3)

SCRIPT = """
import os, random, sys
seed, arm = int(sys.argv[1]), os.environ.get("LWPF_FUNC_D", "plain")
with open("ran", "a") as ran:
    ran.write(f"{arm} {seed}\\n")
generator = random.Random(seed)
for epoch in range(3):
    value = 80 + 5 * epoch + generator.random() + (arm == "relu") * (2 + random.Random(seed + 100).random())
    print(f"epoch {epoch}: top-1: {value:.3f}.")
print(f"trained for {1 + seed + (arm == 'relu')} s")
"""
END = "\nsys.stdout.flush(); os._exit(0)\n"
ARMS = ("--arm", "plain", "--arm", "relu")
TOP1 = ("--metric", "top-1: ([0-9.]+)")
COMMAND = ("--", "python", "train.py", "{seed}")


def top1(arm, seed, epoch=2):
    """What SCRIPT prints, once more."""
    import random

    generator = random.Random(seed)
    noise = [generator.random() for _ in range(epoch + 1)][-1]
    return round(80 + 5 * epoch + noise + (arm == "relu") * (2 + random.Random(seed + 100).random()), 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("LWPF_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT + END)
    return tmp_path


def ran(folder):
    """Which runs have taken place since this was last asked."""
    file = folder / "ran"
    lines = sorted(file.read_text().splitlines()) if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def report(folder, name="comparison"):
    return json.loads((folder / name / "report.json").read_text())


# --- statistics, against what is computed otherwise -----------------------------------------------------------------

OWN = {0: 3.1, 1: 4.0, 2: 3.6, 3: 5.2}
OTHER = {0: 2.9, 1: 3.1, 2: 3.8, 3: 3.9}


def test_intervals_and_probability_of_improvement():
    found = statistics.compare(OWN, OTHER, lower=False)
    x, y = np.array(list(OWN.values())), np.array(list(OTHER.values()))
    d = x - y
    assert found.seeds == (0, 1, 2, 3)
    assert found.mean == pytest.approx(d.sum() / 4)
    assert found.deviation == pytest.approx(math.sqrt(((d - d.mean()) ** 2).sum() / 3))
    # All 256 resamples there are, in place of random ones.
    means = np.array([d[list(which)].mean() for which in itertools.product(range(4), repeat=4)])
    assert found.bootstrap == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.04)
    interval = stats.ttest_rel(x, y).confidence_interval(0.95)
    assert found.student == pytest.approx((interval.low, interval.high))
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]
    assert found.improvement == pytest.approx(sum(pairs) / 16)
    assert found.improvement == pytest.approx(stats.mannwhitneyu(x, y).statistic / 16)
    assert found.improvement_interval[0] <= found.improvement <= found.improvement_interval[1] <= 1
    assert found.won == 3
    assert found.verdict == "open"  # Student's interval holds 0, though the bootstrap's would not
    assert found.student[0] < 0 < found.student[1]
    lower = statistics.compare(OWN, OTHER, lower=True)
    assert lower.mean == found.mean
    assert lower.improvement == pytest.approx(1 - found.improvement)
    assert lower.won == 1


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (-0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_to_settle_is_the_size_of_a_paired_t_test(effect, seeds):
    """The sample sizes are those of Cohen's tables: paired, two-sided, alpha 0.05, power 0.8."""
    assert statistics.seeds_to_settle(effect) == seeds
    assert statistics.seeds_to_settle(1e-3) is None
    assert statistics.seeds_to_settle(1e6) == 2


def test_seeds_to_settle_holds_in_simulation():
    draws = np.random.default_rng(0).normal(0.8, 1, (4000, 15))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_what_gives_no_interval():
    one = statistics.compare({3: 2.0}, {3: 1.0, 4: 1.0}, lower=False)
    assert (one.verdict, one.mean, one.bootstrap, one.student, one.improvement) == ("one seed", 1.0, None, None, None)
    assert statistics.compare(OWN, OWN, lower=False).verdict == "equal"
    shifted = statistics.compare({s: v + 0.1 for s, v in OWN.items()}, OWN, lower=False)
    assert (shifted.verdict, shifted.bootstrap, shifted.won) == ("no spread", None, 4)
    assert statistics.compare({0: 1.0}, {1: 1.0}, lower=False).verdict == "no pair"
    holes = statistics.compare({**OWN, 2: math.nan, 9: 1.0}, {**OTHER, 3: math.inf, 8: 1.0}, lower=False)
    assert holes.seeds == (0, 1)
    # In whatever order the runs are named, the same report.
    turned = statistics.compare(dict(reversed(OWN.items())), OTHER, lower=False)
    assert turned == statistics.compare(OWN, OTHER, lower=False)
    summary = statistics.summarise({**OWN, 2: math.nan})
    assert (summary.strange, len(summary.values)) == ((2,), 3)
    clear = statistics.compare({s: v + 9 for s, v in OWN.items()}, OTHER, lower=True)
    assert (clear.verdict, clear.seeds_to_settle) == ("worse", None)


# --- a comparison ---------------------------------------------------------------------------------------------------


def test_a_comparison_and_its_report(folder, capsys):
    arms = [*ARMS, "--arm", "same: --func-d none --masking paper"]
    assert main(["compare", *arms, "--seeds", "3", *TOP1, "--metric", r"epoch (?P<step>\d).*1: (?P<value>[\d.]+)",
                 "--name", "again", "--value", "first", "--better", "lower", "--time", "trained for (.*) s",
                 *COMMAND]) == 0  # fmt: skip
    assert ran(folder) == sorted(f"{arm} {seed}" for arm in ("plain", "relu", "none") for seed in range(3))
    out, err = capsys.readouterr()
    assert "[9/9]" in err
    assert "left" in err
    assert "WARNING: same gives exactly the figures of plain at seed 0" in err
    assert "top-1 (higher is better; last value of a run)" in out
    assert "relu against plain: better. top-1 +2." in out
    assert "same against plain: the same top-1 at each of 3 seeds." in out

    data = report(folder)
    metric, again = data["metrics"]
    assert metric["arms"]["relu"]["values"] == {str(seed): top1("relu", seed) for seed in range(3)}
    differences = [top1("relu", seed) - top1("plain", seed) for seed in range(3)]
    (relu, same) = metric["differences"]
    assert relu["mean"] == pytest.approx(sum(differences) / 3)
    assert (relu["verdict"], relu["won"], same["verdict"]) == ("better", 3, "equal")
    assert again["differences"][0]["verdict"] == "worse"  # lower is said to be better
    assert again["arms"]["plain"]["values"]["1"] == top1("plain", 1, epoch=0)
    assert data["arms"][2]["settings"]["masking"] == "paper"
    assert data["arms"][1]["options"] == ["--patch", "timm", "--func-d", "relu"]
    assert data["arms"][1]["sites"]["timm.layers.attention.Attention"]
    assert data["provenance"]["files"]["train.py"]
    assert data["provenance"]["versions"]["lwpf_patch"]
    assert data["runs"][1]["curves"]["again"]["steps"] == [0, 1, 2]
    assert data["command"]["text"] == "python train.py {seed}"
    assert data["time"] == "trained for (.*) s"
    assert data["arms"][1]["times"] == {
        "seconds": {"0": 2, "1": 3, "2": 4},
        "times_baseline": {"0": 2, "1": 3 / 2, "2": 4 / 3},
        "times_baseline_median": 3 / 2,
    }
    line, _ = [line for line in out.splitlines() if line.startswith("relu   3 ")]
    assert line.split("3 of 3")[1].split() == ["3.0", "1.50", "better"]
    lines = list(csv.DictReader((folder / "comparison" / "runs.csv").open()))
    assert [(line["arm"], line["seed"], line["state"]) for line in lines[:3]] == [
        ("plain", "0", "finished"), ("relu", "0", "finished"), ("same", "0", "finished"),
    ]  # fmt: skip
    assert float(lines[4]["top-1"]) == top1("relu", 1)
    text = (folder / "comparison" / "report.md").read_text()
    assert "$ python train.py {seed}" in text
    assert "- relu against plain: better." in text
    assert "| relu | 3 | 92." in text
    assert (folder / "comparison" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_which_value_of_a_run_counts(folder, capsys):
    figure = ("--metric", r"epoch (?P<step>\d).*1: (?P<value>[\d.]+)")
    chosen = [word for value in ("1", "mean") for word in (*figure, "--value", value, "--name", value)]
    assert main(["compare", *ARMS, "--seeds", "1", *chosen, *COMMAND]) == 0
    at_step, mean = report(folder)["metrics"]
    assert at_step["arms"]["relu"]["values"]["0"] == top1("relu", 0, epoch=1)
    assert mean["arms"]["plain"]["values"]["0"] == pytest.approx(sum(top1("plain", 0, epoch) for epoch in range(3)) / 3)
    out = capsys.readouterr().out
    assert "1 (higher is better; value of a run at step 1)" in out
    assert "mean (higher is better; mean over a run)" in out
    assert main(["compare", *ARMS, "--seeds", "1", *figure, "--value", "7", *COMMAND]) == 2
    assert "--value 7: there is none at this step in " in (error := capsys.readouterr().err)
    assert ", but 3 from step 0 to 2" in error


@pytest.mark.drawn(days=2)
def test_what_has_finished_is_not_repeated(folder, capsys):
    base = ["compare", *ARMS, *TOP1, "--seeds", "1"]
    assert main([*base, *COMMAND]) == 0
    assert ran(folder) == ["plain 0", "relu 0"]
    assert main([*base, *COMMAND]) == 0
    assert ran(folder) == []
    assert "2 have finished before" in capsys.readouterr().err
    # Another seed, another arm, other figures: only what is new.
    assert main(["compare", *ARMS, "--arm", "pfu", *TOP1, "--seeds", "0-1", "--value", "best", *COMMAND]) == 0
    assert ran(folder) == ["pfu 0", "pfu 1", "plain 1", "relu 1"]
    data = report(folder)
    assert data["metrics"][0]["arms"]["relu"]["values"] == {"0": top1("relu", 0), "1": top1("relu", 1)}
    # Without --time that of the process counts, also of a run that has finished before.
    took = {(run["arm"], run["seed"]): run["seconds"] for run in data["runs"]}
    assert data["arms"][1]["times"]["seconds"] == {"0": took["relu", 0], "1": took["relu", 1]}
    assert data["arms"][1]["times"]["times_baseline"]["1"] == pytest.approx(took["relu", 1] / took["plain", 1])
    # Another command: refused before anything is run.
    capsys.readouterr()
    assert main([*base, *COMMAND, "--more"]) == 2
    error = capsys.readouterr().err
    assert "holds a comparison of another command; it was\n  python train.py {seed}\nand is now" in error
    assert ran(folder) == []
    # The source of the script has changed, though not the command.
    (folder / "train.py").write_text(SCRIPT + "# changed" + END)
    assert main([*base, *COMMAND]) == 0
    assert ran(folder) == ["plain 0", "relu 0"]
    assert "6 runs in " in capsys.readouterr().err
    assert main([*base, "--seeds", "2", "--report-only", *COMMAND]) == 0
    assert ran(folder) == []
    assert "NOTE: plain has no figures at seed 1;" in capsys.readouterr().out


def test_arms_that_give_the_script_more_arguments(folder, capsys):
    script = "import os, sys; print(f'top-1: {len(sys.argv[2:]) + 0.1 * int(sys.argv[1])}', sys.argv[2:])"
    (folder / "train.py").write_text(script + END)
    texts = ("plain", "twice: plain -- --wide {arm}", "both: --func-d relu -- --deep 'a b' {seed}")
    arms = [word for text in texts for word in ("--arm", text)]
    assert main(["compare", *arms, "--seeds", "2", *TOP1, *COMMAND]) == 0
    logs = {path.parent.name.rpartition("-")[0]: path.read_text() for path in folder.glob("comparison/runs/*/log.txt")}
    assert "top-1: 0.1 []" in logs["plain-seed1"]
    assert "top-1: 2.0 ['--wide', 'twice']" in logs["twice-seed0"]
    assert "top-1: 3.1 ['--deep', 'a b', '1']" in logs["both-seed1"]
    arms_of_report = {arm["label"]: (arm["options"], arm["more"]) for arm in report(folder)["arms"]}
    assert arms_of_report["twice"] == (None, ["--wide", "{arm}"])
    assert arms_of_report["both"][0][-2:] == ["--func-d", "relu"]
    text = (folder / "comparison" / "report.md").read_text()
    assert "- **twice**: the script as it is, with `--wide '{arm}'`" in text
    # What an arm gives the script is a part of what its runs depend on.
    capsys.readouterr()
    arms[3] += " --higher"
    assert main(["compare", *arms, "--seeds", "2", *TOP1, *COMMAND]) == 0
    assert "; 4 have finished before; " in capsys.readouterr().err
    assert sum(1 for _ in folder.glob("comparison/runs/twice-*")) == 4


def test_a_run_that_fails_is_reported_and_the_rest_go_on(folder, capsys):
    fail = "\nif (arm, seed) == ('relu', 1): print('why it failed'); sys.stdout.flush(); os._exit(3)"
    nan = "\nif (arm, seed) == ('relu', 2): print('top-1: nan')"
    (folder / "train.py").write_text(SCRIPT + fail + nan + END)
    arguments = ["compare", *ARMS, "--seeds", "4", "--jobs", "2", "--metric", "top-1: ([0-9.]+|nan)", *COMMAND]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "relu, seed 1: FAILED: exit code 3; the end of " in err
    assert "  | why it failed" in err
    assert "log.txt" in err
    assert "NOTE: relu has no figures at seed 1 (exit code 3)" in out
    assert "top-1 of relu is not a finite number at seed 2, which is left out" in out
    (difference,) = report(folder)["metrics"][0]["differences"]
    assert difference["seeds"] == [0, 3]
    assert report(folder)["runs"][5]["curves"]["top-1"]["values"][-1] == "nan"
    # Repeated is what failed, alone.
    ran(folder)
    assert main(arguments) == 1
    assert ran(folder) == ["relu 1"]


@pytest.mark.drawn(days=4)
def test_a_patch_without_effect_is_a_failure(folder, capsys):
    """The attention of the patched runs was never reached: their figures are not theirs."""
    (folder / "train.py").write_text(SCRIPT + "\nimport torch; torch.nn.Linear(2, 2)(torch.zeros(2))")
    assert main(["compare", *ARMS[2:], "--arm", "pfu", "--seeds", "1", *TOP1, *COMMAND]) == 1
    err = capsys.readouterr().err
    assert "relu, seed 0: FAILED: lwpf_patch: timm was asked to be patched" in err
    assert "no run has finished: there is nothing to report" in err
    # Nothing has finished, so that another command destroys nothing.
    assert main(["compare", *ARMS[2:], "--arm", "pfu", "--seeds", "1", *TOP1, *COMMAND, "more"]) == 1


def test_figures_that_are_no_numbers_or_coarse_are_no_ignored_seed(folder, capsys):
    (folder / "train.py").write_text(
        "import os, sys\nrelu = 'LWPF_FUNC_D' in os.environ\nfor step in range(4):\n"
        "    print('acc', [10, 60, 90, 100][step], 'top-1:', 'nan' if relu else 91.25 + step)" + END
    )
    both = ("--metric", "acc ([0-9]+)", "--metric", r"top-1: (\S+)")
    assert main(["compare", *ARMS[2:], "--arm", "pfu", "--seeds", "2", *both, *COMMAND, "{seed}"]) == 0
    out, err = capsys.readouterr()
    assert "WARNING: seeds 0 and 1 of relu give the same figures" in err
    assert "NOTE: top-1 of relu is not a finite number at seed 0, 1" in out


@pytest.mark.drawn(days=4)
def test_a_patch_without_effect_is_noticed_behind_a_line_without_an_end(folder, capsys):
    unfinished = "\nimport torch; torch.nn.Linear(2, 2)(torch.zeros(2))\nsys.stdout.write('\\rstep 9 of 9')"
    (folder / "train.py").write_text(SCRIPT + unfinished)
    assert main(["compare", *ARMS, "--seeds", "1", *TOP1, *COMMAND]) == 1
    assert "relu, seed 0: FAILED: lwpf_patch: timm was asked to be patched" in capsys.readouterr().err


def test_a_run_that_lacks_a_figure_is_repeated(folder, capsys):
    (folder / "train.py").write_text(
        SCRIPT.replace('print(f"epoch', "if seed or arm == 'relu' or os.path.exists('mended'): print(f\"epoch") + END
    )
    base = ["compare", *ARMS, *TOP1, "--seeds", "2"]
    # The first run has none, so that the metric may be at fault; with another seed there is one that has it.
    assert main([*base, *COMMAND]) == 2
    assert main([*base[:-1], "1-1", *COMMAND]) == 0
    ran(folder)
    assert main([*base, "--report-only", *COMMAND]) == 1
    assert "plain, seed 0: FAILED: --metric 'top-1: ([0-9.]+)' matches nothing" in capsys.readouterr().err
    (folder / "mended").touch()
    assert main([*base, *COMMAND]) == 0
    assert "repeated, since they ended well and lack a figure: plain, seed 0" in capsys.readouterr().err
    assert ran(folder) == ["plain 0", "relu 0"]


def test_files_that_cannot_be_read_as_they_should(folder, capsys):
    (folder / "train.py").write_text(
        SCRIPT + "\nwith open(sys.argv[2] + '/f.csv', 'wb') as file:\n"
        "    file.write(b'\\xef\\xbb\\xbftop1,note\\n91.%d5,\\xe9\\n' % (seed + 3 * (arm == 'relu')))" + END
    )
    command = [*COMMAND, "{output}"]
    assert main(["compare", *ARMS, "--seeds", "2", "--metric", "csv:{output}/f.csv:top1", *command]) == 0
    assert report(folder)["metrics"][0]["arms"]["relu"]["values"] == {"0": 91.35, "1": 91.45}
    assert main(["compare", *ARMS, "--seeds", "2", "--metric", "csv:{output}:top1", *command]) == 2
    assert "cannot be read from" in capsys.readouterr().err
    ran(folder)
    # Somebody has deleted the log of a run.
    (log,) = folder.glob("comparison/runs/relu-seed1*/log.txt")
    log.unlink()
    assert main(["compare", *ARMS, "--seeds", "2", *TOP1, *command]) == 0
    assert ran(folder) == ["relu 1"]


def test_what_lwpf_patch_says_is_no_figure(folder):
    ours = "\nif arm == 'relu': print('lwpf_patch: separation top-1: 99.5')"
    (folder / "train.py").write_text(SCRIPT + ours + END)
    assert main(["compare", *ARMS, "--seeds", "1", *TOP1, *COMMAND]) == 0
    assert report(folder)["metrics"][0]["arms"]["relu"]["values"] == {"0": top1("relu", 0)}


def test_a_reader_that_leaves_loses_no_file(folder):
    command = [sys.executable, "-m", "lwpf_patch", "compare", *ARMS, "--seeds", "1", *TOP1, *COMMAND]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    child.stderr.close()
    assert child.wait(timeout=60) == 0
    assert (folder / "comparison" / "curves.png").is_file()
    assert ran(folder) == ["plain 0", "relu 0"]


def test_odd_labels_and_tiny_figures(folder, capsys):
    long = "x" * 300
    (folder / "train.py").write_text(SCRIPT.replace("{value:.3f}", "{value * 1e-13}") + END)
    figure = ("--metric", r"top-1: ([-0-9.e]+\d)", "--name", "$_$")
    assert main(["compare", "--arm", "plain", "--arm", f"b$_${long}: --func-d relu", "--seeds", "2", *figure,
                 *COMMAND]) == 0  # fmt: skip
    assert (folder / "comparison" / "curves.png").is_file()
    assert "e-12" in capsys.readouterr().out


def test_a_module_that_runs_in_its_output(folder):
    (folder / "pk").mkdir()
    (folder / "pk" / "tr.py").write_text(SCRIPT.replace("open(", "open('../../../../' + ") + END)
    command = ("--in-output", "--", "-m", "pk.tr", "{seed}")
    assert main(["compare", *ARMS, "--seeds", "1", *TOP1, *command]) == 0
    assert ran(folder) == ["plain 0", "relu 0"]


@pytest.mark.drawn(days=3)
def test_what_changes_meanwhile_is_said(folder, capsys):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True, capture_output=True)

    (folder / "helper.py").write_text("")
    git("init")
    git("add", "train.py", "helper.py")
    git("commit", "-m", "first")
    (folder / "train.py").write_text(SCRIPT + "\nopen(sys.argv[2], 'a').write('x')" + END)
    base = ["compare", *ARMS, *TOP1, "--seeds", "1", "--", "python", "train.py", "{seed}", "result.txt"]
    assert main(base) == 0
    out, err = capsys.readouterr()
    assert err.count("WARNING: result.txt, which the command names, has changed or appeared meanwhile") == 1
    assert "NOTE: result.txt, which" in out
    (folder / "train.py").write_text(SCRIPT + END)
    assert main(["compare", *ARMS, *TOP1, "--seeds", "1", "--output", "two", *COMMAND]) == 0
    (folder / "helper.py").write_text("# another")
    git("commit", "-am", "second")
    capsys.readouterr()
    assert main(["compare", *ARMS, "--arm", "pfu", *TOP1, "--seeds", "1", "--output", "two", *COMMAND]) == 0
    assert "NOTE: the runs are of several commits" in capsys.readouterr().out


def test_a_time_may_be_called_seconds():
    """It is no column of its own, as a metric is."""
    assert read_time("json:{output}/run.json:seconds", in_output=False).name == "seconds"


def test_what_is_started_is_not_forgotten():
    """An interruption while a process is started comes after it has been noted."""
    noted = []

    def start():
        with scheduling._uninterrupted():
            signal.raise_signal(signal.SIGINT)
            noted.append(1)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert noted == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted(folder, tmp_path):
    slow = "\nif seed: print('pid', os.getpid(), flush=True); import time; time.sleep(60)"
    (folder / "train.py").write_text(SCRIPT + slow + END)
    command = [sys.executable, "-m", "lwpf_patch", "compare", *ARMS, "--jobs", "2", "--seeds", "2", *TOP1, *COMMAND]

    def start():
        # As a terminal starts it: what a shell starts in the background ignores SIGINT, and hands that on.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stderr=pipe, stdout=subprocess.DEVNULL, text=True, preexec_fn=heed)

    child = start()
    logs = []
    deadline = time.monotonic() + 60
    while len(logs) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        logs = [log for log in folder.glob("comparison/runs/*seed1*/log.txt") if "pid" in log.read_text()]
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "interrupted: 2 of 4 runs have finished" in err
    assert "Traceback" not in err
    for log in logs:
        pid = int(log.read_text().partition("pid ")[2].split()[0])
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    ran(folder)
    # Not the same script: what was interrupted is repeated, and with it the rest.
    again = start()
    while not (lines := ran(folder)) and time.monotonic() < deadline + 30:
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=30)
    assert again.returncode == 143
    assert lines[0].endswith(" 1")
    assert "2 have finished before" in err


def test_jobs_gpus_variables_and_folders(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    where = "\nprint(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['SEED'], sys.argv[2:], os.getcwd())"
    (folder / "train.py").write_text(SCRIPT.replace("open(", "open('../' + ") + where + END)
    assert main(["compare", *ARMS, "--seeds", "1,5", *TOP1, "--gpus", "3,0+1", "--env", "SEED=s{seed}", "--in-output",
                 *COMMAND, "{output}", "{arm}", "{other}"]) == 0  # fmt: skip
    runs = report(folder)["runs"]
    said = {}
    for run in runs:
        gpu, seed, rest = (folder / run["log"]).read_text().splitlines()[-1].split(" ", 2)
        said[run["arm"], run["seed"]] = gpu
        own = os.path.join(os.path.dirname(run["log"]), "output")
        assert seed == f"s{run['seed']}"
        assert rest == f"{[own, run['arm'], '{other}']} {own}"
    assert set(said.values()) == {"3", "0,1"}
    # Two at a time share the cores.
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert runs[0]["variables"] == {"SEED": "s1", "CUDA_VISIBLE_DEVICES": said["plain", 1], "OMP_NUM_THREADS": threads}


@pytest.mark.drawn(days=3)
def test_submitit(folder, capsys):
    pytest.importorskip("submitit")
    assert main(["compare", *ARMS, "--seeds", "1", *TOP1, "--submitit", "cluster=local,timeout_min=2", *COMMAND]) == 0
    assert report(folder)["metrics"][0]["differences"][0]["verdict"] == "one seed"
    assert ran(folder) == ["plain 0", "relu 0"]
    assert main(["compare", *ARMS, "--seeds", "2", *TOP1, "--submitit", "cluster=local,timeot=2", *COMMAND]) == 2
    assert "lwpf: --submitit: " in capsys.readouterr().err
    assert ran(folder) == []


# --- what is refused ------------------------------------------------------------------------------------------------

BAD = {
    "no seed": ([*ARMS, *TOP1, "--", "train.py"], "has no place for the seed: write {seed} where it belongs"),
    "no command": ([*ARMS, *TOP1], "no command is given"),
    "no script": ([*ARMS, *TOP1, "--", "python", "tran.py", "{seed}"], "there is no script 'tran.py' in"),
    "a program": ([*ARMS, *TOP1, "--", "git", "{seed}"], "'git' is a program and no Python script"),
    "python -c": ([*ARMS, *TOP1, "--", "python", "-c", "{seed}"], "cannot be patched with '-c'"),
    "another python": ([*ARMS, *TOP1, "--", "/opt/x/bin/python", "train.py"], "begins with /opt/x/bin/python, but"),
    "one arm": (["--arm", "relu", *TOP1, *COMMAND], "needs two arms or more"),
    "an arm twice": ([*ARMS, "--arm", "relu", *TOP1, *COMMAND], "--arm 'relu' and --arm 'relu' cannot be told apart"),
    "no func_d": (["--arm", "plain", "--arm", "reul", *TOP1, *COMMAND], "unknown func_d 'reul' (from arm 'reul', "
                  "--func-d): allowed are none, pfu, relu; did you mean 'relu'?. An arm is 'plain', a func_d, or"),
    "no option": (["--arm", "plain", "--arm", "x: --fun-c relu", *TOP1, *COMMAND], "arm 'x' does not parse: "),
    "a wrong value": (["--arm", "plain", "--arm", "x: --masking no", *TOP1, *COMMAND],
                      "unknown masking 'no' (from arm 'x', --masking)"),
    "a script in an arm": (["--arm", "plain", "--arm", "x: --func-d relu y", *TOP1, *COMMAND], "'y' is no option"),
    "no such site": (["--arm", "plain", "--arm", "x: --include *none*", *TOP1, *COMMAND], "arm 'x': include pattern"),
    "the label plain": (["--arm", "relu", "--arm", "plain: --func-d relu", *TOP1, *COMMAND], "'plain' is the arm that"),
    "options of plain": (["--arm", "plain", "--arm", "x: plain --lr 1", *TOP1, *COMMAND],
                         "'--lr' stands behind 'plain'"),
    "no host": ([*ARMS, "--patch", "tim", *TOP1, *COMMAND], "unknown host 'tim' (from arm 'relu', --patch)"),
    "no baseline": ([*ARMS, "--baseline", "x", *TOP1, *COMMAND], "--baseline 'x' is none of the arms: plain, relu"),
    "no metric": ([*ARMS, *COMMAND], "no figure to compare is given"),
    "no group": ([*ARMS, "--metric", "top-1", *COMMAND], "has 0 groups: put the figure"),
    "no pattern": ([*ARMS, "--metric", "top-1: ([0-9", *COMMAND], "is no regular expression"),
    "which direction": ([*ARMS, "--metric", "eval_loss: (.*)", *COMMAND], "write --better lower behind it"),
    "a wrong direction": ([*ARMS, *TOP1, "--better", "lwoer", *COMMAND], "unknown better 'lwoer' (from --better)"),
    "a direction of nothing": ([*ARMS, "--value", "best", *TOP1, *COMMAND], "belongs to the --metric before it"),
    "a taken name": ([*ARMS, "--metric", "seed: (.*)", *COMMAND], "is called 'seed', as a column of runs.csv is"),
    "a new line": (["--arm", "plain", "--arm", "a\nb: --func-d relu", *TOP1, *COMMAND], "cannot be printed"),
    "no report": ([*ARMS, *TOP1, "--report-only", *COMMAND], "--report-only: there is no comparison in comparison"),
    "a metric twice": ([*ARMS, *TOP1, *TOP1, *COMMAND], "two metrics are called 'top-1'"),
    "one file for all": ([*ARMS, "--metric", "csv:out/summary.csv:top1", *COMMAND], "csv:{output}/summary.csv:top1"),
    "a time": ([*ARMS, *TOP1, "--time", "took", *COMMAND], "--time 'took' has 0 groups: put the figure"),
    "no column": ([*ARMS, "--metric", "csv:{output}/summary.csv", *COMMAND], "is not of the form csv:FILE:NAME"),
    "seeds": ([*ARMS, *TOP1, "--seeds", "3,3", *COMMAND], "--seeds '3,3': write how many"),
    "jobs": ([*ARMS, *TOP1, "--jobs", "0", *COMMAND], "--jobs 0 is not at least 1"),
    "gpus": ([*ARMS, *TOP1, "--gpus", "0,0", *COMMAND], "--gpus '0,0': name each GPU once"),
    "submitit": ([*ARMS, *TOP1, "--submitit", "partition", *COMMAND], "is not of the form name=value"),
    "a variable": ([*ARMS, *TOP1, "--env", "LWPF_PATCH=timm", *COMMAND], "--env 'LWPF_PATCH=timm' is not"),
    "output": ([*ARMS, *TOP1, "--output", "train.py/x", *COMMAND], "--output train.py/x cannot be written to"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_is_run(folder, capsys, case):
    arguments, message = BAD[case]
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert ran(folder) == []
    assert not (folder / "comparison").exists()


def test_settings_in_the_environment_are_refused(folder, capsys, monkeypatch):
    monkeypatch.setenv("LWPF_MASKING", "paper")
    assert main(["compare", *ARMS, *TOP1, *COMMAND]) == 2
    assert "LWPF_MASKING is set, and would reach no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("scipy", TOP1),
        ("tensorboard", ["--metric", "events:{output}:acc"]),
        ("submitit", [*TOP1, "--submitit", "cluster=local"]),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(folder, capsys, monkeypatch, missing, arguments):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    assert main(["compare", *ARMS, *arguments, *COMMAND]) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert "pip install 'lwpf_patch[compare]'" in error
    assert ran(folder) == []


def test_a_metric_that_never_matches_ends_the_comparison_at_the_first_run(folder, capsys):
    assert main(["compare", *ARMS, "--metric", "top-5: ([0-9.]+)", *COMMAND]) == 2
    error = capsys.readouterr().err
    assert "plain, seed 0, has finished, but --metric 'top-5: ([0-9.]+)' matches nothing in " in error
    assert "  | epoch 2: top-1: " in error
    assert ran(folder) == ["plain 0"]
    # Mended: the run is still there.
    assert main(["compare", *ARMS, "--seeds", "1", *TOP1, *COMMAND]) == 0
    assert ran(folder) == ["relu 0"]
    assert main(["compare", *ARMS, "--metric", "csv:{output}/*.csv:top1", *COMMAND]) == 2
    assert "output/*.csv is no file" in capsys.readouterr().err
    assert main(["compare", *ARMS, *TOP1, "--time", "hours: (.*)", *COMMAND]) == 2
    assert "plain, seed 0, has finished, but --time 'hours: (.*)' matches nothing in " in capsys.readouterr().err
    assert ran(folder) == []


def test_a_script_that_ignores_the_seed(folder, capsys):
    (folder / "train.py").write_text(SCRIPT.replace("int(sys.argv[1])", "7") + END)
    assert main(["compare", *ARMS, "--seeds", "5", *TOP1, *COMMAND]) == 2
    assert "seeds 0 and 1 of plain give the same figures throughout (15 digits)" in capsys.readouterr().err
    assert len(ran(folder)) == 3
    # Said once, it holds nobody up.
    assert main(["compare", *ARMS, "--seeds", "2", *TOP1, *COMMAND]) == 0
    assert "WARNING: seeds 0 and 1 of plain give the same figures" in capsys.readouterr().err
    assert ran(folder) == ["relu 7"]
    # A single figure may be the same by chance: it is said, and the comparison goes on.
    (folder / "train.py").write_text("import os, sys\nprint('top-1: 50', sys.argv)" + END)
    assert main(["compare", *ARMS, "--seeds", "2", *TOP1, *COMMAND]) == 0
    out, err = capsys.readouterr()
    assert "WARNING: seeds 0 and 1 of plain give the same figures" in err
    assert "NOTE: top-1 of plain is the same at all 2 seeds: either the script ignores the seed" in out


# --- arms and metrics -----------------------------------------------------------------------------------------------


def arms_of(*texts, controls=True):
    from lwpf_patch.cli import _parser
    from lwpf_patch.comparing.arms import read_arms

    run = _parser().parse_args(["run", "script.py"]).parser
    return {arm.label: arm for arm in read_arms(texts, run, "timm", controls)}


@pytest.mark.drawn(days=4)
def test_controls_have_the_parameters_and_no_stage_one():
    arms = arms_of("plain", "relu", "u: --uhop every=9 --func-d relu", "fixed: --uhop train=false",
                   "both: --uhop train=false --func-d pfu", "v: --uhop lr=1 --func-d relu", "w: --uhop on")  # fmt: skip
    assert list(arms) == ["plain", "relu", "u", "u (control)", "fixed", "both", "both (control)", "v", "w",
                          "w (control)"]  # fmt: skip
    control = arms["u (control)"]
    assert control.control_of == ("u", "v")  # which differ in Stage I alone
    assert arms["w (control)"].control_of == ("w",)
    assert control.settings == arms["u"].settings | {"uhop": control.settings["uhop"]}
    assert "iters=1,t=2,lr=1e-12" in control.settings["uhop"]
    assert "every" not in control.settings["uhop"]
    # A map that nothing trains stays the identity: the control is the arm without it, and plain is that of `fixed`.
    assert arms["both (control)"].settings == arms["both"].settings | {"uhop": None}
    assert "u (control)" not in arms_of("plain", "u: --uhop on", controls=False)
    # Where an arm gives the script more arguments, so does its control, and it shares none with an arm that does not.
    arms = arms_of("plain", "u: --uhop on", "deep: --uhop on -- --depth 9", "still: --uhop train=false -- --depth 9")
    assert list(arms) == ["plain", "u", "u (control)", "deep", "deep (control)", "still", "still (control)"]
    assert arms["deep (control)"].more == arms["still (control)"].more == ("--depth", "9")


def read(tmp_path, text, name="", content="", log=""):
    (tmp_path / "output").mkdir(exist_ok=True)
    (tmp_path / "log.txt").write_text(log)
    if name:
        (tmp_path / "output" / name).write_text(content)
    run = Run("plain", 0, "", tmp_path, (), {}, tmp_path, {"{output}": str(tmp_path / "output")})
    (metric,) = settle([read_metric(text)], False)
    series = metric.read(run)
    return metric.name, series.unit, dict(zip(series.steps, series.values, strict=True))


def test_metrics(tmp_path):
    summary = "epoch,train_loss,eval_top1\n0,2.0,50.5\n1,,60.0\n1,1.0,61.0\n2,nan,\n"
    assert read(tmp_path, "csv:{output}/*.csv:eval_top1", "summary.csv", summary) == (
        "eval_top1", "epoch", {0: 50.5, 1: 61.0},
    )  # fmt: skip
    data = json.dumps(
        {"final": {"acc": 0.5, "list": [0.1, 0.2]}, "epochs": [{"epoch": 3, "a": 1}, {"epoch": 6, "a": 2}]}
    )
    assert read(tmp_path, "json:{output}/r.json:final.acc", "r.json", data) == ("final.acc", "order", {1: 0.5})
    assert read(tmp_path, "json:{output}/r.json:final.list")[2] == {1: 0.1, 2: 0.2}
    assert read(tmp_path, "json:{output}/r.json:epochs.a")[1:] == ("epoch", {3: 1, 6: 2})
    assert read(tmp_path, "json:{output}/r.json:epochs.-1.a")[2] == {1: 2}
    lines = '{"step": 10, "m": {"acc": 1}}\n\n{"step": 20, "acc": 0.25}\n{"step": 30, "acc": 0.5}\n'
    assert read(tmp_path, "jsonl:{output}/r.jsonl:acc", "r.jsonl", lines)[1:] == ("step", {20: 0.25, 30: 0.5})
    assert read(tmp_path, "jsonl:{output}/r.jsonl:m.acc")[2] == {1: 1}
    log = "10%|#\r\x1b[1macc 0.5\x1b[0m 50%|##\racc 0.75, the end\r\nacc 1e-1.\n"
    assert read(tmp_path, r"^acc ([\d.e-]+)", log=log) == ("acc", "order", {1: 0.5, 2: 0.75, 3: 0.1})
    assert read(tmp_path, r"\* Acc@1 (\S+)", log="* Acc@1 7")[0] == "Acc@1"
    for text, message in [
        ("csv:{output}/summary.csv:top1", "finds no 'top1' in .*, which has 'epoch', 'train_loss', 'eval_top1'"),
        ("csv:{output}/*.*:top1", "several files"),
        ("json:{output}/r.json:final.x", "finds no 'final.x'"),
        ("acc (.*)", "is no number"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(tmp_path, text, log=log)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path / "output"))
    for step, value in enumerate([0.25, 0.5]):
        scalar = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag="val/acc", simple_value=value)])
        writer.add_event(event_pb2.Event(step=10 * step, summary=scalar))
    writer.close()
    assert read(tmp_path, "events:{output}:val/acc") == ("val/acc", "step", {0: 0.25, 10: 0.5})
    with pytest.raises(ValueError, match=r"finds no 'acc' in .*, which has 'val/acc'"):
        read(tmp_path, "events:{output}:acc")


# --- as people use it -----------------------------------------------------------------------------------------------

TRAIN = """
import argparse, os, timm, torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import update_summary

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--output")
options = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(options.seed)
model = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=2, embed_dim=8, depth=1, num_heads=2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
os.makedirs(os.path.join(options.output, "run"))
for epoch in range(3):
    images = torch.randn(16, 1, 8, 8)
    loss = torch.nn.functional.cross_entropy(model(images), (images.mean((1, 2, 3)) > 0).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_summary(epoch, {"loss": loss.item()}, {}, os.path.join(options.output, "run", "summary.csv"),
                   write_header=epoch == 0)
"""


@pytest.mark.drawn(days=5)
def test_a_network_of_timm(folder, capsys):
    require_host("timm")
    (folder / "train.py").write_text(TRAIN)
    assert main(["compare", "--arm", "plain", "--arm", "u: --func-d relu --uhop iters=2 --observe every=1",
                 "--seeds", "1", "--jobs", "2", "--metric", "csv:{output}/*/summary.csv:train_loss",
                 "--better", "lower",
                 "--", "python", "train.py", "--seed", "{seed}", "--output", "{output}"]) == 0  # fmt: skip
    err = capsys.readouterr().err
    assert "u: timm" in err
    assert "classes (lwpf status lists them) patched; func_d relu" in err
    data = report(folder)
    curves = {run["arm"]: run["curves"]["train_loss"] for run in data["runs"]}
    assert list(curves) == ["plain", "u", "u (control)"]
    assert curves["plain"]["unit"] == "epoch"
    first = {arm: curve["values"][0] for arm, curve in curves.items()}
    last = {arm: curve["values"][2] for arm, curve in curves.items()}
    assert first["u"] == first["u (control)"] != first["plain"]  # the map begins as the identity, ReLU forgets
    assert last["u"] != last["u (control)"]
    said = data["arms"][1]["said"]
    assert any("Stage I on timm after step 1" in line for line in said)
    assert any("observe: 1 layers in 3 samples" in line for line in said)
    assert not any("step 1: forgotten" in line for line in (*said, err))  # a line a sample would be too much
    (log,) = folder.glob("comparison/runs/u-seed0-*/log.txt")
    assert "lwpf_patch: step 1: forgotten" in log.read_text()
    # The control's Stage I is to move nothing, and is not warned of.
    (log,) = folder.glob("comparison/runs/u-control-seed0-*/log.txt")
    assert "it separated nothing" in log.read_text()
    assert not any("it separated nothing" in line for line in (*data["arms"][2]["said"], err))


def test_nothing_heavy_is_imported_by_the_command(python):
    out = python(
        "-c",
        "import sys, lwpf_patch.cli\n"
        "print([n for n in ('torch', 'numpy', 'scipy', 'matplotlib', 'tqdm', 'submitit') if n in sys.modules],"
        " sorted(n for n in sys.modules if n.startswith('lwpf_patch.comparing')))",
    )
    assert out.stdout == "[] ['lwpf_patch.comparing', 'lwpf_patch.comparing.command']\n"


def test_help_is_ascii_and_shows_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert text.isascii()
    assert "lwpf compare --arm plain --arm relu --seeds 5 --metric 'top-1: ([0-9.]+)'" in text
