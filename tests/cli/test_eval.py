"""`kimi-local eval`: the figures it prints, that they do not depend on how they are computed, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.eval import Dtype, evaluate
from cli.main import main
from cli.options import KV
from hybrid.checkpoint.tiny import make_tiny
from hybrid.errors import CheckpointError, UsageError
from tests.checkpoint import damage

WORDS = "The first of many words is that it was not the last; in this, as with his others, he had been one. " * 6
SKILLS = ["arithmetic_instant", "copy", "tool_call"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def instant(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A copy of `tiny` that says of itself that it cannot reason."""
    model = damage.copy(tiny, tmp_path_factory.mktemp("models") / "instant")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"thinking": False}))
    return model


def run(model: Path | str, text: Path, **options: Any) -> None:
    given = {"skill": SKILLS, "cases": 2, "max_tokens": 8, "ctx": 48, "tokens": 96, "threads": 1} | options
    evaluate(str(model), text=[text], **given)


def report(capsys: pytest.CaptureFixture[str], model: Path | str, text: Path, **options: Any) -> dict[str, Any]:
    run(model, text, json_output=True, **options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def test_json(capsys: pytest.CaptureFixture[str], tiny: Path, text: Path) -> None:
    found = report(capsys, tiny, text)
    assert list(found) == ["model", "settings", "skills", "text", "against", "seconds"]
    assert found["model"] == str(tiny) and found["against"] is None and found["seconds"] > 0
    assert list(found["skills"]) == SKILLS
    for figures in found["skills"].values():
        assert list(figures) == ["cases", "passed", "instant", "score", "low", "high"]
        assert figures["cases"] == 2 and figures["low"] <= figures["score"] <= figures["high"]
    assert list(found["text"]) == ["tokens", "nats_per_token", "perplexity", "bits_per_byte"]
    assert found["text"]["tokens"] == 2 * 47
    assert found["settings"]["dtype"] == "float32" and found["settings"]["activations"] == "int8"


def test_figures_do_not_depend_on_batch_and_chunk(capsys: pytest.CaptureFixture[str], tiny: Path, text: Path) -> None:
    """The failures tell every word of the replies."""
    found = []
    for batch, chunk in ((1, 64), (8, 64), (8, 1)):
        each = report(capsys, tiny, text, batch=batch, prefill_chunk=chunk, failures=2, skill=SKILLS[:2])
        assert each["settings"]["batch"] == batch
        found.append(each)
    first, *others = found
    assert all(each["failures"] for each in first["skills"].values())
    for other in others:
        assert other["skills"] == first["skills"]
        assert other["text"] == pytest.approx(first["text"], rel=2e-3)


def test_a_seed_draws_other_cases(capsys: pytest.CaptureFixture[str], tiny: Path, text: Path) -> None:
    asked = []
    for seed in (0, 0, 1):
        found = report(capsys, tiny, text, seed=seed, failures=2, skill=["copy"], max_tokens=1)
        asked.append([each["asked"] for each in found["skills"]["copy"]["failures"]])
    assert asked[0] == asked[1] != asked[2] and len(asked[0]) == 2


def test_against_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, text: Path) -> None:
    other = make_tiny(tmp_path / "other", seed=1)
    itself = report(capsys, tiny, text, cases=0, against=str(tiny))
    assert itself["against"] == {"model": str(tiny), "kl_mean": 0, "kl_p99": 0, "top1": 1}
    assert itself["skills"] == {}
    found = report(capsys, tiny, text, cases=0, against=str(other))["against"]
    assert found["model"] == str(other) and 0 < found["kl_mean"] < found["kl_p99"] and found["top1"] < 1


def test_what_a_reduced_cache_costs(capsys: pytest.CaptureFixture[str], tiny: Path, text: Path) -> None:
    """The same model as its reference, whose rows are not rounded."""
    found = {kv: report(capsys, tiny, text, cases=0, against=str(tiny), kv=kv) for kv in (KV.fp8, KV.int8)}
    assert found[KV.fp8]["against"]["kl_mean"] > found[KV.int8]["against"]["kl_mean"] > 0
    assert found[KV.fp8]["settings"]["kv"] == "fp8" and found[KV.fp8]["text"] != found[KV.int8]["text"]


@pytest.mark.parametrize("dtype", Dtype)
def test_text_is_the_same_however_it_is_computed(
    capsys: pytest.CaptureFixture[str], tiny: Path, text: Path, dtype: Dtype
) -> None:
    """`compare` streams the layers of the same model over the same windows, and knows a perplexity of its own."""
    from cli.compare import compare
    from cli.options import Activations

    found = report(capsys, tiny, text, cases=0, dtype=dtype, activations=Activations.float32)
    compare(
        str(tiny), str(tiny), [text], tokens=96, ctx=48, threads=1, activations=Activations.float32, json_output=True
    )
    expected = json.loads(capsys.readouterr().out)["ppl_a"]
    assert found["text"]["perplexity"] == pytest.approx(expected, rel=1e-4 if dtype == Dtype.float32 else 0.05)


def test_tables_for_people(capsys: pytest.CaptureFixture[str], tiny: Path, text: Path) -> None:
    run(tiny, text, failures=1, against=str(tiny), skill=["copy", "tool_call"])
    out = capsys.readouterr().out
    assert re.search(r"^copy +0\.0% +0\.0% to 65\.8% +0 of 2$", out, re.MULTILINE)
    assert "perplexity" in out and "bits per byte" in out and "same likeliest token" in out
    assert re.search(r"^copy, (length|stop)\n  asked     .+\n  expected  .+\n  got", out, re.MULTILINE)
    assert "*" not in out.split("copy, ")[0]
    assert not any(line.endswith(" ") for line in out.split("copy, ")[0].splitlines())


def test_a_model_without_reasoning_is_marked(capsys: pytest.CaptureFixture[str], instant: Path, text: Path) -> None:
    run(instant, text, skill=["arithmetic", "arithmetic_instant"])
    out = capsys.readouterr().out
    assert "arithmetic * " in out and "arithmetic_instant *" not in out and "* Asked without the reasoning" in out
    found = report(capsys, instant, text, skill=["arithmetic", "arithmetic_instant"])["skills"]
    assert [each["instant"] for each in found.values()] == [2, 0]


def test_what_cannot_be_scored_is_refused(tmp_path: Path, tiny: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="There is no skill 'juggling'. There are arithmetic, "):
        run(tiny, text, skill=["copy", "juggling"])
    with pytest.raises(UsageError, match="more --tokens"):
        run(tiny, text, tokens=1)
    with pytest.raises(UsageError, match="--ctx 5,000 is too long for tiny"):
        run(tiny, text, ctx=5000)
    with pytest.raises(UsageError, match="No text has 1,000 tokens"):
        run(tiny, text, ctx=1000, tokens=None)
    with pytest.raises(CheckpointError, match="no model directory"):
        run(tmp_path / "nowhere", text)


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: Path, tiny: Path, text: Path) -> None:
    other = make_tiny(tmp_path / "other", config={"vocab_size": 300 + 256})
    with pytest.raises(UsageError, match="other and tiny have different vocabularies"):
        run(tiny, text, against=str(other))


def test_options_reach_the_command(capsys: pytest.CaptureFixture[str], tiny: Path, text: Path) -> None:
    arguments = [
        "eval", str(tiny), "--skill", "copy", "--cases", "1", "--seed", "3", "--text", str(text), "--tokens", "60",
        "--ctx", "30", "-n", "4", "--batch", "2", "--prefill-chunk", "16", "--dtype", "bfloat16", "--threads", "1",
        "--activations", "float32", "--json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {
        "cases": 1, "seed": 3, "tokens": 60, "ctx": 30, "max_tokens": 4, "batch": 2, "prefill_chunk": 16,
        "threads": 1, "dtype": "bfloat16", "kv": "auto", "activations": "float32",
    }  # fmt: skip


def test_errors_are_one_line(text: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "eval", "nowhere", "--text", str(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and "no model directory nowhere" in done.stderr


def test_help_is_instant_and_says_what_scores_depend_on() -> None:
    code = (
        "import sys\ntry:\n    from cli.main import main; main(['eval', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numba', 'numpy', 'tiktoken'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "do not depend" in " ".join(done.stdout.replace("│", " ").split())
