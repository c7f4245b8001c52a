"""Several processes train one model: the same curve as one process with the joint batch, and one run."""
import subprocess
import sys

import numpy as np
import pytest

from tformer_lab.runs.store import Run
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import fit

pytestmark = pytest.mark.timeout(300)  # a deadlock has to end, too
SCRIPT = """
import gc
import os
import sys
from pathlib import Path
import torch.distributed
from tformer_lab.runs.store import Run
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import fit, resumed

if __name__ == "__main__":
    for name, samples, minutes in (("population", None, None), ("finite", 80, None), ("parts", 80, None), ("resumed", None, 1e-6)):
        runs, parts = Path(sys.argv[1]) / name, dict(optimizer="sgd", accumulate=3, clip=.1, warmup=5, schedule="cosine") if name == "parts" else {}
        run = fit(Recall(length=32), runs_dir=runs, steps=30, batch_size=32, samples=samples, population_size=64 if samples else None, checkpoints=4, progress=False, time_limit=minutes, **parts)
        sys.stdout.write(f"{name} has {'no run' if run is None else run.status}\\n")
        sys.stdout.flush()
    stopped = Run(next(runs.iterdir()))
    fit(*resumed(stopped, time_limit=None), resume=stopped, progress=False)
    gc.collect()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's gloo threads want the interpreter's lock while it is taken apart, and now and then abort the process: pytorch's pull request 179291
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes trained, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # with --cpu accelerate launch starts only one
    done = subprocess.run([*launch, folder / "script.py", folder], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@pytest.mark.parametrize("name, samples", [("population", None), ("finite", 80), ("resumed", None)])
def test_two_processes_learn_what_one_does_from_the_joint_batch(two, name, samples, tmp_path):
    [path] = (two[0] / name).iterdir()
    run, alone = Run(path), fit(Recall(length=32), runs_dir=tmp_path, steps=30, batch_size=32, samples=samples, population_size=64 if samples else None, checkpoints=4, progress=False)
    assert run.config["processes"] == 2 and run.status == "done"
    assert run.metrics.columns.equals(alone.metrics.columns) and run.metrics["step"].tolist() == list(range(31))  # each step once
    assert np.allclose(run.metrics, alone.metrics, rtol=1e-4, equal_nan=True)
    assert run.spectra.steps.tolist() == list(run.checkpoints) == list(alone.checkpoints)
    for name in alone.spectra.matrices: assert np.allclose(run.checkpoints[30][name], alone.checkpoints[30][name], atol=1e-4)


def test_processes_share_a_batch_in_parts_its_clipped_gradient_and_the_schedule(two, tmp_path):
    [path] = (two[0] / "parts").iterdir()
    run, whole = Run(path), fit(Recall(length=32), runs_dir=tmp_path, steps=30, batch_size=32, samples=80, population_size=64, checkpoints=4, progress=False, optimizer="sgd", clip=.1, warmup=5, schedule="cosine")
    assert run.config["trainer"]["accumulate"] == 3 and np.allclose(run.metrics, whole.metrics, rtol=1e-4, equal_nan=True)
    for name in whole.spectra.matrices: assert np.allclose(run.checkpoints[30][name], whole.checkpoints[30][name], atol=1e-5)


def test_only_the_first_process_has_the_run(two):
    said = [line for line in two[1].splitlines() if " has " in line]
    assert sorted(said) == sorted([*(f"{name} has no run" for name in ("population", "finite", "parts", "resumed")), "population has done", "finite has done", "parts has done", "resumed has stopped"])
