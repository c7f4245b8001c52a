"""The recorder inside real trainers: which steps, whose weights, and how a run ends."""
import logging
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tformer_lab.runs.callbacks import lightning_callback, transformers_callback
from tformer_lab.runs.store import Run, RunError

warnings.filterwarnings("ignore", module="lightning|transformers|torch")
TOP = Path(__file__).parents[1]


def same_spectra(run, step, weights):
    """Are the spectra of a step those of these weights? Of matrices that are one parameter, whatever the rest of their name"""
    endings = ("first", "second") if "first.weight" in weights else ("wte", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    history, at = run.spectra, run.spectra.steps.tolist().index(step)
    pairs = [([history[name][at] for name in history.matrices if name.endswith(end)], [w for name, w in weights.items() if name.endswith(f"{end}.weight")]) for end in endings]
    assert all(len(found) == len(own) == 1 for found, own in pairs), history.matrices
    return all(np.allclose(s, torch.linalg.svdvals(w.detach().double()), rtol=0, atol=1e-6) for [s], [w] in pairs)


def copied(model): return {name: w.detach().clone() for name, w in model.named_parameters()}


def test_importing_the_callbacks_loads_neither_trainer():
    code = "import sys, tformer_lab.runs.callbacks; print(sorted({'transformers', 'lightning', 'pytorch_lightning', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['torch']")


@pytest.mark.parametrize("make, package, command", [(transformers_callback, "transformers", "pip install transformers[torch]"), (lightning_callback, "lightning", "pip install lightning")])
def test_a_missing_package_is_named_with_its_command(monkeypatch, tmp_path, make, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.pytorch", None)
    with pytest.raises(ModuleNotFoundError) as error: make(tmp_path / "run")
    assert str(error.value) == f"this callback needs the package {package}: {command}"


# ---- Hugging Face

def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def trainer_of(model, tmp_path, *callbacks, **options):
    from transformers import PrinterCallback, Trainer, TrainingArguments
    options = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": .01, "logging_steps": 1, "save_strategy": "no", **options}
    args = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True, **options)
    rows = (torch.arange(8) + torch.randint(11, (16, 1), generator=torch.Generator().manual_seed(1))) % 11
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights_by_step():
    """A callback that keeps all weights at every step, to compare with."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def __init__(self): self.at = {}
        def on_train_begin(self, args, state, control, model=None, **others): self.at[state.global_step] = copied(model)
        def on_step_end(self, args, state, control, model=None, **others): self.at[state.global_step] = copied(model)

    return Keep()


def test_a_hugging_face_run_has_the_weights_of_each_scheduled_update_and_of_the_last(tmp_path):
    keep, watch = weights_by_step(), transformers_callback(tmp_path / "run", every=3, weights=True, optimum={"eval_loss": .1}, config={"note": "mine"})
    trainer = trainer_of(gpt2(), tmp_path, watch, keep, eval_strategy="steps", eval_steps=4)
    trainer.train()
    run = Run(tmp_path / "run")
    assert run.status == "done" and run.spectra.steps.tolist() == list(run.checkpoints) == [0, 3, 6, 8]
    assert all(same_spectra(run, step, keep.at[step]) for step in (0, 3, 6, 8))
    assert same_spectra(run, 8, dict(trainer.model.named_parameters())) and not same_spectra(run, 6, keep.at[8])
    assert torch.equal(run.checkpoints[6]["transformer.wte.weight"], keep.at[6]["transformer.wte.weight"])
    assert run.optimum[0]["metric"] == "eval/loss" and run.config["parameters"]["note"] == "mine"
    parameters = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["parameters"]
    assert parameters["learning_rate"] == .01 and parameters["gradient_accumulation_steps"] == 2 and parameters["optim"] == trainer.args.optim.value


def test_a_hugging_face_run_has_what_the_trainer_logged_one_row_a_step(tmp_path):
    watch = transformers_callback(tmp_path / "run")
    trainer = trainer_of(gpt2(), tmp_path, watch, eval_strategy="steps", eval_steps=4, eval_on_start=True)
    trainer.train()
    metrics = watch.run.metrics.set_index("step")
    assert metrics.index.tolist() == list(range(9))
    for name, column in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("learning_rate", "learning_rate"), ("grad_norm", "grad_norm"), ("train_loss", "train_loss")):
        logged = {row["step"]: row[name] for row in trainer.state.log_history if name in row}
        assert metrics[column].dropna().to_dict() == logged and logged
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    trainer.evaluate()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before and watch.run.status == "done"


def test_a_second_training_with_one_callback_is_refused_and_leaves_the_run(tmp_path):
    watch = transformers_callback(tmp_path / "run", every=4)
    trainer = trainer_of(gpt2(), tmp_path, watch)
    trainer.train()
    weights, files = copied(trainer.model), {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="make a new one"): trainer.train()
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert all(torch.equal(w, weights[name]) for name, w in trainer.model.named_parameters())


def test_a_resumed_hugging_face_run_is_the_uninterrupted_one(tmp_path):
    whole = transformers_callback(tmp_path / "whole", every=1)
    trainer_of(gpt2(), tmp_path, whole, save_strategy="steps", save_steps=4).train()
    first = transformers_callback(tmp_path / "run", every=1)
    trainer_of(gpt2(), tmp_path, first).train()
    (tmp_path / "run/spectra/00000007.safetensors").write_bytes(b"of a life that is gone")
    (tmp_path / "run/spectra/00000012.safetensors").write_bytes(b"of a life that is gone")
    rows = (tmp_path / "run/metrics.jsonl").read_bytes().splitlines()
    again = transformers_callback(tmp_path / "run", every=1, resume=True)
    trainer_of(gpt2(seed=5), tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes().splitlines()[:4] == rows[:4]
    assert again.run.status == "done" and again.run.metrics["step"].tolist() == list(range(1, 9))
    assert np.allclose(again.run.metrics["train/loss"], whole.run.metrics["train/loss"], atol=1e-6)
    assert again.run.spectra.steps.tolist() == list(range(9))
    assert all(np.allclose(again.run.spectra[name], whole.run.spectra[name], atol=1e-6) for name in whole.run.spectra.matrices)


def test_a_new_run_of_a_resumed_training_begins_at_the_checkpoint(tmp_path):
    trainer_of(gpt2(), tmp_path, save_strategy="steps", save_steps=4).train()
    watch = transformers_callback(tmp_path / "late", every=100)
    trainer_of(gpt2(), tmp_path, watch).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert watch.run.spectra.steps.tolist() == [4, 8]


def test_the_last_step_is_not_the_best_model_that_is_loaded_after_it(tmp_path):
    keep, watch = weights_by_step(), transformers_callback(tmp_path / "run", every=100)
    trainer = trainer_of(gpt2(), tmp_path, watch, keep, learning_rate=3., lr_scheduler_type="constant", optim="sgd", eval_strategy="steps", eval_steps=2,
                         save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_runtime", greater_is_better=False, max_steps=6)
    runtimes = iter([1., 2., 3.])  # the first is the best
    evaluate = trainer.evaluation_loop
    def timed(*args, **options):
        output = evaluate(*args, **options)
        output.metrics["eval_first"] = next(runtimes)
        return output
    trainer.evaluation_loop, trainer.args.metric_for_best_model = timed, "eval_first"
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert same_spectra(watch.run, 6, keep.at[6]) and not same_spectra(watch.run, 6, dict(trainer.model.named_parameters()))


def test_a_loop_that_starts_anew_with_smaller_batches_takes_the_run_back(tmp_path):
    model, calls = gpt2(), iter(range(100))
    forward = model.forward
    def scarce(*args, **options):
        if next(calls) == 7: raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(*args, **options)
    model.forward = scarce
    keep, watch = weights_by_step(), transformers_callback(tmp_path / "run", every=2)
    trainer_of(model, tmp_path, watch, keep, auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=4, remove_unused_columns=False).train()
    assert next(calls) > 8 and watch.run.status == "done" and watch.run.metrics["step"].tolist() == [1, 2, 3, 4]
    assert watch.run.spectra.steps.tolist() == [0, 2, 4] and all(same_spectra(watch.run, step, keep.at[step]) for step in (0, 2, 4))


FAILING = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_callbacks import gpt2, trainer_of, transformers_callback
folder, model = Path(sys.argv[2]), gpt2()
def broken(*args, **options): raise FloatingPointError("out of ink")
model.forward = broken
watch = transformers_callback(folder / "run")
try: trainer_of(model, folder, watch, remove_unused_columns=False).train()
except FloatingPointError:
    print(watch.run.status)
    if sys.argv[3] == "uncaught": raise
"""


@pytest.mark.parametrize("how, error", [("caught", "the training did not come to its end"), ("uncaught", "FloatingPointError: out of ink")])
def test_a_training_that_raised_leaves_a_failed_run_when_its_process_ends(tmp_path, how, error):
    done = subprocess.run([sys.executable, "-c", FAILING, TOP / "tests", tmp_path, how], cwd=TOP, capture_output=True, text=True)
    assert (done.returncode == 0) == (how == "caught") and done.stdout.strip() == "running", done.stderr
    run = Run(tmp_path / "run")
    assert run.status == "failed" and run.status_details["error"] == error and run.spectra.steps.tolist() == [0]


def test_a_callback_whose_training_broke_off_is_closed_so_that_the_next_can_go_on(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            if state.global_step == 5: raise KeyboardInterrupt

    watch = transformers_callback(tmp_path / "run", every=2)
    trainer = trainer_of(gpt2(), tmp_path, watch, Stop(), save_strategy="steps", save_steps=4)
    with pytest.raises(KeyboardInterrupt): trainer.train()
    assert watch.run.status == "running"
    with pytest.raises(RunError, match="broke off"): trainer.train(resume_from_checkpoint=True)
    assert watch.run.status == "failed" and watch.run.metrics["step"].tolist() == [1, 2, 3, 4, 5]
    again = transformers_callback(tmp_path / "run", every=2, resume=True)
    trainer_of(gpt2(), tmp_path, again).train(resume_from_checkpoint=True)
    assert again.run.status == "done" and again.run.spectra.steps.tolist() == [0, 2, 4, 6, 8] and again.run.metrics["step"].tolist() == list(range(1, 9))


def test_leaving_with_after_the_end_does_not_undo_it(tmp_path):
    with pytest.raises(ZeroDivisionError), transformers_callback(tmp_path / "run", every=4) as watch:
        trainer_of(gpt2(), tmp_path, watch).train()
        1 / 0
    assert watch.run.status == "done"


def test_only_the_main_process_writes(tmp_path):
    watch, model = transformers_callback(tmp_path / "run"), gpt2()
    args = SimpleNamespace(to_sanitized_dict=dict, auto_find_batch_size=False)
    state = SimpleNamespace(global_step=0, is_world_process_zero=False)
    watch.on_train_begin(args, state, None, model=model)
    state.global_step = 1
    watch.on_step_end(args, state, None)
    watch.on_log(args, state, None, logs={"loss": 1., "train_runtime": 1.})
    watch.on_train_end(args, state, None)
    assert watch.run is None and not (tmp_path / "run").exists()


def test_late_metrics_keep_their_step_and_what_is_no_number_is_left_out(tmp_path):
    watch, model = transformers_callback(tmp_path / "run"), nn.Linear(3, 2)
    args = SimpleNamespace(to_sanitized_dict=dict, auto_find_batch_size=False)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    watch.on_train_begin(args, state, None, model=model)
    for step, logs in ((5, {"loss": 2.}), (3, {"eval_loss": 1., "note": "late", "many": torch.ones(2)}), (5, None), (5, {"note": "nothing else"})):
        state.global_step = step
        watch.on_log(args, state, None, logs=logs)
    watch.on_train_end(args, state, None)
    for state.global_step in (6, 7): watch.on_log(args, state, None, logs={"eval_loss": 1.})  # the run is closed
    assert watch.run.metrics.fillna(0).to_dict("records") == [{"step": 5, "train/loss": 2., "eval/loss": 0}, {"step": 3, "train/loss": 0, "eval/loss": 1.}]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_recorded_under_its_own_names(tmp_path, wrap):
    watch = transformers_callback(tmp_path / "run")
    args, state = SimpleNamespace(to_sanitized_dict=dict, auto_find_batch_size=False), SimpleNamespace(global_step=0, is_world_process_zero=True)
    watch.on_train_begin(args, state, None, model=wrap(nn.Sequential(nn.Linear(3, 2))))
    watch.on_train_end(args, state, None)
    assert watch.run.spectra.matrices == ["0"]


def test_a_sharded_model_is_refused_before_anything_is_written(tmp_path):
    from torch.distributed.fsdp import fully_shard
    watch = transformers_callback(tmp_path / "run")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 2))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded"):
            watch.on_train_begin(SimpleNamespace(to_sanitized_dict=dict, auto_find_batch_size=False), SimpleNamespace(global_step=0, is_world_process_zero=True), None, model=model)
    finally: torch.distributed.destroy_process_group()
    assert not (tmp_path / "run").exists()


# ---- Lightning

def module(lr=.05, seed=0, manual=False, fail_at=None):
    import lightning

    class Copy(lightning.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.save_hyperparameters()
            self.first, self.second, self.automatic_optimization = nn.Linear(6, 5), nn.Linear(5, 6), not manual
            self.losses, self.validated, self.after = [], {}, {}

        def loss(self, x): return nn.functional.mse_loss(self.second(self.first(x)), x)

        def training_step(self, x, batch_idx):
            if fail_at == self.global_step: raise FloatingPointError("out of ink")
            loss = self.loss(x)
            self.losses.append(float(loss.detach()))
            self.log("seen", loss, on_step=True, on_epoch=True)
            if not manual: return loss
            for optimizer in self.optimizers(): optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers(): optimizer.step()

        def on_train_batch_end(self, *others): self.after[self.global_step] = copied(self)
        def on_train_epoch_end(self): self.log("epochs", float(self.current_epoch + 1))
        def validation_step(self, x, batch_idx): self.log("val_loss", self.loss(x))
        def on_validation_epoch_end(self): self.validated[self.global_step] = float(self.loss(DATA).detach())

        def configure_optimizers(self):
            if not manual: return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
            return [torch.optim.SGD(part.parameters(), lr=self.hparams.lr) for part in (self.first, self.second)]

    torch.manual_seed(seed)
    return Copy(lr)


DATA = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))


def loader(size=2): return torch.utils.data.DataLoader(DATA, batch_size=size)


def fit(model, *callbacks, validate=True, ckpt_path=None, **options):
    import lightning
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, "num_sanity_val_steps": 2, **options}
    trainer = lightning.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options)
    trainer.fit(model, loader(), loader(20) if validate else None, ckpt_path=ckpt_path)
    return trainer


def test_a_lightning_run_counts_updates_not_batches(tmp_path):
    model, watch = module(), lightning_callback(tmp_path / "run", every=4, weights=True, config={"note": "mine"})
    start = copied(model)
    fit(model, watch, max_epochs=2, accumulate_grad_batches=3)  # 10 batches an epoch: updates of 3, 3, 3 and 1
    assert watch.run.status == "done" and watch.run.spectra.steps.tolist() == list(watch.run.checkpoints) == [0, 4, 8]
    assert same_spectra(watch.run, 0, start) and same_spectra(watch.run, 4, model.after[4]) and same_spectra(watch.run, 8, dict(model.named_parameters()))
    parameters = watch.run.config["parameters"]
    assert parameters["lr"] == .05 and parameters["accumulate_grad_batches"] == 3 and parameters["note"] == "mine"


def test_a_lightning_run_has_each_metric_at_the_step_where_it_was_computed(tmp_path):
    model, watch = module(), lightning_callback(tmp_path / "run", every=100)
    fit(model, watch, max_epochs=2, accumulate_grad_batches=3)
    metrics, losses = watch.run.metrics.set_index("step"), np.array(model.losses)
    updates = [epoch * 10 + np.arange(a, b) for epoch in (0, 1) for a, b in ((0, 3), (3, 6), (6, 9), (9, 10))]
    assert metrics.index.tolist() == list(range(1, 9))
    assert np.allclose(metrics["train/loss"], [losses[batches].mean() for batches in updates], atol=1e-6)
    assert np.allclose(metrics["seen_step"], [losses[batches[-1]] for batches in updates], atol=1e-6)
    assert np.allclose(metrics["seen_epoch"].dropna(), [losses[:10].mean(), losses[10:].mean()], atol=1e-6)
    assert metrics["epochs"].dropna().to_dict() == {4: 1., 8: 2.}
    model.validated.pop(0)  # the sanity check before the training is none of it
    assert sorted(metrics["val_loss"].dropna().index) == [4, 8] and np.allclose(metrics["val_loss"].dropna(), list(model.validated.values()), atol=1e-6)
    assert "seen" not in metrics


def test_a_lightning_run_logs_as_often_as_the_trainer_and_where_spectra_are(tmp_path):
    watch = lightning_callback(tmp_path / "run", every=7)
    fit(module(), watch, max_steps=18, max_epochs=-1, validate=False, log_every_n_steps=5)
    assert watch.run.metrics.set_index("step")["train/loss"].dropna().index.tolist() == [5, 7, 10, 14, 15, 18]


def test_a_resumed_lightning_run_is_the_uninterrupted_one(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint
    whole, first = (lightning_callback(tmp_path / name, every=1) for name in ("whole", "run"))
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    fit(module(), whole, keep, max_epochs=2, enable_checkpointing=True)
    fit(module(), first, max_steps=14, max_epochs=-1)
    kept = (tmp_path / "run/metrics.jsonl").read_bytes().splitlines()[:10]
    again = lightning_callback(tmp_path / "run", every=1, resume=True)
    fit(module(seed=7), again, max_epochs=2, ckpt_path=tmp_path / "kept/step=10.ckpt")
    assert again.run.status == "done" and (tmp_path / "run/metrics.jsonl").read_bytes().splitlines()[:10] == kept
    assert again.run.metrics["step"].tolist() == list(range(1, 21)) and again.run.spectra.steps.tolist() == list(range(21))
    assert all(np.allclose(again.run.metrics[name].dropna(), whole.run.metrics[name].dropna(), atol=1e-6) for name in ("train/loss", "val_loss", "seen_epoch"))
    assert all(np.allclose(again.run.spectra[name], whole.run.spectra[name], atol=1e-6) for name in ("first", "second"))


def test_a_lightning_training_that_raises_leaves_a_failed_run_at_once(tmp_path):
    watch = lightning_callback(tmp_path / "run")
    with pytest.raises(FloatingPointError): fit(module(fail_at=3), watch, max_epochs=1)
    assert watch.run.status == "failed" and watch.run.status_details["error"] == "FloatingPointError: out of ink"
    assert watch.run.spectra.steps.tolist() == [0, 1, 2, 3] and watch.run.metrics["step"].tolist() == [1, 2, 3]


def test_steps_that_several_optimizers_pass_over_are_recorded_at_the_next(tmp_path):
    model, watch = module(manual=True), lightning_callback(tmp_path / "run", every=5)
    fit(model, watch, max_epochs=1, validate=False)  # 10 batches, 2 updates each
    assert watch.run.spectra.steps.tolist() == [0, 6, 10, 16, 20]
    assert all(same_spectra(watch.run, step, model.after[step]) for step in (6, 10, 16, 20))


def test_a_lightning_callback_can_be_sent_to_another_process(tmp_path):
    sent = pickle.loads(pickle.dumps(lightning_callback(tmp_path / "run", every=4, config={"note": "mine"})))
    fit(module(), sent, max_epochs=1)
    assert sent.run.spectra.steps.tolist() == [0, 4, 8, 10] and sent.run.config["parameters"]["note"] == "mine"


# ---- several processes

TWO = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_callbacks import *
if __name__ == "__main__":
    folder = Path(sys.argv[2])
    watch = transformers_callback(folder / "hugging_face", every=2)
    trainer_of(gpt2(), folder, watch, max_steps=4, eval_strategy="steps", eval_steps=2).train()
    sys.stdout.write(f"hugging face {watch.run and watch.run.status}\\n")
    sys.stdout.flush()
    watch, model = lightning_callback(folder / "lightning", every=2), module()
    fit(model, watch, max_epochs=1, strategy="ddp", devices=2, accumulate_grad_batches=2)
    sys.stdout.write(f"lightning {watch.run and watch.run.status}\\n")
    sys.stdout.flush()
    if watch.run: assert same_spectra(watch.run, 3, dict(model.named_parameters()))
"""


@pytest.mark.timeout(300)
def test_two_processes_leave_one_run_of_the_unwrapped_model(tmp_path):
    (tmp_path / "script.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, tmp_path / "script.py", TOP / "tests", tmp_path], cwd=TOP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert sorted(line for line in done.stdout.splitlines() if line.startswith(("hugging face", "lightning"))) == ["hugging face None", "hugging face done", "lightning None", "lightning done"]
    assert Run(tmp_path / "hugging_face").spectra.steps.tolist() == [0, 2, 4] and "transformer.wte" in Run(tmp_path / "hugging_face").spectra.matrices
    assert Run(tmp_path / "lightning").spectra.steps.tolist() == [0, 2, 3] and Run(tmp_path / "lightning").spectra.matrices == ["first", "second"]


def test_a_training_elsewhere_that_was_accumulating_does_not_keep_fit_from_stepping(tmp_path):
    from accelerate.state import GradientState

    from tformer_lab.tasks.recall import Recall
    from tformer_lab.training.fit import fit
    train = lambda name: fit(Recall(length=8), runs_dir=tmp_path / name, steps=3, batch_size=8, progress=False).metrics
    before = train("before")
    GradientState()._set_sync_gradients(False)
    assert train("after").equals(before)
