# SPDX-License-Identifier: Apache-2.0
"""Each file that the README offers for copying runs alone, with the packages of its row only.

    python -m pytest tests/test_copies.py

`run_alone` copies the file to an empty folder and runs a few lines of Python that use it, in a
process that finds no other file of the project and lets the copy import no other package.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# The hook looks at the importing module: packages may import anything, the copy and the lines that
# use it may not. Python runs isolated (-I), so its path holds the folder and installed packages.
GUARD = """
import builtins, sys
folder, *packages = sys.argv[1:]
sys.path.insert(0, folder)
allowed = {*packages, *sys.stdlib_module_names}
unguarded_import = builtins.__import__

def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__file__", folder)  # `code` has no __file__
    if importer.startswith(folder) and name.split(".")[0] not in allowed:
        raise ImportError(f"{name} is blocked")
    return unguarded_import(name, globals, locals, fromlist, level)

builtins.__import__ = guarded_import
"""


def run_alone(folder: Path, file: str, packages: list[str], code: str) -> str:
    """Standard output of `code` beside a copy of `file` in the empty folder `folder`.

    Both may import the file's module, `packages` and the standard library.
    """
    shutil.copy(REPO / file, folder)
    command = [sys.executable, "-I", "-c", GUARD + code, str(folder), *packages, Path(file).stem]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MODEL = """
import torch
from model import ModelConfig, Transducer
model = Transducer(ModelConfig(8, 5, 6, 1, 2, 1, 4, 1, 3, normalization=True))
encoded, enc_lens, predicted, *_ = model(torch.randn(2, 7, 8), torch.tensor([7, 4]),
                                      torch.tensor([[1, 2, 3], [2, 0, 0]]))
print(*model.joint(encoded, predicted).shape, *enc_lens.tolist())
"""

LOSS = """
import math, torch
from loss import joint_transducer_loss, transducer_loss
targets, lens, target_lens = torch.tensor([[1]]), torch.tensor([2]), torch.tensor([1])
plain = transducer_loss(torch.zeros(1, 2, 2, 4), targets, lens, target_lens, 0)
joint = joint_transducer_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(4, 3),
                              torch.zeros(4, requires_grad=True), targets, lens, target_lens, 0)
joint.backward()
print(all(math.isclose(x, 3 * math.log(4) - math.log(2), rel_tol=1e-6) for x in (plain, joint)))
"""

RANKS = """
import torch
from ranks import Ranks, all_sum, read_ranks
print(*read_ranks(), *all_sum(torch.ones(2), Ranks(0, 1, 0)).tolist())
"""

OPTIMIZER = """
import torch
from optimizer import Lamb, lr_at
x = torch.nn.Parameter(torch.ones(3))
lamb = Lamb([x], lr=lr_at(1, 1, lr=0.5, warmup_epochs=0, hold_epochs=1, steps_per_epoch=1,
                          gamma=0.9, lr_min=0))
x.sum().backward()
lamb.step()
print([round(v, 4) for v in x.tolist()])
"""

CHECKPOINT = """
from pathlib import Path
import torch
from checkpoint import CHECKPOINT_FORMAT, load_checkpoint, save_checkpoint
path = Path("checkpoint-00000001.pt")
save_checkpoint(path, {"format": CHECKPOINT_FORMAT, "weight": torch.arange(3)})
print(*load_checkpoint(path)["weight"].tolist())
"""

FEATURES = """
import numpy as np, soundfile
from features import features, load_audio
soundfile.write("tone.wav", 0.5 * np.sin(np.arange(8000)), 8000)
samples = load_audio("tone.wav")  # resampled to 16 kHz
feats = features(samples)
print(len(samples), feats.shape[1], bool(feats.isfinite().all()))
"""


@pytest.mark.parametrize(
    ("file", "packages", "code", "output"),
    [
        ("model.py", ["torch"], MODEL, "2 4 4 5 4 2"),
        ("loss.py", ["torch"], LOSS, "True"),
        ("optimizer.py", ["torch"], OPTIMIZER, "[0.5, 0.5, 0.5]"),
        ("ranks.py", ["torch"], RANKS, "0 1 0 1.0 1.0"),
        ("checkpoint.py", ["torch"], CHECKPOINT, "0 1 2"),
        ("features.py", ["numpy", "torch", "soundfile", "soxr"], FEATURES, "16000 256 True"),
    ],
    ids=lambda value: value if str(value).endswith(".py") else "",
)
def test_copied_file_runs_with_the_packages_of_its_row(tmp_path, monkeypatch, file, packages,
                                                       code, output):
    for name in ("RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert run_alone(tmp_path, file, packages, code).strip() == output


def test_copied_file_may_not_import_other_packages_or_files_of_the_project(tmp_path):
    # other.py stands for a copied file that imports inside functions.
    (tmp_path / "other.py").write_text("""
def package(): import torch.nn, numpy
def file(): from data import Tokenizer
""")
    code = """
import other
for function in (other.package, other.file):
    try:
        function()
    except ImportError as error:
        print(error)
"""
    blocked = run_alone(tmp_path, "loss.py", ["torch", "other"], code).splitlines()
    assert blocked == ["numpy is blocked", "data is blocked"]


@pytest.mark.parametrize("file", ["model.py", "loss.py"])
def test_model_and_loss_know_no_files_flags_ranks_or_compilers(file):
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not (imported | used) & {"argparse", "compile", "distributed", "jit", "os", "pathlib"}


@pytest.mark.parametrize("file", ["model.py", "loss.py"])
def test_model_and_loss_name_no_device(file):
    source = (REPO / file).read_text(encoding="utf-8")
    assert re.findall(r"(?i)\b(cpu|cuda|mps|xpu)\b", source) == []
