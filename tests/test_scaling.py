# SPDX-License-Identifier: Apache-2.0
"""What bench.py scaling measures and concludes: python -m pytest tests/test_scaling.py"""

import json
import os
import sys

import pytest
import torch
from tones import run_script

import data
import features
from tools import bench, ladder
from tools.ladder import Case

BYTES = 4 * 10**8
# A turn takes 10 ms and half as long again as its bytes; a step hides half of all behind computing.
REDUCE_S = {case: 2 * (case.ranks - 1) * 0.01 + 1.5 * ladder.ring_s(case.ranks, BYTES, case.gbit)
            for case in (Case(2, 10), Case(2, 1), Case(4, 10), Case(4, 1))}


def measured(case, words):
    row = {"gradient_bytes": BYTES, "all_reduce": REDUCE_S.get(case._replace(words=()), 0.1)}
    if "--exchange-only" in case.words:
        return row
    if case == Case(1):
        return {"step": 1.8, "gradient_bytes": BYTES}
    waits = 0.5 * row["all_reduce"]
    turns = {"waits": [waits - 0.03125, waits, waits + 0.25]}
    return row | {"step": 2.0 + waits, "waits": waits, "turns": turns}


@pytest.mark.parametrize("has_hosts", [True, False])
def test_table_and_projection(monkeypatch, capsys, tmp_path, has_hosts):
    monkeypatch.setattr(ladder, "measure_case", measured)
    monkeypatch.setattr(ladder, "can_make_hosts", lambda: has_hosts)
    path = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "scaling", "--json", str(path)])
    bench.main()
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(path.read_text()) == result
    assert result["torch"] == torch.__version__
    pair = next(line for line in lines if line.startswith("2 ranks"))
    assert pair.split() == ["2", "ranks", "2.05", "0.100", "0.05", "(0.02", "to", "0.30)", "88%"]
    assert result["cases"]["2 ranks"]["efficiency"] == pytest.approx(1.8 / 2.05)
    if not has_hosts:
        assert set(result["cases"]) == {"1 ranks", "2 ranks"}
        assert "projected_speedup" not in result
        with pytest.raises(ValueError, match="without hosts"):
            ladder.read_scaling(path)
        return
    assert len(result["cases"]) == 10
    assert result["slope"] == pytest.approx(1.5)
    assert result["latency_s"] == pytest.approx(0.01)
    for gbit in (10, 1):
        reduce_s = 14 * 0.01 + 1.5 * 2 * 7 / 8 * 8 * BYTES / (gbit * 1e9)
        expected = 4 * 2.05 / (2 + 0.5 * reduce_s)
        assert result["projected_speedup"][f"{gbit} Gbit/s"] == pytest.approx(expected)
    assert "the original says 5.16" in lines[-1]


def test_oneccl_is_measured_with_1_2_and_4_workers_where_it_is(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(ladder, "measure_case", lambda case, words: (
        asked.append(case), measured(case, words))[1])
    monkeypatch.setattr(ladder, "can_make_hosts", lambda: False)
    monkeypatch.setattr(ladder.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        sys, "argv", ["bench.py", "scaling", "--json", str(tmp_path / "scaling.json")]
    )
    bench.main()
    assert [case.ccl_workers for case in asked] == [0, 0, 1, 2, 4]
    assert "2 ranks oneCCL with 4" in capsys.readouterr().out
    env = asked[-1].environment(1, "4711")
    assert (env["CCL_WORKER_COUNT"], env["CCL_LOCAL_RANK"], env["RANK"]) == ("4", "1", "1")
    assert "CCL_WORKER_COUNT" not in asked[1].environment(1, "4711")


@pytest.mark.parametrize(("dtype", "mean"), [
    (torch.bfloat16, [2.5, 0.5]), (torch.float32, [2.5005, 0.5])
])
def test_exchanged_gradients_are_the_mean_of_all_ranks(monkeypatch, dtype, mean):
    """In bfloat16 1.001 travels as 1."""

    class Bucket:
        flat = torch.tensor([1.001, -3.0])

        def buffer(self):
            return self.flat

    class Work:
        def __init__(self, tensor):
            self.done = torch.futures.Future()
            self.done.set_result([tensor + torch.tensor([2.0, 2.0])])  # of another rank

        def get_future(self):
            return self.done

    monkeypatch.setattr(bench.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(bench.dist, "all_reduce", lambda tensor, async_op: Work(tensor))
    bucket = Bucket()
    state = {"dtype": dtype}
    assert ladder.exchange(state, bucket).wait().tolist() == pytest.approx(mean)
    assert bucket.flat.tolist() == pytest.approx(mean)
    assert state["began"] > 0


def test_the_first_recordings_are_the_same_for_any_number_of_ranks(tmp_path):
    """Those are what every rank computes."""
    made = []
    for count in (4, 8):
        bench.synthesize(tmp_path / str(count), bench.draw_shapes(count))
        utterances = data.read_split(tmp_path / str(count), "noise")[:4]
        made.append([(u.id, u.text, features.load_audio(u.path).tolist()) for u in utterances])
    assert made[0] == made[1]


@pytest.mark.slow
def test_ranks_and_hosts_are_really_measured(tmp_path):
    words = ["--json", str(tmp_path / "scaling.json"), "--turns", "1", "--preset", "demo",
             "--batch-size", "1", "--vocab-size", "24"]
    *lines, last = run_script("tools.bench", "scaling", *words).splitlines()
    cases = json.loads(last)["cases"]
    if os.geteuid() != 0 or any("no hosts made" in line for line in lines):
        assert len(cases) == 2
    else:
        assert len(cases) == 10
        slow, fast = (cases[f"2 hosts, {gbit} Gbit/s"]["all_reduce"] for gbit in (1, 10))
        num_bytes = cases["2 ranks"]["gradient_bytes"]
        assert slow > 0.5 * ladder.ring_s(2, num_bytes, 1)  # the rate holds, but for its burst
        assert slow > fast
    pair = cases["2 ranks"]
    assert pair["step"] > pair["waits"] > 0
    assert pair["efficiency"] == cases["1 ranks"]["step"] / pair["step"]
