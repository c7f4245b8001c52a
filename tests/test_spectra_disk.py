"""Spectra on disk: folders of checkpoints of others, interrupted and changed; derived files that are lost, broken or of another folder; files that are read piece by piece."""
import json
import os
import shutil
import threading
import warnings

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file

from tformer_lab.spectra import analysis, checkpoints, decomposition, sources
from tformer_lab.spectra.analysis import analyze
from tformer_lab.spectra.checkpoints import CACHE, SpectraFolder, find_checkpoints, from_checkpoints
from tformer_lab.spectra.decomposition import read_spectra, singular_values
from tformer_lab.spectra.history import SpectrumHistory, SpectrumRecord, pack
from tformer_lab.spectra.matrices import weight_matrices
from tformer_lab.storage import read_safetensors, step_file, write_atomically


def weights(step, **shapes):
    generator = torch.Generator().manual_seed(step)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in (shapes or {"a": (6, 8), "b": (5, 4)}).items()}


def flat(folder, *steps, **shapes):
    """Checkpoints model-STEP.pt in one folder."""
    folder.mkdir(exist_ok=True)
    for step in steps: torch.save(weights(step, **shapes), folder / f"model-{step}.pt")
    return folder


def exact(step, name="a"): return torch.linalg.svdvals(weights(step)[f"{name}.weight"].double()).numpy()


def read(where, **options): return from_checkpoints(where, progress=False, **options)


def assert_history(history, steps, names=("a", "b")):
    assert history.steps.tolist() == list(steps) and history.matrices == list(names)
    for name in names: np.testing.assert_allclose(history[name], [exact(step, name) for step in steps], rtol=1e-6)


def cache_of(folder): return sorted(path for path in folder.iterdir() if path.name.startswith(".tformer_spectra"))


@pytest.fixture
def decomposed(monkeypatch):
    """The steps that were decomposed, and a step at which to stop."""
    class Calls(list): stop_at = None
    calls, original = Calls(), checkpoints._decompose
    def spy(step, *rest):
        if step == calls.stop_at: raise KeyboardInterrupt
        calls.append(step)
        return original(step, *rest)
    monkeypatch.setattr(checkpoints, "_decompose", spy)
    return calls


# folders of checkpoints

@pytest.mark.parametrize("stop_at", [1, 20, 300])
def test_an_interrupted_reading_goes_on_where_it_was(tmp_path, decomposed, stop_at):
    folder = flat(tmp_path / "run", 1, 5, 20, 300)
    decomposed.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt): read(folder)
    done = list(decomposed)
    assert done == [step for step in (1, 5, 20, 300) if step < stop_at]
    decomposed.stop_at = None
    assert_history(read(folder), (1, 5, 20, 300))
    assert decomposed == [1, 5, 20, 300] and not [path for path in cache_of(folder)[0].iterdir() if path.suffix == ".tmp"]
    assert_history(read(folder), (1, 5, 20, 300))
    assert decomposed == [1, 5, 20, 300]


def test_a_write_that_fails_midway_leaves_no_half_file_and_is_made_up_for(tmp_path, monkeypatch):
    folder, replace, count = flat(tmp_path / "run", 1, 2, 3), os.replace, []
    def full_disk(source, target):
        count.append(target)
        if len(count) == 2: raise OSError(28, "No space left on device")
        replace(source, target)
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"): read(folder)
    assert [path.name for path in cache_of(folder)[0].iterdir()] == [step_file(1)]
    assert_history(read(folder), (1, 2, 3))


def test_a_damaged_spectrum_is_decomposed_again(tmp_path, decomposed):
    folder = flat(tmp_path / "run", 1, 2, 3)
    read(folder)
    kept = cache_of(folder)[0]
    (kept / step_file(1)).write_bytes(b"broken")
    (kept / step_file(2)).write_bytes((kept / step_file(2)).read_bytes()[:-9])
    shutil.copy(kept / step_file(1), kept / step_file(99))
    del decomposed[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the broken file of no step of ours is named
        assert_history(read(folder), (1, 2, 3))
    assert decomposed == [1, 2]


def test_changed_added_and_removed_checkpoints_are_told_apart(tmp_path, decomposed):
    folder = flat(tmp_path / "run", 1, 2, 3, 4)
    read(folder)
    del decomposed[:]
    torch.save({name: 3 * tensor for name, tensor in weights(2).items()}, folder / "model-2.pt")
    (folder / "model-3.pt").unlink()
    flat(folder, 10)
    history = read(folder)
    assert decomposed == [2, 10] and history.steps.tolist() == [1, 2, 4, 10]
    np.testing.assert_allclose(history["a"], [exact(1), 3 * exact(2), exact(4), exact(10)], rtol=1e-6)
    flat(folder, 3)
    assert read(folder).steps.tolist() == [1, 2, 3, 4, 10] and decomposed == [2, 10, 3]


def test_a_checkpoint_that_changed_in_place_is_read_again_though_its_size_is_the_same(tmp_path, decomposed):
    folder = flat(tmp_path / "run", 1, 2)
    read(folder)
    path = folder / "model-1.pt"
    before = os.stat(path)
    torch.save({name: 2 * tensor for name, tensor in weights(1).items()}, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert os.stat(path).st_size == before.st_size
    np.testing.assert_allclose(read(folder)["a"], [2 * exact(1), exact(2)], rtol=1e-6)
    assert decomposed == [1, 2, 1]


def test_choices_of_matrices_are_kept_apart(tmp_path, decomposed):
    folder = flat(tmp_path / "run", 1, 2, 3)
    choices = ({}, {"include": "a"}, {"exclude": ["a"]}, {"min_size": 5}, {"minus": "first"}, {"minus": "previous"})
    first = [read(folder, **options) for options in choices]
    assert len(cache_of(folder)) == len(choices)
    del decomposed[:]
    for options, before in zip(choices, first):
        again, alone = read(folder, **options), read(folder, cache=False, **options)
        for other in (again, alone):
            assert other.matrices == before.matrices and other.steps.tolist() == before.steps.tolist()
            for name in other.matrices: np.testing.assert_array_equal(other[name], before[name])
    assert [h.matrices for h in first] == [["a", "b"], ["a"], ["b"], ["a"], ["a", "b"], ["a", "b"]] and first[4].steps.tolist() == [2, 3]
    change = lambda step, base: torch.linalg.svdvals((weights(step)["a.weight"] - weights(base)["a.weight"]).double())
    np.testing.assert_allclose(first[4]["a"], [change(2, 1), change(3, 1)], rtol=1e-6)
    np.testing.assert_allclose(first[5]["a"], [change(2, 1), change(3, 2)], rtol=1e-6)
    assert len(decomposed) == 3 * 4 + 2 * 2  # those without a cache only


def test_a_changed_base_changes_what_was_learnt_since(tmp_path, decomposed):
    folder = flat(tmp_path / "run", 1, 2, 3)
    read(folder, minus="first"), read(folder, minus="previous")
    del decomposed[:]
    torch.save({name: 0 * tensor for name, tensor in weights(1).items()}, folder / "model-1.pt")
    np.testing.assert_allclose(read(folder, minus="first")["a"], [exact(2), exact(3)], rtol=1e-6)
    assert decomposed == [2, 3]
    np.testing.assert_allclose(read(folder, minus="previous")["a"][0], exact(2), rtol=1e-6)
    assert decomposed == [2, 3, 2]


def test_without_a_cache_nothing_is_written(tmp_path):
    folder = flat(tmp_path / "run", 1, 2)
    assert_history(read(folder, cache=False), (1, 2))
    assert sorted(os.listdir(folder)) == ["model-1.pt", "model-2.pt"]


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    folder = flat(tmp_path / "run", 1, 2)
    def denied(*args, **kwargs): raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="Permission denied"):
        patch.setattr(checkpoints.Path, "mkdir", denied)
        assert_history(read(folder), (1, 2))
    assert sorted(os.listdir(folder)) == ["model-1.pt", "model-2.pt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_read_all_the_same(tmp_path):
    folder = flat(tmp_path / "run", 1, 2)
    folder.chmod(0o500)
    try:
        with pytest.warns(UserWarning, match="cannot be written"): assert_history(read(folder), (1, 2))
    finally: folder.chmod(0o700)


def test_natural_order_and_steps_that_are_given(tmp_path, decomposed):
    folder = flat(tmp_path / "run", 1, 2, 10)
    assert [path.name for path in find_checkpoints(folder, [7, 8, 9]).values()] == ["model-1.pt", "model-2.pt", "model-10.pt"]
    given = read(folder, steps=[100, 50, 0])
    assert given.steps.tolist() == [0, 50, 100]
    np.testing.assert_allclose(given["a"], [exact(10), exact(2), exact(1)], rtol=1e-6)
    named = read(folder, steps={"model-10.pt": 3, "model-1.pt": 1})
    assert named.steps.tolist() == [1, 3] and len(named) == 2
    np.testing.assert_allclose(named["a"], [exact(1), exact(10)], rtol=1e-6)
    assert_history(read(folder), (1, 2, 10))  # step 1 is another checkpoint now than under the first names
    np.testing.assert_allclose(read(folder, steps=[2, 1, 10])["a"], [exact(2), exact(1), exact(10)], rtol=1e-6)


def test_two_checkpoints_of_one_step_are_an_error_that_names_both(tmp_path):
    folder = flat(tmp_path / "run", 5)
    torch.save(weights(5), folder / "epoch1-5.ckpt")
    with pytest.raises(ValueError, match="epoch1-5.ckpt and model-5.pt|model-5.pt and epoch1-5.ckpt"): read(folder)
    assert_history(read(folder / "model-*.pt"), [5])
    assert_history(read(folder, steps={"epoch1-5.ckpt": 5}), [5])
    assert read(folder, steps={"epoch1-5.ckpt": 4, "model-5.pt": 5}).steps.tolist() == [4, 5]


@pytest.mark.parametrize("save", [lambda state, path: torch.save(state, path.with_suffix(".pt")), lambda state, path: torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": .1}}, path.with_suffix(".ckpt")),
                                  lambda state, path: torch.save({"model_state_dict": state}, path.with_suffix(".pth")), lambda state, path: save_file(state, path.with_suffix(".safetensors")), lambda state, path: torch.save(state, path.with_suffix(".bin"))])
def test_flat_files_of_every_format_are_read(tmp_path, save):
    for step in (3, 20): save(weights(step), tmp_path / f"ckpt_{step:06d}")
    (tmp_path / "log.txt").write_text("step 5")
    (tmp_path / "config.json").write_text("{}")
    assert_history(read(tmp_path), (3, 20))


def trainer_folder(folder, *steps):
    """What a Hugging Face Trainer leaves; what must not be opened raises or lies."""
    for step in steps:
        inside = folder / f"checkpoint-{step}"
        inside.mkdir(parents=True)
        save_file(weights(step), inside / "model.safetensors")
        torch.save({"state": {0: {"exp_avg": torch.ones(6, 8)}}, "param_groups": []}, inside / "optimizer.pt")
        torch.save({"last_epoch": step}, inside / "scheduler.pt")
        (inside / "training_args.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'exit 1'\ntR.")
        torch.save({"cpu": torch.get_rng_state()}, inside / "rng_state.pth")
        for name in ("trainer_state.json", "config.json", "generation_config.json", "tokenizer.json"): (inside / name).write_text("{}")
    return folder


def test_the_folders_of_a_hugging_face_trainer_are_read_and_only_their_weights(tmp_path, monkeypatch):
    folder = trainer_folder(tmp_path / "out", 5, 10, 100)
    monkeypatch.setattr(torch, "load", lambda path, *args, **kwargs: pytest.fail(f"{path} was opened"))
    assert_history(read(folder), (5, 10, 100))
    monkeypatch.undo()
    save_file(weights(7), folder / "model.safetensors")
    (folder / "training_args.bin").write_bytes(b"broken")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.123").write_bytes(b"x")
    with pytest.warns(UserWarning, match="no step in the name: model.safetensors, training_args.bin"): assert_history(read(folder), (5, 10, 100))
    assert_history(read(folder / "checkpoint-*"), (5, 10, 100))


def test_a_trainers_pytorch_weights_and_shards_are_read(tmp_path):
    folder = trainer_folder(tmp_path / "out", 1, 2)
    for step in (1, 2): (folder / f"checkpoint-{step}" / "model.safetensors").unlink()
    torch.save(weights(1), folder / "checkpoint-1/pytorch_model.bin")
    for i, name in enumerate(("a.weight", "b.weight"), 1): save_file({name: weights(2)[name]}, folder / f"checkpoint-2/model-0000{i}-of-00002.safetensors")
    (folder / "checkpoint-2/model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"{n}.weight": f"model-0000{i}-of-00002.safetensors" for i, n in enumerate("ab", 1)}}))
    assert_history(read(folder), (1, 2))


def test_a_trainers_checkpoint_without_weights_is_named_and_the_others_are_kept(tmp_path, decomposed):
    folder = trainer_folder(tmp_path / "out", 1, 2)
    (folder / "checkpoint-2/model.safetensors").unlink()
    with pytest.warns(UserWarning, match="left out: step 2:.*checkpoint-2"): assert_history(read(folder), (1,))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="checkpoint-2"): read(folder / "checkpoint-2*", steps=[2])
    save_file(weights(2), folder / "checkpoint-2/model.safetensors")
    del decomposed[:]
    assert_history(read(folder), (1, 2))
    assert decomposed == [2]


def test_a_checkpoint_with_nan_is_nan_and_matrices_may_come_and_go(tmp_path):
    folder = flat(tmp_path / "run", 1, 3)
    torch.save({name: tensor * float("nan") for name, tensor in weights(2).items()}, folder / "model-2.pt")
    torch.save(weights(4) | {"new.weight": torch.eye(3)}, folder / "model-4.pt")
    torch.save({"a.weight": weights(5)["a.weight"]}, folder / "model-5.pt")
    for _ in range(2):
        for history in (read(folder), read(folder, cache=False)):
            assert history.matrices == ["a", "b", "new"] and np.isnan(history["a"]).all(1).tolist() == [False, True, False, False, False]
            assert np.isnan(history["b"]).all(1).tolist() == [False, True, False, False, True] and np.isnan(history["new"]).all(1).tolist() == [True, True, True, False, True]


# the derived file of a folder of spectra

def write_record(folder, step, names=("a", "b"), scale=1., side=6):
    generator = torch.Generator().manual_seed(step)
    r = SpectrumRecord(step, dict(read_spectra({name: scale * torch.randn(side, 8, generator=generator) for name in names})))
    write_atomically(folder / step_file(step), safetensors.numpy.save(*pack(r)))
    return r


def of_originals(folder):
    """The history from the files alone."""
    return SpectrumHistory(SpectraFolder(folder)[step] for step in SpectraFolder(folder))


def assert_same(found, expected):
    assert found.steps.tolist() == expected.steps.tolist() and found.shapes == expected.shapes
    for name in expected.matrices:
        m, e = found.matrix(name), expected.matrix(name)
        np.testing.assert_array_equal(m.values, e.values)
        np.testing.assert_array_equal(m.variances, e.variances)
        assert m.precision == e.precision


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "spectra"
    for step in range(0, 1200, 10): write_record(folder, step)
    SpectraFolder(folder).history()
    assert (folder / CACHE).exists()
    return folder


@pytest.fixture
def spectra(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "spectra")  # keeps the times of change
    return tmp_path / "spectra"


def opened(monkeypatch):
    """The steps whose files are opened from here on."""
    steps, original = [], SpectraFolder.__getitem__
    monkeypatch.setattr(SpectraFolder, "__getitem__", lambda self, step: steps.append(step) or original(self, step))
    return steps


def test_the_derived_file_is_used_and_equals_the_originals(spectra, monkeypatch):
    expected, steps = of_originals(spectra), opened(monkeypatch)
    assert_same(SpectraFolder(spectra).history(), expected)
    assert steps == []
    (spectra / CACHE).unlink()
    assert_same(SpectraFolder(spectra).history(), expected)
    assert len(steps) == 120
    assert_same(SpectraFolder(spectra).history(), expected)
    assert len(steps) == 120


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:5], lambda data: data[:len(data) // 2], lambda data: data[:-1], lambda data: data + b"x", lambda data: b"\xff" * 8 + data[8:], lambda data: bytes(len(data)), lambda data: b"not a file"])
def test_a_damaged_derived_file_is_not_believed(spectra, damage):
    (spectra / CACHE).write_bytes(damage((spectra / CACHE).read_bytes()))
    assert_same(SpectraFolder(spectra).history(), of_originals(spectra))


def changed_cache(folder, change, **metadata):
    tensors, about = read_safetensors(folder / CACHE, "numpy")
    change(tensors)
    (folder / CACHE).write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, about | metadata))


def swap_stamps(tensors): tensors["stamps"][[3, 50]] = tensors["stamps"][[50, 3]]
def forget_stamps(tensors): tensors["stamps"] = tensors["stamps"][:5]
def reverse_steps(tensors): tensors["steps"] = tensors["steps"][::-1]
def negative_values(tensors): tensors["rank_6"] = -tensors["rank_6"]
def rising_values(tensors): tensors["rank_6"] = tensors["rank_6"][..., ::-1]
def fewer_values(tensors): tensors["rank_6"] = tensors["rank_6"][:, :60]
def one_matrix(tensors): tensors["rank_6"] = tensors["rank_6"][:1]
def nothing(tensors): pass
def no_values(tensors): del tensors["rank_6"]
def no_variances(tensors): del tensors["variances"]


@pytest.mark.parametrize("change", [swap_stamps, forget_stamps, reverse_steps, negative_values, rising_values, fewer_values, one_matrix, no_values, no_variances])
def test_a_derived_file_that_lies_is_not_believed(spectra, change):
    changed_cache(spectra, change)
    assert_same(SpectraFolder(spectra).history(), of_originals(spectra))


@pytest.mark.parametrize("metadata", [{"format": "2"}, {"matrices": "{"}, {"matrices": "[1, 2]"}, {"matrices": json.dumps([{"name": "a"}])}, {"matrices": json.dumps([{"name": "a", "rank": "x", "shape": [6, 8], "precision": 1e-7}])}])
def test_a_derived_file_of_another_format_is_not_believed(spectra, metadata):
    changed_cache(spectra, nothing, **metadata)
    assert_same(SpectraFolder(spectra).history(), of_originals(spectra))


@pytest.mark.parametrize("options", [dict(scale=2.), dict(side=4), dict(names=("b", "a"))])
def test_a_derived_file_from_another_run_is_not_believed(spectra, tmp_path, options):
    other = tmp_path / "other"
    for step in range(0, 1200, 10): write_record(other, step, **options)
    SpectraFolder(other).history()
    shutil.copy2(other / CACHE, spectra / CACHE)
    found, expected = SpectraFolder(spectra).history(), of_originals(spectra)
    assert set(found.matrices) == set(expected.matrices)
    for name in expected.matrices: np.testing.assert_array_equal(found[name], expected[name])
    assert found.steps.tolist() == expected.steps.tolist()


def test_what_changed_since_the_derived_file_was_written_is_read_anew(spectra, monkeypatch):
    write_record(spectra, 30, scale=3.)
    write_record(spectra, 5000)
    (spectra / step_file(40)).unlink()
    os.utime(spectra / step_file(70), ns=(1, 1))
    expected, steps = of_originals(spectra), opened(monkeypatch)
    assert_same(SpectraFolder(spectra).history(), expected)
    assert sorted(steps) == [30, 70, 5000]


def test_a_file_that_took_the_place_of_another_step_is_left_out_with_a_warning(spectra):
    shutil.copy2(spectra / step_file(20), spectra / step_file(50))
    with pytest.warns(UserWarning, match="step 20"): history = SpectraFolder(spectra).history()
    assert 50 not in history.steps and len(history) == 119


def test_a_history_that_was_handed_out_does_not_change_with_the_folder_or_with_what_is_added_to_it(spectra):
    folder = SpectraFolder(spectra)
    first = folder.history("one")
    kept = first["a"].copy()
    first.add(SpectrumRecord(7, folder[0].spectra))
    write_record(spectra, 6000)
    second = folder.history("two")
    assert 7 in first.steps and 6000 not in first.steps and 7 not in second.steps and 6000 in second.steps and (first.run, second.run) == ("one", "two")
    np.testing.assert_array_equal(second["a"][:120], kept)


def test_two_readers_at_once_both_get_the_history_and_leave_a_whole_derived_file(spectra):
    (spectra / CACHE).unlink()
    expected, found, errors = of_originals(spectra), [], []
    def work():
        try: found.append(SpectraFolder(spectra).history())
        except Exception as error: errors.append(error)  # else it is lost with the thread
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors and len(found) == 4
    for history in [*found, SpectraFolder(spectra).history()]: assert_same(history, expected)
    assert not [name for name in os.listdir(spectra) if name.endswith(".tmp")]


def _history_elsewhere(folder, queue):
    history = SpectraFolder(folder).history()
    queue.put((len(history), float(history["a"].sum())))


def test_two_processes_that_read_one_folder_at_once_both_get_the_history(spectra, processes):
    (spectra / CACHE).unlink()
    expected, queue = of_originals(spectra), processes.Queue()
    started = [processes.Process(target=_history_elsewhere, args=(spectra, queue)) for _ in range(2)]
    for process in started: process.start()
    found = [queue.get(timeout=120) for _ in started]
    for process in started: process.join()
    assert found == [(120, float(expected["a"].sum()))] * 2
    assert_same(SpectraFolder(spectra).history(), expected)


def test_a_folder_in_which_a_file_vanishes_while_it_is_read_has_the_others(spectra, monkeypatch):
    (spectra / CACHE).unlink()
    original = SpectraFolder.__getitem__
    def vanishing(self, step):
        if step == 100: (spectra / step_file(110)).unlink(missing_ok=True)
        return original(self, step)
    monkeypatch.setattr(SpectraFolder, "__getitem__", vanishing)
    history = SpectraFolder(spectra).history()
    assert 110 not in history.steps and len(history) == 119


# piece by piece

@pytest.fixture
def alive(monkeypatch):
    """How many tensors from a file are alive at once, at most, and the order in which they are read."""
    import gc
    import weakref
    class Alive(list): most = 0
    seen, refs, original = Alive(), [], sources._read_safetensors
    def spy(file, name, device):
        tensor = original(file, name, device)
        refs.append(weakref.ref(tensor))
        seen.append(name)
        seen.most = max(seen.most, sum(r() is not None for r in refs))
        return tensor
    gc.collect()
    monkeypatch.setattr(sources, "_read_safetensors", spy)
    return seen


@pytest.mark.parametrize("consumer", [singular_values, lambda x: analyze(x, null=None, progress=False), lambda x: analyze(x, "permutation", 2, progress=False)], ids=["singular_values", "analyze", "permutation null"])
def test_a_file_is_read_a_chunk_at_a_time(tmp_path, monkeypatch, alive, consumer):
    save_file({f"m{i}.weight": torch.randn(40, 50) for i in range(24)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(decomposition, "CHUNK_BYTES", 3 * decomposition.work_bytes(40, 50))
    consumer(weight_matrices(tmp_path / "model.safetensors"))
    assert set(alive) == {f"m{i}.weight" for i in range(24)} and alive.most <= 2 * 3 + 1


def test_checkpoints_are_read_one_at_a_time(tmp_path, alive):
    for step in range(6): save_file({f"m{i}.weight": torch.randn(8, 9) for i in range(3)}, tmp_path / f"model-{step}.safetensors")
    history = read(tmp_path)
    assert len(history) == 6 and len(alive) == 18 and alive.most <= 3 + 1


@pytest.mark.parametrize("rows, columns", [(1500, 60), (60, 1500)])
def test_a_large_matrix_is_not_converted_as_a_whole(monkeypatch, rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(decomposition, "CHUNK_BYTES", 200_000)
    largest, original = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: largest.append(self.numel()) or original(self))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: pytest.fail("converted as a whole"))
    s = singular_values({"x": x})["x"]
    monkeypatch.undo()
    np.testing.assert_allclose(s, torch.linalg.svdvals(x.double()), rtol=1e-6)
    assert max(largest) * 8 <= 200_000 // 8 and sum(largest) == rows * columns


def test_a_difference_of_two_files_is_read_a_matrix_at_a_time(tmp_path, monkeypatch, alive):
    for name in ("before", "after"): save_file({f"m{i}.weight": torch.randn(30, 40) for i in range(12)}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(decomposition, "CHUNK_BYTES", decomposition.work_bytes(30, 40))
    table = analyze(tmp_path / "after.safetensors", None, minus=tmp_path / "before.safetensors", progress=False)
    assert len(table) == 12 and len(alive) == 24 and alive.most <= 4
    assert analysis.main([str(tmp_path / "after.safetensors"), "--minus", str(tmp_path / "before.safetensors"), "--null", "none", "-o", str(tmp_path / "t.csv")]) == 0


def test_two_models_in_one_folder_do_not_mix(tmp_path):
    for i in range(1, 4): torch.save({"w": torch.randn(8, 6)}, tmp_path / f"a-{i}.pt")
    for i in (11, 12): torch.save({"w": torch.randn(4, 5)}, tmp_path / f"b-{i}.pt")
    for i in (21, 22): torch.save({"v": torch.randn(4, 5)}, tmp_path / f"c-{i}.pt")
    histories = [read(tmp_path / pattern) for pattern in ("a-*.pt", "b-*.pt", "c-*.pt")]
    assert [h.steps.tolist() for h in histories] == [[1, 2, 3], [11, 12], [21, 22]] and [h.shapes for h in histories] == [{"w": (8, 6)}, {"w": (4, 5)}, {"v": (4, 5)}]


def test_steps_that_are_given_go_to_the_checkpoints_in_the_order_of_their_paths(tmp_path):
    for i in np.random.default_rng(0).permutation(12):
        (tmp_path / f"run{i}").mkdir()
        torch.save({"w": torch.eye(3) * (i + 1)}, tmp_path / f"run{i}" / "model.pt")
    found = find_checkpoints(tmp_path / "*/model.pt", steps=range(12))
    assert [path.parent.name for path in found.values()] == [f"run{i}" for i in range(12)]


@pytest.mark.parametrize("steps", [[-1, 1], [1, 10**18], [.5, 1.5]])
def test_steps_that_no_file_can_be_named_by_are_refused(tmp_path, steps):
    for i in (1, 2): torch.save({"w": torch.eye(3)}, tmp_path / f"a-{i}.pt")
    try: history = read(tmp_path, steps=steps)
    except (ValueError, TypeError): return
    assert history.steps.tolist() == steps


def test_a_matrix_of_no_checkpoint_is_not_in_the_history(tmp_path):
    import safetensors.numpy
    from tformer_lab.spectra.history import pack
    from tformer_lab.storage import step_file, write_atomically
    def write(step, names): write_atomically(tmp_path / step_file(step), safetensors.numpy.save(*pack(SpectrumRecord(step, dict(read_spectra({n: torch.eye(3) for n in names}))))))
    write(0, "ab"), write(1, "a")
    folder = SpectraFolder(tmp_path)
    assert folder.history().matrices == ["a", "b"]
    os.unlink(tmp_path / step_file(0))
    assert folder.history().matrices == SpectraFolder(tmp_path).history().matrices == ["a"]


def test_the_derived_file_of_another_run_leaves_no_matrices_behind(tmp_path):
    import shutil
    import safetensors.numpy
    from tformer_lab.spectra.checkpoints import CACHE
    from tformer_lab.spectra.history import pack
    from tformer_lab.storage import step_file, write_atomically
    for run, name in (("A", "a"), ("B", "b")):
        for step in range(130): write_atomically(tmp_path / run / step_file(step), safetensors.numpy.save(*pack(SpectrumRecord(step, dict(read_spectra({name: torch.eye(3)}))))))
    SpectraFolder(tmp_path / "B").history()
    shutil.copy(tmp_path / "B" / CACHE, tmp_path / "A" / CACHE)
    assert SpectraFolder(tmp_path / "A").history().matrices == ["a"]


def test_a_derived_file_with_fewer_variances_than_steps_is_not_believed(tmp_path):
    import safetensors.numpy
    from tformer_lab.spectra.checkpoints import CACHE
    from tformer_lab.spectra.history import pack
    from tformer_lab.storage import read_safetensors, step_file, write_atomically
    for step in range(130): write_atomically(tmp_path / step_file(step), safetensors.numpy.save(*pack(SpectrumRecord(step, dict(read_spectra({"a": torch.eye(3)}))))))
    SpectraFolder(tmp_path).history()
    tensors, about = read_safetensors(tmp_path / CACHE, "numpy")
    (tmp_path / CACHE).write_bytes(safetensors.numpy.save(tensors | {"variances": np.ascontiguousarray(tensors["variances"][:, :5])}, about))
    assert len(SpectraFolder(tmp_path).history().variances("a")) == 130


def test_with_and_without_a_cache_a_change_of_shape_has_one_outcome(tmp_path):
    for i in (1, 2, 3): torch.save({"w": torch.randn(8, 6 if i < 3 else 5)}, tmp_path / f"a-{i}.pt")
    def outcome(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: return read(tmp_path, **options).steps.tolist()
            except ValueError: return "refused"
    assert outcome(cache=True) == outcome(cache=False)


def test_steps_that_are_exchanged_exchange_the_spectra(tmp_path):
    for i in (1, 2):
        (tmp_path / f"run{i}").mkdir()
        save_file({"w": torch.eye(3) * i}, tmp_path / f"run{i}" / "model.safetensors")
        os.utime(tmp_path / f"run{i}" / "model.safetensors", (1e9, 1e9))
    for steps in ([1, 2], [2, 1]): assert read(tmp_path / "*/model.safetensors", steps=steps)["w"][:, 0].tolist() == steps


def test_a_checkpoint_that_is_being_written_is_left_out_and_read_later(tmp_path):
    folder = flat(tmp_path / "run", 1, 2, 3)
    whole = (folder / "model-3.pt").read_bytes()
    (folder / "model-3.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.warns(UserWarning, match="left out: step 3"): assert_history(read(folder), (1, 2))
    (folder / "model-3.pt").write_bytes(whole)
    assert_history(read(folder), (1, 2, 3))
