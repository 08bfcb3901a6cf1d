"""The ops' edges: what they refuse and how they say it, what they count, and that tracers see through them."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import guided_case

import tiltscope
from tiltscope.kernels import dispatch, implementation, reference
from tiltscope.kernels.reference import StepInputs

CASE = guided_case(4, (3, 6, 5))


def strided(t):
    return torch.stack([t, t], -1)[..., 0]


REFUSED = [
    ("x", lambda t: t.half(), "torch.float16"),
    ("x", lambda t: t[:, :0], "at least one element"),
    ("x0_hat", lambda t: t[:, :2], "[4, 3, 6, 5]"),
    ("x0_hat", lambda t: t.double(), "torch.float64"),
    ("grad_a", lambda t: t.bfloat16(), "torch.bfloat16"),
    ("history", lambda t: t[:3], "[3, 3, 6, 5]"),
    ("history", lambda t: t.to("meta"), "a tensor on meta"),
    ("table", lambda t: t[0], "[plan, row, 11]"),
    ("table", lambda t: t[..., :10], "11]"),
    ("table", lambda t: t.double(), "torch.float64"),
    ("num_rows", lambda t: t[:2], "[3]"),
    ("num_rows", lambda t: t + 1, "1 to 7"),
    ("num_rows", lambda t: t * 0, "1 to 7"),
    ("plan", lambda t: t.int(), "torch.int64"),
    ("plan", lambda t: t + 3, "0 to 2"),
    ("plan", lambda t: t - 1, "0 to 2"),
    ("row", lambda t: t + 9, "a slot that has done its plan"),
    ("row", lambda t: t - 9, "a slot that has done its plan"),
    ("ok", lambda t: t.int(), "torch.bool"),
    ("drive", lambda t: t[:2], "[4]"),
    ("strength", lambda t: t.double(), "torch.float64"),
    ("guided", lambda t: t.float(), "torch.bool"),
    ("key", lambda t: t[:, :1], "[4, 2]"),
    ("index", lambda t: t.int(), "torch.int32"),
    ("particle", lambda t: t[None], "[1, 4]"),
]


@pytest.mark.parametrize(("name", "change", "says"), REFUSED)
@pytest.mark.parametrize("asked", ["reference", "native"])
def test_a_wrong_argument_is_a_config_error_that_names_it(asked, name, change, says):
    case = CASE._replace(**{name: change(getattr(CASE, name))})
    with pytest.raises(tiltscope.errors.ConfigError) as refused:
        dispatch.guided_step(case, implementation=asked)
    assert str(refused.value).startswith(f"{name}: got ")
    assert says in str(refused.value)


@pytest.mark.parametrize("grad_a", [None, CASE.grad_a.contiguous(memory_format=torch.channels_last)])
@pytest.mark.parametrize(("name", "by"), [("row", -9), ("row", 9), ("plan", -1), ("plan", 3), ("num_rows", 1)])
def test_places_that_are_not_there_are_refused_by_native_without_a_gradient_and_with_one_that_it_leaves(
    grad_a, name, by
):
    case = CASE._replace(grad_a=grad_a, **{name: getattr(CASE, name) + by})
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^{name}: got "):
        dispatch.guided_step(case, implementation="native")


def test_a_slot_that_has_done_its_plan_is_not_past_it():
    done = dispatch.guided_step(CASE._replace(row=CASE.num_rows[CASE.plan]))
    assert torch.equal(done.x, CASE.x)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("x0_hat", strided, "call .contiguous()"),
        ("grad_a", lambda t: t.contiguous(memory_format=torch.channels_last), "all four tensors alike"),
        ("x", lambda t: t.double(), "float64"),
        ("ticket", None, "torch.int64"),
    ],
)
def test_what_only_the_kernel_cannot_take_is_named_too(monkeypatch, name, change, says):
    monkeypatch.setattr(dispatch, "require_implementation", lambda *_: None)
    ticket = torch.zeros(4, dtype=torch.int64) if name == "ticket" else None
    case = CASE
    if name == "x":
        case = CASE.to(torch.float64)
    elif change is not None:
        case = CASE._replace(**{name: change(getattr(CASE, name))})
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^{name}: got .*") as refused:
        dispatch.guided_step(case, ticket=ticket, implementation="triton")
    assert says in str(refused.value)


def test_an_implementation_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(tiltscope.errors.ConfigError, match="'cuda', allowed are reference, native, compiled, triton"):
        dispatch.guided_step(CASE, implementation="cuda")  # type: ignore[arg-type]


def test_triton_without_a_device_is_refused_and_never_becomes_the_reference():
    with dispatch.count_calls() as calls, pytest.raises(tiltscope.errors.RunnerError, match="run on a CUDA device"):
        dispatch.guided_step(CASE, implementation="triton")
    assert not calls


def test_triton_that_is_not_installed_is_refused_with_the_extra_to_install(monkeypatch):
    find = implementation.importlib.util.find_spec
    monkeypatch.setattr(
        implementation.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    with pytest.raises(tiltscope.errors.RunnerError, match=r"pip install 'tiltscope\[triton\]'"):
        dispatch.guided_step(CASE, implementation="triton")


def test_compiled_without_a_compiler_is_refused(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler.__new__(
            InvalidCxxCompiler
        )  # its own __init__ reads settings that a test may have hidden

    implementation.require_compiler.cache_clear()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(tiltscope.errors.RunnerError, match="need a C\\+\\+ compiler"):
        dispatch.guided_step(CASE, implementation="compiled")


COMPILED = """
import sys, torch
sys.path.append("tools")
from kernel_cases import check_guided_step, guided_case
from tiltscope.kernels import dispatch

case = guided_case(7, (3, 6, 7))
with dispatch.count_calls() as calls:
    together = dispatch.guided_step(case, implementation="compiled")
assert dict(calls) == {("guided_step", "compiled"): 1}
check_guided_step(together, case)
alone = dispatch.guided_step(case.slots(torch.tensor([4])), implementation="compiled")
assert all(torch.equal(mine[0], theirs[4]) for mine, theirs in zip(alone, together, strict=True))
check_guided_step(dispatch.guided_step(case._replace(grad_a=None), implementation="compiled"), case._replace(grad_a=None))
"""


@pytest.mark.slow
def test_compiled_is_the_definition_and_a_sample_alone_is_the_sample_in_company_bit_for_bit(root):
    # In a process whose functions carry no shape checks: torch.compile cannot trace those.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=root)


def test_the_reference_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from tiltscope.kernels import dispatch, reference, philox"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_calls_are_counted_where_they_are_asked_for_and_nested():
    with dispatch.count_calls() as outer:
        dispatch.guided_step(CASE)
        with dispatch.count_calls() as inner:
            dispatch.resample(torch.zeros(2, 4), torch.full((2,), 0.5))
    dispatch.guided_step(CASE)
    assert dict(inner) == {("resample", "reference"): 1}
    assert dict(outer) == {("guided_step", "reference"): 1, ("resample", "reference"): 1}


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_guided_step_is_a_well_formed_op(layout):
    change = {
        "contiguous": lambda t: t,
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "strided": strided,
    }[layout]
    torch.library.opcheck(torch.ops.tiltscope.guided_step, (*CASE.pictures(change), None, "reference"))


@pytest.mark.parametrize("asked", ["reference", "native"])
def test_it_is_one_without_a_gradient_too(asked):
    torch.library.opcheck(torch.ops.tiltscope.guided_step, (*CASE._replace(grad_a=None), None, asked))


def test_resample_is_a_well_formed_op():
    generator = torch.Generator().manual_seed(0)
    args = torch.randn(3, 8, generator=generator), torch.rand(3, generator=generator), 0.5, "reference"
    torch.library.opcheck(torch.ops.tiltscope.resample, args)


def test_the_op_is_the_definition_bit_for_bit():
    for case in (CASE, CASE.to(torch.float64), CASE.network_in(torch.bfloat16)):
        got, expected = dispatch.guided_step(case), reference.guided_step(case)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_compile_traces_through_an_op_as_one_node_and_counts_what_runs():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda *fields: dispatch.guided_step(StepInputs(*fields)).x * 2, fullgraph=True, backend=keep)
    with dispatch.count_calls() as calls:
        got = step(*CASE)
    assert torch.equal(got, dispatch.guided_step(CASE).x * 2)
    assert [str(node.target) for node in graphs[0].graph.nodes].count("tiltscope.guided_step") == 1
    assert dict(calls) == {("guided_step", "reference"): 1}
