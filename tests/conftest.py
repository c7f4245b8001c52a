"""What several tests share: small runs, processes to end, a browser, a JupyterLab to point it at, and a SLURM."""
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

TOP = Path(__file__).parent.parent
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync"]


def pytest_configure():
    """Ctrl-C reaches what the tests start, also where they are started in the background of a shell, which has it ignored by all children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


def growing(
    shape, # Rows and columns
    checkpoints,
    seed,
    empty=0, # Values that are zero until half of the training
):
    """Singular values [checkpoints, rank] of a matrix of noise that takes up a signal of rank three."""
    rank, late = min(shape), 1 / (1 + np.exp(-12 * (np.linspace(0, 1, checkpoints) - .4)))[:, None]
    noise = np.linalg.svd(np.random.default_rng(seed).normal(size=shape), compute_uv=False)
    s = -np.sort(-((.05 + .02 * late) * noise + late * np.r_[3., 1.5, .8, np.zeros(max(rank - 3, 0))][:rank] * (1 + .3 * np.sin(seed))), axis=-1)
    if empty: s[:checkpoints // 2, -empty:] = 0.
    return s


def write_run(
    path,
    spectra, # [checkpoints, rank] by matrix
    shapes, # Rows and columns by matrix
    steps, # [checkpoints]
    losses=None, # [checkpoints]; None: none is recorded
    ends="done", # "done", "failed", or None: the writer is left open and returned
    weights=(), # Steps whose weights are kept
    **config,
):
    """A run without a training: every matrix has the spectra that are given. Returns the Run, or its open writer."""
    import torch

    from tformer_lab.runs.store import Run, RunWriter
    run = Run.create(path, {"task": "synthetic", "model": f"{len(spectra)} matrices", "optimum": [{"metric": "train/loss", "value": 1.2, "kind": "exact", "error": 0., "position": None}], **config})
    writer = RunWriter(run)
    for i, step in enumerate(steps): add_checkpoint(writer, int(step), {name: s[i] for name, s in spectra.items()}, shapes, None if losses is None else float(losses[i]))
    for step in weights:
        rng, i = np.random.default_rng(0), list(steps).index(step)
        bases = {name: [np.linalg.qr(rng.normal(size=(side, min(shapes[name]))))[0] for side in shapes[name]] for name in spectra}
        writer.save_weights(step, {name: torch.tensor((u * spectra[name][i]) @ v.T) for name, (u, v) in bases.items()})
    if ends is None: return writer
    writer.close(ends, "RuntimeError: the loss is NaN" if ends == "failed" else None)
    return run


def add_checkpoint(writer, step, values, shapes, loss=None):
    """Write the spectra of a step, and its loss; without waiting for the disk."""
    import safetensors.numpy

    from tformer_lab.spectra.decomposition import MatrixSpectrum
    from tformer_lab.spectra.history import SpectrumRecord, pack
    from tformer_lab.storage import step_file, write_atomically
    record = SpectrumRecord(step, {name: MatrixSpectrum(np.asarray(s, dtype=float), shapes[name], float(np.sum(s**2) / np.prod(shapes[name])), 2.**-23) for name, s in values.items()})
    if loss is not None: writer.log([{"step": step, "train/loss": loss}])
    write_atomically(writer.run.path / "spectra" / step_file(step), safetensors.numpy.save(*pack(record)), durable=False)
    writer.step = step


def layered_run(path, layers, rank, checkpoints, losses=True):
    """A run of four matrices a layer, rank × 2 rank each, at steps that grow."""
    names = [f"encoder.{layer}.self_attn.{role}" for layer in range(layers) for role in "qkvo"]
    steps = np.arange(checkpoints) * np.arange(checkpoints) // 4 + np.arange(checkpoints)
    spectra = {name: growing((rank, 2 * rank), checkpoints, seed) for seed, name in enumerate(names)}
    return write_run(path, spectra, dict.fromkeys(names, (rank, 2 * rank)), steps, 1.2 + 3 * np.exp(-6 * np.linspace(0, 1, checkpoints)) if losses else None)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A short training of every matrix of the default model, with 13 checkpoints."""
    from tformer_lab.tasks.recall import Recall
    from tformer_lab.training.fit import fit
    return fit(Recall(length=48), runs_dir=tmp_path_factory.mktemp("small") / "runs", steps=200, batch_size=64, checkpoints=12, progress=False)


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context for real processes that start in a moment: they are forked from one that has loaded the library."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tformer_lab.training.fit", "tformer_lab.tasks.recall", "pandas", "torch._dynamo"])  # optimizers import the last
    return context


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium; on a machine without one the test is skipped, in CI it fails."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"): pytest.fail("CI has to have a browser: apt-get install chromium")
        pytest.skip("no Chromium on this machine: the browser tests are skipped")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


def files_only(context):
    """Take the network from a browser's context. Returns the list of what is asked for all the same."""
    asked = []
    context.set_offline(True)
    def answer(route):
        if route.request.url.startswith(("file:", "blob:", "data:")): return route.continue_()
        asked.append(route.request.url)
        route.abort()
    context.route("**/*", answer)
    return asked


class Server:
    """A server of notebooks as a process of its own, over a copy of the notebooks and a folder of runs."""
    def __init__(self, folder, runs, command):
        self.folder, self.log = folder, open(folder / "server.log", "w+")
        shutil.copytree(TOP / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        env = {**os.environ, "TFORMER_RUNS": str(runs), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTER_CONFIG_DIR": str(folder / "config"),
               "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "IPYTHONDIR": str(folder / "ipython")}
        self.process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=env, stdout=self.log, stderr=subprocess.STDOUT)

    def wait_for(self, ready):
        """What `ready` returns as soon as it is something; an error with the server's own words if it ends before."""
        for _ in range(300):
            if (found := ready()): return found
            if self.process.poll() is not None: break
            time.sleep(.2)
        raise RuntimeError("the server did not start:\n" + self.said())

    def said(self): return Path(self.log.name).read_text()

    def kernels(self):
        """The connection files of its kernels."""
        return set(self.folder.glob("runtime/kernel-*.json"))

    def close(self):
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        self.log.close()


class Lab(Server):
    """A JupyterLab with settings that keep its own news out of the way."""
    def __init__(self, folder, runs, dark=False):
        settings = folder / "settings/@jupyterlab/apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
        (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": "JupyterLab Dark" if dark else "JupyterLab Light"}))
        root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        super().__init__(folder, runs, ["jupyter", "lab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--IdentityProvider.token=test", "--ServerApp.password=", *root])
        self.url = self.wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", self.said()))[0]

    def open(self, browser, notebook, width=1400, height=1000, dark=False, run=True):
        """Open a notebook, and run all its cells."""
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.goto(f"{self.url}/lab/tree/nbs/{notebook}?reset&token=test")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function("document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')", timeout=60_000)  # earlier, a run asks for a kernel
        if not run: return page
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        return page


class Voila(Server):
    """A notebook as a page for colleagues."""
    def __init__(self, folder, runs, notebook):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(folder, runs, ["voila", f"nbs/{notebook}", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"])
        self.url = f"http://127.0.0.1:{port}"
        self.wait_for(lambda: self._answers(port))

    def _answers(self, port):
        with socket.socket() as asking: return asking.connect_ex(("127.0.0.1", port)) == 0


class Kernel:
    """The kernel behind an open notebook, asked past its page."""
    def __init__(self, connection_file):
        from jupyter_client import BlockingKernelClient
        self.client = BlockingKernelClient(connection_file=str(connection_file))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=30)

    def run(self, code):
        """What it printed; an error in it is raised."""
        said = []
        def hear(message):
            if message["msg_type"] == "stream": said.append(message["content"]["text"])
        reply = self.client.execute_interactive(code, store_history=False, timeout=60, output_hook=hear)["content"]
        if reply["status"] != "ok": raise RuntimeError(f"{reply['ename']}: {reply['evalue']}")
        return "".join(said)

    def start(self, code):
        """Run code without waiting for its end."""
        self.client.execute(code, store_history=False)

    def close(self): self.client.stop_channels()


class Slurm:
    """A SLURM of one node, see `one_node_slurm.sh`, that ends with this process at the latest. Its state is in `home`, `env` leads to it."""
    def __init__(self, home):
        self.home, self.log = home, home.with_name(home.name + ".log")
        with open(self.log, "w") as log:  # in a session of its own: Ctrl-C is for pytest, which then ends it in order
            self.process = subprocess.Popen([TOP / "tests/one_node_slurm.sh", home], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        try: ready = self.process.stdout.readline()
        except BaseException:
            self.close()
            raise
        if not ready: raise RuntimeError(f"{self.log.read_text()}\nno SLURM: one_node_slurm.sh ended with {self.process.wait()}")
        self.env = {"SLURM_CONF": str(home / "slurm.conf"), "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def states(self):
        """The state of each job so far, by the job's number as SLURM writes it: "7", or "7_0" in an array."""
        said = subprocess.run(["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"], env={**os.environ, **self.env}, check=True, capture_output=True, text=True)
        return dict(line.split() for line in said.stdout.splitlines())

    def wait(self, job, seconds=60):
        """The state in which a job ends."""
        end = time.monotonic() + seconds
        while (state := self.states()[job]) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"):
            if time.monotonic() > end: raise TimeoutError(f"job {job} is still {state}")
            time.sleep(.1)
        return state

    def close(self):
        """Cancel its jobs and end it; takes a second, or the six that SLURM gives a job to end."""
        self.process.stdin.close()
        try: self.process.wait(60)
        except subprocess.TimeoutExpired: self.process.terminate()  # once it has no child that waits for anything, it hears this
        self.process.stdout.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real SLURM of one node, on `SLURM_CONF` and `PATH` until the tests end; where there is none the test is skipped, in CI it fails."""
    missing = [command for command in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid():
        lacks = f"no {', '.join(missing)}: apt-get install -y --no-install-recommends slurm-wlm munge" if missing else "its daemons have to be started as root"
        if os.environ.get("CI"): pytest.fail(f"CI has to have a SLURM: {lacks}")
        pytest.skip(lacks)
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "home")
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]: patch.delenv(name)  # of a job that these tests may be run in
            for name, value in cluster.env.items(): patch.setenv(name, value)
            yield cluster
    finally: cluster.close()
