"""A Ray cluster of this machine in a process of its own, for tests that take nodes from it.

    ray_nodes.py NODES

Prints the address, then obeys stdin: "remove" kills the node of the most recent start, the end of the input all.
"""

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TMPDIR"] = "/tmp"  # the name of a socket has at most 107 bytes

from ray.cluster_utils import Cluster

MEMORY = 100 * 2**20  # of an object store that nothing uses

if __name__ == "__main__":
    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=MEMORY)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(int(sys.argv[1]))]
    print(cluster.address, flush=True)
    for _line in sys.stdin:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    cluster.shutdown()
