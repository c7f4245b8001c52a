"""What the README says of its first training, on that training's own batches."""
import numpy as np

from tformer_lab.runs.store import Run, RunWriter
from tformer_lab.tasks.recall import Recall
from tformer_lab.training.fit import fit


def test_loss_waits_at_ln_4_and_falls_while_five_singular_values_lead(tmp_path):
    run = fit(Recall(), runs_dir=tmp_path, steps=260, checkpoints=26, spacing="linear", evaluations=1, progress=False)
    loss, history = run.metrics["train/loss"], run.spectra
    assert abs(loss[60:180].mean() - np.log(4)) < .05
    waited, fallen = np.flatnonzero(loss > .9 * np.log(4))[-1], np.flatnonzero(loss < .01 * np.log(4))[0]
    assert 180 < waited < fallen < waited + 30
    waiting = history["W"][(history.steps >= 60) & (history.steps <= 180)]
    assert (waiting[:, 4] > 4 * waiting[:, 5]).all() and (waiting[:, 0] < 2 * waiting[:, 4]).all()
    assert fallen < run.unresolved < 260


def test_negative_loss_is_not_taken_for_one_below_the_precision(tmp_path):
    run = Run.create(tmp_path / "likelihood", {"trainer": {"precision": "float32"}})
    with RunWriter(run) as writer: writer.log([{"step": i, "train/loss": 1. - i} for i in range(4)])
    assert run.unresolved is None
