"""The pocket model: a miniature of Kimi K2.5, trained from scratch, that comes with the program."""

from pathlib import Path

from hybrid.errors import CheckpointError


def pocket_path() -> Path:
    """The pocket model's directory. Raises CheckpointError for an installation that lacks it."""
    directory = Path(__file__).with_name("pocket-1")
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"This installation has no pocket model in {directory}.",
            "Install kimi-local again, or train it: python tools/train_pocket.py --help",
        )
    return directory
