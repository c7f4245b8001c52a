"""The command that trains, as accelerate launches it: two processes make the run of one, and say once what is wrong."""
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tformer_lab.runs.store import Run
from tformer_lab.tasks.graphical import Graphical
from tformer_lab.training.fit import fit

pytestmark = pytest.mark.timeout(300)  # a deadlock has to end, too
TOP = Path(__file__).parents[1]
GRAPH = TOP / "nbs/papers/graphs/chain.yaml"
TASK = {"graph": str(GRAPH), "length": 12, "test_size": 16, "model": "minlstm", "d_model": 8, "n_layers": 1}
HOW = {"steps": 12, "batch_size": 8, "checkpoints": 3, "evaluations": 4, "lr": .01}


def launch(*arguments, processes=2, **parameters):
    """The exit status, and what was said."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"] if processes > 1 else [sys.executable]
    pairs = [str(part) for name, value in parameters.items() for part in ("-p", name, value)]
    done = subprocess.run([*start, "-m", "tformer_lab.training.launch", *arguments, *pairs], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "PYTHONPATH": str(TOP), "CUDA_VISIBLE_DEVICES": ""})
    return done.returncode, done.stdout


def test_two_launched_processes_learn_what_one_does_from_the_joint_batch(tmp_path):
    """From a file that both want made, with a trace."""
    (tmp_path / "parameters.yaml").write_text("task: graphical\nmodel: minlstm\nlr: 1e-2\nlength: 5\n")
    code, said = launch("-f", tmp_path / "parameters.yaml", **(TASK | HOW), runs_dir=tmp_path / "runs", name="two", samples=20, stored=tmp_path / "set.npy", profile=4)
    assert code == 0, said
    assert said.count("done at step 12: ") == said.count("4 checkpoints: ") == 1 and str(tmp_path / "runs/two") in said
    run, alone = Run(tmp_path / "runs/two"), fit(Graphical(**TASK, stored=str(tmp_path / "alone.npy")), runs_dir=tmp_path / "alone", samples=20, progress=False, **HOW)
    assert run.config["processes"] == 2 and run.status == "done" and [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
    assert run.metrics.columns.equals(alone.metrics.columns) and run.metrics["step"].tolist() == list(range(13))
    assert np.allclose(run.metrics, alone.metrics, rtol=1e-4, equal_nan=True)
    assert (tmp_path / "set.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes() and alone.trace is None
    assert b"gloo:all_reduce" in gzip.decompress(run.trace.read_bytes())  # of one process, in which both average their gradients
    for name, weights in alone.checkpoints[12].items(): assert np.allclose(run.checkpoints[12][name], weights, atol=1e-4)


def test_what_is_wrong_is_said_once_and_makes_no_folder(tmp_path):
    code, said = launch(task="graphical", model="minlst", runs_dir=tmp_path / "runs")
    assert code != 0 and said.count("tformer-train: ") == said.count("did you mean 'minlstm'?") == 1, said
    assert not (tmp_path / "runs").exists()
