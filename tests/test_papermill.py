"""The notebook that trains, run by papermill as a user runs it."""
import ast
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pytest

from tformer_lab.runs.store import Run, default_runs_dir
from tformer_lab.tasks.task import TASKS, task_class
from tformer_lab.training.fit import fit, resumed
from tformer_lab.training.parameters import Trainer, field_names

pytestmark = pytest.mark.timeout(300)  # a deadlock has to end, too
TOP = Path(__file__).parent.parent
NOTEBOOK = TOP / "nbs/train.ipynb"


def start(folder, out, parameters, cwd=TOP, **env):
    """Start papermill, with what Jupyter writes for itself kept in the test's folder."""
    own = {"IPYTHONDIR": folder / "ipython", "JUPYTER_RUNTIME_DIR": folder / "runtime", "JUPYTER_CONFIG_DIR": folder / "config"}
    given = [str(part) for name, value in parameters.items() for part in ("-p", name, value)]
    return subprocess.Popen([sys.executable, "-m", "papermill", os.path.relpath(NOTEBOOK, cwd), out, *given], cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, **{name: str(value) for name, value in (own | env).items()}})


def papermill(folder, out, parameters, **how):
    """Its exit status, and what it said."""
    process = start(folder, out, parameters, **how)
    said = process.communicate()[0]
    return process.returncode, said


def only_run(runs):
    [path] = runs.iterdir()
    return Run(path)


def outputs(notebook, mime):
    """Everything of a kind that the cells show."""
    return [output.data[mime] for cell in notebook.cells for output in cell.get("outputs", []) if mime in output.get("data", {})]


def numbers(array):
    """plotly's typed arrays, decoded."""
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]) if isinstance(array, dict) else np.array(array, dtype=float)


# A run

@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shortened")
    parameters = {"steps": 60, "length": 32, "batch_size": 32, "checkpoints": 6, "noise": .25, "attention": "softmax", "runs_dir": folder / "runs"}
    code, said = papermill(folder, folder / "out.ipynb", parameters)
    assert code == 0, said
    return said, folder / "out.ipynb", only_run(folder / "runs")


def test_papermill_trains_and_records(shortened):
    said, out, run = shortened
    assert run.status == "done" and run.spectra.steps.tolist() == list(run.checkpoints) and len(run.checkpoints) == 7
    assert run.config["parameters"]["noise"] == .25 and run.config["trainer"]["steps"] == 60
    assert "unknown parameter" not in said.lower()


def test_output_shows_the_parameters(shortened):
    [table] = [html for html in outputs(nbformat.read(shortened[1], 4), "text/html") if "batch_size" in html]
    cells = re.sub(r"(<[^>]*>|\s)+", " ", table)
    for shown in ("lr 0.5", "steps 60", "batch_size 32", "noise 0.25", "optimizer normalized_gd", "vocab_size 60"): assert shown in cells


def test_output_shows_each_loss_beside_its_optimum(shortened):
    _, out, run = shortened
    figure = outputs(nbformat.read(out, 4), "application/vnd.plotly.v1+json")[0]
    curves = {trace["name"]: trace for trace in figure["data"] if not trace["name"].startswith("optimum")}
    assert curves.keys() == set(run.metrics.columns) - {"step"}
    assert np.array_equal(numbers(curves["train/loss"]["y"]), run.metrics["train/loss"].astype(np.float32))
    entropy = -.25 * np.log(.25) - .75 * np.log(.75)
    lines = [trace for trace in figure["data"] if trace["name"].startswith("optimum")]
    assert {(line["xaxis"], float(f"{numbers(line['y'])[0]:.12f}")) for line in lines} >= {(curves[name]["xaxis"], float(f"{entropy:.12f}")) for name in ("train/loss", "unseen/loss")}
    assert any(f"optimum {entropy:.4g} (exact)" in note["text"] for note in figure["layout"]["annotations"])


def test_output_scrubs_through_the_recorded_spectra_without_a_kernel(shortened):
    _, out, run = shortened
    figure = outputs(nbformat.read(out, 4), "application/vnd.plotly.v1+json")[1]
    stops = [stop["args"][0][0] for stop in figure["layout"]["sliders"][0]["steps"]]
    assert stops == [frame["name"] for frame in figure["frames"]] == [str(step) for step in run.spectra.steps]
    for i, frame in enumerate(figure["frames"]):
        assert frame["traces"] == [1, 2, 4, 5, 7, 8]
        for trace, drawn in zip(frame["traces"], frame["data"]):
            before_or_now, name = i - (trace % 3 == 1), run.spectra.matrices[trace // 3]
            s = run.spectra[name][max(before_or_now, 0)].astype(np.float32)
            s[s <= len(s) * np.finfo(np.float32).eps * s[0]] = np.nan  # zero, and so not on a logarithmic axis
            drawn = numbers(drawn["y"])
            assert np.array_equal(drawn, s[:len(drawn)], equal_nan=True) and np.isnan(s[len(drawn):]).all()


def test_output_is_small_and_holds_no_widget(shortened):
    notebook = nbformat.read(shortened[1], 4)
    assert shortened[1].stat().st_size < 300_000
    assert "widgets" not in notebook.metadata and not outputs(notebook, "application/vnd.jupyter.widget-view+json")


TASK = '''
from typing import ClassVar
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

@dataclass(frozen=True, kw_only=True)
class Copy:
    width:int = Field(ge=1)
    name:ClassVar[str] = "copy"
    defaults:ClassVar[dict] = {"steps": 20, "batch_size": 16, "optimizer": "adam", "lr": .01, "checkpoints": 3}

    def model(self, data=None): return nn.Linear(self.width, self.width, bias=False)
    def batch(self, n, rng): return (torch.from_numpy(rng.standard_normal((n, self.width), dtype="float32")),)
    def loss(self, model, batch): return (model(batch[0]) - batch[0]).square().mean()
    def evaluate(self, model): return {}
    def optimum(self): return []
'''


def test_task_of_a_users_own_package_trains_from_another_folder(tmp_path):
    package = tmp_path / "library/copying"
    package.mkdir(parents=True)
    (package / "tasks.py").write_text(TASK)
    code, said = papermill(tmp_path, tmp_path / "out.ipynb", {"task": "copying.tasks:Copy", "width": 5}, cwd=TOP / "nbs",
                           PYTHONPATH=tmp_path / "library", TFORMER_RUNS=tmp_path / "runs")
    assert code == 0, said
    run = only_run(tmp_path / "runs")
    assert run.status == "done" and run.config["parameters"] == {"width": 5} and run.name.startswith("copy-width5-")
    assert run.spectra.shapes == {"weight": (5, 5)} and len(run.spectra) == 4 and len(run.metrics) == 21
    assert run.metrics["train/loss"].iloc[-1] < run.metrics["train/loss"].iloc[0]


def test_papermill_trains_a_forecaster_and_shows_its_forecasts(tmp_path):
    given = {"task": "forecast", "loss": "sgt", "sgt_q": 1.001, "optimizer": "adam", "data": "normal_short", "input_length": 20, "horizon": 5, "d_model": 8, "n_heads": 2, "n_layers": 1,
             "steps": 20, "batch_size": 8, "checkpoints": 2, "evaluations": 4, "validation_size": 16, "patience": 50, "runs_dir": tmp_path / "runs"}
    code, said = papermill(tmp_path, tmp_path / "out.ipynb", given)
    assert code == 0 and "unknown parameter" not in said.lower(), said
    run = only_run(tmp_path / "runs")
    assert run.status == "done" and run.config["parameters"]["loss"] == "sgt" and run.config["parameters"]["sgt_q"] == 1.001
    training, forecasts = outputs(nbformat.read(tmp_path / "out.ipynb", 4), "application/vnd.plotly.v1+json")[:2]
    names = [trace["name"] for trace in training["data"]]
    assert any(name.startswith("best linear predictor") for name in names) and any(name.startswith("optimum") for name in names)
    assert [trace["name"] for trace in forecasts["data"]][:6] == ["80% by its errors", "window", "what came", "forecast", "80% given the window", "80% given the window"]


def test_runs_go_to_the_top_of_the_project_from_its_folders(monkeypatch):
    monkeypatch.delenv("TFORMER_RUNS", raising=False)
    for folder in (TOP, TOP / "nbs", TOP / "nbs/runs"):
        monkeypatch.chdir(folder)
        assert default_runs_dir() == TOP / "runs"


# Its parameters

def test_parameters_cell_declares_every_field_of_trainer_and_built_in_tasks():
    [cell] = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    values = {target.id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body for target in line.targets}
    built_in = [task_class(name) for name, where in TASKS.items() if str(where).startswith("tformer_lab.")]
    assert sorted(values) == sorted({"task", "runs_dir", "name", "resume", "tracking", "PAPERMILL_OUTPUT_PATH"} | {name for kind in (Trainer, *built_in) for name in field_names(kind)})
    assert values.pop("task") == "recall" and set(values.values()) == {None}


WRONG = {"lrr 0.5": "there is no parameter 'lrr'; did you mean 'lr'?", "lr -1": "lr = -1: it should be greater than 0", "lr fast": "lr = 'fast': it should be a valid number",
         "noise 1.5": "noise = 1.5: it should be less than 1", "d_model 64": "d_model is 64", "steps True": "steps = True: it should be int",
         "attention sofmax": "'linear', 'softmax' or 'relu'; did you mean 'softmax'?", "task reccall": "there is no task 'reccall'; did you mean 'recall'?",
         "resume nowhere": "nowhere is no run", "name ../mine": "'../mine' is no name for a run", "tracking mlfow": "did you mean 'mlflow'?"}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """papermill with each wrong parameter, two at a time: most of it is waiting for kernels."""
    folder = tmp_path_factory.mktemp("refusals")
    with ThreadPoolExecutor(2) as pool:
        run = lambda i, wrong: papermill(folder, folder / f"out{i}.ipynb", {"runs_dir": folder / f"runs{i}", **dict([wrong.split()])})
        yield {wrong: (pool.submit(run, i, wrong), folder / f"runs{i}") for i, wrong in enumerate(WRONG)}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_parameter_stops_before_anything_is_written(refusals, wrong):
    answer, runs = refusals[wrong]
    code, said = answer.result()
    assert code != 0 and WRONG[wrong] in said
    assert not re.search(r"tformer_lab/(data|models|runs|spectra|tasks|training)/", said) and not runs.exists()  # no traceback of ours


# Its end

def test_terminated_kernel_saves_and_papermill_goes_on_with_the_run(tmp_path):
    parameters = {"steps": 600, "length": 32, "batch_size": 32, "test_size": 16, "checkpoints": 6, "runs_dir": tmp_path / "runs"}
    process = start(tmp_path, tmp_path / "out.ipynb", parameters)
    while process.poll() is None and not list(tmp_path.glob("runs/*/spectra/00000001.safetensors")): time.sleep(.01)
    os.kill(only_run(tmp_path / "runs").status_details["pid"], signal.SIGTERM)
    said = process.communicate()[0]
    run = only_run(tmp_path / "runs")
    assert process.returncode == 0 and run.status == "stopped" and 0 < len(run.metrics) < 600
    assert f"stopped by SIGTERM at step {run.status_details['step']}" in json.dumps(nbformat.read(tmp_path / "out.ipynb", 4)), said

    code, said = papermill(tmp_path, tmp_path / "out.ipynb", {"resume": run.path})
    assert code == 0 and run.status == "done", said
    unbroken = fit(*resumed(run), runs_dir=tmp_path / "unbroken", progress=False)
    assert run.metrics.equals(unbroken.metrics) and len(run.metrics) == 601
    assert list(run.checkpoints) == list(unbroken.checkpoints)
    for step in run.checkpoints: assert all(run.checkpoints[step][name].equal(weights) for name, weights in unbroken.checkpoints[step].items())
