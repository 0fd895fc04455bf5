"""The card says what was measured."""

import json
from pathlib import Path

from pocket.card import card
from pocket.state import LOG, Settings


def test_the_card_quotes_its_sources(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    data.mkdir()
    Settings(steps=50, decay_from=40, qat_from=45, freeze_from=40).save(run)
    line = {
        "tokens": 40960,
        "lr": 0.002,
        "loss": 1.25,
        "accuracy": 0.5,
        "max_logit": [3.0, 104.0],
        "clipped": 1,
        "load": 1.5,
    }
    lines = [{"step": step, **line} for step in (10, 20, 30, 40, 50)]
    lines[2]["lr"] = 1e-6
    (run / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"package": "some-text", "version": "1.2", "licence": "CC0"}
    (data / "sources.json").write_text(json.dumps([source]))
    score = {"cases": 500, "passed": 481, "score": 0.962, "low": 0.941, "high": 0.976}
    text = {"tokens": 26000, "perplexity": 31.5, "bits_per_byte": 1.5}
    settings = {"dtype": "float32", "activations": "int8", "seed": 0}
    domain = {"entropy": [0.9], "busiest_tenth": [0.3], "kept": 0.25, "apart_from_text": 0.5}
    routing = {"tokens_per_domain": 8192, "entropy": [0.95], "busiest_tenth": [0.25], "domains": {"copy": domain}}
    found = card(run, data, {"settings": settings, "skills": {"copy": score}, "text": text}, routing)
    assert "50 steps of 16 x 256 tokens" in found
    assert "| 50 | 0.04 | 2.0e-03 | 1.250 | 50.0% | 104 | 1 | 1.50 |" in found
    assert "continued at steps 30," in found
    assert "| copy | 481 of 500 | 96.2% | 94.1% | 97.6% |" in found and "perplexity 31.50" in found
    assert "| some-text | 1.2 | CC0 |" in found and "| copy | 30.0% | 25.0% | 0.500 |" in found
    assert all(len(line) <= 200 for line in found.splitlines())
