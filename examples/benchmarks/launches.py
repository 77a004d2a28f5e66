"""What a training step asks of the device: calls of operators, and the bytes that these read and write.

ResNet-50 with batch statistics, in shares of the plain network's memory, beside the plain network: what a GPU
needs launches and bandwidth for, counted on any machine. Tensors are fake: they have a size and no memory. Calls
are those that reach the device's kernels, in forward and backward; views and what has no tensor are not among
them. With `--profile` tensors are real, and calls are also those that torch.profiler sees, with their time.

    python examples/benchmarks/launches.py --planned-for cuda --channels-last  # at 4096 pixels: two minutes
    python examples/benchmarks/launches.py --size 640 --real --profile         # real tensors
"""

import argparse
import collections
import contextlib
import functools
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxstream
from fxstream.io.inputs import inputs_of
from fxstream.machine import speeds
from fxstream.tools.model_spec import load

PASSED = {"prim::device", "aten::detach", "aten::promote_types", "aten::empty", "aten::empty_like"}
"""Calls that launch nothing."""
FILLS = {"aten::copy_", "aten::zeros_like", "aten::ones_like", "aten::zero_", "aten::fill_", "aten::new_zeros"}
"""Calls that write their first tensor, or one like it, and do not read it."""


class Calls(TorchDispatchMode):
    """Counts calls of operators, and the bytes of their tensors, by operator."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        read = args[1:] if name in FILLS else args
        tensors = [t for t in pytree.tree_leaves((read, kwargs, result)) if isinstance(t, torch.Tensor)]
        if tensors and not func.is_view and name not in PASSED:
            self.calls[str(func)] += 1
            self.bytes[str(func)] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


class Workload:
    """A network and an image; on fake tensors where they are not `real`."""

    def __init__(self, options):
        torch.manual_seed(0)
        self.model, shape = load(options.network, weights=True).train(), (1, 3, options.size, options.size)
        self.image = torch.randn(shape) if options.real else torch.zeros(1).expand(shape)
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        if options.real:
            self.model = self.model.to(memory_format=self.layout)
            self.image = self.image.to(memory_format=self.layout)
        self.fakes = FakeTensorMode() if not options.real else contextlib.nullcontext()

    def plain(self):
        """The plain network as a function of nothing, with its result."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        tensors = {name: self._as_run(tensor) for name, tensor in tensors.items()}
        return functools.partial(torch.func.functional_call, self.model, tensors, self._as_run(self.image))

    def streamed(self, memory):
        """The same within a memory, and its plan. It is planned with real tensors, and not run."""
        module = fxstream.compile(self.model, memory=memory, verify=False)
        ready = fxstream.inspect(module).ready(inputs_of(self.model, (self.image,), {}))
        prepared = ready.prepared
        tensors = [self._as_run(tensor) for tensor in prepared.analysis.captured.arguments(ready.values)]
        return lambda: prepared.streamed(*tensors)[0], prepared.plan

    def _as_run(self, tensor):
        if isinstance(self.fakes, FakeTensorMode):
            fake = self.fakes.from_tensor(tensor.detach()).contiguous()
            fake = fake.to(memory_format=self.layout) if fake.ndim == 4 else fake
            return fake.requires_grad_(tensor.requires_grad)
        return tensor

    def calls(self, function):
        """The calls of a step of such a function."""
        with self.fakes:
            function().sum().backward()
            with Calls() as calls:
                function().sum().backward()
        return calls


def profiled(function):
    """How many operators torch.profiler sees in a step, and the seconds of one without the profiler."""
    start = time.perf_counter()
    function().sum().backward()
    seconds = time.perf_counter() - start
    with torch.profiler.profile() as profile:
        function().sum().backward()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")), seconds


def rows(options):
    """The table's rows: plain, and within each share of its memory."""
    workload = Workload(options)
    peak = fxstream.plan(workload.model, options.size, memory=2**50).prediction.plain_bytes
    plain = workload.plain()
    first = workload.calls(plain), profiled(plain) if options.profile else (1, 1.0)
    yield "plain", None, first, first
    for share in options.shares:
        function, plan = workload.streamed(int(share * peak))
        row = workload.calls(function), profiled(function) if options.profile else (1, 1.0)
        yield f"{share:.0%}", plan, row, first


def table_of(options):
    """The rows as a table; the largest operators below it."""
    columns = ["memory", "segments", "tiles", "calls", "over plain", "GB", "over plain"]
    columns += ["seen", "seconds", "predicted"] if options.profile else ["predicted"]
    table, listed = Table(*columns), {}
    for name, plan, (calls, (seen, seconds)), (plain, (seen_plain, plain_seconds)) in rows(options):
        count, size = calls.calls.total(), calls.bytes.total()
        ratios = f"{count / plain.calls.total():.2f}x", f"{size / plain.bytes.total():.2f}x"
        tiles = (str(len(plan.segments)), str(sum(s.tile_count for s in plan.segments))) if plan else ("", "")
        predicted = f"{plan.prediction.time_ratio:.2f}x" if plan else ""
        cells = [name, *tiles, str(count), ratios[0], f"{size / 1e9:.1f}", ratios[1]]
        if options.profile:
            cells += [f"{seen / seen_plain:.2f}x", f"{seconds / plain_seconds:.2f}x"]
        table.add_row(*cells, predicted)
        listed[name] = calls
    return table, listed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="torchvision/resnet50")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4, 0.25])
    parser.add_argument("--real", action="store_true", help="real tensors, which need the memory that they have")
    parser.add_argument("--profile", action="store_true", help="also by torch.profiler; needs --real")
    parser.add_argument("--channels-last", action="store_true", help="the memory format of GPUs")
    parser.add_argument("--planned-for", choices=speeds.ACCELERATORS, help="with the speeds of another device")
    parser.add_argument("--most", type=int, default=0, help="also the operators of the most bytes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.planned_for:
        speeds.Machine.of = staticmethod(lambda device, is_shared=False: speeds.ACCELERATORS[options.planned_for])
    table, listed = table_of(options)
    console = Console(width=110)
    console.print(table)
    for name, calls in listed.items() if options.most else ():
        most = ", ".join(f"{key} {size / 1e9:.1f} GB" for key, size in calls.bytes.most_common(options.most))
        console.print(f"{name}: {most}")
    kind = "real" if options.real else "fake"
    planned = f", planned for {options.planned_for}" if options.planned_for else ""
    console.print(f"{options.network} at {options.size}, {kind} tensors{planned}")


if __name__ == "__main__":
    main()
