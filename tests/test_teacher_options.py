"""What no theory, teacher or student is there for is refused in words."""
import dataclasses
import re

import numpy as np
import pytest
import torch

from tformer_lab.data.teacher import draw_teachers, teacher_samples
from tformer_lab.models.attention_indexed import squared_label_error
from tformer_lab.tasks.teacher_student import TeacherStudent
from tformer_lab.theory.attention_erm import erm_plateau, erm_tied_smse
from tformer_lab.theory.teacher_student import bayes_optimal_smse, measurement_noise, recovery_threshold, untied_bounds
from tformer_lab.training.parameters import Trainer


@pytest.mark.parametrize("call, said", [
    (lambda: bayes_optimal_smse(.5, .5, .5, 2, "sofmax"), "output is 'sofmax': it has to be softmax or identity"),
    (lambda: bayes_optimal_smse(.5, .5, .5, noise="indep"), "noise is 'indep': it has to be symmetric or independent"),
    (lambda: bayes_optimal_smse(.5, "x", .5), "rho_star is 'x': it has to be one number"),
    (lambda: bayes_optimal_smse("x", .5, .5), "alpha is 'x': it has to be a number, or an array of numbers"),
    (lambda: recovery_threshold(.5, 2, "x"), "output is 'x': it has to be softmax or identity"),
    (lambda: measurement_noise(-1.), "delta_in is -1.0: the noise's variance has to be 0 or more"),
    (lambda: measurement_noise(.5, noise="x"), "noise is 'x': it has to be symmetric or independent"),
    (lambda: untied_bounds(.5, [.5], .5), "rho_star is [0.5]: it has to be one number"),
    (lambda: erm_tied_smse("a", .5, .5, .01), "alpha is 'a': it has to be one number"),
    (lambda: erm_tied_smse(np.array([.1, .2]), .5, .5, .01), "alpha is array([0.1, 0.2]): it has to be one number"),
    (lambda: erm_tied_smse(.5, .5, .5, [.01]), "lam is [0.01]: it has to be one number"),
    (lambda: erm_plateau(None, .5), "rho_star is None: it has to be one number"),
    (lambda: teacher_samples(2, np.random.default_rng(0), draw_teachers("tied", 4, 2, 1), "tied", output="softmx"), "output is 'softmx': it has to be softmax or identity"),
    (lambda: squared_label_error(torch.zeros(1, 4, 4), torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 2), output="softmx"), "output is 'softmx': it has to be softmax or identity"),
])
def test_a_mistyped_option_is_refused(call, said):
    with pytest.raises(ValueError, match=re.escape(said)): call()


def test_numbers_of_numpy_are_numbers():
    assert bayes_optimal_smse(np.float32(.5), np.float64(.5), np.int64(1)) == bayes_optimal_smse(.5, .5, 1)


@pytest.mark.parametrize("form", ["tied", "symmetric"])
@pytest.mark.parametrize("changed", [{"beta": 300.}, {"noise_variance": 1e6}])
def test_labels_that_are_steps_have_no_optimum(form, changed):
    task = TeacherStudent(d_model=40, form=form, **changed)
    assert [one.metric for one in task.optimum()] == ["valid/smse"] and task.references() == [] and task.predicted_student() is None
    assert len(TeacherStudent(d_model=40, form=form, beta=30.).optimum()) == 3


def test_students_see_all_samples_at_once():
    task = TeacherStudent(d_model=20)
    trainer = Trainer(**task.defaults)
    task.check_trainer(trainer)
    with pytest.raises(ValueError, match=f"set batch_size to {task.samples}"): task.check_trainer(dataclasses.replace(trainer, batch_size=task.samples - 1))
    with pytest.raises(ValueError, match="tolerance"): TeacherStudent(tolerance=float("inf"))


def test_more_samples_than_memory_are_refused():
    with pytest.raises(ValueError, match="GiB, more than 256"): TeacherStudent(d_model=20, students=2, sample_ratio=1e9)
