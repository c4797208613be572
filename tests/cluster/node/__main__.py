"""python -m tests.cluster.node build | up | load IMAGE... | restart-kubelet | env | down"""

import argparse
import subprocess
import sys

from tests.cluster.node import node, pins
from tests.cluster.node.build import build
from tests.cluster.node.system import NodeError, say


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.node", description="A Kubernetes node for tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build every binary into the cache")
    commands.add_parser("up", help="start the node, or say that it is up")
    load = commands.add_parser("load", help="move images from buildah's storage into the node")
    load.add_argument("images", nargs="+", metavar="IMAGE")
    commands.add_parser("restart-kubelet", help="end the kubelet and start it again")
    commands.add_parser("down", help="remove the node and all it left on this machine")
    commands.add_parser("env", help="print what a shell needs to use the node")
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "build":
                print(build())
            case "up":
                node.up()
                print(f"export KUBECONFIG={pins.KUBECONFIG}")
                print(f"export INGRESS_ADDRESS={pins.INGRESS_ADDRESS}")
            case "load":
                node.load(arguments.images)
            case "restart-kubelet":
                node.restart_kubelet()
            case "down":
                node.down()
            case "env":
                print(node.environment())
    except (NodeError, subprocess.SubprocessError) as error:
        say(f"{arguments.command}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
