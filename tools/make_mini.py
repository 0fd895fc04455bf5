"""The mini model: Kimi K2.5 with its widths and 5 of its layers, to time a whole model where 555 GB do not fit.

`python tools/make_mini.py DIR` writes 1 dense and 4 MoE layers of 128 experts each (of K2.5's 60 of 384), the shapes of
a layer, of attention and of a token's work in it unchanged, and a vocabulary of 20,480: 15 GB of random weights in the
released format. `--experts 72` is 10 GB. For tools/bench_decode.py; options and weights are those of make_layer.py.
"""

import sys

from make_layer import main

SIZES = {"layers": 4, "dense": 1, "experts": 128}

if __name__ == "__main__":
    sys.exit(main(description=__doc__, **SIZES))
