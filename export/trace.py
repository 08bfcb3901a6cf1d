"""The step's graphs, each as one pure tensor program: the networks, and the input gradient inside them.

    unguided   x, conditioning                      -> D
    guided     x, conditioning, readout             -> D, activation, drive, grad_a
    measure    x0, readout                          -> activation, drive
    gradient   x0, readout                          -> activation, drive, d drive / d x0
    pullback   x, conditioning, v                   -> (dD/dx)' v

conditioning = from_x, from_output, input_scale [batch], time_embedding [batch, channels]: what the noise level decides, float64
on the host (engine/runtime/conditioning.py) and cast at the edge, so no graph needs float64. readout: six tensors, an input, so
that one graph serves every feature of a hook. Order of inputs and outputs: engine/runtime/exported.py. The batch is symbolic;
weights are lifted to buffers.

A coarse graph is for engines that run operator after operator, such as ONNX Runtime: a norm is one, silu and gelu are as few as
their gradients can share, and a layer's product is one over the rows of all samples, whose bits must not depend on where they
stand (tests/export/test_exported_bundle.py). In the other graphs, which a compiler takes apart, a norm is its parts, silu and
gelu are the reference's, and every sample has a product of its own. What either says twice is taken out (simplify.py).

Refused: a backward operator left in the graph, a constant taken from the example. Knows torch; knows no file format.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.graph import CodeGen
from torch.fx.graph_module import GraphModule
from torch.fx.node import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltscope.engine.batch_invariant import whole_operators
from tiltscope.engine.errors import ExportError
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.readout import Readout, read
from tiltscope.engine.prior.network import NetworkDenoiser
from tiltscope.engine.runtime.conditioning import CONDITIONING
from tiltscope.engine.runtime.function_parts import FunctionDenoiser, FunctionTrunk
from tiltscope.export.decompositions import table
from tiltscope.export.plain import plain_functions
from tiltscope.export.simplify import simplify


class _Given(nn.Module):
    """Stands where a network computes its time embedding, and hands out the one that was given."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, timesteps: Tensor) -> Tensor:
        if self.value is None:
            raise ExportError("the network asked for a time embedding before one was given")
        return self.value


class StepNetworks(nn.Module):
    """The two networks of a step, and its graphs as methods of their names. Parameters take no gradient."""

    def __init__(self, denoiser: NetworkDenoiser, trunk: Trunk) -> None:
        super().__init__()
        self.network: Any = copy.deepcopy(denoiser.network)
        if not hasattr(self.network, "time_proj"):
            raise ExportError(
                f"{type(self.network).__name__}: its time embedding has no place of its own (time_proj), which an export needs"
            )
        self.given = _Given()
        self.network.time_proj = self.given
        self.fold = denoiser.pixel_unshuffle
        self.trunk = copy.deepcopy(trunk)
        # What a user's own function closes over is no parameter of anything: the trace may hold it as it is.
        self.closed_over = isinstance(denoiser, FunctionDenoiser) or isinstance(trunk, FunctionTrunk)
        self.eval().requires_grad_(False)

    def denoise(
        self, x: Tensor, from_x: Tensor, from_output: Tensor, time_embedding: Tensor, input_scale: Tensor
    ) -> Tensor:
        self.given.value = time_embedding
        scaled = input_scale[:, None, None, None] * x
        folded = F.pixel_unshuffle(scaled, self.fold) if self.fold > 1 else scaled
        output = self.network(folded, from_x, return_dict=False)[0]
        output = F.pixel_shuffle(output, self.fold) if self.fold > 1 else output
        # Beside the prediction a network may tell its variance, which no step graph reads.
        output = output[:, : x.shape[1]]
        return from_x[:, None, None, None] * x + from_output[:, None, None, None] * output

    def unguided(self, x: Tensor, *conditioning: Tensor) -> tuple[Tensor]:
        return (self.denoise(x, *conditioning),)

    def guided(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0_hat = self.denoise(x, *rest[: len(CONDITIONING)])
            activation, drive = read(self.trunk(x0_hat), Readout(*rest[len(CONDITIONING) :]))
            (grad_a,) = torch.autograd.grad(drive.sum(), x)
        return x0_hat.detach(), activation.detach(), drive.detach(), grad_a

    def measure(self, x0: Tensor, *readout: Tensor) -> tuple[Tensor, ...]:
        return read(self.trunk(x0), Readout(*readout))

    def gradient(self, x0: Tensor, *readout: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            activation, drive = read(self.trunk(x0), Readout(*readout))
            (grad_a,) = torch.autograd.grad(drive.sum(), x0)
        return activation.detach(), drive.detach(), grad_a

    def pullback(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0_hat = self.denoise(x, *rest[:-1])
            return torch.autograd.grad(x0_hat, x, rest[-1])


class StepGraph(nn.Module):
    """One traced graph with its weights as buffers: callable, and what an exporter writes out."""

    def __init__(self, graph: GraphModule, weights: dict[str, Tensor], constants: dict[str, Tensor]) -> None:
        """constants: what a user's function closes over, the last inputs of a graph that then takes all of them in a row."""
        super().__init__()
        self.graph = graph
        self.names = {name: name.replace(".", "_") for name in weights}
        self.constants = tuple(constants)
        for name, tensor in weights.items():
            self.register_buffer(self.names[name], tensor.detach())
        for name, tensor in constants.items():
            self.register_buffer(name, tensor.detach())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        held = {name: getattr(self, held) for name, held in self.names.items()}
        if not self.constants:
            return self.graph(held, *inputs)
        return tuple(self.graph(*held.values(), *inputs, *(getattr(self, name) for name in self.constants)))


def trace(networks: StepNetworks, graph: str, example: Sequence[Tensor], *, coarse: bool = False) -> StepGraph:
    """The graph named `graph` for any batch. example: its inputs at some batch of at least 2. coarse: see above.

    Raises ExportError where a backward operator is left or something of the example became a constant.
    """
    weights = dict(networks.named_parameters()) | dict(networks.named_buffers())
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def with_symbolic_batch(at: int, tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (tensor.dim() - 1)
        context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * tensor.dim())
        return fake.from_tensor(tensor, source=ConstantSource(f"input_{at}"), symbolic_context=context)

    inputs = [with_symbolic_batch(at, tensor) for at, tensor in enumerate(example)]
    held = {name: fake.from_tensor(tensor.detach(), static_shapes=True) for name, tensor in weights.items()}
    run: Callable[..., Any] = getattr(networks, graph)

    def program(state: dict[str, Tensor], *values: Tensor) -> Any:
        return torch.func.functional_call(
            _Calling(networks, run), {f"networks.{k}": v for k, v in state.items()}, values
        )

    # MATH is not a choice: with a fused attention kernel the forward decomposes, its backward does not.
    operators = whole_operators() if coarse else nullcontext()
    make = make_fx(
        program, tracing_mode="symbolic", decomposition_table=table(coarse=coarse), _allow_non_fake_inputs=True
    )
    with sdpa_kernel(SDPBackend.MATH), plain_functions(), operators:
        traced = make(held, *inputs)
    networks.given.value = None  # no fake tensor may outlive the trace
    simplify(traced)
    _check(traced, graph, closed_over=networks.closed_over)
    return StepGraph(traced, weights, _lift_constants(traced) if networks.closed_over else {}).eval()


def _lift_constants(traced: GraphModule) -> dict[str, Tensor]:
    """Tensors that the trace holds become inputs, behind the others and all in a row; {} where there are none. Changes `traced`.

    As an attribute of a graph inside another module torch's exporter loses them.
    """
    taken = [node for node in traced.graph.nodes if node.op == "get_attr"]
    if not taken:
        return {}
    traced.graph.set_codegen(CodeGen())  # no nesting of inputs any more
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    constants: dict[str, Tensor] = {}
    inputs: dict[str, Node] = {}
    for node in taken:
        name = str(node.target)
        held = f"closed_over{name}"
        if held not in constants:
            constants[held] = getattr(traced, name)
            with traced.graph.inserting_after(last):
                last = inputs[held] = traced.graph.placeholder(held)
        node.replace_all_uses_with(inputs[held])
        traced.graph.erase_node(node)
    for name in {str(node.target) for node in taken}:
        delattr(traced, name)  # or it would be weights beside what it has become
    traced.recompile()
    return constants


class _Calling(nn.Module):
    def __init__(self, networks: StepNetworks, run: Callable[..., Any]) -> None:
        super().__init__()
        self.networks, self.run = networks, run

    def forward(self, *values: Tensor) -> Any:
        return self.run(*values)


def _check(traced: GraphModule, graph: str, *, closed_over: bool) -> None:
    left = sorted({str(node.target) for node in traced.graph.nodes if "backward" in str(node.target)})
    if left:
        raise ExportError(
            f"graph {graph}: {', '.join(left)} has no decomposition; its gradient would be wrong or missing"
        )
    baked = [str(node.target) for node in traced.graph.nodes if node.op == "get_attr"]
    if baked and not closed_over:
        raise ExportError(
            f"graph {graph}: {len(baked)} constants were taken from the example ({', '.join(baked[:3])}); "
            "something cached a tensor, or made one from values"
        )
