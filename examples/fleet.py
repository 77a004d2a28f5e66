"""Predictions by a fleet of workers that Ray starts, here or on a cluster, all on one job folder.

    python examples/fleet.py model.py:build results slides/*.svs --weights model.pt --memory 8GiB --workers 4

Ray finds the machines, keeps the workers running and starts one again that died. Who does which image is settled
in the folder of results, which all machines must have in common: the same as if they were started by hand, with
`fxstream predict`. `ray start` makes a cluster of several machines; `--address auto` joins it.
"""

import argparse
import sys

import ray

import fxstream


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Worker:
    """A process that works at the job until nothing is left to do."""

    def predict(self, target: str, images: list[str], out: str, **options: object) -> fxstream.Predictions:
        return fxstream.predict(target, images, out, say=lambda line: print(line, flush=True), **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="the network, as for fxstream predict")
    parser.add_argument("out", help="the folder of results")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--weights")
    parser.add_argument("--memory", default="4GiB", help="what a tile of one worker may take")
    parser.add_argument("--normalise")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of one worker; without them it has one core")
    parser.add_argument("--address", help="of a cluster that runs: auto; without it one is started here")
    arguments = parser.parse_args()
    ray.init(address=arguments.address, include_dashboard=False)
    options = {"weights": arguments.weights, "memory": arguments.memory, "normalise": arguments.normalise}
    options["device"] = "cuda" if arguments.gpus else "cpu"
    kind = Worker.options(num_cpus=1, num_gpus=arguments.gpus)
    workers = [kind.remote() for _ in range(arguments.workers)]
    calls = [
        worker.predict.remote(arguments.target, arguments.images, arguments.out, **options) for worker in workers
    ]
    outcome = ray.get(calls)[0]
    print(outcome)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
