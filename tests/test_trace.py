"""A trace of some updates: what is in it, what it leaves as it was, and when there is none."""
import gzip
import json
from collections import Counter

import pytest
import torch

from tformer_lab.runs.store import Run
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import fit, resumed
from tformer_lab.training.parameters import ParameterError, Trainer, build

HOW = dict(steps=12, batch_size=8, checkpoints=2, evaluations=2, spacing="linear", progress=False)


def parts(run):
    """How often each part of a step is in a run's trace, and operators by name."""
    events = json.loads(gzip.decompress(run.trace.read_bytes()))["traceEvents"]
    return [Counter(event["name"] for event in events if event.get("cat") == kind) for kind in ("user_annotation", "cpu_op")]


def train(runs, length=16, **given): return fit(Recall(length=length), runs_dir=runs, **(HOW | given))


def same(run, other):
    assert run.metrics.equals(other.metrics)
    for name, weight in other.checkpoints[12].items(): assert torch.equal(run.checkpoints[12][name], weight)


@pytest.mark.parametrize("how", [{}, {"samples": 16, "population_size": 8, "accumulate": 2}], ids=["population", "parts"])
def test_a_trace_holds_the_updates_that_were_asked_for_and_changes_no_number(tmp_path, how):
    run, plain = (train(tmp_path, profile=profile, **how) for profile in (4, None))
    same(run, plain)
    assert plain.trace is None and run.trace == run.path / "trace.json.gz" and not list(run.path.glob(".*tmp"))
    named, operators = parts(run)
    assert named["loss"] == named["update"] == 4 and named["evaluate"] == named["record"] == 1  # updates 3 to 6, and what belongs to step 6
    assert sorted(name for name in named if name.startswith("ProfilerStep")) == [f"ProfilerStep#{i}" for i in (3, 4, 5, 6)] and sum(operators.values()) > 20
    assert run.config["trainer"]["profile"] == 4 and "speed" in run.status_details


def test_shapes_are_in_a_trace(tmp_path):
    events = json.loads(gzip.decompress(train(tmp_path, length=17, profile=1).trace.read_bytes()))["traceEvents"]
    assert any(shape[:2] == [8, 17] for event in events if event.get("cat") == "cpu_op" for shape in event["args"].get("Input Dims", []))


def test_updates_that_are_traced_are_left_out_of_the_speed(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr("tformer_lab.training.fit.Stopwatch.stop", lambda self, examples, pausing=False: counted.append(examples))
    train(tmp_path, profile=4)
    assert len(counted) == 12 - 3 - 4


class Stopping(Recall):
    def finished(self, model):
        asked.append(0)
        if len(asked) == stop_at: raise KeyboardInterrupt
        return False


@pytest.mark.parametrize("at, before, after", [(3, None, 4), (6, 2, 2), (10, 4, 4)])
def test_a_resumed_run_has_one_trace_and_the_same_numbers(tmp_path, at, before, after):
    """Stopped in the warm-up, it traces after it goes on; stopped later, it keeps what it has."""
    global asked, stop_at
    asked, stop_at = [], at
    with pytest.raises(KeyboardInterrupt): fit(Stopping(length=16), runs_dir=tmp_path / "broken", profile=4, save_minutes=1e-9, **HOW)
    [path] = (tmp_path / "broken").iterdir()
    broken = Run(path)
    assert (None if broken.trace is None else parts(broken)[0]["update"]) == before
    again = fit(*resumed(broken, Recall), resume=broken, progress=False)
    assert parts(again)[0]["update"] == after
    same(again, train(tmp_path))


@pytest.mark.parametrize("wrong, said", [(dict(profile=0), "profile = 0"), (dict(profile=10, steps=12), "it should be 9 at most, for steps is 12"), (dict(profile=1, steps=3), "3 updates warm up"), (dict(profile=True), "profile = True")], ids=str)
def test_what_cannot_be_traced_is_refused(wrong, said):
    with pytest.raises(ParameterError, match=said): build(Trainer, wrong)
    assert build(Trainer, {"profile": 9, "steps": 12}).profile == 9
