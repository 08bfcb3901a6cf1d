"""A bundle is what its description says: every wrong file, name and path has its own refusal; the rest is as stored."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.bundle import embedded_bundles, load
from tiltscope.engine.config import ExplainConfig, SampleConfig
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.explain import inquire
from tiltscope.engine.prepare import prepare
from tiltscope.engine.sampler.plan import GraphKind

FEATURE = "blocks.1:sae:3"


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return load(tiny_bundle)


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    """A bundle to damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def describe(folder, change):
    """Edit bundle.json in place."""
    meta = json.loads((folder / "bundle.json").read_text())
    change(meta)
    (folder / "bundle.json").write_text(json.dumps(meta))
    return folder


def test_it_says_what_it_is(bundle, tiny_bundle):
    assert bundle.name == "tiny"
    assert bundle.path == tiny_bundle
    assert bundle.identity == "sha256:" + hashlib.sha256((tiny_bundle / "bundle.json").read_bytes()).hexdigest()
    assert bundle.verify() == len(bundle.meta["files"])
    assert bundle.prior is bundle.prior
    assert bundle.prior.pool is bundle.pool


def test_a_path_is_as_good_as_its_text(tiny_bundle):
    assert load(str(tiny_bundle)).identity == load(tiny_bundle).identity


@pytest.mark.parametrize("name", ["nonesuch", "", "org/model", "./nowhere", "x" * 5000, "a\0b", 3, None, b"tiny"])
def test_an_unknown_bundle_names_those_there_are(name):
    with pytest.raises(ConfigError, match="bundle") as caught:
        load(name)
    if isinstance(name, str):
        assert "bundle.json" in str(caught.value)
        for embedded in embedded_bundles():
            assert embedded in str(caught.value)


def test_a_hub_id_is_refused_as_what_it_is():
    with pytest.raises(ConfigError, match="hub"):
        load("org/model")


def test_opening_reads_nothing_but_the_description(copy):
    for path in copy.rglob("*"):
        if path.is_file() and path.name != "bundle.json":
            path.write_bytes(b"")
    assert load(copy).name == "tiny"


# file -> what first reads it
READERS = {
    "prior/diffusion_pytorch_model.safetensors": lambda b: b.prior,
    "prior/config.json": lambda b: b.prior,
    "prior/scheduler_config.json": lambda b: b.prior,
    "trunk/model.safetensors": lambda b: b.feature(FEATURE),
    "trunk/config.json": lambda b: b.feature(FEATURE),
    "trunk/preprocessor_config.json": lambda b: b.feature(FEATURE),
    "sae/sae.safetensors": lambda b: b.feature(FEATURE),
    "sae/features.parquet": lambda b: b.features(),
    "evaluator/model.safetensors": lambda b: b.evaluator(),
    "pool/pool.parquet": lambda b: b.pool.names,
    "pool/activations.parquet": lambda b: b.pool.activations(b.feature(FEATURE)),
    "pool/statistics.safetensors": lambda b: b.pool.statistics("blocks.1"),
    "pool/embeddings.safetensors": lambda b: b.pool.embeddings(),
    "README.md": lambda b: b.verify(),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_a_damaged_file_is_named_when_it_is_first_read(copy, name, damage):
    path = copy / name
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "the end":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(BundleError) as caught:
        READERS[name](load(copy))
    assert name.rpartition("/")[2] in str(caught.value)
    with pytest.raises(BundleError):
        load(copy).verify()


def test_a_file_that_is_not_listed_is_not_read(copy):
    describe(copy, lambda meta: meta["files"].pop("sae/sae.safetensors"))
    with pytest.raises(BundleError, match=r"sae/sae\.safetensors is not listed"):
        load(copy).feature(FEATURE)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\b", "C:/b", ""])
def test_a_listed_name_cannot_leave_the_folder(copy, name):
    entry = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(BundleError, match="leaves the folder"):
        load(describe(copy, lambda meta: meta["files"].update({name: entry})))


@pytest.mark.parametrize("path", ["../tiny/sae", "/tmp", "sae/../../sae"])
def test_a_section_cannot_leave_the_folder(copy, path):
    with pytest.raises(BundleError, match="not listed"):
        load(describe(copy, lambda meta: meta["saes"][0].update(path=path))).feature(FEATURE)


def test_a_link_cannot_leave_the_folder(copy, tmp_path):
    path = copy / "sae/sae.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link that leaves"):
        load(copy).feature(FEATURE)


@pytest.mark.parametrize(
    ("change", "use", "message"),
    [
        (lambda m: m.update(schema_version=2), lambda b: b, "schema_version 2"),
        (lambda m: m.update(schema_version=True), lambda b: b, "schema_version True"),
        (lambda m: m.pop("schema_version"), lambda b: b, "schema_version None"),
        (lambda m: m.pop("name"), lambda b: b, "name must be"),
        (lambda m: m.pop("files"), lambda b: b, "files must be"),
        (lambda m: m["files"].update({"README.md": {"sha256": 1}}), lambda b: b, "sha256 and bytes"),
        (lambda m: m.pop("prior"), lambda b: b.prior, "prior must be"),
        (lambda m: m["prior"].update(kind="pickle"), lambda b: b.prior, "diffusers_unet2d"),
        (lambda m: m["prior"].update(shape=[3, 64]), lambda b: b.prior, "shape"),
        (lambda m: m["prior"].update(pixel_unshuffle=2), lambda b: b.prior, "in_channels must be 12"),
        (lambda m: m["trunk"].update(kind="vit"), lambda b: b.feature(FEATURE), "dinov3_vit"),
        (lambda m: m["saes"][0].update(kind="gated"), lambda b: b.feature(FEATURE), "jumprelu"),
        (lambda m: m.pop("evaluator"), lambda b: b.evaluator(), "evaluator must be"),
        (lambda m: m["pool"].update(num=41), lambda b: b.pool.names, "40 rows, not 41"),
    ],
)
def test_a_wrong_description_is_refused_by_field(copy, change, use, message):
    with pytest.raises(BundleError, match=message):
        use(load(describe(copy, change)))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_description_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load(tmp_path)


def test_a_folder_without_description_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blocks.1:sae:24", "0 to 23"),
        ("blocks.1:sae:99999", "0 to 23"),
        ("blocks.2:sae:0", "blocks.1"),
        ("norm:sae:0", "blocks.1"),
        ("blocks.3:sae:0", r"blocks\.0 to blocks\.2, norm"),
        ("blocks.1:neuron:32", "0 to 31"),
        ("blocks.1:cls:32", "0 to 31"),
        ("blocks.1:neuron:0@8,0", "y 0 to 7, x 0 to 7"),
        ("blocks.1:direction:absent.npy", "absent.npy"),
        ("blocks.1:glow:0", "sae, neuron, direction, cls"),
        ("sae:3", "HOOK:KIND:INDEX"),
    ],
)
def test_a_feature_that_is_not_there_is_refused_with_what_is(bundle, text, message):
    with pytest.raises(ConfigError, match=message):
        bundle.feature(text)


def test_one_feature_is_one_object(bundle):
    assert bundle.feature("blocks.1:sae:3") is bundle.feature("blocks.01:sae:03@centre")
    assert bundle.feature("blocks.1:sae:3") is not bundle.feature("blocks.1:sae:3@max")
    assert bundle.feature("blocks.1:sae:3").pool_key == FEATURE


def test_the_feature_table_and_labels(bundle, tiny_bundle):
    infos = bundle.features()
    assert [info.feature for info in infos] == [f"blocks.1:sae:{j}" for j in range(24)]
    assert (
        infos[3].name
        == bundle.label(bundle.feature("blocks.1:sae:3"))
        == bundle.label(bundle.feature(FEATURE + "@max"))
    )
    assert isinstance(infos[3].name, str)
    assert infos[2].name is None
    assert bundle.label(bundle.feature("blocks.1:sae:2")) is None
    assert bundle.label(bundle.feature("blocks.1:neuron:3")) is None
    assert bundle.label(bundle.feature(FEATURE) * 2.0) is None
    assert bundle.label(load(tiny_bundle).feature(FEATURE)) is None  # the same address, another bundle
    assert infos[3].words
    assert (infos[3].alive, infos[23].alive) == (True, False)
    stored = bundle.pool.activations(bundle.feature(FEATURE))
    assert infos[3].max == pytest.approx(stored.max(), rel=1e-6)
    assert infos[3].density == pytest.approx((stored > 0).mean())
    infos.clear()
    assert len(bundle.features()) == 24


def test_the_evaluator_is_loaded_once(bundle):
    assert bundle.evaluator() is bundle.evaluator()
    embedded = torch.nn.functional.normalize(bundle.evaluator().embed(bundle.pool.x0([0, 5])), dim=-1).numpy()
    # Stored in float16, made before the weights themselves were rounded to it.
    np.testing.assert_allclose(embedded, bundle.pool.embeddings()[[0, 5]], atol=2e-3)


def test_opening_a_bundle_imports_no_diffusion_library(tiny_bundle):
    """Seconds of imports are paid where the network is used, not for a list of features."""
    code = (
        "import sys, tiltscope; b = tiltscope.load(sys.argv[1]); b.features(); b.feature('blocks.1:sae:3');"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_embedded_bundles_are_whole():
    for name, folder in embedded_bundles().items():
        embedded = tiltscope.load(name)
        assert embedded.name == name
        assert embedded.path == folder
        assert embedded.verify() > 10


INTERVAL = [0.2, 0.9]


def asks(folder, interval=INTERVAL):
    """A bundle whose prior asks to be guided at some noise levels alone."""
    return load(describe(folder, lambda meta: meta["prior"].update(guidance_interval=interval)))


def guided(bundle, **settings):
    """sin(theta) at the guided rows of a run of ten, and the interval its configuration holds."""
    run = prepare(bundle.prior, bundle.feature(FEATURE), SampleConfig(num=1, **({"lam": 1.0, "steps": 10} | settings)))
    at = run.plan.kind == GraphKind.GUIDED
    return np.sin(run.plan.thetas[:-1][at]), run.config.guidance_interval


def test_a_prior_is_guided_where_it_asks_to_be_unless_the_request_says_where(copy):
    everywhere, none = guided(load(copy))
    assert none is None
    assert everywhere.max() > 0.9
    published = guided(load(copy), preset="paper_exact")[0]
    bundle = asks(copy)
    asked, interval = guided(bundle)
    assert interval == tuple(INTERVAL)
    np.testing.assert_array_equal(asked, everywhere[(everywhere >= 0.2) & (everywhere <= 0.9)])
    assert 0 < len(asked) < len(everywhere)
    np.testing.assert_array_equal(guided(bundle, guidance_interval=(0.0, 1.0))[0], everywhere)
    # The published scale is no lambda: its rows are the published ones.
    np.testing.assert_array_equal(guided(bundle, preset="paper_exact")[0], published)
    # In another precision it is the same prior.
    np.testing.assert_array_equal(guided(bundle, dtype="float64")[0], asked)


def test_an_explanation_says_where_its_prior_was_guided(copy):
    inquiry = inquire(asks(copy), FEATURE, ExplainConfig(num=1, lam=1.0, steps=10))
    assert inquiry.config.guidance_interval == tuple(INTERVAL)


@pytest.mark.parametrize("interval", [[0.9, 0.2], [0.5], [-0.1, 1.0], [0.0, 1.1], "0,1", [0.0, True], [0.0, None], 0.5])
def test_an_interval_that_is_none_is_refused_by_name(copy, interval):
    with pytest.raises(BundleError, match=r"prior\.guidance_interval must be"):
        _ = asks(copy, interval).prior
