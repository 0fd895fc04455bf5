"""Downloads against a small real server: what is fetched, resumed, refused, and how failures are told."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.file_download
import pytest

from hybrid import hub
from hybrid.checkpoint import open_checkpoint
from hybrid.checkpoint.deep import check_deep
from hybrid.errors import DoesNotFit, KimiError, MissingExtra, Retry, UsageError
from hybrid.hub import plan_pull, pull
from tests.checkpoint.damage import SHARD, flip_byte
from tests.hub_server import REPO, Hub, serve

ROOT = Path(__file__).parents[1]
BLOCK = 65536


@pytest.fixture
def server(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny model, and a library that forgets nothing and waits for nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", BLOCK)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    files |= {"modeling_kimi.py": b"raise SystemExit", "other/model.safetensors": b"x", "pytorch_model.bin": b"x"}
    with serve(files) as hub:
        yield hub


@pytest.fixture(params=["directory", "cache"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "model" if request.param == "directory" else None


def test_a_download_is_complete_and_holds_no_code(server: Hub, target: Path | None) -> None:
    plan = plan_pull(REPO, target, endpoint=server.url)
    assert (
        plan.missing == plan.total == sum(len(d) for n, d in server.files.items() if n in {f.name for f in plan.files})
    )
    path = pull(plan, endpoint=server.url)
    assert target is None or path == target
    names = {entry.name for entry in path.iterdir() if entry.name != ".cache"}
    assert names == server.files.keys() - {"modeling_kimi.py", "other/model.safetensors", "pytorch_model.bin"}
    open_checkpoint(path).close()
    assert plan.missing == 0
    report = check_deep(path)
    assert report.findings == [] and report.checked_files == 1  # its sha256 was recorded on the way


def test_an_interrupted_download_continues_where_it_stopped(server: Hub, target: Path | None) -> None:
    plan = plan_pull(REPO, target, endpoint=server.url)
    server.cut_after = 2 * BLOCK + 100
    server.refuse_ranges = True
    with pytest.raises(Retry) as caught:
        pull(plan, endpoint=server.url)
    assert caught.value.exit_code == 75 and "again" in caught.value.remedy and "\n" not in str(caught.value)
    shard = next(file for file in plan.files if file.name == SHARD)
    kept = plan.partial(shard).stat().st_size
    assert kept == 2 * BLOCK
    assert plan.missing == plan.total - kept
    server.cut_after, server.refuse_ranges = None, False
    server.ranges.clear()
    path = pull(plan_pull(REPO, target, endpoint=server.url), endpoint=server.url)
    assert server.ranges == [f"bytes={kept}-"]
    assert (path / SHARD).read_bytes() == server.files[SHARD]
    assert not plan.partial(shard).exists()


def test_what_is_there_is_not_fetched_again(server: Hub, target: Path | None) -> None:
    pull(plan_pull(REPO, target, endpoint=server.url), endpoint=server.url)
    server.downloads.clear()
    pull(plan_pull(REPO, target, endpoint=server.url), endpoint=server.url)
    assert server.downloads == []


def test_a_damaged_shard_is_not_kept(server: Hub, target: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_pull(REPO, target, endpoint=server.url)
    whole = server.files[SHARD]
    server.files[SHARD] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(Retry, match="arrived damaged"):
        pull(plan, endpoint=server.url)
    shard = next(file for file in plan.files if file.name == SHARD)
    assert not plan.destination(shard).exists() and not plan.partial(shard).exists()
    server.files[SHARD] = whole
    assert (pull(plan, endpoint=server.url) / SHARD).read_bytes() == whole


def test_no_space_is_said_before_anything_is_written(
    server: Hub, target: Path | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "disk_free", lambda path: 1_000_000)
    plan = plan_pull(REPO, target, endpoint=server.url)
    with pytest.raises(DoesNotFit) as caught:
        pull(plan, endpoint=server.url)
    assert "needs 0.0 GB more" in caught.value.message and caught.value.exit_code == 3
    assert server.downloads == [] and not (tmp_path / "model").exists() and not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up_meanwhile(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: object, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub._StoppableFile, "write", write)
    with pytest.raises(DoesNotFit, match="disk filled up"):
        pull(plan_pull(REPO, tmp_path / "model", endpoint=server.url), endpoint=server.url)


def test_unknown_repositories_and_dead_connections(server: Hub) -> None:
    with pytest.raises(KimiError, match="no model repository some/thing") as caught:
        plan_pull("some/thing", endpoint=server.url)
    assert caught.value.exit_code == 1
    with pytest.raises(UsageError, match="not the name of a model repository"):
        plan_pull("a b/../c", endpoint=server.url)
    with pytest.raises(Retry, match="stopped: .*refused"):
        plan_pull(REPO, endpoint="http://127.0.0.1:9")


def test_a_repository_without_safetensors(server: Hub) -> None:
    del server.files[SHARD]
    with pytest.raises(KimiError, match="holds no safetensors"):
        plan_pull(REPO, endpoint=server.url)


def test_offline(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(KimiError, match="HF_HUB_OFFLINE"):
        plan_pull(REPO)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra) as caught:
        plan_pull(REPO)
    assert caught.value.remedy == 'pip install "kimi-local[hub]"'


def run(server: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`kimi-local pull` in a process of its own, as a person would."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    command = [sys.executable, "-c", "from cli.main import main; main()", "pull", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command(server: Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    said = run(server, tmp_path, REPO, "--dir", str(model), "--dry-run")
    assert said.returncode == 0 and SHARD in said.stdout and "to download" in said.stderr and not model.exists()
    said = run(server, tmp_path, REPO, "--dir", str(model))
    assert said.returncode == 0 and said.stdout == f"{model}\n"
    assert f"kimi-local doctor {model}" in said.stderr
    flip_byte(model / SHARD, "language_model.lm_head.weight")
    assert SHARD in [finding.where for finding in check_deep(model).findings]
    said = run(server, tmp_path, "some/thing")
    assert said.returncode == 1 and said.stderr.startswith("error: There is no model repository some/thing")
    assert said.stderr.count("\n") == 1
