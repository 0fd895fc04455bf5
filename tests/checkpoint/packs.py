"""Small packs for tests."""

from pathlib import Path

from hybrid.checkpoint import CheckpointWriter, open_checkpoint
from hybrid.checkpoint.tiny import make_tiny
from hybrid.convert import Settings, quantize

VISION = {
    "patch_size": 2, "vt_num_hidden_layers": 1, "vt_hidden_size": 8, "vt_num_attention_heads": 2,
    "vt_intermediate_size": 16, "init_pos_emb_height": 4, "init_pos_emb_width": 4, "merge_kernel_size": [2, 2],
}  # fmt: skip


def make_pack(directory: Path) -> Path:
    """A pack with every kind of file: an image tower, residents in int8, experts in several formats."""
    source = make_tiny(directory / "source", config={"vision_config": VISION, "moe_intermediate_size": 512})
    return quantize(source, directory / "pack", Settings(bits=2.4, resident="int8"), threads=1)


def resharded(source: Path, target: Path, max_shard_bytes: int = 150_000) -> Path:
    """A copy of a checkpoint in many small shards."""
    texts = [path for path in source.iterdir() if path.suffix in (".json", ".jinja", ".model")]
    files = {path.name: path.read_bytes() for path in texts if not path.name.startswith(("model.", "checksums"))}
    with open_checkpoint(source) as checkpoint, CheckpointWriter(target, max_shard_bytes=max_shard_bytes) as writer:
        for name in checkpoint.names():
            writer.add(name, checkpoint.tensor(name))
        return writer.finish(files)


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
