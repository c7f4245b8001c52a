"""Runs in MLflow: all of a run is there, once, and nothing that happens to a server, or to the process that tells it, reaches a training."""
import itertools
import json
import math
import os
import queue
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tformer_lab.runs import tracking
from tformer_lab.runs.store import Run, RunWriter
from tformer_lab.runs.tracking import Deadline, Follower, Mirror, Watch, connect, follow_lines, last_pushes, mlflow_name, mlflow_settings, push, run_key, track, tracking_uri
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import Loop, fit, prepare, resumed

pytestmark = pytest.mark.timeout(300)  # a deadlock has to end, too
TOP = Path(__file__).parents[1]
TASK = {"vocab_size": 20, "d_model": 40, "length": 32, "test_size": 16}
TRAINER = {"steps": 40, "checkpoints": 5, "batch_size": 16}
NICE = Follower.nice
LARGEST = sys.float_info.max  # what MLflow has for infinity


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(autouse=True)
def followers(monkeypatch):
    """Ends the processes that follow, which would otherwise have a minute, and lets them have their share of a machine that is busy."""
    monkeypatch.setattr(Follower, "nice", 0)
    tracking._follower.cache_clear()
    yield
    for process in following(): process.kill()


def following():
    """The processes that this one has begun to follow runs."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "tformer_lab.runs.tracking" in child.cmdline(): found.append(child)
    return found


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """A database with MLflow's tables and nothing in them; they take seconds to make."""
    folder = tmp_path_factory.mktemp("tables")
    with mlflow_settings():
        from mlflow import MlflowClient
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def runs(tmp_path, tables):
    """A folder of runs with such a database."""
    (tmp_path / "runs").mkdir()
    return Path(shutil.copy(tables, tmp_path / "runs")).parent


def train(runs, task=None, **options):
    return fit(task or Recall(**TASK), runs_dir=runs, progress=False, **{**TRAINER, **options})


def ended_run(path, steps=5, status="done"):
    """A run without a training."""
    with RunWriter(Run.create(path, {"task": "synthetic"})) as writer:
        writer.log([{"step": step, "train/loss": 1 / (1 + step)} for step in range(steps)])
        writer.close(status, "why" if status == "failed" else None)
    return Run(path)


class NotThere(Exception): pass


class Shown:
    """A run as MLflow has it; there must be one."""
    def __init__(self, run):
        with mlflow_settings():
            self.client, experiment = connect(run.path.parent)
            found = self.client.search_runs([experiment], f"tags.`tformer_lab.run` = '{run_key(run)}'")
        if not found: raise NotThere
        [self.run] = found
        self.id, self.status, self.params, self.tags = self.run.info.run_id, self.run.info.status, self.run.data.params, self.run.data.tags

    def points(self, name): return [(p.step, p.value) for p in sorted(self.client.get_metric_history(self.id, name), key=lambda p: p.step)]

    def has(self, run):
        """Does it have every number of the run once, and no other?"""
        expected = {name: list(zip(run.metrics["step"][kept], column[kept])) for name, column in run.metrics.drop(columns="step").items() if (kept := column.notna()).any()}
        for (matrix, metric), rows in run.spectra.metrics().groupby(["matrix", "metric"], observed=True): expected[f"spectra/{matrix}/{metric}"] = list(zip(rows["step"], rows["value"]))
        assert set(self.run.data.metrics) == set(expected)
        for name, points in expected.items():
            mine = self.points(name)
            assert [step for step, _ in mine] == [step for step, _ in points], name
            np.testing.assert_allclose([value for _, value in mine], np.clip([value for _, value in points], -LARGEST, LARGEST), rtol=1e-12)
        return True


def until(true, *given, seconds=250):
    """Wait for something that has to come; what is asked of a run that is not in MLflow is not true yet."""
    end = time.monotonic() + seconds
    while True:
        with suppress(NotThere):
            if true(*given): return
        assert time.monotonic() < end, "it did not come"
        time.sleep(.2)


def has_status(run, status): return Shown(run).status == status


def content(runs):
    """All rows of all tables of the local database."""
    with closing(sqlite3.connect(runs / "mlflow.db")) as db:
        tables = [name for name, in db.execute("select name from sqlite_master where type = 'table'")]
        return {name: sorted(map(repr, db.execute(f'select * from "{name}"'))) for name in tables}


# ---- what is told

def test_importing_the_module_loads_neither_mlflow_nor_torch():
    code = "import sys, tformer_lab.runs.tracking; print(sorted({'mlflow', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("use", [lambda runs: Follower(runs), lambda runs: track(runs), lambda runs: train(runs, tracking="mlflow"), lambda runs: prepare({"tracking": "mlflow"})])
def test_missing_mlflow_is_named_with_its_command_before_a_training(monkeypatch, tmp_path, use):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "tformer_lab\[mlflow\]"'): use(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_tracked_training_is_in_the_local_database_with_all_that_it_recorded(tmp_path):
    run = train(tmp_path / "runs", tracking="mlflow", lr=.25)
    until(has_status, run, "FINISHED")  # the training has waited for it, but not for long
    shown = Shown(run)
    assert shown.has(run) and len(run.spectra) == 6
    assert {"task": "recall", "lr": "0.25", "steps": "40", "noise": "0.0", "length": "32", "seed": "0", "optimum/train/loss": "0.0", "optimum/train/loss/kind": "exact"}.items() <= shown.params.items()
    assert shown.tags["versions.torch"] == run.config["versions"]["torch"] and shown.run.info.run_name == run.name
    before = content(tmp_path / "runs")
    assert track(tmp_path / "runs").to_dict("records") == [{"run": run.name, "status": "done", "new": 0, "error": None}]
    assert content(tmp_path / "runs") == before


def test_a_training_is_not_tracked_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = train(tmp_path / "runs")
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(tmp_path / "runs") == [run.name]


@pytest.mark.parametrize("status, its", [("done", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED")])
def test_a_run_has_its_status_and_its_error(runs, status, its):
    run = ended_run(runs / "a", status=status)
    push(run)
    assert Shown(run).status == its and Shown(run).tags.get("error") == ("why" if status == "failed" else None)


def test_a_failed_training_is_told(runs):
    with pytest.raises(FloatingPointError): train(runs, name="a", tracking="mlflow", optimizer="sgd", lr=1e30)
    run = Run(runs / "a")
    until(has_status, run, "FAILED")
    assert "FloatingPointError" in Shown(run).tags["error"] and math.isnan(Shown(run).points("train/loss")[-1][1])


def test_the_notebook_is_an_artifact_and_is_told_again_only_when_it_has_changed(tmp_path, runs):
    run, notebook = ended_run(runs / "a"), tmp_path / "out.ipynb"
    push(run, notebook)  # before there is one
    notebook.write_text("one")
    push(run)
    shown = Shown(run)
    with mlflow_settings(): assert Path(shown.client.download_artifacts(shown.id, "out.ipynb")).read_text() == "one"
    stored = next((runs / "mlartifacts").rglob("out.ipynb"))
    before = stored.stat().st_mtime_ns
    push(run, notebook)
    assert stored.stat().st_mtime_ns == before
    notebook.write_text("two")
    push(run)
    assert stored.read_text() == "two"


@given(st.lists(st.text(st.characters(codec="utf-8") | st.sampled_from("./: _-@×"), max_size=300), min_size=2, max_size=2, unique=True))
def test_mlflow_takes_every_name_and_no_two_become_one(names):
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name
    told = [mlflow_name(name) for name in names]
    for name in told:
        _validate_metric_name(name)
        assert 0 < len(name) <= MAX_ENTITY_KEY_LENGTH
    assert told[0] != told[1]


ODD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "tiny": 5e-324, "many": 2**53, "W_K @ W_Q": 1.0}


def write_odd(path):
    with RunWriter(Run.create(path, {"parameters": {"long": "x" * 10_000, "none": None, "deep": {"a": {"b": 1}}}, "trainer": {"long": 1}})) as writer: writer.log([{"step": step, **ODD} for step in (0, 10**12)])
    return Run(path)


def assert_odd(shown):
    for name, value in {**ODD, "inf": LARGEST, "-inf": -LARGEST}.items():
        assert [step for step, _ in shown.points(mlflow_name(name))] == [0, 10**12]
        np.testing.assert_array_equal([v for _, v in shown.points(mlflow_name(name))], [value, value])
    assert shown.params["deep.a.b"] == "1" and shown.params["none"] == "None" and len(shown.params["long"]) == 6000 and shown.params["trainer.long"] == "1"


def test_values_that_are_no_numbers_and_names_that_cannot_be(runs):
    run = write_odd(runs / "a")
    assert push(run) == 2 and push(run) == 0
    assert_odd(Shown(run))


def test_a_record_with_more_metrics_than_a_request_takes(runs):
    with RunWriter(Run.create(runs / "a")) as writer: writer.log([{"step": step, **{f"m{i}": step + i for i in range(2100)}} for step in range(2)])
    run = Run(runs / "a")
    assert push(run) == 2 and push(run) == 0
    assert len(Shown(run).run.data.metrics) == 2100 and all(Shown(run).points(f"m{i}") == [(0, i), (1, 1 + i)] for i in (0, 899, 900, 1799, 1800, 2099))


# ---- what is told twice

def test_what_was_sent_before_the_answer_was_lost_is_there_once(runs):
    run, lost = ended_run(runs / "a", steps=2000), []
    with mlflow_settings():
        mirror = Mirror(run.path, connect(run.path.parent))
        send = mirror.client.log_batch

        def lose(*args, metrics=(), **options):
            send(*args, metrics=metrics, **{**options, "tags": [] if metrics else options.get("tags", [])})
            if metrics: raise ConnectionError(lost.append(len(metrics)))
        mirror.client.log_batch = lose
        with pytest.raises(ConnectionError): mirror.push()
    assert lost == [900] and push(run) == 2000
    assert Shown(run).has(run)


def test_a_resumed_run_is_told_once(runs, processes):
    process = processes.Process(target=train_and_die, args=(runs, 30))
    process.start()
    process.join()
    run = Run(runs / "a")
    assert run.status == "interrupted"
    track(runs)
    shown = Shown(run)
    assert shown.status == "KILLED" and len(shown.points("train/loss")) == len(run.metrics) > 20
    cut = fit(*resumed(run, time_limit=1e-9), resume=run, progress=False)
    assert cut.status == "stopped" and len(cut.metrics) < len(shown.points("train/loss"))
    run = fit(*resumed(run), resume=run, progress=False, tracking="mlflow")
    until(has_status, run, "FINISHED")
    assert run.status == "done" and Shown(run).id == shown.id and Shown(run).has(run)


def train_and_die(runs, at):
    """Save states, then records without one, then die."""
    add, save, writer = Loop._write, Loop.save, []
    def dies(self, rows):
        add(self, rows)
        if rows and rows[-1]["step"] >= at: os.kill(os.getpid(), signal.SIGKILL)
    Loop._write = dies
    Loop._is_late = lambda self, step: step in (0, 20)
    from tformer_lab.training.fit import MetricsLog
    log = MetricsLog.add
    def written(self, step, metrics):
        log(self, step, metrics)
        self.flush()
    MetricsLog.add = written
    train(runs, name="a")


def test_a_run_that_came_to_something_else_replaces_the_one_in_mlflow(runs):
    run = ended_run(runs / "a")
    push(run)
    before = Shown(run).id
    rows = run.path / "metrics.jsonl"
    with RunWriter(run) as writer:
        writer.cut(rows.read_bytes().index(b"\n") + 1)
        push(run)
        assert Shown(run).id == before and Shown(run).status == "RUNNING"  # it may yet come to the same
        writer.log([{"step": step, "train/loss": 7.0} for step in range(1, 6)])
        push(run)
        assert Shown(run).id != before
    push(run)
    assert Shown(run).has(run) and Shown(run).points("train/loss")[1] == (1, 7.0)


def push_each(folder, names, start):
    start.wait(200)
    for name in names: push(folder / name)


def test_many_processes_at_once_on_a_fresh_database(tmp_path, processes):
    runs = [ended_run(tmp_path / f"runs/{name}", steps=1500) for name in ("both", *"abcde")]
    start = processes.Barrier(5)
    all_at_once = [processes.Process(target=push_each, args=(tmp_path / "runs", (name, "both"), start)) for name in "abcde"]
    for process in all_at_once: process.start()
    for process in all_at_once: process.join()
    assert [process.exitcode for process in all_at_once] == [0] * 5
    assert all(Shown(run).has(run) for run in runs)


# ---- the process that follows

def test_a_run_is_followed_from_before_it_begins_to_its_end(runs):
    with Follower(runs) as follower:
        follower.follow("a")
        assert follower.wait("a", 60) == "it has not begun"
        writer = RunWriter(Run.create(runs / "a"))
        writer.log([{"step": 0, "train/loss": 1.0}])
        assert follower.wait("a", 60) == "it is running"
        assert Shown(writer.run).status == "RUNNING" and Shown(writer.run).points("train/loss") == [(0, 1.0)]
        writer.log([{"step": 1, "train/loss": .5}])
        until(lambda: len(Shown(writer.run).points("train/loss")) == 2)  # without being asked
        writer.close()
        assert follower.close(60) is None
    assert Shown(writer.run).status == "FINISHED"


FORKS = """
import os, sys, time
from tformer_lab.runs.store import Run, RunWriter
from tformer_lab.runs.tracking import Follower
Follower.nice = 0
follower = Follower(sys.argv[1])
follower.follow("a")
follower.wait("a", 100)
if not (child := os.fork()): time.sleep(1000)
writer = RunWriter(Run.create(sys.argv[1] + "/a"))
writer.log([{"step": 0, "train/loss": 1.0}])
print(follower._process.pid, child, flush=True)
time.sleep(1000)
"""


def test_when_the_training_is_killed_its_last_records_are_told_and_the_process_ends(runs):
    training = subprocess.Popen([sys.executable, "-c", FORKS, str(runs)], stdout=subprocess.PIPE, text=True)
    pid, child = map(int, training.stdout.readline().split())
    follower, fork = psutil.Process(pid), psutil.Process(child)  # which holds the pipe, and lives on
    training.kill()
    training.wait()
    try:
        until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE)
        assert fork.is_running()
    finally: fork.kill()
    shown = Shown(Run(runs / "a"))
    assert shown.status == "KILLED" and shown.points("train/loss") == [(0, 1.0)]


def test_when_the_process_that_follows_is_killed_the_training_goes_on_and_another_tells_the_rest(runs):
    killed = []

    class Kills(Recall):
        def loss(self, model, batch):
            if len(killed) < 30: killed.append(None)
            if len(killed) == 29:
                [follower] = following()
                follower.kill()
                follower.wait()
            return super().loss(model, batch)
    run = train(runs, Kills(**TASK), tracking="mlflow")
    assert run.status == "done" and len(killed) == 30
    until(has_status, run, "FINISHED")
    assert Shown(run).has(run)


def test_it_gives_way_to_trainings(runs, monkeypatch):
    monkeypatch.setattr(Follower, "nice", NICE)
    with Follower(runs) as follower:
        follower.follow("a")
        until(lambda: psutil.Process(follower._process.pid).nice() > psutil.Process().nice())


def test_it_ends_when_there_has_been_nothing_to_do_and_not_before(runs):
    ended_run(runs / "a")
    watch, turns = Watch(runs), itertools.count()
    watch.follow("a")
    follow_lines(watch, queue.SimpleQueue(), print, interval=.01, idle=.3)
    assert Shown(Run(runs / "a")).status == "FINISHED"
    watch.follow("later")
    follow_lines(watch, queue.SimpleQueue(), print, lambda: next(turns) < 100, interval=.01, idle=.3)
    assert next(turns) > 100


def papermill_says(path, end): path.write_text(json.dumps({"cells": [], "metadata": {"papermill": {"end_time": end}}}))


def test_a_notebook_that_papermill_is_still_writing_is_waited_for_while_it_may_come(tmp_path, runs):
    ended_run(runs / "a")
    notebook, turns = tmp_path / "out.ipynb", itertools.count()
    papermill_says(notebook, None)
    watch = Watch(runs)
    watch.follow("a", notebook)

    def needed():
        if next(turns) == 2: papermill_says(notebook, "2026-11-25T03:00:00")
        return True
    settled = []
    assert last_pushes(watch, settled.append, Deadline(0.5), needed) == {}
    assert settled == [""] and next(turns) == 3
    assert "03:00:00" in next((runs / "mlartifacts").rglob("out.ipynb")).read_text()
    papermill_says(notebook, None)
    assert last_pushes(watch, settled.append, Deadline(0.5), lambda: False) == {}  # nobody is there who would write it


# ---- servers

class MlflowServer:
    """A real `mlflow server`, which can be killed and begun again."""
    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", str(self.folder / "files")]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", *command], cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True)
        until(lambda: self.process.poll() is not None or self.answers())
        assert self.process.poll() is None, (self.folder / "server.log").read_text()

    def answers(self):
        with socket.socket() as asking: return asking.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self):
        with suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def at_server(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return server


def test_a_server_has_a_tracked_training_and_its_notebook(tmp_path, at_server):
    (tmp_path / "out.ipynb").write_text("{}")
    run = train(tmp_path / "runs", tracking="mlflow", notebook=tmp_path / "out.ipynb")
    until(has_status, run, "FINISHED")
    until(lambda: "tformer_lab.notebook" in Shown(run).tags)
    shown = Shown(run)
    assert shown.has(run) and shown.params["lr"] == "0.5"
    with mlflow_settings(): assert [file.path for file in shown.client.list_artifacts(shown.id)] == ["out.ipynb"]
    assert not (tmp_path / "runs/mlflow.db").exists()


def test_a_server_takes_values_that_are_no_numbers(tmp_path, at_server):
    run = write_odd(tmp_path / "runs/a")
    assert push(run) == 2 and push(run) == 0
    assert_odd(Shown(run))


def test_a_server_that_is_killed_during_a_training_changes_nothing_and_is_told_later(tmp_path, at_server, capsys):
    plain, told = train(tmp_path / "plain"), []

    class Kills(Recall):
        def loss(self, model, batch):
            told.append(None)
            if len(told) == 20:  # some records are there, and more are to come
                until(has_status, Run(tmp_path / "runs/a"), "RUNNING")
                at_server.kill()
            return super().loss(model, batch)
    try:
        run = train(tmp_path / "runs", Kills(**TASK), name="a", tracking="mlflow")
        assert run.status == "done" and len(told) == 41
        assert (run.path / "metrics.jsonl").read_bytes() == (plain.path / "metrics.jsonl").read_bytes()
        assert all(np.array_equal(run.spectra[name], plain.spectra[name]) for name in plain.spectra.matrices)
        assert "MLflow does not know all of a yet" in capsys.readouterr().out
        until(lambda: "MLflow: " in (tmp_path / "runs/mlflow.log").read_text())
    finally:
        at_server.start()
    assert track(tmp_path / "runs")["error"].isna().all()  # while the process that followed may do the same
    assert Shown(run).status == "FINISHED" and Shown(run).has(run)
    until(lambda: "MLflow answers again" in (tmp_path / "runs/mlflow.log").read_text())
    assert Counter(line.split()[3] for line in (tmp_path / "runs/mlflow.log").read_text().splitlines() if " MLflow: " in line) == {"MlflowException:": 1}
    assert Shown(run).has(run)


@pytest.fixture(params=["refuses", "says nothing"])
def no_answer(request, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if request.param == "says nothing": deaf.listen(100)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        yield


def test_without_an_answer_a_training_is_what_it_is_without_tracking(tmp_path, no_answer, capsys):
    plain, run = train(tmp_path / "plain"), train(tmp_path / "runs", name="a", tracking="mlflow")
    assert run.status == "done" and (run.path / "metrics.jsonl").read_bytes() == (plain.path / "metrics.jsonl").read_bytes()
    assert "MLflow does not know all of a yet" in capsys.readouterr().out
    from mlflow.exceptions import MlflowException
    with pytest.raises(MlflowException): track(tmp_path / "runs")


def test_without_an_answer_close_returns_and_says_why(tmp_path, no_answer):
    ended_run(tmp_path / "runs/a")
    follower = Follower(tmp_path / "runs")
    follower.follow("a")
    assert "MlflowException" in follower.close(60)


def test_a_process_that_hangs_is_not_waited_for(tmp_path):
    ended_run(tmp_path / "runs/a")
    follower = Follower(tmp_path / "runs")
    follower.follow("a")
    follower._process.send_signal(signal.SIGSTOP)
    for name in range(3000): follower.follow(f"{'long' * 40}{name}")  # more than a pipe takes
    assert "nothing was heard" in follower.wait("a", .1) and "nothing was heard" in follower.close(.1)
    follower._process.kill()


def test_papermill_hands_over_its_output_notebook_when_it_is_complete(runs):
    notebook = runs.parent / "out.ipynb"
    given = {"tracking": "mlflow", "runs_dir": runs, "name": "a", "steps": 20, "checkpoints": 2, "length": 16, "batch_size": 8}
    own = {"IPYTHONDIR": runs.parent / "ipython", "JUPYTER_RUNTIME_DIR": runs.parent / "runtime", "JUPYTER_CONFIG_DIR": runs.parent / "config"}
    done = subprocess.run([sys.executable, "-m", "papermill", "nbs/train.ipynb", str(notebook), "--inject-output-path", *(str(part) for name, value in given.items() for part in ("-p", name, value))],
                          cwd=TOP, capture_output=True, text=True, env={**os.environ, **{name: str(path) for name, path in own.items()}})
    assert done.returncode == 0, done.stderr
    assert "unknown parameter" not in done.stderr.lower()
    until(lambda: any(stored.read_bytes() == notebook.read_bytes() for stored in (runs / "mlartifacts").rglob("out.ipynb")))
    assert json.loads(notebook.read_text())["metadata"]["papermill"]["end_time"]
    run = Run(runs / "a")
    assert Shown(run).status == "FINISHED" and Shown(run).has(run)
