"""Attention-indexed models, their teachers, and students that are trained side by side."""
import math
import signal

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.special import expit

from tformer_lab.data.teacher import draw_teachers, teacher_samples
from tformer_lab.models.attention_indexed import CENTERED, WEIGHTS, AttentionIndexed, attention_logits, index_matrix, squared_label_error
from tformer_lab.runs.store import Run
from tformer_lab.tasks.teacher_student import Students, TeacherStudent, student_table
from tformer_lab.theory.attention_erm import erm_tied_smse
from tformer_lab.theory.teacher_student import bayes_optimal_smse, measurement_noise, recovery_threshold
from tformer_lab.training.fit import fit, resumed, trained
from tformer_lab.training.parameters import ParameterError, Trainer, trainer_for

SMALL = dict(d_model=20, students=3, sample_ratio=.5, test_size=100)


def literal(form, x, *weights):
    """The logits of one sample [L, D], written as in the definition."""
    (R, D), L = weights[0].shape, len(x)
    q = x @ weights[0].T
    if form == "tied": return (q @ q.T - torch.eye(L, dtype=x.dtype) * (weights[0]**2).sum()) / (D * math.sqrt(R))
    if form == "untied": return q @ (x @ weights[1].T).T / (D * math.sqrt(R))
    if form == "gram": return q @ q.T / D**2
    S = (weights[0] + weights[0].T) / math.sqrt(2 * D)
    return (x @ S @ x.T - torch.eye(L, dtype=x.dtype) * torch.trace(S)) / math.sqrt(D)


@pytest.mark.parametrize("output", ["softmax", "identity"])
@pytest.mark.parametrize("L", [2, 3, 5])
@pytest.mark.parametrize("form", WEIGHTS)
def test_loss_and_gradient_are_those_of_the_definition(form, L, output):
    torch.manual_seed(L)
    D, count, n = 7, 3, 1100 if L == 2 else 11  # with two tokens in more than one chunk
    model = AttentionIndexed(D, D if form in ("symmetric", "gram") else 4, form, count, 1.7, output).double()
    x, y = torch.randn(count, n, L, D, dtype=torch.float64), torch.rand(count, n, L, L, dtype=torch.float64)
    losses = model.loss(x, y)
    losses.sum().backward()
    for c in range(count):
        weights = [getattr(model, name)[c].detach().requires_grad_() for name in WEIGHTS[form]]
        said = torch.stack([literal(form, sample, *weights) for sample in x[c]])
        if output == "softmax": said = (1.7 * said).softmax(-1)
        assert torch.allclose(model(x)[c], said)
        expected = ((said - y[c])**2).sum()
        expected.backward()
        assert torch.allclose(losses[c], expected)
        for name, weight in zip(WEIGHTS[form], weights): assert torch.allclose(getattr(model, name)[c].grad, weight.grad)


def test_some_students_alone_lose_what_they_do_among_all():
    model, x, y = AttentionIndexed(6, 4, count=4), torch.randn(4, 50, 2, 6), torch.rand(4, 50, 2, 2)
    assert torch.allclose(model.loss(x[[1, 3]], y[[1, 3]], [1, 3]), model.loss(x, y)[[1, 3]])


@pytest.mark.parametrize("kind", ["symmetric", "independent"])
def test_the_noise_in_the_labels_has_the_moments_that_it_should(kind):
    teachers = draw_teachers("tied", 5, 3, 2)
    samples = teacher_samples(40_000, np.random.default_rng(1), teachers, "tied", 3, .7, kind, output="identity")
    noise = (samples.labels - samples.clean)[:, 0].double().numpy()
    assert np.allclose(noise.var(0), .7 * (np.eye(3) + 1) / 2, rtol=.04) and np.allclose(noise.mean(0), 0, atol=.02)
    correlation = np.corrcoef(noise[:, 0, 1], noise[:, 1, 0])[0, 1]
    assert abs(correlation - (kind == "symmetric")) < .02
    assert stats.kstest(noise[:, 1, 1] / math.sqrt(.7), "norm").pvalue > .001


@pytest.mark.parametrize("L", [2, 3])
@pytest.mark.parametrize("output", ["softmax", "identity"])
@pytest.mark.parametrize("kind", ["symmetric", "independent"])
def test_measurements_have_the_noise_that_sampled_labels_have(kind, output, L):
    """Signal and noise of what can be seen, sampled, have the predicted ratios along their common axes."""
    D, n, rng = 60, 60_000, np.random.default_rng(L)
    M = rng.standard_normal((D, D))
    M = torch.from_numpy((M + M.T) / math.sqrt(2 * D))[None]
    x = torch.from_numpy(rng.standard_normal((1, n, L, D)))
    signal = attention_logits(x, M, True)[0].numpy() / math.sqrt(M.square().sum().item() / D)
    samples = teacher_samples(n, rng, draw_teachers("tied", 4, 2, 1), "tied", L, 1., kind, output="identity")
    noise = (samples.labels - samples.clean)[:, 0].double().numpy()
    seen = lambda a: (a if output == "identity" else a[:, np.arange(L), np.arange(L), None] - a).reshape(n, -1)
    signal, noise = (np.cov(seen(part).T) for part in (signal, noise))
    axes = lambda a: (lambda values, vectors: vectors[:, values > .01 * values[-1]])(*np.linalg.eigh(a))
    kept = axes(noise)  # what differs in no label is not seen
    known = 1 / np.maximum(linalg.eigh(kept.T @ signal @ kept, kept.T @ noise @ kept, eigvals_only=True), 1e-12)
    expected = measurement_noise(1., L, output, kind)
    assert np.allclose(np.sort(known)[:len(expected)], np.sort(expected), rtol=.06) and (np.sort(known)[len(expected):] > 1e3).all()


def test_students_together_learn_what_each_learns_alone(tmp_path):
    together, alone = (fit(TeacherStudent(**SMALL | {"students": n}), runs_dir=tmp_path, steps=400, precision="float64", progress=False) for n in (3, 1))
    first, only = (trained(run).students.weight[0] for run in (together, alone))
    errors = alone.metrics["valid/smse"].dropna()
    assert torch.allclose(first, only, atol=1e-6) and errors.iloc[-1] < .5 * errors.iloc[0]
    assert np.isclose(student_table(together)["valid/smse"][0], errors.iloc[-1], rtol=1e-3)


def test_a_student_that_has_ended_stays_as_it_is(tmp_path):
    task = TeacherStudent(**SMALL | {"tolerance": 3e-5, "ridge": .03})
    run = fit(task, runs_dir=tmp_path, progress=False, checkpoints=400, spacing="linear", steps=400, evaluations=400)
    active, steps = run.metrics["train/students"].dropna(), list(run.checkpoints)
    assert active.iloc[0] == 3 and active.iloc[-1] == 0 and 100 < run.status_details["step"] < 400 and run.status == "done"
    ends = [int(np.argmax(active.to_numpy() < 3 - i)) for i in range(3)]  # the steps from which on 2, 1, 0 are left
    assert ends[0] < ends[2]
    moved = [[s for s in steps[1:] if not torch.equal(run.checkpoints[s][f"students.weight.{c}"], run.checkpoints[s - 1][f"students.weight.{c}"])][-1] for c in range(3)]
    assert sorted(moved) == ends


def test_absolute_tolerance_ends_students_of_small_ridge_first(tmp_path):
    ended = {(stopping, ridge): fit(TeacherStudent(**SMALL | {"sample_ratio": .1, "ridge": ridge, "stopping": stopping, "tolerance": 1e-5}), runs_dir=tmp_path, steps=1500, progress=False).status_details["step"]
             for stopping in ("relative", "absolute") for ridge in (.1, 1e-4)}
    assert ended["absolute", 1e-4] < ended["relative", 1e-4]


def test_a_training_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    task = TeacherStudent(**SMALL)
    whole = fit(task, runs_dir=tmp_path / "whole", steps=300, progress=False)
    stopped = fit(task, runs_dir=tmp_path / "stopped", steps=300, progress=False, time_limit=1e-3)
    assert stopped.status == "stopped"
    again = fit(*resumed(stopped, time_limit=None), resume=Run(stopped.path), progress=False)
    assert again.metrics.equals(whole.metrics) and all(torch.equal(a, b) for a, b in zip(trained(again).parameters(), trained(whole).parameters()))


def test_a_training_that_was_stopped_when_some_students_had_ended_goes_on_bit_for_bit(tmp_path, monkeypatch):
    task, trainer = TeacherStudent(**SMALL | {"tolerance": 3e-5, "ridge": .03}), dict(steps=400, evaluations=20, progress=False)
    whole, note = fit(task, runs_dir=tmp_path / "whole", **trainer), Students.note
    def stop_then(students, *given, **more):
        note(students, *given, **more)
        if students.ended.any(): signal.raise_signal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Students, "note", stop_then)
        stopped = fit(task, runs_dir=tmp_path / "stopped", **trainer)
    assert stopped.status == "stopped" and 0 < len(trained(stopped).active) < 3
    again = fit(*resumed(stopped, time_limit=None), resume=Run(stopped.path), progress=False)
    assert again.metrics.equals(whole.metrics) and all(torch.equal(a, b) for a, b in zip(trained(again).state_dict().values(), trained(whole).state_dict().values()))


def test_table_has_each_students_numbers_and_their_means_are_the_runs(tmp_path):
    run = fit(TeacherStudent(**SMALL, form="untied"), runs_dir=tmp_path, steps=30, progress=False)
    table, last = student_table(run), run.metrics.dropna().iloc[-1]
    assert table["student"].tolist() == [0, 1, 2]
    for name in ("valid/smse", "valid/label_error", "valid/clean_label_error", "train/data_loss"): assert np.isclose(table[name].mean(), last[name], rtol=1e-5)
    assert np.isclose((table["train/data_loss"] + table["train/regularizer"]).mean(), last["train/loss"], rtol=1e-5)


def test_loss_is_the_mean_objective_over_the_square_of_the_dimension():
    task = TeacherStudent(**SMALL)
    batch = task.batch(task.samples, np.random.default_rng(0))
    model = task.model(batch)
    with torch.no_grad(): loss = task.loss(model, batch)
    x, y, _ = batch.by_teacher
    W = torch.stack(list(model.students.weight))
    said = attention_logits(x, index_matrix("tied", W), True).softmax(-1)
    assert torch.isclose(loss, (((said - y)**2).sum() + .01 / math.sqrt(.75) * (W**2).sum()) / (3 * 400))
    half = task.batch(task.samples // 2, np.random.default_rng(0))
    with torch.no_grad(): assert torch.isclose(task.loss(model, half), loss, rtol=.2)  # half the samples count twice


def test_a_student_that_is_the_teacher_has_the_label_error_that_the_noise_makes_and_none_without():
    task = TeacherStudent(d_model=40, students=2, sample_ratio=.01, student_width=.5, test_size=20_000)
    model, rng = task.model(), np.random.default_rng(0)
    with torch.no_grad():
        for weight, own in zip(model.students.weight, task.teachers[0]): weight.copy_(own)
    found = {name: value.numpy() for name, value in task.student_errors(model).items()}
    expected = []
    for W in task.teachers[0].double().numpy():
        x, noise = rng.standard_normal((60_000, 2, 40)), math.sqrt(.5 / 4) * rng.standard_normal((60_000, 2, 2))
        z = x @ (W.T @ W) @ x.swapaxes(1, 2) / (40 * math.sqrt(20)) - np.eye(2) * (W**2).sum() / (40 * math.sqrt(20))
        first = lambda a: expit(np.stack([a[:, 0, 0] - a[:, 0, 1], a[:, 1, 1] - a[:, 1, 0]]))
        expected.append(2 * np.square(first(z + noise + noise.swapaxes(1, 2)) - first(z)).sum(0).mean())
    assert np.allclose(found["valid/label_error"], expected, rtol=.03) and np.allclose(found["valid/clean_label_error"], 0, atol=1e-9) and np.allclose(found["valid/smse"], 0, atol=1e-9)


@pytest.mark.parametrize("width", [.5, 1.])
def test_with_next_to_no_samples_the_best_label_error_is_half_of_what_two_teachers_differ_by(width):
    """On the same tokens: that half is the variance that is left when all that is known is how teachers are drawn."""
    best, rng, D = {o.metric: o.value for o in TeacherStudent(sample_ratio=1e-4, teacher_width=width).optimum()}, np.random.default_rng(0), 200
    def labels(x):
        W, diagonal, beside = rng.standard_normal((round(width * D), D)), math.sqrt(.5) * rng.standard_normal((len(x), 2)), .5 * rng.standard_normal((len(x), 1))
        z = (x @ (W.T @ W) @ x.swapaxes(1, 2) - np.eye(2) * (W**2).sum()) / (D * math.sqrt(len(W)))
        z = np.stack([z[:, 0, 0] - z[:, 0, 1], z[:, 1, 1] - z[:, 1, 0]], 1)
        return expit(z + diagonal - beside), expit(z)
    differ = []
    for _ in range(12):
        x = rng.standard_normal((2000, 2, D))
        differ.append([4 * np.square(one - other).mean() / 2 for one, other in zip(labels(x), labels(x))])
    assert np.allclose(np.mean(differ, 0), [best["valid/label_error"], best["valid/clean_label_error"]], rtol=.03), (np.mean(differ, 0), best)


def posterior_label_errors(task, teacher):
    """Of the mean of the label over all symmetric matrices that are left, which are Gaussian: the teacher's weights are, and the differences of its logits are seen with Gaussian noise."""
    D, rows, columns = task.d_model, *np.triu_indices(task.d_model)
    def rows_of(x):  # [2 n, D (D + 1) / 2] what a matrix of variance 1 adds to z_11 - z_12 and z_22 - z_12, and D: of variance 2 / D on the diagonal, else 1 / D
        a, b = x[:, 0], x[:, 1]
        both = np.where(rows == columns, 1, 2)
        measured = lambda u, v: both / 2 * (u[:, rows] * v[:, columns] + v[:, rows] * u[:, columns])
        parts = [measured(u, u) - (rows == columns) - measured(a, b) for u in (a, b)]
        return np.stack(parts, 1).reshape(-1, len(rows)) * np.sqrt(np.where(rows == columns, 2, 1) / D) / math.sqrt(D)
    x, y, _ = (part[teacher].double().numpy() for part in task.batch(task.samples, np.random.default_rng(0)).by_teacher)
    fresh, *labels = (part[teacher].double().numpy() for part in task.batch(1000, np.random.default_rng(1)).by_teacher)
    logit = lambda y: np.stack([np.log(y[:, 0, 0] / y[:, 0, 1]), np.log(y[:, 1, 1] / y[:, 1, 0])], 1).ravel()
    F, G = rows_of(x), rows_of(fresh)
    noise = np.kron(np.eye(len(x)), task.noise_variance * np.array([[1.5, .5], [.5, 1.5]]))
    L = np.linalg.cholesky(F @ F.T + noise)
    half = linalg.solve_triangular(L, F @ G.T, lower=True)
    mean, left = half.T @ linalg.solve_triangular(L, logit(y), lower=True), (G**2).sum(1) - (half**2).sum(0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    best = lambda variance: expit(mean[:, None] + np.sqrt(variance)[:, None] * nodes) @ weights / weights.sum()
    return [4 * np.square(expit(logit(y)) - best(left + more)).mean() for y, more in zip(labels, (1.5 * task.noise_variance, 0.))]


@pytest.mark.parametrize("ratio", [.1, .2])
def test_the_best_label_errors_of_a_gaussian_teacher_are_those_of_its_posterior(ratio):
    task = TeacherStudent(d_model=60, form="symmetric", sample_ratio=ratio, students=3)
    best = {o.metric: o.value for o in task.optimum()}
    found = np.mean([posterior_label_errors(task, i) for i in range(task.students)], 0)
    assert np.allclose(found, [best["valid/label_error"], best["valid/clean_label_error"]], rtol=.06), (found, best)


@pytest.mark.parametrize("ratio", [.22, .5])
def test_students_of_a_large_ridge_have_the_predicted_error_at_dimension_100(tmp_path, ratio):
    run = fit(TeacherStudent(sample_ratio=ratio, ridge=.1, students=2, test_size=50), runs_dir=tmp_path, steps=250, evaluations=2, progress=False)
    found, predicted = student_table(run), erm_tied_smse(ratio, .5, .5, .1)
    assert predicted.status == "converged" and found["valid/smse"].mean() == pytest.approx(predicted.smse, rel=.04)
    assert (found["train/data_loss"] + found["train/regularizer"]).mean() == pytest.approx(predicted.data_loss + predicted.regularizer, rel=.03)


def test_optimum_is_there_where_it_is_known():
    known = lambda **given: {o.metric: (o.value, o.kind) for o in TeacherStudent(**given).optimum()}
    assert known()["valid/smse"] == (bayes_optimal_smse(.5, .5, .5), "asymptotic")
    assert known(form="symmetric", output="identity")["valid/smse"][0] == bayes_optimal_smse(.5, np.inf, .5, output="identity")
    assert known(form="untied")["valid/smse"][1] == "bound" and not known(form="untied", output="identity") and not known(form="gram")
    assert known(noise_variance=0., sample_ratio=.2)["valid/smse"] == (0., "asymptotic") and recovery_threshold(.5) < .2


WRONG = {"student_width": ("form='gram', student_width=.5", "square"), "sample_ratio": ("sample_ratio=1e-5", "no sample"), "teacher_width": ("teacher_width=.001", "no row"),
         "noise": ("label_noise='white'", "symmetric"), "length": ("length=1", "greater than or equal to 2")}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_parameters_are_refused(wrong):
    given, said = WRONG[wrong]
    with pytest.raises(ValueError, match=said): eval(f"TeacherStudent({given})")


def test_a_trainer_with_other_samples_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ParameterError, match="set sample_ratio"): fit(TeacherStudent(**SMALL), runs_dir=tmp_path, samples=7, progress=False)
    with pytest.raises(ParameterError, match="set sample_ratio"): fit(TeacherStudent(**SMALL), Trainer(), runs_dir=tmp_path, progress=False)
    with pytest.raises(ParameterError, match="gradient"): fit(TeacherStudent(**SMALL), optimizer="es", runs_dir=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_adams_eps_is_the_tasks_own_unless_another_optimizer_is_asked_for():
    task = TeacherStudent(**SMALL)
    assert trainer_for(task).adam_eps == 1e-8 / 1200 and trainer_for(task, optimizer="sgd").adam_eps is None and trainer_for(task, optimizer="sgd").lr == .1
    with pytest.raises(ParameterError, match="adam_eps is for optimizer = 'adam' and optimizer = 'adamw', not for sgd"): trainer_for(task, optimizer="sgd", adam_eps=1e-8)
