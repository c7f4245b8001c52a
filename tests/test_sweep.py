"""Many runs from one grid, on this machine: each once, whoever is killed in between. What SLURM does with them is in test_slurm."""
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import TOP
from test_kill import assert_begins_like, assert_same

from tformer_lab.runs import jobs
from tformer_lab.runs.grid import combinations
from tformer_lab.runs.jobs import Job, code_version, key_of, plan_jobs
from tformer_lab.runs.pool import Pool, Slot, cores, shares
from tformer_lab.runs.progress import Board, Teller, board_table, look_at, summary
from tformer_lab.runs.store import Run, RunError, RunWriter, list_runs
from tformer_lab.runs.sweep import list_sweeps, main, open_sweep, sweep
from tformer_lab.storage import FileError
from tformer_lab.training.fit import fit, resumed
from tformer_lab.training.parameters import ParameterError

pytestmark = pytest.mark.timeout(1800)  # a deadlock has to end, too
NOTEBOOK = TOP / "nbs/train.ipynb"
SMALL = {"steps": 50, "length": 8, "batch_size": 8, "test_size": 4, "checkpoints": 4}
LONG = {**SMALL, "steps": 240, "checkpoints": 12, "save_minutes": .002}
PATIENCE = 900  # seconds that something may take where nothing else is running; it takes a few

TASKS = '''
import os
import time
from pathlib import Path

import numpy as np
import torch

from tformer_lab.tasks.recall import Recall


class Paused(Recall):
    """Learns as slowly as PAUSE says."""
    name = "paused"
    def loss(self, model, batch):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return super().loss(model, batch)


class Stuck(Recall):
    """Hears nothing once it trains."""
    name = "stuck"
    def loss(self, model, batch):
        while True: time.sleep(1)


class Failing(Recall):
    """Cannot be learnt before there is a cure."""
    name = "failing"
    def loss(self, model, batch):
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        if self.count > 20 and not Path(os.environ["CURE"]).exists(): raise ValueError("this cannot be learnt")
        return super().loss(model, batch)


class Counted(Recall):
    """Leaves a line for each training."""
    name = "counted"
    def model(self, data=None):
        with open(os.environ["COUNT"], "a") as file: file.write(f"{self.noise}\\\\n")
        return super().model(data)


class Leaking(Recall):
    """Sets what belongs to the whole process, prints, and reads."""
    name = "leaking"
    def model(self, data=None):
        print("leaking", end=" ")
        try: input()
        except EOFError: print("nothing to read")
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        np.random.seed(0)
        return super().model(data)


class Clean(Recall):
    """Prints without an end of the line."""
    name = "clean"
    def model(self, data=None):
        print("clean", self.noise, end=" ")
        return super().model(data)


class Dying(Recall):
    """Takes its process with it."""
    name = "dying"
    def model(self, data=None): os._exit(7)
'''.replace("\\\\n", "\\n")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder with a user's tasks, in which everything runs; what Jupyter writes for itself stays in it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "own_tasks.py").write_text(TASKS)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"): patch.setenv(name, str(folder / name))
        for name in ("TFORMER_RUNS", "PAUSE", "CUDA_VISIBLE_DEVICES"): patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        patch.setenv("CURE", str(folder / "cure"))
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        yield folder


def notebook(path, *cells, parameters):
    """A notebook; its cell of parameters comes after the first of its cells."""
    first, *others = [nbformat.v4.new_code_cell(source) for source in cells]
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[first, tagged, *others], metadata=kernel), path)
    return path


@pytest.fixture(scope="module")
def light(place):
    """A user's own notebook that trains, and draws nothing."""
    return notebook(place / "light.ipynb", "from tformer_lab.training.fit import fit, prepare\nfrom tformer_lab.training.parameters import NotebookParameters\ngiven = NotebookParameters(globals())",
                    "job = prepare(given.given())\nrun = fit(job.task, job.trainer, runs_dir=runs_dir, name=job.name, resume=job.resume)",
                    parameters='task = "recall"\nruns_dir = None\nname = None\nresume = None')


class Command:
    """A `tformer-sweep` of its own."""
    def __init__(self, runs, *arguments, folder=None, **env):
        folder = folder or runs.parent
        self.runs, self.log = runs, folder / f"{runs.name}.{time.monotonic_ns()}.log"
        own = {**os.environ, "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), **{name: str(value) for name, value in env.items()}}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([Path(sys.executable).with_name("tformer-sweep"), *map(str, arguments), "--runs-dir", runs], env=own,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored where the tests run in a shell's background

    def said(self): return self.log.read_text()

    def until(self, happened):
        """Until something is so, while it runs."""
        end = time.monotonic() + PATIENCE
        while not (found := happened()):
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(.02)
        return found

    def end(self):
        """Its exit status."""
        self.process.wait(PATIENCE)
        return self.process.returncode

    def jobs(self): return {job.name: job for path in self.runs.glob("jobs/*/job.json") for job in [Job(self.runs, path.parent.name)]}

    def trained(self, count=1):
        """The jobs whose runs have a checkpoint, once they are enough."""
        found = [job for job in self.jobs().values() if list(job.run_path.glob("spectra/*4.safetensors"))]
        return found if len(found) >= count else None


def command(runs, *arguments, **env):
    """A sweep to its end: exit status, and what it said."""
    running = Command(runs, *arguments, **env)
    return running.end(), running.said()


def given(parameters):
    return [part for name, value in parameters.items() for part in ("-p", name, str(value))]


def processes_of(folder):
    """Those that work in a folder, kernels among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in part for part in process.cmdline()): found.append(process)
        except psutil.Error: pass
    return found


def nothing_is_left(folder):
    end = time.monotonic() + PATIENCE
    while left := processes_of(folder):
        if time.monotonic() > end: return [(process.pid, process.cmdline()) for process in left]
        time.sleep(.1)
    return True


@pytest.fixture(autouse=True)
def end_what_is_left(tmp_path):
    """A test that fails leaves nothing behind."""
    yield
    for process in processes_of(tmp_path): process.kill()


def comes_to_stand(job, status):
    """Whose process is not a child of this one lets go of its lock some time after it is seen no more."""
    end = time.monotonic() + PATIENCE
    while job.status != status and time.monotonic() < end: time.sleep(.05)
    return job.status == status


def files(folder):
    """Every file's bytes and time, but for the list of the sweep's jobs."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file() and path.parent.name != "sweeps"}


def unbroken(run, folder, task=None):
    """The same run, in one go."""
    known = folder / "unbroken" / run.name
    return Run(known) if known.exists() else fit(*resumed(run, task), runs_dir=known.parent, name=run.name, progress=False)


def plan(runs, grid, source=None):
    """Jobs of trainings, written as a sweep writes them."""
    found = plan_jobs(source, combinations(grid), runs)
    for job, parameters in found.items(): job.set_plan(None if source is None else str(source), parameters, trains=True)
    return list(found)


def in_turn(wanted, **how):
    """Run jobs in one slot."""
    Pool([Slot(share, in_process=True, **how) for share in shares(1, gpus=0)], say=lambda text: None).run(wanted)


# What was done is done

@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A sweep of four, one after another in two slots: of these one diverges, and one has a task that raises."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "grid.yaml").write_text(yaml.safe_dump({"notebook": str(NOTEBOOK), "slots": 2, "name": "first", "parameters": [{"lr": [.5, .1, "1e30"], **SMALL}, {"task": "own_tasks:Failing", **SMALL}]}))
    code, said = command(folder / "runs", "-f", folder / "grid.yaml")
    found = {("failing" if "task" in parameters else parameters["lr"]): job for job, parameters in open_sweep("first", folder / "runs").jobs.items()}
    return code, said, folder, found


def test_each_run_has_its_own_process_and_its_executed_notebook(first):
    code, said, folder, found = first
    assert {name: job.status for name, job in found.items()} == {.5: "done", .1: "done", 1e30: "failed", "failing": "failed"}, said
    assert len({job.said["pid"] for job in found.values()}) == 4
    assert len({Run(job.run_path).status_details["pid"] for job in found.values()}) == 4  # kernels
    for lr in (.5, .1):
        run = Run(found[lr].run_path)
        assert (run.status, len(run.metrics), run.config["trainer"]["lr"]) == ("done", 51, lr)
        assert f"done at step 50: {run.path}" in found[lr].notebook.read_text()
    assert not processes_of(folder)


def test_failed_run_keeps_its_notebook_and_traceback_and_stops_no_other(first):
    code, said, folder, found = first
    assert code == 1
    for name, error, line in ((1e30, "FloatingPointError: train/loss is", "run = fit("), ("failing", "ValueError: this cannot be learnt", 'raise ValueError("this cannot be learnt")')):
        job = found[name]
        outputs = [output for cell in nbformat.read(job.notebook, 4).cells for output in cell.get("outputs", []) if output.output_type == "error"]
        assert job.said["error"].startswith(error) and Run(job.run_path).status == "failed"
        assert [output.ename for output in outputs] == [error.split(":")[0]] and line.partition("(")[0] in re.sub(r"\x1b\[[\d;]*m", "", "\n".join(outputs[0].traceback))
        assert error in (job.folder / "log.txt").read_text() and error in said


def test_log_file_has_the_failures_a_line_a_minute_and_the_end(first):
    code, said, folder, found = first
    lines = said.splitlines()
    assert [line for line in lines if "failed, " in line and ": failed" in line] and "\x1b" not in said
    assert lines[-1] == "first: 2 done, 2 failed" and lines[-2] == "2 done · 2 failed"
    assert sum(": failed, " in line for line in lines) == 2


def test_repeated_sweep_starts_no_process_and_touches_no_file(first):
    code, said, folder, found = first
    before = files(folder / "runs")
    again, said = command(folder / "runs", "-f", folder / "grid.yaml")
    assert (again, files(folder / "runs")) == (1, before), said


def test_only_what_failed_is_tried_again_and_only_if_asked(first, place):
    code, said, folder, found = first
    before = {lr: (files(found[lr].folder), files(found[lr].run_path)) for lr in (.5, .1)}
    (place / "cure").touch()
    again, said = command(folder / "runs", "-f", folder / "grid.yaml", "--retry")
    assert {name: job.status for name, job in found.items()} == {.5: "done", .1: "done", 1e30: "failed", "failing": "done"}, said
    assert again == 1 and said.splitlines()[-2:] == ["3 done · 1 failed", "first: 3 done, 1 failed"]
    assert {lr: (files(found[lr].folder), files(found[lr].run_path)) for lr in (.5, .1)} == before
    import own_tasks
    assert_same(Run(found["failing"].run_path), unbroken(Run(found["failing"].run_path), folder, own_tasks.Failing))


def test_in_process_gives_the_records_of_the_notebook(first, tmp_path):
    code, said, folder, found = first
    again = sweep(NOTEBOOK, {"lr": [.5, .1], **SMALL}, runs_dir=tmp_path / "runs", in_process=True, slots=1, progress=False)
    assert [job.name for job in again.jobs] == [found[lr].name for lr in (.5, .1)]
    assert len({job.said["pid"] for job in again.jobs}) == 1  # many runs in one process
    for job in again.jobs:
        mine, its = Run(job.run_path), Run(folder / "runs" / job.name)
        assert_same(mine, its)
        assert {**mine.config, "created": None} == {**its.config, "created": None}
        assert not job.notebook.exists()


def test_torchs_own_optimizers_share_a_process_too(tmp_path):
    found = sweep(None, {"lr": [.1, .2], "optimizer": "adam", **SMALL}, runs_dir=tmp_path, in_process=True, slots=1, progress=False)
    assert found.counts() == {"done": 2} and len({job.said["pid"] for job in found.jobs}) == 1  # the first sets a variable of the environment


def test_runs_of_a_sweep_are_runs_as_any_others(first):
    code, said, folder, found = first
    table = list_runs(folder / "runs")
    assert sorted(table["run"]) == sorted(job.name for job in found.values()) and "unreadable" not in set(table["status"])


# Processes that are killed

def test_killed_job_and_killed_kernel_stop_no_other_and_go_on_bit_for_bit(light, tmp_path):
    grid = given({"task": "own_tasks:Paused", "noise": "0,0.1,0.2", **LONG})
    running = Command(tmp_path / "runs", light, *grid, "--slots", 3, PAUSE=.05)
    one, two, three = running.until(lambda: running.trained(3))
    [kernel] = psutil.Process(two.said["pid"]).children()
    os.kill(one.said["pid"], signal.SIGKILL)
    kernel.kill()
    assert running.end() == 3, running.said()
    assert (one.status, one.said["error"]) == ("stopped", "its process was ended by SIGKILL")
    assert (two.status, three.status) == ("stopped", "done") and "the kernel died" in two.said["error"]
    assert nothing_is_left(tmp_path) is True
    assert {Run(job.run_path).status for job in (one, two)} == {"interrupted"}

    import own_tasks
    kept = files(three.folder), files(three.run_path)
    for job in (one, two): assert_begins_like(Run(job.run_path), unbroken(Run(job.run_path), tmp_path, own_tasks.Paused))
    code, said = command(tmp_path / "runs", light, *grid, "--slots", 2)
    assert code == 0 and {job.status for job in (one, two, three)} == {"done"}, said
    assert (files(three.folder), files(three.run_path)) == kept
    for job in (one, two, three): assert_same(Run(job.run_path), unbroken(Run(job.run_path), tmp_path, own_tasks.Paused))


def test_killed_server_is_replaced_and_its_run_goes_on_bit_for_bit(tmp_path):
    grid = given({"task": "own_tasks:Paused", "noise": "0,0.1,0.2", **LONG})
    running = Command(tmp_path / "runs", "--in-process", *grid, "--slots", 1, PAUSE=.02)
    [one] = running.until(lambda: running.trained())
    os.kill(one.said["pid"], signal.SIGKILL)
    assert running.end() == 3, running.said()
    others = [job for job in running.jobs().values() if job != one]
    assert (one.status, one.said["error"], [job.status for job in others]) == ("stopped", "its process was ended by SIGKILL", ["done"] * 2)
    assert len({job.said["pid"] for job in others}) == 1 and nothing_is_left(tmp_path) is True
    code, said = command(tmp_path / "runs", "--in-process", *grid)
    assert code == 0, said
    import own_tasks
    for job in (one, *others): assert_same(Run(job.run_path), unbroken(Run(job.run_path), tmp_path, own_tasks.Paused))


def test_task_that_ends_its_process_stops_no_other(tmp_path):
    dying, well = plan(tmp_path, [{"task": "own_tasks:Dying", **SMALL}, SMALL])
    in_turn([dying, well])
    assert (dying.status, dying.said["error"], well.status) == ("stopped", "its process ended with status 7", "done")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("in_process", [False, True])
def test_interrupted_sweep_lets_its_runs_save_and_the_same_command_goes_on(light, tmp_path, number, in_process):
    grid = [light, *given({"task": "own_tasks:Paused", "noise": "0,0.1,0.2", **LONG}), *(["--in-process"] if in_process else [])]
    running = Command(tmp_path / "runs", *grid, "--slots", 2, PAUSE=.05)
    running.until(lambda: running.trained(2))
    running.process.send_signal(number)
    assert running.end() == 3 and "the same command goes on" in running.said(), running.said()
    assert not processes_of(tmp_path)
    found = list(running.jobs().values())
    assert sorted(job.status for job in found) == ["stopped", "stopped", "waiting"]
    for job in found[:]:
        if job.status == "stopped": assert Run(job.run_path).status == "stopped" and Run(job.run_path).status_details["step"] == len(Run(job.run_path).metrics) > 0
    if number == signal.SIGTERM: return  # it goes on in the same way
    code, said = command(tmp_path / "runs", *grid, "--slots", 2)
    assert code == 0, said
    import own_tasks
    for job in found: assert_same(Run(job.run_path), unbroken(Run(job.run_path), tmp_path, own_tasks.Paused))


@pytest.mark.parametrize("in_process", [False, True])
def test_second_interrupt_ends_at_once_what_does_not_hear(light, tmp_path, in_process):
    running = Command(tmp_path / "runs", light, *given({"task": "own_tasks:Stuck", **SMALL}), *(["--in-process"] if in_process else []))
    running.until(lambda: list(running.runs.glob("*/spectra/00000000.safetensors")))
    running.process.send_signal(signal.SIGINT)
    running.until(lambda: "once more to end it at once" in running.said())
    time.sleep(.5)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 3 and not processes_of(tmp_path), running.said()
    [job] = running.jobs().values()
    assert job.status == "stopped" and job.said["error"] == "its process was ended by SIGKILL"


@pytest.mark.parametrize("in_process", [False, True])
def test_runs_of_a_killed_sweep_notice_it_and_save(light, tmp_path, in_process):
    grid = [light, *given({"task": "own_tasks:Paused", **LONG, "steps": 4000}), *(["--in-process"] if in_process else [])]
    running = Command(tmp_path / "runs", *grid, PAUSE=.05)
    [job] = running.until(lambda: running.trained())
    running.process.kill()
    running.process.wait()
    assert nothing_is_left(tmp_path) is True and comes_to_stand(job, "stopped")
    run = Run(job.run_path)
    assert run.status == "stopped" and 0 < run.status_details["step"] == len(run.metrics) < 4000


def test_job_that_has_only_begun_to_start_when_its_sweep_is_killed_ends(light, tmp_path):
    running = Command(tmp_path / "runs", light, *given({"task": "own_tasks:Paused", **LONG, "steps": 4000}), PAUSE=.05)
    running.until(lambda: [process for process in processes_of(tmp_path) if "tformer_lab.runs.jobs" in process.cmdline()])
    running.process.kill()
    running.process.wait()
    assert nothing_is_left(tmp_path) is True
    [job] = running.jobs().values()
    assert not job.is_held() or comes_to_stand(job, "stopped")


def test_kernel_ends_quickly_and_loses_nothing_that_a_notebook_left_open(tmp_path):
    cells = [f"import atexit\nleft = open({str(tmp_path / 'left.txt')!r}, 'w')\nleft.write('kept')\natexit.register(lambda: open({str(tmp_path / 'last.txt')!r}, 'w').write('told'))",
             "sorted(name for name in globals() if not name.startswith('_'))"]
    notebook(tmp_path / "open.ipynb", *cells, parameters="x = 1")
    jobs.execute(tmp_path / "open.ipynb", tmp_path / "out.ipynb", {})
    assert (tmp_path / "left.txt").read_text() == "kept" and (tmp_path / "last.txt").read_text() == "told"
    names = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].data["text/plain"]
    assert "'left'" in names and not any(f"'{name}'" in names for name in ("os", "sys", "gc", "end"))  # what runs before a notebook leaves no names in it


@pytest.mark.parametrize("in_process", [False, True])
def test_run_that_does_not_hear_ends_some_time_after_its_sweep(light, tmp_path, in_process):
    [job] = plan(tmp_path / "runs", {"task": "own_tasks:Stuck", **SMALL}, light)
    child = f"from tformer_lab.runs import jobs\njobs._PATIENCE = .5\njobs.main({[str(tmp_path / 'runs'), job.name, *(['--in-process'] if in_process else [])]})"
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nsys.stdin.read()"], stdin=subprocess.PIPE)
    end = time.monotonic() + PATIENCE
    while not list(job.run_path.glob("spectra/00000000.safetensors")) and time.monotonic() < end: time.sleep(.02)
    assert job.status == "running"
    parent.communicate(b"")
    assert nothing_is_left(tmp_path) is True and comes_to_stand(job, "stopped")


def test_stopped_slot_starts_nothing_more(tmp_path):
    [job] = plan(tmp_path, SMALL)
    for in_process in (True, False):
        slot = Slot(shares(1, gpus=0)[0], in_process)
        slot.stop()  # the pool was stopped after it had taken a job for this slot, and before the job began
        assert (slot.run(job), slot.process, job.status) == ("stopped", None, "waiting")


# Kernels

def test_32_kernels_two_at_a_time_find_their_sockets(place, tmp_path):
    source = notebook(tmp_path / "tiny.ipynb", "pass", "square = x * x\nsquare", parameters="x = 0")
    found = sweep(source, {"x": range(32)}, runs_dir=tmp_path / "runs", slots=2, progress=False)
    assert found.counts() == {"done": 32}, found.table().to_string()
    results = {parameters["x"]: nbformat.read(job.notebook, 4).cells[-1].outputs[0].data["text/plain"] for job, parameters in found.jobs.items()}
    assert results == {x: str(x * x) for x in range(32)}
    assert not processes_of(tmp_path) and not list(Path(os.environ["JUPYTER_RUNTIME_DIR"]).glob("kernel-*.json"))


def test_kernel_starts_where_temporary_files_have_long_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 60) / ("y" * 60)))
    os.makedirs(os.environ["TMPDIR"])
    source = notebook(tmp_path / "tiny.ipynb", "pass", "x", parameters="x = 0")
    found = sweep(source, {}, runs_dir=tmp_path / "runs", slots=1, progress=False)
    assert found.counts() == {"done": 1}, found.table().to_string()


def test_any_notebook_with_parameters_is_run_and_what_fails_in_it_stops_no_other(place, tmp_path):
    source = notebook(tmp_path / "any.ipynb", "import os", 'inverse = 1 / x\nprint(inverse, os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"])', parameters="x = 1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
        found = sweep(source, {"x": [0, 2, 4]}, runs_dir=tmp_path / "runs", threads=3, progress=False)
    zero, two, four = found.jobs
    assert (zero.status, zero.said["error"], two.status, four.status) == ("failed", "ZeroDivisionError: division by zero", "done", "done")
    assert "ZeroDivisionError" in zero.notebook.read_text() and not zero.run_path.exists()
    for job, inverse in ((two, "0.5"), (four, "0.25")):
        said = nbformat.read(job.notebook, 4).cells[-1].outputs[0].text.split()
        assert said[:2] == [inverse, "3"] and said[2] in ("3", "GPU-5")
    with pytest.raises(ParameterError, match="there is no parameter 'y'"): sweep(source, {"y": 1}, runs_dir=tmp_path / "runs", progress=False)
    with pytest.raises(ParameterError, match="does not train"): sweep(source, {"x": 1}, runs_dir=tmp_path / "runs", in_process=True, dry_run=True)


def test_notebook_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "some.ipynb"
    for text, error in (("{", "is no notebook"), ("[]", "is no notebook"), ('{"cells": [5]}', "is no notebook"), ('{"cells": []}', "has no cell with the tag 'parameters'")):
        path.write_text(text)
        with pytest.raises(FileError, match=error): sweep(path, {"x": 1}, runs_dir=tmp_path / "runs")
    with pytest.raises(FileError, match="its cell of parameters sets nothing"): sweep(notebook(path, "pass", "x", parameters="x <- 1"), {"x": 1}, runs_dir=tmp_path / "runs")
    for source in ("%matplotlib inline\nx = 1", "x = "):
        with pytest.raises(FileError, match="should be assignments in Python"): sweep(notebook(path, "pass", "x", parameters=source), {"x": 1}, runs_dir=tmp_path / "runs")
    with pytest.raises(FileError, match="there is no notebook"): sweep(tmp_path / "none.ipynb", {"x": 1}, runs_dir=tmp_path / "runs")
    assert [found.name for found in tmp_path.iterdir()] == ["some.ipynb"]


def test_training_notebook_that_makes_no_run_has_failed(place, tmp_path):
    names = 'task = "recall"\nruns_dir = None\nname = None\nresume = None'
    raising = notebook(tmp_path / "raising.ipynb", "pass", 'raise OSError("no data here")', parameters=names)
    silent = notebook(tmp_path / "silent.ipynb", "pass", "'nothing'", parameters=names)
    for source, error in ((raising, "OSError: no data here"), (silent, "the notebook came to its end, and made no run of the name that it was given")):
        found = sweep(source, SMALL, runs_dir=tmp_path / "runs", slots=1, progress=False)
        [job] = found.jobs
        assert job.status == "failed" and job.said["error"].startswith(error) and job.notebook.exists() and not job.run_path.exists()


# A full disk

@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of a few megabytes; where none can be mounted the test is skipped, in CI it fails."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        if os.environ.get("CI"): pytest.fail(f"CI has to be able to mount a small disk: {mounted.stderr}")
        pytest.skip("no small disk can be mounted here")
    yield folder
    for process in processes_of(folder): process.kill()
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk):
    """Take all that is left."""
    with open(disk / "ballast", "ab", buffering=0) as ballast:
        for size in (65536, 4096, 1):
            try:
                while ballast.write(bytes(size)): pass
            except OSError: pass


@pytest.mark.parametrize("in_process", [False, True])
def test_full_disk_loses_nothing_and_with_room_the_sweep_goes_on(light, tiny_disk, tmp_path, in_process):
    grid = [light, *given({"task": "own_tasks:Paused", "noise": "0,0.1", **LONG}), "--slots", 1, *(["--in-process"] if in_process else [])]
    running = Command(tiny_disk / "runs", *grid, folder=tmp_path, PAUSE=.03)
    [job] = running.until(lambda: [job for job in running.trained() or [] if (job.run_path / "state.pt").exists()])
    fill(tiny_disk)
    assert running.end() == 3, running.said()
    other = next(other for other in running.jobs().values() if other != job)
    assert (job.status, other.status) in [("stopped", "stopped"), ("stopped", "waiting")] and nothing_is_left(tmp_path) is True, running.said()
    assert "Traceback" not in running.said()
    import own_tasks
    whole = unbroken(Run(job.run_path), tmp_path, own_tasks.Paused)
    assert_begins_like(Run(job.run_path), whole)
    (tiny_disk / "ballast").unlink()
    code, said = command(tiny_disk / "runs", *grid, folder=tmp_path)
    assert code == 0, said
    assert_same(Run(job.run_path), whole)
    assert_same(Run(other.run_path), unbroken(Run(other.run_path), tmp_path, own_tasks.Paused))
    assert not [path for path in tiny_disk.rglob("*.tmp")]


def test_sweep_that_cannot_be_written_down_says_so(tiny_disk, capsys):
    fill(tiny_disk)
    assert main(["--in-process", "--runs-dir", str(tiny_disk / "runs"), *given(SMALL)]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said


def test_run_whose_end_cannot_be_written_is_let_go(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "one")
    writer = RunWriter(run)
    with monkeypatch.context() as patch:
        patch.setattr("tformer_lab.runs.store.write_atomically", lambda *given, **how: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError): writer.close()
        with pytest.raises(OSError): Run.create(tmp_path / "two")
    assert run.status == "interrupted"
    RunWriter(run).close()


def test_cut_notebook_does_not_take_the_place_of_a_whole_one(tmp_path, monkeypatch):
    source = notebook(tmp_path / "tiny.ipynb", "pass", "x", parameters="x = 0")
    (tmp_path / "out").mkdir()
    whole = shutil.copy(source, tmp_path / "out/notebook.ipynb")
    class Full:
        def execute_notebook(self, source, output, *given, **how):
            Path(output).write_text('{"cells": [')
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(jobs, "_papermill", Full)
    with pytest.raises(OSError): jobs.execute(source, Path(whole), {})
    assert Path(whole).read_bytes() == source.read_bytes() and [path.name for path in (tmp_path / "out").iterdir()] == ["notebook.ipynb"]


# Several sweeps

def test_two_sweeps_over_one_grid_train_each_run_once(tmp_path):
    grid = ["--in-process", "--slots", 1, *given({"task": "own_tasks:Counted", "noise": "0,0.1,0.2,0.3,0.4,0.5", **SMALL})]
    both = [Command(tmp_path / "runs", *grid, COUNT=tmp_path / "count") for _ in range(2)]
    for one in both: assert one.end() == 0 and one.said().splitlines()[-1].endswith(": 6 done"), one.said()
    assert sorted((tmp_path / "count").read_text().split()) == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]


def test_what_another_sweep_leaves_unfinished_is_taken_over(tmp_path):
    grid = ["--in-process", "--slots", 1, *given({"task": "own_tasks:Paused", **LONG})]
    one = Command(tmp_path / "runs", *grid, PAUSE=.05)
    [job] = one.until(lambda: one.trained())
    other = Command(tmp_path / "runs", *grid)
    other.until(lambda: "1 running" in other.said())
    one.process.send_signal(signal.SIGTERM)
    assert (one.end(), other.end()) == (3, 0), other.said()
    import own_tasks
    assert_same(Run(job.run_path), unbroken(Run(job.run_path), tmp_path, own_tasks.Paused))


# Before anything starts

def test_grid_with_an_invalid_combination_starts_and_writes_nothing(tmp_path, capsys):
    wrong = ["-p", "lr", "0.1,-1", "-p", "lenght", "8", "-p", "attention", "softmax,sofmax"]
    assert main([str(NOTEBOOK), *wrong, "--runs-dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tformer-sweep: 4 of 4 combinations cannot be, so nothing was started\n{'lr': 0.1, 'lenght': 8, 'attention': 'softmax'} and 3 more:\n")
    assert said.count("there is no parameter 'lenght'; did you mean 'length'?") == 1 and not list(tmp_path.iterdir())
    assert main([str(NOTEBOOK), "-p", "lr", "0.1,-1", "-p", "attention", "softmax,sofmax", "--runs-dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "3 of 4 combinations" in said and "{'lr': -1, 'attention': 'softmax'}:\n  lr = -1: it should be greater than 0" in said
    assert "{'lr': 0.1, 'attention': 'sofmax'} and 1 more:\n  attention = 'sofmax'" in said and "did you mean 'softmax'?" in said
    assert main([str(NOTEBOOK), "-p", "lr", ",".join(f"-{i}" for i in range(1, 31)), "--runs-dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert said.count("should be greater than 0") == 20 and said.endswith("and 10 more problems\n") and not list(tmp_path.iterdir())


REFUSED = {
    "a name twice": (["-p", "lr", "0.1", "-p", "lr", "0.5"], "lr is given twice"),
    "a condition on nothing": (["-p", "kappa", "0,1", "--only", "kappa"], "--only kappa: where?"),
    "a condition with another name": (["-p", "kappa", "0,1", "--only", "kappa", "parametrisation=origin"], "names 'parametrisation', which is not in the grid"),
    "seeds twice": (["-p", "seed", "1,2", "--seeds", "3"], "seeds are given twice"),
    "no seeds": (["--seeds", "0"], "seeds = 0: it should be how many"),
    "an empty list": (["-p", "lr", "[]"], "lr = []: it should be a value, or a list with one or more"),
    "half a list": (["-p", "lr", "[0.1"], "'[0.1' is no list"),
    "a place": (["-p", "runs_dir", "elsewhere"], "runs_dir is for the sweep to give"),
    "a run's name": (["-p", "name", "mine"], "name is for the sweep to give"),
    "a run to resume": (["-p", "resume", "runs/mine"], "resume is for the sweep to give"),
    "a task that is not": (["-p", "task", "own_tasks:Missing"], "task 'own_tasks:Missing' cannot be imported"),
    "a path as name": (["--name", "../../elsewhere"], "'../../elsewhere' is no name"),
    "an empty name": (["--name", "."], "'.' is no name"),
    "no slots": (["--slots", "0"], "slots = 0: it should be a whole number, 1 or more"),
    "more GPUs than there are": (["--gpus", "7"], "gpus = 7: this machine has 0 for a job"),
    "an option of a cluster": (["--partition", "gpu"], "partition is for executor = 'slurm'"),
    "an executor": (["--executor", "pbs"], "executor = 'pbs': it should be 'local' or 'slurm'"),
    "a tracker": (["--tracking", "wandb"], "tracking = 'wandb': it should be 'mlflow'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_command_refuses(what, tmp_path, monkeypatch, capsys):
    arguments, expected = REFUSED[what]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--in-process", *arguments, "--runs-dir", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.startswith("tformer-sweep: ") and not said.out and not list(tmp_path.iterdir())


WRONG_FILES = {
    "no mapping": ("- lr", "it should be a mapping, with the grid under 'parameters'"),
    "no YAML": ("a: [", "is no YAML"),
    "another name": ("parametres: {lr: 0.1}", "there is no parameter 'parametres'; did you mean 'parameters'?"),
    "parameters that are none": ("parameters: 5", "parameters = 5: it should be a mapping from names to values, or a list of such"),
    "a grid that is none": ("parameters: [5]", "a grid is 5: it should be a mapping"),
    "no grid": ("parameters: []\nin_process: true", None),
    "a number as name": ("name: 2024", "name = 2024: it should be a string"),
    "a number as folder": ("runs_dir: 5", None),
    "a number as notebook": ("notebook: 5", "notebook = 5: it should be a string"),
    "conditions in a list": ("parameters: {kappa: [0, 1]}\nonly: [kappa]", "only = ['kappa']: it should be a mapping"),
    "a condition that is none": ("parameters: {kappa: [0, 1]}\nonly: {kappa: origin}", "the condition on 'kappa' is ['origin']: it should be a mapping"),
    "a date": ("parameters: {lr: 2024-01-01}", "lr = datetime.date(2024, 1, 1): it should be a number, a string"),
    "no slots": ("slots: two", "slots = 'two': it should be a whole number"),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_file_that_is_wrong_is_refused(what, tmp_path, capsys):
    text, expected = WRONG_FILES[what]
    (tmp_path / "grid.yaml").write_text(text)
    where = [] if what == "a number as folder" else ["--runs-dir", str(tmp_path / "runs")]
    code = main(["--in-process", "--dry-run", "-f", str(tmp_path / "grid.yaml"), *where])
    said = capsys.readouterr()
    if what == "no grid": assert (code, said.out.splitlines()[-1]) == (0, "1 runs, of which 1 are to be run")  # as without parameters: the defaults
    else: assert code == 2 and (expected or "runs_dir = 5: it should be a string") in said.err and "Traceback" not in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_dry_run_lists_the_combinations_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(f"notebook: {NOTEBOOK}\nparameters:\n  parametrization: [origin, reparam]\n  kappa: [0, 1]\n  lr: 1e-1\nseeds: [3, 7]\nonly:\n  kappa: {{parametrization: origin}}\n")
    assert main(["-f", str(tmp_path / "grid.yaml"), "-p", "steps", "50", "--dry-run", "--runs-dir", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "waiting    parametrization=origin kappa=0 lr=0.1 steps=50 seed=3" and lines[-1] == "6 runs, of which 6 are to be run"
    assert lines[2] == "waiting    parametrization=reparam lr=0.1 steps=50 seed=3" and sum("seed=7" in line for line in lines) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


def test_dry_run_counts_what_a_retry_would_run(first, capsys):
    code, said, folder, found = first
    for more in ([], ["--retry"]):
        assert main(["-f", str(folder / "grid.yaml"), "--runs-dir", str(folder / "runs"), "--dry-run", *more]) == 0
        failed = sum(job.status == "failed" for job in found.values())
        assert capsys.readouterr().out.splitlines()[-1] == f"4 runs, of which {failed if more else 0} are to be run"


def test_command_takes_what_its_arguments_say_before_its_file(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text("in_process: true\nparameters: {lr: [0.1, 0.2], steps: 10}\nseeds: 2\nonly: {kappa: {attention: relu}}")
    assert main(["-f", str(tmp_path / "grid.yaml"), "-p", "lr", "0.5", "-p", "kappa", "0", "-p", "attention", "linear,relu", "--only", "kappa", "lr=0.5", "--seeds", "5", "--dry-run", "--runs-dir", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "waiting    lr=0.5 steps=10 kappa=0 attention=linear seed=0" and lines[-1] == "10 runs, of which 10 are to be run"


def test_command_that_is_called_leaves_its_callers_signals_alone(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--list", "--runs-dir", str(tmp_path)]) == 0 and signal.getsignal(signal.SIGTERM) is before


def test_task_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "local_tasks.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    code, said = command(tmp_path / "runs", "--in-process", *given({"task": "local_tasks:Clean", **SMALL}))
    assert code == 0, said


def test_sweeps_that_were_begun_are_listed_and_looked_at(first, capsys):
    code, said, folder, found = first
    where = ["--runs-dir", str(folder / "runs")]
    assert main(["--list", *where]) == 0 and capsys.readouterr().out.split() == ["first"]
    assert main(["--status", "first", *where]) == 0
    table = capsys.readouterr().out
    assert table.split()[:2] == ["lr", "task"] and len(table.splitlines()) == 5 and "1e+30" in table
    for name, expected in (("frist", "there is no sweep 'frist'"), ("../../first", "is no name")):
        for look in ("--status", "--cancel"): assert main([look, name, *where]) == 2 and expected in capsys.readouterr().err


def test_local_sweep_has_nothing_to_cancel(first, capsys):
    code, said, folder, found = first
    assert main(["--cancel", "first", "--runs-dir", str(folder / "runs")]) == 0 and capsys.readouterr().out == "0 jobs cancelled\n"


# Keys

def key(given, source=NOTEBOOK):
    [job] = plan_jobs(source, [given], "runs")
    return job.name.rpartition("-")[2]


def test_key_is_that_of_the_result(place, tmp_path):
    mine = key(SMALL)
    for same in ({"seed": 0}, {"attention": "softmax"}, {"lr": .5}, {"lr": None}, {"task": "recall"}, {"time_limit": 5}, {"save_minutes": 2}, {"layerwise": False}): assert key({**SMALL, **same}) == mine
    for other in ({"seed": 1}, {"steps": 51}, {"attention": "relu"}, {"lr": .51}, {"checkpoints": 5}, {"keep_weights": False}, {"precision": "float64"}): assert key({**SMALL, **other}) != mine
    assert key(dict(reversed(SMALL.items()))) == mine


def test_key_changes_with_the_code_of_the_notebook_and_of_a_users_task(place, tmp_path, monkeypatch):
    copy = Path(shutil.copy(NOTEBOOK, tmp_path / "other_name.ipynb"))
    assert key(SMALL, copy) == key(SMALL)
    for source, changes in (("markdown", False), ("code", True)):
        changed = nbformat.read(NOTEBOOK, 4)
        next(cell for cell in changed.cells if cell.cell_type == source).source += "\n1"
        nbformat.write(changed, copy)
        assert (key(SMALL, copy) != key(SMALL)) == changes
    import own_tasks
    before = key({"task": "own_tasks:Clean"})
    assert before != key({}) and before != key({"task": "own_tasks:Paused"})
    with monkeypatch.context() as patch:
        (tmp_path / "own_tasks.py").write_text(TASKS + "\n# changed")
        patch.setattr(own_tasks, "__file__", str(tmp_path / "own_tasks.py"))
        assert key({"task": "own_tasks:Clean"}) != before
    assert key({"task": "own_tasks:Clean"}) == before
    assert key_of({"lr": 1}, code_version()) != key_of({"lr": 1}, code_version(NOTEBOOK))


def test_task_that_only_this_process_knows_is_refused(monkeypatch):
    import own_tasks

    from tformer_lab.tasks.task import TASKS as known
    monkeypatch.setitem(known, "clean", own_tasks.Clean)
    with pytest.raises(ParameterError, match="only this process knows it by that name"): key({"task": "clean"})


def test_numbers_of_numpy_are_numbers_in_a_notebook(tmp_path):
    source = notebook(tmp_path / "tiny.ipynb", "pass", "x", parameters="x = 0")
    found = sweep(source, {"x": [np.int64(3), np.float64(.5), torch.tensor(2)]}, runs_dir=tmp_path / "runs", dry_run=True, progress=False)
    assert [(type(value), value) for parameters in found.jobs.values() for value in parameters.values()] == [(int, 3), (float, .5), (int, 2)]
    assert len(sweep(source, {"x": np.arange(3)}, runs_dir=tmp_path / "runs", dry_run=True, progress=False).jobs) == 3
    for value in (object(), [Path("x")], lambda: 1):
        with pytest.raises(ParameterError, match="x = .*: it should be a number, a string"): sweep(source, {"x": value}, runs_dir=tmp_path / "runs", dry_run=True)


# Names and files of others

@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "-x", ".hidden", "a\0b", "a\nb", "x" * 201, "/etc/passwd"])
def test_name_that_would_be_a_path_is_refused(name, tmp_path):
    for use in (lambda: Job(tmp_path, name), lambda: open_sweep(name, tmp_path), lambda: sweep(None, SMALL, name=name or "/", runs_dir=tmp_path / "runs", in_process=True, progress=False)):
        with pytest.raises(RunError, match="is no name"): use()
    assert not list(tmp_path.iterdir())


STATUS_FILES = ["", "{", "[]", "5", "null", '"done"', "\xff", "[" * 100_000, '{"status": 5}', '{"status": ["done"]}', '{"status": "dnoe"}', '{"status": "done"}', '{"status": "running"}',
                '{"status": "stopped", "error": 5, "seconds": "x", "pid": [], "slurm": {}, "started": 1}', '{"status": "failed", "error": {"a": 1}, "seconds": null}']


@pytest.mark.parametrize("text", STATUS_FILES, ids=range(len(STATUS_FILES)))
def test_damaged_status_is_not_the_end_of_a_sweep(text, tmp_path):
    job, other = plan(tmp_path, {"lr": [.1, .2], **SMALL})
    for name in ("status.json", "slurm.json"): (job.folder / name).write_bytes(text.encode("latin-1"))
    assert job.status in ("waiting", "stopped", "failed") and other.status == "waiting"
    board = Board([job, other])
    assert sum(board.counts().values()) == 2 and summary(board, 1) and len(board_table(board, {job: {}, other: {}})) == 2
    Teller(board, {job: {}, other: {}}, 1, io.StringIO()).tell([job], last=True)


def test_damaged_files_are_written_anew(tmp_path):
    grid = {"lr": [.1, .2, .3], **SMALL}
    one, two, three = plan(tmp_path, grid)
    (one.folder / "status.json").write_text("{")
    (two.folder / "job.json").write_text('{"notebook": 5, "parameters": [], "trains": "yes"}')
    (three.folder / "job.json").unlink()
    (three.folder / "job.json").mkdir()
    found = sweep(None, {"lr": [.1, .2], **SMALL}, runs_dir=tmp_path, in_process=True, slots=1, progress=False)
    assert found.counts() == {"done": 2} and one.plan["parameters"] == {"lr": .1, **SMALL}
    assert three.plan == {} and three.status == "waiting"


def test_job_without_a_plan_is_stopped_with_the_reason(tmp_path):
    one, two = plan(tmp_path, {"lr": [.1, .2], **SMALL})
    (one.folder / "job.json").write_text("{}")
    in_turn([one, two])
    assert (one.status, two.status) == ("stopped", "done") and "job.json is damaged" in one.said["error"] and not one.run_path.exists()


def test_plan_of_a_job_leads_to_no_other_folder(tmp_path):
    [job] = plan(tmp_path / "runs", SMALL)
    job.set_plan(None, {**SMALL, "runs_dir": str(tmp_path / "elsewhere"), "name": "x"}, trains=True)
    assert jobs.run_job(job, in_process=True) == "done" and job.run_path.is_dir() and [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_damaged_run_is_looked_at(tmp_path):
    [job] = plan(tmp_path, SMALL)
    job.run_path.mkdir()
    for config, metrics in (("a: [", ""), ("5", ""), ("trainer: 5", ""), ("trainer: {steps: many}", '{"step": "x", "train/loss": []}\n'), ("trainer: {}", "5\n[1]\n{\n")):
        (job.run_path / "config.yaml").write_text(config)
        (job.run_path / "metrics.jsonl").write_text(metrics)
        look = look_at(job)
        assert (look.status, look.step, look.loss) == ("waiting", None, None)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"jobs": 5}', '{"jobs": ["x"]}', '{"jobs": {"../../x": {}}}', '{"jobs": {"x": 5}}', '{"jobs": {"x": null}}', "{}"])
def test_damaged_list_of_jobs_is_named(text, tmp_path, capsys):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/mine.json").write_text(text)
    with pytest.raises(FileError): open_sweep("mine", tmp_path)
    assert main(["--status", "mine", "--runs-dir", str(tmp_path)]) == 2 and capsys.readouterr().err.startswith("tformer-sweep: ")
    assert list_sweeps(tmp_path) == ["mine"]


# Many runs in one process

def test_nothing_leaks_from_one_run_to_the_next_in_a_process(tmp_path):
    leaking, *clean = plan(tmp_path, [{"task": "own_tasks:Leaking", **SMALL}, {"task": "own_tasks:Clean", "noise": [0, .25], **SMALL}, SMALL])
    in_turn([leaking, *clean])
    assert [job.status for job in (leaking, *clean)] == ["done"] * 4, (leaking.folder / "log.txt").read_text()
    pids = [job.said["pid"] for job in (leaking, *clean)]
    assert len(set(pids)) == 2 and pids[1:] == [pids[1]] * 3  # a new process after what leaked, and no other
    recall = Run(clean[-1].run_path)
    assert {weights.dtype for weights in recall.checkpoints[50].values()} == {torch.float32}
    assert_same(recall, unbroken(recall, tmp_path))
    logs = [(job.folder / "log.txt").read_text() for job in (leaking, *clean)]
    assert "nothing to read" in logs[0] and "clean" not in logs[0]  # what it reads is not the name of the next job
    assert [log.split() for log in logs[1:]] == [["clean", "0.0"], ["clean", "0.25"], []]


def test_failed_run_fails_alone_in_its_process(tmp_path):
    bad, *good = plan(tmp_path, [{"lr": 1e30, **SMALL}, {"lr": [.1, .2], **SMALL}])
    in_turn([bad, *good])
    assert [job.status for job in (bad, *good)] == ["failed", "done", "done"] and len({job.said["pid"] for job in (bad, *good)}) == 1
    assert bad.said["error"].startswith("FloatingPointError: train/loss is") and "Traceback" in (bad.folder / "log.txt").read_text()


# A slot's share

def test_slots_share_the_machine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-b,7,2,")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares()] == ["4", "GPU-b", "7", "2"]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(gpus=2)] == ["4,GPU-b", "7,2"]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(slots=2)] == ["4", "GPU-b"]
    assert {share["OMP_NUM_THREADS"] for share in shares(slots=1, threads=5)} == {"5"} and {share["OMP_NUM_THREADS"] for share in shares()} == {str(max(1, cores() // 4))}
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(gpus=0)] == [""] * cores()
    for wrong, message in (({"gpus": 5}, "this machine has 4 for a job"), ({"slots": 5}, "has room for 4"), ({"slots": 3, "gpus": 2}, "with 2 GPUs a job, this machine has room for 2"), ({"threads": True}, "threads = True")):
        with pytest.raises(ParameterError, match=message): shares(**wrong)
    for none in ("", "-1", " "):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert len(shares()) == cores() and "CUDA_VISIBLE_DEVICES" not in shares()[0]
    assert Slot({"OMP_NUM_THREADS": "3"}).env["OMP_NUM_THREADS"] == "3" and Slot({}).env["PATH"] == os.environ["PATH"]


# Progress

def test_log_says_one_line_a_minute_and_each_failure(tmp_path):
    waiting, failing = plan(tmp_path, {"lr": [.1, .2], **SMALL})
    board, out = Board([waiting, failing]), io.StringIO()
    teller = Teller(board, {waiting: {"lr": .1}, failing: {"lr": .2}}, 1, out)
    for _ in range(100): teller.tell(board.refresh())
    assert out.getvalue() == "2 waiting\n"
    failing.say("failed", error="ValueError: no")
    for _ in range(100): teller.tell(board.refresh())
    assert out.getvalue() == "2 waiting\nlr=0.2: failed, ValueError: no\n"
    teller.every = 0
    teller.tell(board.refresh())
    for job in (failing, waiting):  # the one by a retry
        Run.create(job.run_path)
        job.say("done")
    teller.tell(board.refresh(), last=True)
    assert out.getvalue().splitlines()[2:] == ["1 waiting · 1 failed", "2 done"]


def screen(text):
    """What a terminal shows in the end."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d*[FJ]|\r*\n)", text):
        if re.fullmatch(r"\x1b\[\d+F", part):
            keep = max(len(lines) - 1 - int(part[2:-1]), 0)
        elif part == "\x1b[J": lines = lines[:keep] + [""]
        elif part.strip("\r") == "\n": lines.append("")
        else: lines[-1] += part
    return [line for line in lines if line]


def test_terminal_replaces_its_lines(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([Path(sys.executable).with_name("tformer-sweep"), "--in-process", "--slots", "1", "--name", "seen", "--runs-dir", tmp_path, *given({"task": "own_tasks:Failing,own_tasks:Paused", **LONG})],
                               stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "CURE": str(tmp_path / "none"), "PAUSE": ".02"})
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096): said += part
    except OSError: pass  # so a terminal says that nobody writes to it any more
    os.close(ours)
    assert process.wait() == 1
    text = said.decode()
    assert text.count("\x1b[J") > 0 and "1 running" in text
    assert screen(text) == ["task=own_tasks:Failing: failed, step 19 of 240, train/loss " + re.search(r"step 19 of 240, train/loss (\S+),", text)[1] + ", ValueError: this cannot be learnt", "1 done · 1 failed", "seen: 1 done, 1 failed"]


def test_word_in_between_leaves_no_stale_line(tmp_path):
    [job] = plan(tmp_path, SMALL)
    out = io.StringIO()
    out.isatty = lambda: True
    board = Board([job])
    teller = Teller(board, {job: {"lr": .1}}, 1, out)
    teller.tell()
    teller.note("stopping")
    teller.tell(last=True)
    assert screen(out.getvalue()) == ["stopping", "1 waiting"]


def test_table_fills_in_a_notebook(place, tmp_path):
    from nbclient import NotebookClient
    source = f"from tformer_lab.runs.sweep import sweep\nsweep(None, {{'lr': [.1, .2, 1e30], **{LONG}}}, runs_dir={str(tmp_path / 'runs')!r}, in_process=True, slots=1)"
    cells = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    seen = []

    class Hearing(NotebookClient):
        def process_message(self, message, cell, index):
            seen.append((message["msg_type"], message["content"]))
            return super().process_message(message, cell, index)

    Hearing(cells, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [kind for kind, content in seen]
    assert kinds.count("display_data") == 1 and kinds.count("update_display_data") >= 1
    [shown] = [output for output in cells.cells[0].outputs if output.output_type == "display_data"]
    assert "2 done · 1 failed" in shown.data["text/html"] and shown.data["text/html"].count("<tr") == 4 and "FloatingPointError" in shown.data["text/html"]
    assert len(json.dumps(cells.cells[0].outputs)) < 20_000 and "2 done, 1 failed" in json.dumps(cells.cells[0].outputs[-1])
