"""Every graph of a step is held to the stored outputs before its first use, once, and only those that are needed."""

from collections import Counter
from typing import ClassVar

import pytest
import torch

import tiltscope
from tiltscope.engine.errors import ParityError
from tiltscope.engine.runtime.gate import check_errors, graph_errors, record_self_test
from tiltscope.engine.runtime.held import GRAPHS, HeldStep
from tiltscope.engine.runtime.step import TorchStep

LEVEL = torch.tensor([0.3, 0.7], dtype=torch.float64)
NEEDED = {
    "guided": ("guided",),
    "unguided": ("unguided",),
    "measure": ("measure",),
    "gradient": ("gradient",),
    "linearise": ("unguided", "pullback"),
}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


@pytest.fixture(scope="module")
def feature(bundle):
    return bundle.feature("blocks.1:sae:3")


@pytest.fixture(scope="module")
def recorded(bundle, feature):
    return record_self_test(
        TorchStep(bundle.prior.to(torch.float64), feature.to(torch.float64)), bundle.shape, feature.readout
    )


class Spoilt(TorchStep):
    """The reference, but for `wrong`: a graph, all of whose outputs are a thousandth too large, or gradients turned round."""

    wrong = "nothing"
    calls: ClassVar[Counter[str]] = Counter()

    def spoil(self, graph, value):
        self.calls[graph] += 1
        turned = value.flip(-1) if graph in ("gradient", "pullback") and value.ndim > 1 else value * 1.001
        return turned if graph == self.wrong else value

    def unguided(self, x, sigma, alpha):
        return self.spoil("unguided", super().unguided(x, sigma, alpha))

    def guided(self, x, sigma, alpha, readout):
        out = super().guided(x, sigma, alpha, readout)
        return out._replace(x0_hat=self.spoil("guided", out.x0_hat))

    def measure(self, x0, readout):
        activation, drive = super().measure(x0, readout)
        return activation, self.spoil("measure", drive)

    def gradient(self, x0, readout):
        activation, drive, grad = super().gradient(x0, readout)
        return activation, drive, self.spoil("gradient", grad)

    def linearise(self, x, sigma):
        mean, pull = super().linearise(x, sigma)
        return mean, lambda v: self.spoil("pullback", pull(v))


@pytest.fixture
def make(bundle, feature, recorded):
    """A held step whose graph `wrong` is, what was judged in which order, and its calls."""

    def made(wrong="nothing"):
        kind = type("Spoilt", (Spoilt,), {"wrong": wrong, "calls": Counter()})
        judged = []

        def judge(graph, errors):
            judged.append(graph)
            check_errors(errors, torch.float32, "spoilt", graph)

        return HeldStep(kind(bundle.prior, feature), recorded, torch.float32, judge), judged, kind.calls

    return made


def use(step, method, feature):
    x = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
    alpha, readout = torch.sqrt(1 - LEVEL**2), feature.readout.expand(2)
    given = {
        "guided": (x, LEVEL, alpha, readout),
        "unguided": (x, LEVEL, alpha),
        "measure": (x, readout),
        "gradient": (x, readout),
        "linearise": (x, LEVEL),
    }
    found = getattr(step, method)(*given[method])
    return (found[0], found[1](x)) if method == "linearise" else found


@pytest.mark.parametrize("method", NEEDED)
def test_a_graph_is_held_before_its_first_use_once_and_no_other_is_touched(make, bundle, feature, method):
    step, judged, calls = make()
    found = use(step, method, feature)
    assert tuple(judged) == NEEDED[method]
    once = calls.copy()
    use(step, method, feature)
    assert tuple(judged) == NEEDED[method]
    assert sum(calls.values()) - sum(once.values()) < sum(once.values())  # the second time nothing was compared
    expected = use(TorchStep(bundle.prior, feature), method, feature)
    found, expected = ((each,) if isinstance(each, torch.Tensor) else each for each in (found, expected))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("graph", "output"), list(zip(GRAPHS, ("x0_hat", "x0_hat", "drive", "turn", "turn"), strict=True))
)
def test_a_wrong_graph_is_refused_by_name_whenever_it_is_asked_for_and_the_others_serve(make, feature, graph, output):
    step, judged, _ = make(graph)
    for method, needed in NEEDED.items():
        if graph in needed:
            for _ in range(2):
                with pytest.raises(
                    ParityError, match=rf"runner spoilt: graph {graph}: .*{output} .*use --runner torch"
                ):
                    use(step, method, feature)
        else:
            use(step, method, feature)
    assert judged.count(graph) == 2 * sum(graph in needed for needed in NEEDED.values())


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float64, 0, 1e-12), (torch.float32, 1e-8, 1e-5)], ids=str)
def test_the_reference_is_its_own_in_every_graph_to_the_rounding_of_its_dtype(
    bundle, feature, recorded, graph, dtype, least, most
):
    errors = graph_errors(TorchStep(bundle.prior.to(dtype), feature.to(dtype)), graph, recorded, dtype)
    assert least <= max(errors.values()) < most
