"""A run's folder: read while it is written, by one writer, and whatever is found in it."""
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from tformer_lab.runs import store
from tformer_lab.runs.recorder import SpectrumRecorder
from tformer_lab.runs.store import Run, RunError, RunWriter, list_runs
from tformer_lab.spectra.history import pack, record
from tformer_lab.storage import FileError, step_file
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import fit, resumed

pytestmark = pytest.mark.timeout(300)  # a deadlock has to end, too
TASK = Recall(vocab_size=20, d_model=40, length=32, test_size=16)


def train(runs, steps=12, **trainer):
    return fit(TASK, runs_dir=runs, progress=False, batch_size=32, **{"steps": steps, "checkpoints": 4, **trainer})


def go_on(path, **trainer):
    return fit(*resumed(Run(path), **trainer), resume=Run(path), progress=False)


def saved(path):
    """The bytes of all that was recorded."""
    return {str(file.relative_to(path)): file.read_bytes() for file in [path / "metrics.jsonl", *path.glob("*/*")]}


@pytest.fixture
def run(tmp_path):
    return train(tmp_path / "runs")


# Reading beside the writer

def test_run_is_readable_while_it_is_written(processes, tmp_path):
    runs, rows, checkpoints, said = tmp_path / "runs", [0], [0], []
    process = processes.Process(target=train, args=(runs, 300), kwargs={"checkpoints": 25, "save_minutes": .001})
    process.start()
    run = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while process.is_alive():
            table = list_runs(runs)
            if not len(table): continue
            run = run or Run(runs / table["run"][0])
            said.append(table["status"][0])
            metrics, spectra = run.metrics, run.spectra
            assert metrics["step"].tolist() == list(range(len(metrics)))
            rows.append(len(metrics))
            checkpoints.append(len(spectra))
            if len(spectra): latest, values = spectra.steps[-1], spectra["W"][-1]
    assert process.exitcode == 0 and set(said) <= {"new", "running", "done"} and "running" in said
    assert rows == sorted(rows) and len(set(rows)) > 3 and checkpoints == sorted(checkpoints) and len(set(checkpoints)) > 3
    assert len(run.metrics) == 301 and run.spectra.steps.tolist() == list(run.checkpoints)
    assert np.array_equal(Run(run.path).spectra_at(latest).spectra["W"].values, values)


def test_run_that_ends_while_its_status_is_read_is_not_called_interrupted(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "runs/a")
    writer = RunWriter(run)

    def ends(path):
        writer.close()
        return False

    monkeypatch.setattr(store, "is_locked", ends)
    assert run.status == "done"


# One writer

def create(barrier, path):
    barrier.wait()
    return Run.create(path).path


def train_at_once(barrier, runs):
    barrier.wait()
    return train(runs, steps=2).path


def at_once(processes, function, path, count=8):
    """What a function returns or raises in processes that call it at the same moment."""
    with processes.Manager() as manager, ProcessPoolExecutor(count, mp_context=processes) as pool:
        barrier = manager.Barrier(count)
        futures = [pool.submit(function, barrier, path) for _ in range(count)]
        return [future.exception() or future.result() for future in futures]


def test_of_processes_that_create_one_run_exactly_one_gets_it(processes, tmp_path):
    found = at_once(processes, create, tmp_path / "runs/a")
    errors = [one for one in found if isinstance(one, RunError)]
    assert len(errors) == 7 and found.count(tmp_path / "runs/a") == 1
    assert all("exists already" in str(error) for error in errors)


def test_trainings_started_at_once_never_share_a_folder(processes, tmp_path):
    paths = at_once(processes, train_at_once, tmp_path / "runs")
    assert len(set(paths)) == 8 and sorted(paths) == sorted((tmp_path / "runs").iterdir())
    assert all(Run(path).metrics["step"].tolist() == [0, 1, 2] and Run(path).status == "done" for path in paths)


def test_of_two_processes_that_resume_a_run_one_is_refused(processes, tmp_path):
    path = train(tmp_path / "runs", 20_000, time_limit=1e-6).path  # stopped at once
    with ProcessPoolExecutor(1, mp_context=processes) as one, ProcessPoolExecutor(1, mp_context=processes) as other:
        futures = [pool.submit(go_on, path, time_limit=None) for pool in (one, other)]
        while not any(future.done() for future in futures): time.sleep(.01)
        errors = [future.exception() for future in futures if future.done()]
        assert Run(path).status == "running"
        os.kill(Run(path).status_details["pid"], 15)  # the winner stops and saves
        assert len(errors) == 1 and type(errors[0]) is RunError and "being written by another process" in str(errors[0])
    assert sorted(future.exception() is None for future in futures) == [False, True]
    assert Run(path).status == "stopped"


# Damaged and foreign files

def cut_short(file, whole): file.write_bytes(whole[:-20])
def empty(file, whole): file.write_bytes(b"")
def text(file, whole): file.write_text("404: not found")
def other_step(file, whole): shutil.copy(file.parent / step_file(2), file)
def directory(file, whole): file.unlink(), file.mkdir()
def other_model(file, whole): file.write_bytes(safetensors.numpy.save(*pack(record({"W": torch.ones(3, 2)}, 1))))


@pytest.mark.parametrize("damage", [cut_short, empty, text, other_step, directory, other_model])
def test_broken_spectra_are_named_and_left_out(run, damage):
    before, file = run.spectra, run.path / "spectra" / step_file(1)
    damage(file, file.read_bytes())
    run = Run(run.path)
    with pytest.warns(UserWarning, match=step_file(1)): after = run.spectra
    assert after.steps.tolist() == [step for step in before.steps if step != 1]
    assert np.array_equal(after["W"], before["W"][before.steps != 1])
    assert len(run.metrics) == 13 and run.checkpoints[1] and list_runs(run.path.parent)["status"].tolist() == ["done"]
    if damage is not other_model:
        with pytest.raises(FileError, match=step_file(1)): run.spectra_at(1)


@pytest.mark.parametrize("damage", [cut_short, empty, text, other_step, directory])
def test_broken_weights_are_named_and_the_rest_is_readable(run, damage):
    file = run.path / "checkpoints" / step_file(1)
    damage(file, file.read_bytes())
    with pytest.raises(FileError, match=step_file(1)): run.checkpoints[1]
    assert run.checkpoints[0].keys() == run.checkpoints[2].keys() == {"W", "V", "F"}
    assert len(run.spectra) == 5 and len(run.metrics) == 13


@pytest.mark.parametrize("name, words", [("config.yaml", "{"), ("config.yaml", "[]"), ("status.json", "{"), ("status.json", "[]"), ("status.json", "")])
def test_broken_run_has_its_reason_in_the_list(run, name, words):
    other = train(run.path.parent)
    (run.path / name).write_text(words)
    table = list_runs(run.path.parent).set_index("run")
    assert table.loc[run.name, "status"] == "unreadable" and table.loc[run.name, "error"]
    assert table.loc[other.name, "status"] == "done"


# Nothing that is read runs code

class Malice:
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f"touch '{self.marker}'",)


def pickled(malice, file): file.write_bytes(pickle.dumps(malice, protocol=2))
def saved_by_torch(malice, file): torch.save({"metrics_bytes": 0, "model": malice}, file)


def test_the_malice_of_these_tests_works(tmp_path):
    pickled(Malice(tmp_path / "owned"), tmp_path / "x")
    pickle.loads((tmp_path / "x").read_bytes())
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("write", [pickled, saved_by_torch])
def test_pickle_as_state_is_refused_and_runs_nothing(run, tmp_path, write):
    before = saved(run.path)
    write(Malice(tmp_path / "owned"), run.path / "state.pt")
    with pytest.raises(RunError, match="state.pt"): go_on(run.path)
    assert not (tmp_path / "owned").exists() and saved(run.path) == before


@pytest.mark.parametrize("write", [pickled, saved_by_torch])
def test_pickle_as_safetensors_is_refused_and_runs_nothing(run, tmp_path, write):
    for folder in ("spectra", "checkpoints"): write(Malice(tmp_path / "owned"), run.path / folder / step_file(1))
    with pytest.raises(FileError, match=step_file(1)): run.spectra_at(1)
    with pytest.raises(FileError, match=step_file(1)): run.checkpoints[1]
    with pytest.warns(UserWarning, match=step_file(1)): assert len(run.spectra) == 4
    assert not (tmp_path / "owned").exists()


def test_python_in_a_config_is_refused_and_runs_nothing(run, tmp_path):
    (run.path / "config.yaml").write_text(f"!!python/object/apply:os.system [\"touch '{tmp_path}/owned'\"]\n")
    with pytest.raises(RunError, match="config.yaml"): run.config
    with pytest.raises(RunError, match="config.yaml"): go_on(run.path)
    assert list_runs(run.path.parent)["status"].tolist() == ["unreadable"]
    assert not (tmp_path / "owned").exists()


# A resume that cannot be

def other_state(file): torch.save({"metrics_bytes": 5, "step": 3}, file)
def state_of_another_model(file): shutil.copy(fit(Recall(vocab_size=10, n_outputs=2, d_model=20, length=8), runs_dir=file.parents[2], steps=2, progress=False).path / "state.pt", file)
def state_of_later(file): torch.save({**torch.load(file, weights_only=True), "metrics_bytes": 10**9}, file)


@pytest.mark.parametrize("damage", [lambda file: cut_short(file, file.read_bytes()), lambda file: empty(file, b""), other_state, state_of_another_model, state_of_later],
                         ids=["cut_short", "empty", "other_state", "state_of_another_model", "state_of_later"])
def test_resume_from_a_broken_state_is_an_error_and_loses_nothing(run, damage):
    before, status = saved(run.path), run.status_details
    damage(run.path / "state.pt")
    with pytest.raises(RunError, match="state.pt"): go_on(run.path)
    assert saved(run.path) == before
    assert run.status_details == status  # what was trained is still there


# Names and places

class Escape(Recall):
    name, label = "../../up", "../../../and/away"


def test_name_that_is_a_path_stays_in_the_folder_of_runs(tmp_path):
    for name in ("..", ".hidden", "a b", "a\n", "é", "-p", "x" * 201):
        with pytest.raises(RunError): Run.create(tmp_path / "runs" / name)
    assert not list(tmp_path.rglob("*"))
    run = fit(Escape(vocab_size=20, d_model=40, length=32), runs_dir=tmp_path / "runs", steps=2, progress=False)
    assert run.path.parent == tmp_path / "runs" and [run.path] == list((tmp_path / "runs").iterdir()) and list(tmp_path.iterdir()) == [tmp_path / "runs"]


def limited(function, size, *arguments):
    """With files that cannot grow beyond some bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return function(*arguments)


def test_full_disk_is_an_error_from_which_a_run_goes_on(processes, tmp_path):
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        error = pool.submit(limited, train, 15_000, tmp_path / "runs").exception()  # less than a state
    assert isinstance(error, OSError)
    [path] = (tmp_path / "runs").iterdir()
    assert Run(path).status == "failed" and "File too large" in Run(path).status_details["error"]
    assert Run(path).spectra.steps.tolist() == [0] and not list(path.rglob("*.tmp"))
    whole = train(tmp_path / "whole")
    assert saved(go_on(path).path).keys() == saved(whole.path).keys() and Run(path).metrics.equals(whole.metrics)


def log_much(path):
    with RunWriter(Run(path)) as writer: writer.log([{"step": step, "train/loss": 1.} for step in range(1000)])


def test_records_that_do_not_fit_on_the_disk_are_an_error(processes, tmp_path):
    run = Run.create(tmp_path / "runs/a")
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        assert isinstance(pool.submit(limited, log_much, 10_000, run.path).exception(), OSError)
    assert run.status == "failed" and 0 < len(run.metrics) < 1000


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError): train(tmp_path / "runs")
    finally: tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(OSError, match="runs"): train(tmp_path / "runs")
    assert (tmp_path / "runs").read_text() == "mine"


# In anyone's own loop

def test_resumed_recorder_keeps_what_came_before_and_forgets_what_came_after(tmp_path):
    model, path = nn.Linear(3, 4), tmp_path / "runs/mine"
    with SpectrumRecorder(model, path, every=2, weights=True) as watch:
        for step in range(11): watch(step, loss=step)
    run = Run(path)
    early = run.spectra["weight"][:3]
    nn.init.ones_(model.weight)
    with SpectrumRecorder(model, path, every=2, weights=True, resume=True) as watch:
        for step in range(5, 8): watch(step, loss=100 + step)
    assert run.metrics["train/loss"].tolist() == [0, 1, 2, 3, 4, 105, 106, 107]
    assert run.spectra.steps.tolist() == list(run.checkpoints) == [0, 2, 4, 6]
    assert np.array_equal(run.spectra["weight"][:3], early)


SCRIPT = """
import sys
from pathlib import Path
from torch import nn
from tformer_lab.runs.recorder import SpectrumRecorder
watch = SpectrumRecorder(nn.Linear(3, 2), sys.argv[1])
watch(0, loss=1.5)
"""


@pytest.mark.parametrize("end, status, error", [("", "done", None), ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
                                                ("import os; os.kill(os.getpid(), 9)", "interrupted", None)], ids=["ends", "raises", "killed"])
def test_script_leaves_word_of_how_it_ended(tmp_path, end, status, error):
    subprocess.run([sys.executable, "-c", SCRIPT + end, tmp_path / "runs/mine"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = Run(tmp_path / "runs/mine")
    assert (run.status, run.status_details["error"]) == (status, error)
    assert run.metrics["train/loss"].tolist() == [1.5] and len(run.spectra) == 1


# What a reviewer found once

def test_cut_file_that_has_grown_again_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 1}\n')
    metrics = store.MetricsFile(path)
    assert len(metrics.rows()) == 2
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a": 2}\n')
    assert [row["a"] for row in metrics.rows()] == [1, 2, 2]


def test_one_foreign_run_does_not_hide_the_others(tmp_path):
    for name, text in (("dated", "created: 2026-01-01 00:00:00\ntask: x"), ("odd", "optimum: [{value: 1}, 3]\ntrainer: {precision: [1]}"), ("words", "words")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    Run.create(tmp_path / "mine")
    table = list_runs(tmp_path).set_index("run")["status"]
    assert table.to_dict() == {"mine": "new", "dated": "new", "odd": "new", "words": "unreadable"}


def test_training_set_learnt_by_heart_is_not_held_against_the_population_optimum(tmp_path):
    run = fit(Recall(vocab_size=20, d_model=40, length=16, noise=.5), runs_dir=tmp_path, steps=200, samples=8, batch_size=8, population_size=256,
              optimizer="adam", lr=.3, evaluations=2, progress=False)
    assert run.metrics["train/loss"].iloc[-1] < .1 and [o["metric"] for o in run.optimum] == ["population/loss", "unseen/loss"]
    assert list_runs(tmp_path)["excess"][0] > 0


def test_folder_of_a_run_appears_with_its_config_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(store.os, "rename", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): Run.create(tmp_path / "mine")
    monkeypatch.undo()
    assert not (tmp_path / "mine").exists() and list_runs(tmp_path).empty
    assert Run.create(tmp_path / "mine").config["name"] == "mine"


def test_relative_runs_folder_is_the_same_from_everywhere_in_the_project(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setenv("TFORMER_RUNS", "out")
    places = []
    for folder in (tmp_path, tmp_path / "nbs"):
        monkeypatch.chdir(folder)
        places.append(store.default_runs_dir())
    assert places == [tmp_path / "out"] * 2
