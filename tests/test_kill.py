"""A run that is killed goes on as if it had not been: the same records, spectra and weights, byte for byte."""
import itertools
import json
import os
import random
import signal
import time
import warnings

import numpy as np
import pytest
import torch

from tformer_lab.runs.store import Run
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import MetricsLog, fit, resumed

pytestmark = pytest.mark.timeout(300)  # a deadlock has to end, too
SIZES = {"vocab_size": 20, "d_model": 40, "length": 32, "test_size": 16}
KINDS = {"population": {}, "samples": {"samples": 200, "population_size": 64, "evaluations": 30, "noise": .5}, "adam": {"optimizer": "adam", "lr": .01}}


class StochasticRecall(Recall):
    """Its loss draws from torch's generator, as dropout does."""
    def loss(self, model, batch): return super().loss(model, batch) * (1 + torch.rand(()))


def train(runs, kind="population", **trainer):
    given = {**KINDS[kind], **trainer}
    return fit(StochasticRecall(**SIZES, noise=given.pop("noise", 0.)), runs_dir=runs, batch_size=32, progress=False, **given)


def go_on(runs):
    run = only_run(runs)
    return fit(*resumed(run, StochasticRecall), resume=run, progress=False)


def only_run(runs):
    [path] = runs.iterdir()
    return Run(path)


def content(path):
    """A file's bytes; safetensors writes the metadata in its header in random order, so that is parsed."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0
    return json.loads(data[8:end] or "null"), data[end:]


def recorded(run):
    """All that has to be the same in two runs."""
    files = [run.path / "metrics.jsonl", *run.path.glob("spectra/*"), *run.path.glob("checkpoints/*")]
    return {str(path.relative_to(run.path)): content(path) for path in files}


def assert_same(run, unbroken):
    mine, its = recorded(run), recorded(unbroken)
    assert sorted(mine) == sorted(its)
    assert [name for name in mine if mine[name] != its[name]] == []
    assert run.status == "done" and not list(run.path.rglob("*.tmp"))


def assert_begins_like(run, unbroken):
    """What a killed run shows is right, as far as it goes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics, spectra, whole = run.metrics, run.spectra, unbroken.spectra
    assert metrics["step"].tolist() == list(range(len(metrics)))
    assert not len(metrics) or metrics.equals(unbroken.metrics[metrics.columns].head(len(metrics)))
    for name in spectra.matrices: assert np.array_equal(spectra[name], whole[name][np.isin(whole.steps, spectra.steps)])


def metrics_size(runs):
    return sum(path.stat().st_size for path in runs.glob("*/metrics.jsonl"))


def writes_each_record(function, *arguments, **trainer):
    """Train as after the first second, in which no record is written, so that there are records after the last state."""
    add = MetricsLog.add

    def add_and_flush(self, *record):
        add(self, *record)
        self.flush()

    MetricsLog.add = add_and_flush
    function(*arguments, **trainer)


def wait_until(process, happened):
    while process.is_alive() and not happened(): time.sleep(.002)


def kill(process):
    """End it the way that no process can resist; false where it had come to its end by itself."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
def test_run_killed_again_and_again_equals_the_unbroken_one(kind, processes, tmp_path):
    trainer = {"steps": 800, "checkpoints": 30, "save_minutes": .002}
    unbroken = train(tmp_path / "unbroken", kind, **trainer)
    size, runs, killed = metrics_size(tmp_path / "unbroken"), tmp_path / "killed", 0
    rng = random.Random(kind)
    for part in range(7):
        process = processes.Process(target=writes_each_record, args=(go_on, runs) if killed else (train, runs, kind), kwargs={} if killed else trainer)
        process.start()
        enough = size * (part + rng.random()) / 8
        wait_until(process, lambda: metrics_size(runs) > enough)
        time.sleep(rng.uniform(0, .01))
        killed += kill(process)
        assert only_run(runs).status == "interrupted"
        assert_begins_like(only_run(runs), unbroken)
    assert killed >= 5
    assert_same(go_on(runs), unbroken)


def dies_before_rename(count, runs, **trainer):
    """Train in a process that is killed when it is about to put its `count`-th file in place."""
    replace, left = os.replace, iter(range(count))

    def mortal(*paths):
        if next(left) == count - 1: os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = mortal
    train(runs, **trainer)


def test_run_killed_at_any_write_equals_the_unbroken_one(processes, tmp_path):
    trainer = {"steps": 5, "checkpoints": 3, "optimizer": "adam", "save_minutes": 1e-9}  # a state at every step
    unbroken = train(tmp_path / "unbroken", **trainer)
    for count in itertools.count(2):  # the first file is config.yaml: without it there is no run
        runs = tmp_path / f"killed{count}"
        process = processes.Process(target=dies_before_rename, args=(count, runs), kwargs=trainer)
        process.start()
        process.join()
        if process.exitcode == 0: break
        assert only_run(runs).status in ("new", "interrupted")
        assert_begins_like(only_run(runs), unbroken)
        assert_same(go_on(runs), unbroken)
    assert count > 2 + 2 * 4 + 6  # config and status, spectra and weights of four steps, six states


def test_run_killed_before_its_first_state_starts_anew(processes, tmp_path):
    trainer = {"steps": 20, "checkpoints": 1, "save_minutes": 60}
    process = processes.Process(target=dies_before_rename, args=(7, tmp_path / "killed"), kwargs=trainer)  # with all records, and no state
    process.start()
    process.join()
    run = only_run(tmp_path / "killed")
    assert len(run.metrics) == 20 and not (run.path / "state.pt").exists() and run.status == "interrupted"
    assert_same(go_on(tmp_path / "killed"), train(tmp_path / "unbroken", **trainer))


def test_signal_stops_and_saves(processes, tmp_path):
    process = processes.Process(target=train, args=(tmp_path / "stopped",), kwargs={"steps": 400})
    process.start()
    wait_until(process, lambda: list(tmp_path.glob("stopped/*/spectra/00000001.safetensors")))
    os.kill(process.pid, signal.SIGUSR1)
    process.join()
    run = only_run(tmp_path / "stopped")
    said, state = json.loads((run.path / "status.json").read_text()), torch.load(run.path / "state.pt", weights_only=True)
    assert (process.exitcode, said["status"], said["error"]) == (0, "stopped", "SIGUSR1")
    assert 1 <= state["step"] == len(run.metrics) < 400
    assert_same(go_on(tmp_path / "stopped"), train(tmp_path / "unbroken", steps=400))
