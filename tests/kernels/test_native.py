"""The guided step through C++ is the definition bit for bit, and says what is missing where it cannot be."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import guided_case

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.sampler.noise import STREAM_START, STREAM_STEP
from tiltscope.kernels import dispatch, native, philox, reference

SIZES = [(1,), (3,), (17,), (1023,), (3, 37, 5), (3, 64, 64), (4097,)]


def same(got, expected):
    return all(
        torch.equal(mine.nan_to_num(7e7), theirs.nan_to_num(7e7)) for mine, theirs in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_is_the_definitions_bit_for_bit(shape, dtype):
    for batch in (1, 9):
        case = guided_case(batch, shape).to(dtype)
        with dispatch.count_calls() as calls:
            got = dispatch.guided_step(case, implementation="native")
        assert same(got, reference.guided_step(case))
        assert dict(calls) == {("guided_step", "native"): 1}
        bare = case._replace(grad_a=None)
        assert same(dispatch.guided_step(bare, implementation="native"), reference.guided_step(bare))


@pytest.mark.parametrize("network", [torch.bfloat16, torch.float16])
def test_what_networks_return_in_16_bits_is_widened_first(network):
    case = guided_case(4, (3, 6, 5)).network_in(network)
    assert same(dispatch.guided_step(case, implementation="native"), reference.guided_step(case))


def test_pictures_that_do_not_lie_in_a_row_are_read_as_they_are_meant_and_come_back_as_x_lies():
    """A gradient that does not goes through the definition itself, and is counted as that: its order decides its sum's bits."""
    last = guided_case(4, (3, 6, 5)).pictures(lambda t: t.contiguous(memory_format=torch.channels_last))
    for case, ran in ((last._replace(grad_a=last.grad_a.contiguous()), "native"), (last, "reference")):
        with dispatch.count_calls() as calls:
            got = dispatch.guided_step(case, implementation="native")
        assert same(got, reference.guided_step(case))
        assert got.x.stride() == case.x.stride()
        assert dict(calls) == {("guided_step", ran): 1}


@pytest.mark.parametrize(("name", "place"), [("x0_hat", 29), ("grad_a", 0), ("history", 7)])
def test_a_slot_that_fails_keeps_its_state_as_the_definition_says(name, place):
    case = guided_case(3, (3, 2, 5))
    getattr(case, name)[0].view(-1)[place] = torch.inf
    got = dispatch.guided_step(case, implementation="native")
    assert same(got, reference.guided_step(case))
    assert got.ok.tolist() == [False, True, True]
    assert torch.equal(got.x[0], case.x[0])


def test_several_threads_of_torch_change_no_bit(root):
    code = """
import sys, torch
sys.path.append("tools")
from kernel_cases import guided_case
from tiltscope.kernels import native, reference
torch.set_num_threads(3)
case = guided_case(5, (3, 70, 64))
assert all(torch.equal(*each) for each in zip(native.guided_step(case), reference.guided_step(case)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_the_definitions_bit_for_bit(shape, dtype):
    case = guided_case(5, shape)
    for stream in (STREAM_START, STREAM_STEP):
        words = {"stream": stream, "shape": shape, "dtype": dtype}
        got = dispatch.normal_of("native")(case.key, case.index, case.row, case.particle, **words)
        assert torch.equal(got, philox.normal(case.key, case.index, case.row, case.particle, **words))


def test_calls_in_turn_and_on_several_threads_do_not_write_into_each_others_results():
    cases = [guided_case(2, (3, 64, 64)), guided_case(2, (3, 64, 64))._replace(key=torch.tensor([[3, 4], [5, 6]]))]
    with torch.inference_mode():
        native.guided_step(cases[0])
    wanted = [reference.guided_step(case) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(native.guided_step, cases * 20))
    for at, got in enumerate([*found, *(native.guided_step(case) for case in cases)]):
        assert same(got, wanted[at % 2])


@pytest.fixture
def fresh():
    for each in (native.library, native.require_native):
        each.cache_clear()
    yield
    for each in (native.library, native.require_native):
        each.cache_clear()


def test_without_a_compiler_it_is_refused_with_what_to_do(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        RunnerError, match=r"need a C\+\+ compiler: install g\+\+ or clang\+\+, or use kernels 'reference'"
    ):
        dispatch.guided_step(guided_case(1, (4,)), implementation="native")


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path))
    with pytest.raises(RunnerError, match=r"false failed .*set CXX to a compiler that works"):
        native.require_native()


def test_a_folder_that_others_may_write_into_is_refused(fresh, monkeypatch, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "native").chmod(0o777)
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path))
    with pytest.raises(RunnerError, match="can be written by others"):
        native.require_native()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0xD2511F53u", "0xD2511F51u"),
        ("+ c * z) + d", "+ c * z * T(1.0000002)) + d"),
        ("z_delta[i] = z * delta", "z_delta[i] = z"),
    ],
)
def test_a_library_that_is_not_the_definition_is_refused_when_it_is_loaded(fresh, monkeypatch, tmp_path, right, wrong):
    source = tmp_path / "native.cpp"
    text = native.SOURCE.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path))
    with pytest.raises(RunnerError, match=r"differs from the definition's in torch.float32"):
        native.require_native()
    assert [each.suffix for each in (tmp_path / "native").iterdir()] == [".so"]
