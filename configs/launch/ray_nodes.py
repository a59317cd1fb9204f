"""One process on every node of a Ray cluster (needs ray, which jaxinfer does not install).

Command: python configs/launch/ray_nodes.py eval --task perplexity --data text.txt --out scores.jsonl --model MODEL
         --mesh data=4,model=8
Expect:  what the first node prints. When a node dies the others end within a minute, and the same line goes on.
"""

import subprocess
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PORT = 8476  # of the first node, for the others to find it


@ray.remote(num_cpus=1, max_retries=0)
def run(command: list[str]) -> int:
    """Run a command on a node and return its exit status."""
    return subprocess.call(command)


def main() -> None:
    """Run the command line's command on all nodes, with all their accelerators."""
    ray.init()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    address = f"{nodes[0]['NodeManagerAddress']}:{PORT}"
    tasks = []
    for i, node in enumerate(nodes):
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        resources = {"TPU": node["Resources"]["TPU"]} if "TPU" in node["Resources"] else {}
        options = dict(scheduling_strategy=place, resources=resources, num_gpus=node["Resources"].get("GPU", 0))
        own = ["--distributed", f"{address},{len(nodes)},{i}"]
        tasks.append(run.options(**options).remote(["jaxinfer", *sys.argv[1:], *own]))
    sys.exit(max(ray.get(tasks)))


if __name__ == "__main__":
    main()
