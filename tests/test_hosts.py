# SPDX-License-Identifier: Apache-2.0
"""Training on four hosts: network namespaces on a bridge, an sshd in each, mpirun through `hosts`.

    sudo python -m pytest tests/test_hosts.py

The hosts share the file system of this machine, as those of a cluster do, and nothing else: what
their ranks exchange crosses virtual Ethernet.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from launched import PATH, WORDS, Run

from tools import ladder

pytestmark = pytest.mark.slow

SYSTEM = f"{PATH}:/usr/sbin:/sbin"
HOSTS = 4
ADDRESS = f"{ladder.SUBNET}{{}}"


def why_not():
    """What is missing for a test with several hosts, or nothing."""
    for program in ("ip", "sshd", "ssh", "ssh-keygen", "mpirun"):
        if shutil.which(program, path=SYSTEM) is None:
            return f"there is no {program}"
    return "" if ladder.can_make_hosts() else "no right to make network namespaces here"


@pytest.fixture
def cluster(tmp_path):
    """A folder with the command line that leads to the hosts, ssh, to be called like ssh; and what
    a command on the first of them begins with."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path / "ssh"
    folder.mkdir()
    os.makedirs("/run/sshd", exist_ok=True)  # sshd wants it, whoever starts it
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config = folder / "sshd_config"
    config.write_text(
        f"Port 2222\nHostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\n"
        "PidFile none\n"
    )
    (folder / "ssh").write_text(
        f"#!/bin/sh\nexec ssh -F none -p 2222 -i {key} -o StrictHostKeyChecking=no"
        ' -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    (folder / "ssh").chmod(0o755)
    with ladder.made_hosts(HOSTS, gbit=10) as hosts:
        sshd = [shutil.which("sshd", path=SYSTEM), "-D", "-f", config]
        daemons = [subprocess.Popen([*host, *sshd], env={"PATH": SYSTEM}) for host in hosts]
        yield folder, hosts[0]
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()


def on_the_first(cluster, folder, addresses):
    """Command and environment of run.sh on the first host."""
    (folder / "hosts").write_text("".join(f"{address}\n" for address in addresses))
    ssh, first = cluster
    command = [*first, "bash", "run.sh"]
    env = {"PATH": SYSTEM, "RANKS": "", "SSH": str(ssh / "ssh"),
           "I_MPI_HYDRA_IFACE": "eth0"}
    return command, env


def events(path, kind):
    return [e for e in map(json.loads, path.read_text().splitlines()) if e["event"] == kind]


def test_four_hosts_compute_what_one_process_computes(cluster, tmp_path):
    run = Run(tmp_path)
    # Nothing may depend on the rank: no dropout; and float32, whose rounding is small.
    words = ["--epochs", "1", "--precision", "fp32", "--enc-dropout", "0", "--pred-dropout", "0",
             "--joint-dropout", "0"]
    command, env = on_the_first(cluster, tmp_path, [ADDRESS.format(i + 1) for i in range(HOSTS)])
    run.start(*words, "--batch-size", "2", command=command, **env)
    assert run.expect_end(600) == 0, run.said()
    assert f"1 on {', '.join(ADDRESS.format(i + 1) for i in range(HOSTS))}, by " in run.said()
    (start,) = events(run.log, "start")
    assert start["ranks"] == HOSTS

    alone = [sys.executable, "train.py", "--data", "data/demo", "--train-splits", "train-demo",
             "--dev-split", "dev-demo", "--out", "out/alone", *WORDS, *words]
    subprocess.run(
        [*alone, "--batch-size", str(2 * HOSTS)], cwd=tmp_path, check=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ours, expected = (events(tmp_path / "out" / name / "log.jsonl", "step")
                      for name in ("demo", "alone"))
    assert len(ours) == 4
    # Of the whole step; the terms are summed in another order, which later steps amplify.
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3)):
        assert [e[key] for e in ours] == pytest.approx([e[key] for e in expected], rel=tolerance)


def test_host_that_does_not_answer_is_named(cluster, tmp_path):
    run = Run(tmp_path)
    command, env = on_the_first(cluster, tmp_path, [ADDRESS.format(1), ADDRESS.format(99)])
    run.start(command=command, **env)
    assert run.expect_end(30) == 2
    assert f"on {ADDRESS.format(99)} (status " in run.said()
