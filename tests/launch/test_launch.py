"""A signal to the launcher reaches every rank, exit codes come back, and the SLURM script requeues after it.

SLURM's commands are replaced by shell scripts that do on one machine what the real ones do on a cluster.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "torchrun.sh"

SLURM = {
    "srun": 'echo $$ >"$PROBE_FOLDER/srun.pid"; shift; export SLURM_NODEID=0; exec "$@"',
    "scancel": '[[ "$*" == "--signal=USR1 4242" ]] && kill -USR1 "$(cat "$PROBE_FOLDER/srun.pid")"',
    "scontrol": 'if [[ "$1" == show ]]; then printf "one\\ntwo\\n"; else echo "$*" >"$PROBE_FOLDER/requeue"; fi',
}


@pytest.fixture
def start(tmp_path):
    """start(command, exit_code, **environment) -> process, once both ranks are waiting; stopped at the end."""
    started = []

    def start_(command: list, code: int, **environment: str) -> subprocess.Popen:
        paths = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        probe = {"MODULE": "probe", "PYTHONPATH": str(Path(__file__).parent), "PROBE_CODE": str(code)}
        env = os.environ | probe | {"PROBE_FOLDER": str(tmp_path), "NPROC_PER_NODE": "2", "PATH": ":".join(paths)}
        process = subprocess.Popen(command, env=env | environment, cwd=ROOT, start_new_session=True)
        started.append(process)
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            assert process.poll() is None and time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.1)
        return process

    yield start_
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 3])
def test_usr1_reaches_the_ranks(start, tmp_path, code):
    process = start([LAUNCHER, "experiment=demo"], code)
    process.send_signal(signal.SIGUSR1)
    assert (process.wait(timeout=60) == 0) == (code == 0)
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2)) or code
    assert (tmp_path / "ready1").read_text() == "experiment=demo"


@pytest.mark.slow
@pytest.mark.parametrize(("code", "restarts"), [(0, 0), (0, 1), (3, 0)])
def test_slurm_requeues_after_usr1(start, tmp_path, code, restarts):
    (tmp_path / "bin").mkdir()
    for name, body in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "localhost"}
    slurm |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_RESTART_COUNT": str(restarts)}
    process = start(["bash", ROOT / "slurm" / "train.sbatch", "experiment=demo"], code, **slurm)
    process.send_signal(signal.SIGUSR1)
    assert (process.wait(timeout=60) == 0) == (code == 0)
    assert (tmp_path / "requeue").exists() == (code == 0)
    assert (tmp_path / "ready0").read_text() == "experiment=demo" + " run.if_exists=resume" * restarts


def test_launcher_explains_itself():
    said = subprocess.run([LAUNCHER, "--help"], capture_output=True, text=True, check=True).stdout
    assert "NPROC_PER_NODE" in said and "MASTER_ADDR" in said


def test_several_nodes_need_a_master():
    env = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    result = subprocess.run(
        [LAUNCHER], env=env | {"NNODES": "2", "NPROC_PER_NODE": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "NNODES=2 needs MASTER_ADDR" in result.stderr
