"""Write a tiny random checkpoint in the released format: `python tools/make_tiny.py DIR [--experts int4|bf16|fp8]`."""

import argparse
import json
from pathlib import Path

from hybrid.checkpoint.tiny import make_tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", choices=("int4", "bf16", "fp8"), default="int4")
    parser.add_argument("--prefix", default="language_model.model.")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON object of text_config keys to override")
    options = parser.parse_args()
    print(
        make_tiny(
            options.directory,
            seed=options.seed,
            config=options.config,
            experts=options.experts,
            prefix=options.prefix,
        )
    )


if __name__ == "__main__":
    main()
