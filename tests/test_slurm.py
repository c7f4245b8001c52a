"""A real SLURM, and what is submitted to it."""
import os
import subprocess
import sys
import time

import psutil
import pytest

from conftest import TOP

pytestmark = pytest.mark.timeout(300)


def belonging(home):
    """The living processes of a cluster, by name: its daemons, what a job's command is run by, and what it runs."""
    def is_of(process):
        environment = process.environ()
        if environment.get("SUBMITTED_TO") == str(home): return True
        if not process.name().startswith(("slurm", "munge")): return False
        sockets = {connection.laddr for connection in process.net_connections("unix")}  # a slurmstepd has written over its environment
        return environment.get("SLURM_CONF") == f"{home}/slurm.conf" or any(str(socket).startswith(f"{home}/") for socket in sockets)

    found = []
    for process in psutil.process_iter():
        try: found += [process.name()] if process.status() != psutil.STATUS_ZOMBIE and is_of(process) else []
        except psutil.Error: continue
    return found


def sbatch(command, *options):
    """The number of a job that runs a command, submitted to the cluster that `SLURM_CONF` names."""
    done = subprocess.run(["sbatch", "--parsable", *options, "--wrap", command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_submitted_command_runs_and_ends(slurm, tmp_path):
    job = sbatch("echo on $SLURM_JOB_ID in $PWD", f"--chdir={tmp_path}", "--output=said")
    assert slurm.wait(job) == "COMPLETED"
    assert (tmp_path / "said").read_text() == f"on {job} in {tmp_path}\n"


def test_failing_command_is_told_from_one_that_ends_well(slurm, tmp_path):
    assert slurm.wait(sbatch("exit 3", f"--chdir={tmp_path}", "--output=said")) == "FAILED"


def test_array_of_functions_runs_through_submitit(slurm, tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.SlurmExecutor(folder=tmp_path / "submitit")
    executor.update_parameters(time=5, partition="low", array_parallelism=2, stderr_to_stdout=True)
    jobs = executor.map_array(divmod, (7, 8, 9), (2, 3, 4))
    assert [job.result() for job in jobs] == [(3, 1), (2, 2), (2, 1)]
    assert {slurm.states()[job.job_id] for job in jobs} == {"COMPLETED"}


# The cluster itself

TESTS = """
import os, subprocess, sys, time

def test_that_submits_a_job(slurm):
    subprocess.run(["sbatch", "--output=/dev/null", f"--export=ALL,SUBMITTED_TO={{slurm.home}}", "--wrap", {job!r}], check=True)
    sys.stdin.readline()
    {end}
"""
STUBBORN = "trap '' TERM; touch started; while :; do sleep 1; done"


@pytest.mark.parametrize("end, job", [("assert False", STUBBORN), ("os.kill(os.getpid(), 9)", "touch started; sleep 600"), ("os.killpg(0, 2); time.sleep(60)", "touch started; sleep 600")],
                         ids=["failed", "killed", "interrupted"])
def test_tests_leave_no_process_of_their_cluster_however_they_end(slurm, tmp_path, end, job):
    (tmp_path / "test_it.py").write_text(TESTS.format(end=end, job=job))
    options = ["-s", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir=.", "--basetemp=base", "test_it.py"]
    tests = subprocess.Popen([sys.executable, "-m", "pytest", *options], stdin=subprocess.PIPE, start_new_session=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(TOP / "tests")})
    home = tmp_path / "base/slurm0/home"
    try:
        while not (tmp_path / "started").exists() and tests.poll() is None: time.sleep(.1)
        assert {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"} - set(belonging(home)) == set()
    finally: tests.communicate(b"go on\n", 60)
    assert tests.returncode != 0
    deadline = time.monotonic() + (30 if tests.returncode == -9 else 0)
    while (left := belonging(home)) and time.monotonic() < deadline: time.sleep(.1)
    assert left == []
    assert slurm.process.poll() is None and {"munged", "slurmctld", "slurmd"} <= set(belonging(slurm.home))  # the other has nothing to do with it
