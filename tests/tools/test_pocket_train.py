"""The loop: it learns, it does not depend on threads, and a killed run ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pocket.qat import is_expert
from pocket.record import read_log
from pocket.state import CHECKPOINT, LOG, Settings, State
from pocket.train import Trainer, branch, seconds_per_step, train

from hybrid.errors import KimiError
from tests.tools.pocket_copy import Copy, settings

PROGRAM = Path(__file__).with_name("pocket_copy.py")


@pytest.fixture(autouse=True)
def threads() -> object:
    """Training sets torch's own threads to one; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(run: Path, steps: int, **changes: object) -> Path:
    run.mkdir()
    settings(steps, **changes).save(run)
    return run


def same(one: State, other: State) -> bool:
    parts = [(a.masters | a.mean | {f"{k}.": v for k, v in a.square.items()}, a.bias, a.step) for a in (one, other)]
    (first, bias, step), (second, bias2, step2) = parts
    equal = all(torch.equal(first[name], second[name]) for name in first)
    return step == step2 and equal and all(torch.equal(bias[layer], bias2[layer]) for layer in bias)


def test_copying_is_learned(tmp_path: Path) -> None:
    train(start(tmp_path / "run", 60, rows=8, shard_rows=8, lr=0.02), Copy(symbols=4, longest=3), log_every=10)
    lines = read_log(tmp_path / "run" / LOG)
    assert lines[0]["loss"] > 1.2 and lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["tokens"] > 5 * lines[0]["tokens"] and 1 <= lines[-1]["load"] <= 12


def test_threads_do_not_matter(tmp_path: Path) -> None:
    one, two = (train(start(tmp_path / str(n), 6), Copy(), threads=n) for n in (1, 2))
    assert same(one, two)


def test_shards_are_a_matter_of_rounding(tmp_path: Path) -> None:
    with (
        Trainer(settings(4, shard_rows=4), State.new(settings(4).config, 0), Copy()) as whole,
        Trainer(settings(4, shard_rows=1), State.new(settings(4).config, 0), Copy()) as parts,
    ):
        one, other = whole.step(), parts.step()
    assert one.loss == pytest.approx(other.loss, rel=1e-3) and one.tokens == other.tokens
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.05)


def test_killed_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    steps = 12
    whole = train(start(tmp_path / "whole", steps), Copy(), log_every=1)
    run = start(tmp_path / "killed", steps)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, str(PROGRAM), str(run)], env=environment)
    deadline = time.monotonic() + 120
    while not (run / LOG).exists() or len(read_log(run / LOG)) < 3:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 1 <= State.load(run / CHECKPOINT).step <= steps
    assert same(train(run, Copy(), log_every=1), whole)
    logs = [read_log(tmp_path / name / LOG) for name in ("whole", "killed")]
    timeless = [[{**line, "tok_s": 0} for line in log] for log in logs]
    assert timeless[0] == timeless[1]


def test_a_line_cut_short_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / LOG
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]


def test_rates_rise_stay_and_fall() -> None:
    plan = Settings(steps=100, decay_from=60, qat_from=80, freeze_from=60, warmup=10, lr=1.0, earlier=[[20, 2.0]])
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == 0.2 and set(rates[10:20]) == {2.0} and set(rates[20:60]) == {1.0}
    assert rates[60] == 1.0 and rates[80] == 0.5 and rates[99] == pytest.approx(1 / 40)


def test_branches_differ_in_the_experts_alone(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 6, decay_from=4)
    train(run, Copy())
    kept = "step-000004.safetensors"
    for name, qat in (("with", True), ("without", False)):
        plan = branch(run, kept, tmp_path / name, steps=3, qat_steps=3 * qat)
        assert (plan.steps, plan.decay_from, plan.qat_from) == (7, 4, 4 if qat else 7)
    ends = [train(tmp_path / name, Copy()) for name in ("with", "without")]
    assert ends[0].step == ends[1].step == 7 and not same(*ends)
    with pytest.raises(KimiError, match="already exists"):
        branch(run, kept, tmp_path / "with", steps=3, qat_steps=3)


def test_experts_may_have_fewer_bits(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 6, decay_from=4)
    train(run, Copy())
    plan = branch(run, "step-000004.safetensors", tmp_path / "two", steps=2, qat_steps=2, qat_bits=2)
    assert plan.qat_bits == 2 and Settings.load(tmp_path / "two") == plan
    with Trainer(plan, State.new(plan.config, 0), Copy()) as trainer:
        weights = trainer._weights(plan.qat_bits)
        for name in filter(is_expert, weights):
            groups = weights[name].detach().unflatten(-1, (-1, 32))
            assert all(len(group.unique()) <= 4 for group in groups.flatten(0, -2))


def test_a_branch_may_keep_the_rates_of_its_run(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 6, decay_from=3, qat_from=5)
    end = train(run, Copy())
    kept = "step-000005.safetensors"
    again, without = (branch(run, kept, tmp_path / name, qat_steps=qat) for name, qat in (("again", 1), ("without", 0)))
    assert again == Settings.load(run) and without == replace(again, qat_from=6)
    assert same(train(tmp_path / "again", Copy()), end) and not same(train(tmp_path / "without", Copy()), end)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_products_are_made_in_the_precision_asked_for(precision: str) -> None:
    plan = replace(settings(4), precision=precision)
    with Trainer(plan, State.new(plan.config, 0), Copy()) as trainer:
        weights = trainer._weights(4)
        trainer.step()
    assert weights["lm_head.weight"].dtype == plan.dtype
    assert torch.equal(weights["lm_head.weight"].bfloat16().to(plan.dtype), weights["lm_head.weight"])


def test_bias_follows_the_load_until_it_is_frozen() -> None:
    plan = settings(4, freeze_from=1)
    state = State.new(plan.config, 0)
    with Trainer(plan, state, Copy()) as trainer:
        trainer.step()
        bias = {layer: values.clone() for layer, values in state.bias.items()}
        trainer.step()
    for layer, values in state.bias.items():
        assert values.any() and values.abs().max() == pytest.approx(plan.gamma)
        assert torch.equal(values, bias[layer])


def test_a_clipped_run_stays_below(tmp_path: Path) -> None:
    train(start(tmp_path / "run", 10, tau=1.0, lr=0.02), Copy(), log_every=1)
    lines = read_log(tmp_path / "run" / LOG)
    assert sum(line["clipped"] for line in lines) > 0


def test_time_is_measured_and_leaves_nothing() -> None:
    assert 0 < seconds_per_step(settings(1 << 30), Copy(), threads=1) < 60


def test_what_is_not_there_or_diverges_is_said(tmp_path: Path) -> None:
    with pytest.raises(KimiError, match="no training run"):
        Settings.load(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(KimiError, match="cannot be read"):
        State.load(tmp_path / CHECKPOINT)
    state = State.new(settings(4).config, 0)
    state.masters["norm.weight"][0] = float("nan")
    with Trainer(settings(4), state, Copy()) as trainer, pytest.raises(KimiError, match="diverged at step 0"):
        trainer.step()
