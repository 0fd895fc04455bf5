"""Models that go by a name: the demo model and the pocket model."""

from pathlib import Path

from hybrid.progress import OnProgress, Progress, ignore

DEMO, POCKET = "demo", "pocket"


def model_path(model: str | Path, report: OnProgress = ignore) -> str | Path:
    """The directory of "demo" (built on first use) or "pocket", unless one of that name is here; else `model` itself.

    Raises what `demo_path` and `pocket_path` do.
    """
    name = str(model)
    if name not in (DEMO, POCKET) or Path(model).exists():
        return model
    if name == POCKET:
        from hybrid.pocket import pocket_path

        return pocket_path()
    from hybrid.demo import demo_path

    return demo_path(lambda done, total, text: report(Progress("demo", done, total, text)))
