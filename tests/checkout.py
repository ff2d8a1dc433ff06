# SPDX-License-Identifier: Apache-2.0
"""A copy of run.sh among stand-ins, for the tests of its decisions.

.venv/bin/python is a stand-in that records its words in `calls`, one call per line, words separated
by bars; lscpu shows the topology that a test gives it.
"""

import shutil
import subprocess
from pathlib import Path

from tones import REPO

LSCPU = "#!/bin/sh\ncat lscpu\n"
# Its words depend on the language.
TASKSET = """#!/bin/sh
case "$LC_ALL" in
  C) echo "pid 1's current affinity list: ${CPUS:-0-7}" ;;
  *) echo "pid 1 的当前亲和力列表：${CPUS:-0-7}" ;;
esac
"""

# What run.sh may take from the machine that tests; an mpirun there shall not decide.
PROGRAMS = ("awk", "basename", "bash", "cat", "cksum", "cmp", "cp", "dirname", "env", "find",
            "grep", "mkdir", "mktemp", "paste", "realpath", "rm", "sed", "sh", "sleep", "sort",
            "tail", "test", "timeout", "uniq")

# FAIL names the script or module whose call ends with status 3.
PYTHON = """#!/bin/sh
for word; do printf '%s|' "$word"; done >> calls
printf 'threads=%s\\n' "$OMP_NUM_THREADS" >> calls
case "$*" in *"${FAIL:-never}"*) exit 3 ;; esac
case "$*" in
  "decode.py "*.flac | "decode.py "*.wav)
    shift 3
    for path; do printf '%s\\tHEARD %s\\n' "$path" "$(basename "$path")"; done ;;
esac
"""

# python3 as run.sh uses it for set-up: `-m venv .venv` provides the stand-in above.
PYTHON3 = """#!/bin/sh
echo "python3|$*" >> calls
mkdir -p .venv/bin
cp stand-ins/python .venv/bin/python
"""

LDCONFIG = "#!/bin/sh\ncat libraries\n"
GETENT = '#!/bin/sh\nsed -n "s/ $2\\$/ STREAM $2/p" addresses\n'  # of lines of address and name


class Checkout:
    """A folder with run.sh, what it reads, and stand-ins for every program it starts."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("run.sh", "requirements.txt", "hosts"):
            shutil.copy(REPO / name, root)
        stand_ins = {"lscpu": LSCPU, "taskset": TASKSET, "ldconfig": LDCONFIG, "getent": GETENT,
                     "python3": PYTHON3, "python": PYTHON}
        for name, text in stand_ins.items():
            self.script(f"stand-ins/{name}", text)
        for name in PROGRAMS:
            (root / "stand-ins" / name).symlink_to(shutil.which(name))
        self.script(".venv/bin/python", PYTHON)
        shutil.copy(root / "requirements.txt", root / ".venv")
        # Two sockets of two cores of two hyper-threads, core numbers starting again on each
        # socket: CPU n and CPU n + 4 share a core.
        self.topology([(cpu, cpu % 2, cpu % 4 // 2, 0) for cpu in range(8)])

    def topology(self, cpus: list[tuple]):
        """What lscpu prints: (CPU, core, socket, NUMA node) of each CPU."""
        lines = ["# CPU,Core,Socket,Node", *(",".join(map(str, row)) for row in cpus)]
        (self.root / "lscpu").write_text("\n".join(lines) + "\n")

    def script(self, name: str, text: str):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        # Nothing is inherited, lest the caller's OMP_NUM_THREADS or OUT decide a test.
        env = {"PATH": f"{self.root}/stand-ins", "CGROUPS": "none", **env}
        command = ["bash", str(self.root / "run.sh"), *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    def calls(self, script: str = "") -> list[str]:
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(script)]


def line_of(result: subprocess.CompletedProcess, name: str) -> str:
    return next(line for line in result.stdout.splitlines() if line.startswith(name))
