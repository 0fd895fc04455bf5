"""A Ray cluster of two nodes on this machine: prints its address, and ends when standard input does."""

import logging
import sys

from ray.cluster_utils import Cluster

STORE = 100 << 20  # bytes; Ray's own choice is a third of the memory


def main() -> None:
    node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        del node["include_dashboard"]
        cluster.add_node(**node)
        print(cluster.address, flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
