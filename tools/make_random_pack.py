"""A pack of random bits from a checkpoint: to time a model whose experts would take hours to encode.

    python tools/make_mini.py /models/mini
    python tools/make_random_pack.py /models/mini /models/mini-2 --mix trellis2 --resident int4

Everything but the experts is converted as `kimi-local quantize` does it. An expert has the right size and format, and
weights of a trained model's size, but none of its source's: speed is real, answers are noise.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid.checkpoint import Expert
from hybrid.checkpoint.blob import Formats
from hybrid.convert import experts as conversion
from hybrid.convert import quantize
from hybrid.convert.encode import EncodedExpert, LayerEncoder
from hybrid.convert.plan import Settings, parse_mix
from hybrid.errors import KimiError
from quant.aligned import empty
from quant.bench import random_matrix


def random_expert(layer: LayerEncoder, index: int, expert: Expert, formats: Formats) -> EncodedExpert:
    """In place of `encode_expert`."""
    rng = np.random.default_rng([layer.layer, index])
    parts = [random_matrix(name, *shape, rng) for name, shape in zip(formats, layer.shapes, strict=True)]
    blob = empty((layer.shapes.blob_bytes(formats),))
    blob[:] = 0
    blob[: sum(map(len, parts))] = np.concatenate(parts)
    return EncodedExpert(blob, (1.0, 1.0), (1.0, 1.0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mix", type=parse_mix, default=parse_mix("trellis2"))
    parser.add_argument("--resident", choices=("bf16", "int8", "int4"), default="int4")
    options = parser.parse_args(arguments)
    conversion.encode_expert = random_expert  # the one step that takes hours
    try:
        print(quantize(options.source, options.target, Settings(mix=options.mix, resident=options.resident)))
    except KimiError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
