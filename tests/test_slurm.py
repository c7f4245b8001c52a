"""A real SLURM, and what is submitted to it."""
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import yaml
from conftest import TOP
from test_kill import assert_same

from tformer_lab.runs import slurm as slurm_module
from tformer_lab.runs.jobs import Job
from tformer_lab.runs.slurm import QueuedJob, queued
from tformer_lab.runs.store import Run
from tformer_lab.runs.sweep import main, open_sweep, sweep
from tformer_lab.training.fit import fit

pytestmark = pytest.mark.timeout(1800)  # a deadlock has to end, too


def belonging(home):
    """The living processes of a cluster, by name: its daemons, what a job's command is run by, and what it runs."""
    def is_of(process):
        environment = process.environ()
        if environment.get("SUBMITTED_TO") == str(home): return True
        if not process.name().startswith(("slurm", "munge")): return False
        sockets = {connection.laddr for connection in process.net_connections("unix")}  # a slurmstepd has written over its environment
        return environment.get("SLURM_CONF") == f"{home}/slurm.conf" or any(str(socket).startswith(f"{home}/") for socket in sockets)

    found = []
    for process in psutil.process_iter():
        try: found += [process.name()] if process.status() != psutil.STATUS_ZOMBIE and is_of(process) else []
        except psutil.Error: continue
    return found


def sbatch(command, *options):
    """The number of a job that runs a command, submitted to the cluster that `SLURM_CONF` names."""
    done = subprocess.run(["sbatch", "--parsable", *options, "--wrap", command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_submitted_command_runs_and_ends(slurm, tmp_path):
    job = sbatch("echo on $SLURM_JOB_ID in $PWD", f"--chdir={tmp_path}", "--output=said")
    assert slurm.wait(job) == "COMPLETED"
    assert (tmp_path / "said").read_text() == f"on {job} in {tmp_path}\n"


def test_failing_command_is_told_from_one_that_ends_well(slurm, tmp_path):
    assert slurm.wait(sbatch("exit 3", f"--chdir={tmp_path}", "--output=said")) == "FAILED"


def test_array_of_functions_runs_through_submitit(slurm, tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.SlurmExecutor(folder=tmp_path / "submitit")
    executor.update_parameters(time=5, partition="low", array_parallelism=2, stderr_to_stdout=True)
    jobs = executor.map_array(divmod, (7, 8, 9), (2, 3, 4))
    assert [job.result() for job in jobs] == [(3, 1), (2, 2), (2, 1)]
    assert {slurm.wait(job.job_id) for job in jobs} == {"COMPLETED"}  # a result is there before its job has ended


# The cluster itself

TESTS = """
import os, subprocess, sys, time

def test_that_submits_a_job(slurm):
    subprocess.run(["sbatch", "--output=/dev/null", f"--export=ALL,SUBMITTED_TO={{slurm.home}}", "--wrap", {job!r}], check=True)
    sys.stdin.readline()
    {end}
"""
STUBBORN = "trap '' TERM; while :; do sleep 1; done"
EVERY_PROCESS = {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"}


@pytest.mark.parametrize("end, job", [("assert False", STUBBORN), ("os.kill(os.getpid(), 9)", "sleep 600"), ("os.killpg(0, 2); time.sleep(60)", "sleep 600")],
                         ids=["failed", "killed", "interrupted"])
def test_tests_leave_no_process_of_their_cluster_however_they_end(slurm, tmp_path, end, job):
    (tmp_path / "test_it.py").write_text(TESTS.format(end=end, job=job))
    options = ["-s", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir=.", "--basetemp=base", "test_it.py"]
    tests = subprocess.Popen([sys.executable, "-m", "pytest", *options], stdin=subprocess.PIPE, start_new_session=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(TOP / "tests")})
    home = tmp_path / "base/slurm0/home"
    try:
        wait_for(lambda: tests.poll() is not None or EVERY_PROCESS <= set(belonging(home)))  # at once: between two sleeps there is none
        assert tests.poll() is None
    finally: tests.communicate(b"go on\n", 60)
    assert tests.returncode != 0
    deadline = time.monotonic() + (30 if tests.returncode == -9 else 0)
    while (left := belonging(home)) and time.monotonic() < deadline: time.sleep(.1)
    assert left == []
    assert slurm.process.poll() is None and {"munged", "slurmctld", "slurmd"} <= set(belonging(slurm.home))  # the other has nothing to do with it


# Sweeps

SMALL = {"steps": 50, "length": 8, "batch_size": 8, "test_size": 4, "checkpoints": 5, "task": "gated:Gated"}
LRS = [.1, .2, .3, .4, .5]
TASK = '''
import os
import time
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from tformer_lab.tasks.recall import Recall


def is_slow(tag):
    """Some trainings take long in their first lives, or until their gate is opened."""
    lives = {"slow": 1, "slow twice": 2}.get(tag.partition(" by ")[0], 0)
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) < lives and not (Path(os.environ["GATES"]) / tag).exists()


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Gated(Recall):
    tag: str = ""

    def loss(self, model, batch):
        if is_slow(self.tag): time.sleep(3 if self.tag == "slow by limit" else .5)
        if self.tag == "broken" and not (Path(os.environ["GATES"]) / self.tag).exists(): raise RuntimeError("broken on purpose")
        return super().loss(model, batch)
'''
CELLS = [([], """
import os, time
from tformer_lab.training.fit import fit, prepare
from tformer_lab.training.parameters import NotebookParameters
parameters = NotebookParameters(globals())
"""), (["parameters"], """
task = "recall"
runs_dir = None
name = None
resume = None
"""), ([], """
job = prepare(parameters.given())
run = fit(job.task, job.trainer, runs_dir=runs_dir, name=job.name, resume=job.resume)
"""), ([], """
while job.task.tag == "plotting" and "SLURM_RESTART_COUNT" not in os.environ: time.sleep(.1)
""")]


class Cluster:
    """A SLURM with a folder for sweeps, the task that they train, and the notebook that does it."""
    def __init__(self, slurm, folder):
        self.slurm, self.folder, self.runs, self.submitit, self.gates = slurm, folder, folder / "runs", folder / "submitit", folder / "gates"
        self.gates.mkdir()
        (folder / "gated.py").write_text(TASK)
        self.notebook = folder / "small.ipynb"
        cells = [nbformat.v4.new_code_cell(source.strip(), metadata={"tags": tags}) for tags, source in CELLS]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), self.notebook)

    def sweep(self, tags=("",), notebook=None, **given):
        """A sweep of one run a tag; without the notebook where none is given."""
        how = {"executor": "slurm", "runs_dir": self.runs, "in_process": notebook is None, "time": 10, "progress": False} | given
        return sweep(notebook, {**SMALL, "tag": list(tags)}, **how)

    def command(self, *arguments):
        """The exit status of tformer-sweep."""
        before = signal.getsignal(signal.SIGTERM)
        try: return main([*arguments, "--runs-dir", str(self.runs)])
        finally: signal.signal(signal.SIGTERM, before)

    def start(self, *arguments, **env):
        """tformer-sweep as a process of its own, which says what it does in a file."""
        with open(self.folder / "said", "w") as said: return subprocess.Popen([Path(sys.executable).with_name("tformer-sweep"), *arguments, "--runs-dir", self.runs], stdout=said, stderr=said, env=os.environ | env)

    def said(self): return (self.folder / "said").read_text()

    def fit(self, runs, **given):
        """What a run is without SLURM."""
        import gated
        given = {name: value for name, value in {**SMALL, **given}.items() if name != "task"}
        own = {name: given.pop(name) for name in ("length", "test_size")}
        return fit(gated.Gated(**own), runs_dir=self.folder / runs, progress=False, **given)


@pytest.fixture(scope="module")
def cluster(slurm, tmp_path_factory):
    found = Cluster(slurm, tmp_path_factory.mktemp("sweeps"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(found.folder)
        own = {"PYTHONPATH": found.folder, "TFORMER_SUBMITIT": found.submitit, "GATES": found.gates, "IPYTHONDIR": found.folder / "ipython", "JUPYTER_RUNTIME_DIR": found.folder / "jupyter",
               "SUBMITTED_TO": slurm.home}
        for name, value in own.items(): patch.setenv(name, str(value))
        yield found
        subprocess.run(["scancel", "--quiet", "--user=root"])


def shown(job):
    """What SLURM says of a job, by name."""
    id = job.said["slurm"] if isinstance(job, Job) else job
    said = subprocess.run(["scontrol", "--oneliner", "show", "job", id], check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[\w/:]+=|\s*$)", said.splitlines()[0]))


def by_tag(found): return {parameters["tag"]: job for job, parameters in found.jobs.items()}


def statuses(found): return {tag: job.status for tag, job in by_tag(found).items()}


def ids(found): return [job.said["slurm"] for job in found.jobs]


def steps_of(job):
    """How many steps of its training are recorded."""
    path = job.run_path / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(happened, seconds=1500):
    """Until something has; the machine may be busy."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        if time.monotonic() > deadline: raise TimeoutError("it did not happen")
        time.sleep(.2)
    return found


def scancel(*arguments): subprocess.run(["scancel", *arguments], check=True)


def python_processes(cluster): return [name for name in belonging(cluster.slurm.home) if name.startswith("python")]


@pytest.fixture(scope="module")
def unbroken(cluster): return cluster.fit("unbroken")


# Submitting: held jobs, which SLURM does not run

@pytest.fixture
def held(cluster):
    """Sweeps whose jobs wait until they are cancelled."""
    found = []
    def submit(*arguments, slurm={}, wait=False, **given):
        found.append(cluster.sweep(*arguments, slurm={"hold": True, **slurm}, wait=wait, runs_dir=cluster.folder / "held", **given))
        return found[-1]
    yield submit
    for one in found: one.cancel()


def test_what_is_asked_for_reaches_slurm(held, cluster):
    node = subprocess.run(["sinfo", "--noheader", "--format=%n"], check=True, capture_output=True, text=True).stdout.split()[0]
    subprocess.run(["scontrol", "update", f"NodeName={node}", "AvailableFeatures=lab", "ActiveFeatures=lab"], check=True)
    found = held(["a", "b"], name="asked", partition="high", account="physics", time="3h", mem="2G", cpus=2, gpus=1, constraint="lab", at_once=1, slurm={"comment": "two words", "nice": 7, "exclusive": False})
    there = shown(by_tag(found)["a"])
    expected = {"JobName": "asked", "Partition": "high", "Account": "physics", "TimeLimit": "03:00:00", "MinMemoryNode": "2G", "CPUs/Task": "2", "TresPerNode": "gres:gpu:1", "Features": "lab",
                "ArrayTaskThrottle": "1", "Comment": "two words", "Nice": "7", "Requeue": "1", "ArrayTaskId": "0"}
    assert {name: there.get(name) for name in expected} == expected


def test_environment_of_a_surrounding_job_is_not_handed_on(held, cluster, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "9000", "SLURM_MEM_PER_CPU": "8000", "SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "5", "SBATCH_NO_REQUEUE": "1", "SBATCH_ACCOUNT": "mine"}.items(): monkeypatch.setenv(name, value)
    there = shown(by_tag(held(partition="low"))[""])
    assert {name: there[name] for name in ("Partition", "TimeLimit", "Requeue", "Account")} == {"Partition": "low", "TimeLimit": "00:10:00", "Requeue": "1", "Account": "mine"}
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_sweep_larger_than_an_array_is_several(held, monkeypatch):
    monkeypatch.setattr(slurm_module, "_largest_array", lambda: 2)
    found = held(["a", "b", "c"])
    arrays = {id.partition("_")[0] for id in ids(found)}
    assert len(set(ids(found))) == 3 and len(arrays) == 2 and statuses(found) == dict.fromkeys("abc", "submitted")


def test_what_sbatch_refuses_is_said_and_nothing_counts_as_submitted(cluster, capsys):
    assert cluster.command("--in-process", *(part for name, value in SMALL.items() for part in ("-p", name, str(value))), "--executor", "slurm", "--partition", "nowhere", "--name", "refused") == 2
    assert "invalid partition specified: nowhere" in capsys.readouterr().err
    assert open_sweep("refused", cluster.runs).counts() == {"waiting": 1}


def test_repeated_sweep_submits_nothing_that_is_in_the_queue(held, cluster, capsys):
    first = held(["a", "b"])
    before = ids(first)
    again = held(["a", "b", "c"], progress=True)
    assert "1 jobs submitted, 2 were in the queue" in capsys.readouterr().out
    assert ids(again)[:2] == before and len(set(ids(again))) == 3 == len(queued_for(again))


def queued_for(found):
    """What is in the queue of a sweep, by its number there."""
    return {id: state for id, state in queued().items() if id in ids(found)}


def test_two_that_submit_at_once_submit_each_job_once(held, cluster):
    before = set(queued())
    arguments = ["--in-process", *(part for name, value in SMALL.items() for part in ("-p", name, str(value))), "-p", "tag", "a,b,c,d", "--executor", "slurm", "--slurm", "hold=True", "--no-wait"]
    both = [cluster.start(*arguments, "--name", name) for name in ("one", "other")]
    assert [process.wait(600) for process in both] == [0, 0]
    found = open_sweep("one", cluster.runs)
    assert set(queued()) - before == set(ids(found)) and len(ids(found)) == 4 and statuses(found) == dict.fromkeys("abcd", "submitted")
    assert found.cancel() == 4


def test_waiting_jobs_can_be_cancelled_by_name(cluster, capsys):
    found = cluster.sweep(["a", "b"], name="cancelled", slurm={"hold": True}, wait=False)
    assert cluster.command("--status", "cancelled") == 0
    assert capsys.readouterr().out.count("submitted") == 2
    assert cluster.command("--cancel", "cancelled") == 0
    assert "2 jobs cancelled" in capsys.readouterr().out
    assert found.counts() == {"stopped": 2} and queued_for(found) == {}
    assert cluster.command("--cancel", "cancelled") == 0
    assert "0 jobs cancelled" in capsys.readouterr().out


def test_jobs_that_are_cancelled_by_hand_count_as_stopped(cluster):
    found = cluster.sweep(["a", "b"], slurm={"hold": True}, wait=False)
    assert found.counts() == {"submitted": 2}
    scancel(*ids(found))
    assert found.counts() == {"stopped": 2} and list(found.table()["status"]) == ["stopped"] * 2


def test_pickles_are_private_and_outside_of_the_runs(held, cluster):
    found = held(["a"])
    assert stat.S_IMODE(cluster.submitit.stat().st_mode) == 0o700
    assert list(cluster.submitit.glob("*.pkl")) and not list(found.runs_dir.rglob("*.pkl"))


# Waiting

BROKEN_SQUEUE = """#!/bin/sh
if [ -e {down} ]; then echo asked >> {down}; echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; fi
exec {squeue} "$@"
"""


def test_waiting_outlasts_a_controller_that_is_away_and_an_interrupted_one_is_taken_up_again(cluster, capsys):
    down, squeue = cluster.folder / "down", cluster.folder / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text(BROKEN_SQUEUE.format(down=down, squeue=shutil.which("squeue")))
    squeue.chmod(0o755)
    arguments = ["--in-process", *(part for name, value in SMALL.items() for part in ("-p", name, str(value))), "-p", "tag", "awaited", "--executor", "slurm", "--slurm", "hold=True", "--name", "awaited"]
    waiting = cluster.start(*arguments, PATH=f"{squeue.parent}{os.pathsep}{os.environ['PATH']}")
    wait_for(lambda: "1 submitted" in cluster.said())
    down.touch()
    wait_for(lambda: down.read_text().count("asked") > 1)
    down.unlink()
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(600) == 3
    assert "the jobs stay in the queue" in cluster.said() and "--cancel awaited" in cluster.said()
    found = open_sweep("awaited", cluster.runs)
    assert found.counts() == {"submitted": 1} and list(queued_for(found).values()) == ["PENDING"]
    subprocess.run(["scontrol", "release", *ids(found)], check=True)
    assert cluster.command(*arguments) == 0
    assert "0 jobs submitted, 1 were in the queue" in capsys.readouterr().out


# Running

@pytest.fixture(scope="module")
def six(cluster):
    """A sweep of six through papermill, one of which fails; how it was then; and the same after that one was mended."""
    arguments = [str(cluster.notebook), "--file", str(cluster.folder / "six.yaml"), "--executor", "slurm", "--time", "10", "--name", "six"]
    (cluster.folder / "six.yaml").write_text(yaml.safe_dump({"parameters": [{**SMALL, "lr": LRS}, {**SMALL, "lr": .6, "tag": "broken"}]}))
    code = cluster.command(*arguments)
    found = open_sweep("six", cluster.runs)
    before = [(job.said, job.notebook.read_text()) for job in found.jobs]
    again = cluster.command(*arguments), [job.said for job in found.jobs]
    (cluster.gates / "broken").touch()
    mended = cluster.command(*arguments, "--retry")
    there = [(cluster.slurm.wait(said["slurm"], 600), shown(said["slurm"])) for said, _ in before]
    return SimpleNamespace(sweep=found, code=code, said=[said for said, _ in before], notebook=before[-1][1], ended=[state for state, _ in there], there=[there for _, there in there], again=again, mended=mended)


def test_sweep_is_one_array(six):
    assert len({there["ArrayJobId"] for there in six.there}) == 1
    assert [there["ArrayTaskId"] for there in six.there] == list("012345")


def test_run_that_fails_keeps_its_notebook_and_traceback_and_leaves_the_others_alone(six):
    assert six.code == 1 and six.ended == ["COMPLETED"] * 5 + ["FAILED"]
    assert [said["status"] for said in six.said] == ["done"] * 5 + ["failed"] and six.said[-1]["error"] == "RuntimeError: broken on purpose"
    outputs = [output for cell in json.loads(six.notebook)["cells"] for output in cell.get("outputs", []) if output["output_type"] == "error"]
    assert outputs[-1]["evalue"] == "broken on purpose" and "gated.py" in "".join(outputs[-1]["traceback"])


def test_repeated_sweep_submits_nothing_that_is_done_or_failed(six):
    code, said = six.again
    assert code == 1 and said == six.said


def test_retried_sweep_submits_what_failed_and_nothing_else(six):
    assert six.mended == 0 and six.sweep.counts() == {"done": 6}
    assert [job.said == said for job, said in zip(six.sweep.jobs, six.said)] == [True] * 5 + [False]


def test_records_equal_those_of_a_local_run(six, cluster):
    for i, job in enumerate(six.sweep.jobs): assert_same(Run(job.run_path), cluster.fit(f"local{i}", lr=[*LRS, .6][i]))


def test_unreadable_status_is_the_affair_of_one_job(six, cluster):
    done, torn, *_ = six.sweep.jobs
    (torn.folder / "status.json").write_text('{"status": "do')
    (torn.folder / "slurm.json").write_bytes(b"\xff")
    (torn.folder / "job.json").write_text("[]")
    before = done.said
    assert six.sweep.counts() == {"done": 5, "stopped": 1}
    assert cluster.command(str(cluster.notebook), "--file", str(cluster.folder / "six.yaml"), "--executor", "slurm", "--time", "10", "--quiet") == 0
    assert six.sweep.counts() == {"done": 6} and done.said == before


def is_loading(job):
    """Is the job's first process at work, and not yet ready to hear a signal?"""
    def is_of(process):
        command, own = process.cmdline(), process.environ()
        return "submitit.core._submit" in command and "-c" not in command and job.said.get("slurm") == f"{own.get('SLURM_ARRAY_JOB_ID')}_{own.get('SLURM_ARRAY_TASK_ID')}"
    for process in psutil.process_iter():
        try:
            if is_of(process): return job.status == "submitted"
        except psutil.Error: continue
    return False


def limit(job):
    """Give a running job a minute more, or two, of its ten, and then have its limit as it was."""
    set_to = lambda minutes: ["scontrol", "update", f"JobId={job.said['slurm']}", f"TimeLimit={minutes}"]
    subprocess.run(set_to(2 + int(shown(job)["RunTime"].split(":")[1])), check=True)
    return lambda: shown(job)["Restarts"] == "1" and subprocess.run(set_to(10), check=True)


ACTIONS = { # by tag: when, and what is done to the job then
    "slow by limit": (lambda job: steps_of(job) > 2, limit),
    "loading": (is_loading, ["scancel", "--signal=USR2"]),
    "importing": (lambda job: job.status == "running", ["scancel", "--signal=USR2"]),
    "slow by USR2": (lambda job: steps_of(job) > 2, ["scancel", "--signal=USR2"]),
    "slow by TERM": (lambda job: steps_of(job) > 2, ["scancel", "--signal=TERM"]),
    "slow by hand": (lambda job: steps_of(job) > 2, ["scontrol", "requeue"]),
    "plotting": (lambda job: (job.run_path / "config.yaml").exists() and Run(job.run_path).status == "done", ["scancel", "--signal=USR2"]),
}


@pytest.fixture(scope="module")
def interrupted(cluster):
    """A sweep whose jobs are interrupted, each in another way; by tag."""
    found = cluster.sweep(ACTIONS, cluster.notebook, grace=10, wait=False)
    waiting, limited, acting = {job: ACTIONS[tag] for tag, job in by_tag(found).items()}, [], []
    def act():
        for job, (when, what) in list(waiting.items()):
            if not when(job): continue
            if callable(what): limited.append(what(job))
            else: acting.append(subprocess.Popen([*what, job.said["slurm"]], stderr=subprocess.DEVNULL))  # scancel tries for a minute and a half, and may signal twice
            del waiting[job]
        return not waiting
    wait_for(act)
    wait_for(limited[0])
    cluster.sweep(ACTIONS, cluster.notebook)
    for process in acting: process.wait()
    return by_tag(found)


@pytest.mark.parametrize("tag", ACTIONS)
def test_interrupted_job_goes_back_into_the_queue_and_ends_as_if_it_had_not_been(tag, interrupted, cluster, unbroken):
    job = interrupted[tag]
    assert (job.status, cluster.slurm.wait(job.said["slurm"], 600)) == ("done", "COMPLETED") and int(shown(job)["Restarts"]) >= 1
    assert_same(Run(job.run_path), unbroken)


@pytest.fixture(scope="module")
def displaced(interrupted, cluster):
    """Two runs without a notebook, which make room for a job of the partition high, and then lose their node; and how they stood in between."""
    tags = ["slow twice by a", "slow twice by b"]
    found = cluster.sweep(tags, wait=False)
    wait_for(lambda: all(steps_of(job) > 2 for job in found.jobs))
    other = sbatch("sleep 1", "--partition=high", "--cpus-per-task=2", f"--chdir={cluster.folder}")
    wait_for(lambda: cluster.slurm.states()[other] == "COMPLETED")
    saved = [Run(job.run_path).status_details for job in found.jobs]
    before = [steps_of(job) for job in found.jobs]
    wait_for(lambda: all(job.status == "running" and steps_of(job) > steps for job, steps in zip(found.jobs, before)))
    node = shown(list(found.jobs)[0])["NodeList"]
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"], check=True)
    wait_for(lambda: all(state == "PENDING" for state in queued_for(found).values()))
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])  # which is refused where the node has come back by itself
    cluster.sweep(tags)
    return SimpleNamespace(jobs=list(found.jobs), saved=saved)


def test_run_that_makes_room_for_another_is_saved_first(displaced):
    assert [(said["status"], said["error"] in ("SIGTERM", "SIGUSR2"), said["step"] > 2) for said in displaced.saved] == [("stopped", True, True)] * 2


def test_run_whose_node_fails_goes_on(displaced, unbroken):
    for job in displaced.jobs:
        assert (job.status, shown(job)["Restarts"]) == ("done", "2")
        assert_same(Run(job.run_path), unbroken)


def test_running_job_that_is_cancelled_is_saved_leaves_no_process_and_goes_on_when_repeated(displaced, cluster, unbroken):
    found = cluster.sweep(["slow by cancel", "slow by waiting"], cluster.notebook, wait=False, at_once=1)
    first, second = by_tag(found).values()
    wait_for(lambda: steps_of(first) > 2)
    assert python_processes(cluster)
    assert found.cancel() == 2
    assert [(job.status, job.said["error"]) for job in (first, second)] == [("stopped", "cancelled")] * 2
    assert python_processes(cluster) == [] and Run(first.run_path).status == "stopped" and (first.run_path / "state.pt").exists()
    for tag in by_tag(found): (cluster.gates / tag).touch()
    again = cluster.sweep(["slow by cancel", "slow by waiting"], cluster.notebook)
    assert again.counts() == {"done": 2}
    for job in again.jobs: assert_same(Run(job.run_path), unbroken)


@pytest.fixture
def handlers():
    """What signals do, as it was before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items(): signal.signal(number, handler)


def test_second_signal_does_not_disturb_the_first(cluster, tmp_path, handlers):
    heard, life = [], QueuedJob(str(tmp_path), "told", [], limit=600, grace=60)
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(life.checkpoint()))
    life._began = time.monotonic()
    for _ in range(2): signal.raise_signal(signal.SIGUSR2)
    assert [submission.function.name for submission in heard] == ["told"]


def test_job_that_does_not_get_further_within_its_time_fails(cluster, tmp_path, handlers):
    job = Job(tmp_path, "stuck")
    job.say("stopped", error="SIGUSR2")
    life = QueuedJob(str(tmp_path), "stuck", [], limit=600, grace=60)
    for _ in range(2):
        life._began = time.monotonic() - 540
        life = life.checkpoint()
        life = life and life.function
    assert life is None and job.status == "failed" and "give it more time" in job.said["error"]


def test_no_process_is_left(cluster, displaced):
    wait_for(lambda: not subprocess.run(["squeue", "--noheader"], check=True, capture_output=True, text=True).stdout.strip())  # a run that is done has a moment to end
    assert python_processes(cluster) == []
