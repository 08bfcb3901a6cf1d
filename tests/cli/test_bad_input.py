"""Bad input: one message on one line that says what was got, exit code 2, nothing on stdout, nothing written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FEATURE = "blocks.1:sae:3"
DEAD = "blocks.1:sae:23"  # the tiny bundle's latent that never fires
SAMPLE = ("sample", FEATURE, "--lam", "1", "--steps", "2", "--num", "2")

# (case, words after `tiltscope`, what the message must hold). "BUNDLE" becomes the tiny bundle's folder.
TABLE: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("no command", (), ("command", "explain, sample")),
    ("unknown command", ("explian", FEATURE), ("'explian'", "allowed are explain")),
    ("a command of a later version", ("serve",), ("'serve'", "allowed are explain")),
    ("unknown flag", (*SAMPLE, "--stpes", "3"), ("--stpes", "--help")),
    ("two features", (*SAMPLE, "blocks.1:sae:4"), ("blocks.1:sae:4",)),
    ("no feature", ("explain",), ("FEATURE is missing",)),
    ("a flag without its value", ("sample", FEATURE, "--lam"), ("--lam", "value is missing")),
    # addresses
    ("not an address", ("explain", "clock"), ("clock", "HOOK:KIND:INDEX")),
    ("unknown hook", ("explain", "blocks.99:sae:0"), ("blocks.99", "blocks.0 to blocks.2")),
    ("a hook that is none", ("explain", "layer3:sae:0"), ("layer3", "blocks.N")),
    ("unknown kind", ("explain", "blocks.1:probe:0"), ("probe", "sae", "neuron", "direction", "cls")),
    ("unknown pooling", ("explain", f"{FEATURE}@median"), ("median", "centre")),
    ("index out of range", ("explain", "blocks.1:sae:24"), ("24", "23")),
    ("negative index", ("explain", "blocks.1:sae:-1"), ("-1",)),
    ("index that is no number", ("explain", "blocks.1:sae:first"), ("first",)),
    ("neuron out of range", ("explain", "blocks.1:neuron:32"), ("32", "31")),
    ("a direction that is no file", ("explain", "blocks.1:direction:missing.npy"), ("missing.npy",)),
    # bundle
    ("unknown bundle", ("explain", FEATURE, "--bundle", "emoji65"), ("emoji65", "allowed")),
    ("a hub's bundle", ("explain", FEATURE, "--bundle", "someone/model"), ("someone/model",)),
    ("a folder that is no bundle", ("explain", FEATURE, "--bundle", "."), ("bundle.json",)),
    # choices
    ("unknown solver", (*SAMPLE, "--solver", "rk45"), ("solver", "'rk45'", "ddpm", "heun")),
    ("unknown parameter of a solver", (*SAMPLE, "--solver", "ddim(beta=1)"), ("beta=1", "eta")),
    ("unknown preset", (*SAMPLE, "--preset", "best"), ("preset", "'best'", "calibrated")),
    ("unknown grid", (*SAMPLE, "--grid", "cosine"), ("grid", "'cosine'", "native")),
    ("unknown lift", (*SAMPLE, "--lift", "magic"), ("lift", "'magic'", "dps")),
    ("unknown log-tilt", (*SAMPLE, "--log-tilt", "square"), ("log_tilt", "'square'", "linear")),
    ("unknown runner", (*SAMPLE, "--runner", "magic"), ("runner", "'magic'", "torch")),
    ("unknown dtype", (*SAMPLE, "--dtype", "float8"), ("dtype", "'float8'", "float32")),
    ("unknown kernels", (*SAMPLE, "--kernels", "cuda"), ("kernels", "'cuda'", "reference", "triton")),
    ("triton without a device", (*SAMPLE, "--kernels", "triton"), ("kernels", "CUDA device", "TRITON_INTERPRET=1")),
    ("a device that is not there", (*SAMPLE, "--device", "cuda"), ("device", "cuda", "use device cpu")),
    ("unknown graphs", (*SAMPLE, "--graphs", "on"), ("graphs", "'on'", "auto", "off")),
    ("unknown sort", ("features", "--sort", "size"), ("sort", "'size'", "selectivity")),
    ("unknown hook of features", ("features", "--hook", "blocks.9"), ("hook", "blocks.9", "blocks.1")),
    ("an empty search", ("features", "--search", " "), ("search",)),
    # numbers
    ("num 0", (*SAMPLE, "--num", "0"), ("num", "got 0", "1000000")),
    ("num 10^13", (*SAMPLE, "--num", "10000000000000"), ("num", "10000000000000")),
    ("num that is no whole number", (*SAMPLE, "--num", "2.5"), ("num", "'2.5'", "whole numbers")),
    ("steps 0", (*SAMPLE, "--steps", "0"), ("steps", "got 0")),
    ("steps negative", (*SAMPLE, "--steps", "-1"), ("steps", "got -1")),
    ("more steps than the network has levels", (*SAMPLE, "--grid", "native", "--steps", "5000"), ("5000", "1000")),
    ("lam nan", (*SAMPLE, "--lam", "nan"), ("lam", "nan", "finite")),
    ("lam inf", (*SAMPLE, "--lam", "inf"), ("lam", "inf", "finite")),
    ("lam that is no number", (*SAMPLE, "--lam", "big"), ("lam", "'big'", "numbers")),
    ("as many lam as not num", (*SAMPLE, "--lam", "1,2,3"), ("lam", "3 values", "num=2")),
    ("neither lam nor target", ("sample", FEATURE), ("lam", "target_activation", "neither")),
    ("both lam and target", (*SAMPLE, "--target-activation", "1"), ("lam", "target_activation", "both")),
    ("both lam and quantile", ("explain", FEATURE, "--lam", "1", "--target-quantile", "0.9"), ("both",)),
    ("target nan", ("sample", FEATURE, "--target-activation", "nan"), ("target_activation", "nan")),
    ("quantile 1", ("explain", FEATURE, "--target-quantile", "1"), ("target_quantile", "got 1")),
    ("batch_size 0", (*SAMPLE, "--batch-size", "0"), ("batch_size", "got 0")),
    ("particles 0", (*SAMPLE, "--particles", "0"), ("particles", "got 0")),
    ("calibration_num 0", (*SAMPLE, "--calibration-num", "0"), ("calibration_num", "got 0")),
    ("a reversed interval", (*SAMPLE, "--guidance-interval", "0.9,0.1"), ("guidance_interval", "0.9", "0.1")),
    ("half an interval", (*SAMPLE, "--guidance-interval", "0.9"), ("guidance-interval", "'0.9'", "2 numbers")),
    ("duplicate indices", (*SAMPLE, "--indices", "3,3"), ("indices", "3", "twice")),
    ("negative indices", (*SAMPLE, "--indices", "0,-1"), ("indices", "got -1")),
    ("as many indices as not num", (*SAMPLE, "--indices", "0,1,2"), ("indices", "3", "num=2")),
    ("seed negative", (*SAMPLE, "--seed", "-1"), ("seed", "got -1")),
    ("seed bool", (*SAMPLE, "--seed", "True"), ("seed", "'True'", "whole numbers")),
    ("seed float", (*SAMPLE, "--seed", "1.0"), ("seed", "'1.0'", "whole numbers")),
    ("seed 2^64", (*SAMPLE, "--seed", str(2**64)), ("seed", str(2**64))),
    # targets
    ("sample: target unreachable", ("sample", FEATURE, "--target-activation", "99"), ("99", "largest reachable")),
    ("sample: target below the mean", ("sample", FEATURE, "--target-activation", "-5"), ("lambda would be 0",)),
    ("explain: target unreachable", ("explain", FEATURE, "--target-activation", "99"), ("99", "largest reachable")),
    ("explain: target below the mean", ("explain", FEATURE, "--target-activation", "-5"), ("lambda would be 0",)),
    ("explain: a quantile below the mean", ("explain", FEATURE, "--target-quantile", "0.01"), ("lambda would be 0",)),
    ("explain: zero variance", ("explain", DEAD), ("does not vary",)),
    ("sample: zero variance", ("sample", DEAD, "--target-activation", "1"), ("does not vary",)),
    ("calibrate: zero variance", ("calibrate", DEAD, "--target-activation", "1"), ("does not vary",)),
    ("calibrate: no target", ("calibrate", FEATURE), ("--target-activation is missing", "FLOAT")),
    ("calibrate: target nan", ("calibrate", FEATURE, "--target-activation", "nan"), ("target_activation", "nan")),
]


def one_line(err: str) -> str:
    """The message; there is no other line, so no traceback either."""
    assert err.count("\n") == 1, err
    assert err.startswith("tiltscope")
    return err


@pytest.mark.parametrize(
    ("words", "held"), [(words, held) for _, words, held in TABLE], ids=[case for case, *_ in TABLE]
)
def test_bad_input(cli, folder: Path, tiny_bundle: Path, words: tuple[str, ...], held: tuple[str, ...]) -> None:
    extra = ("--quiet", "--json")
    if words and words[0] in ("explain", "sample", "features", "calibrate") and "--bundle" not in words:
        extra += ("--bundle", str(tiny_bundle))
    done = cli(*words, *(extra if words else ()))
    assert done.code == 2
    message = one_line(done.err)
    assert [part for part in held if part not in message] == []
    assert done.out == ""
    assert list(folder.iterdir()) == []


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "damaged"))


@pytest.mark.parametrize("what", ["truncated", "bit-flipped", "missing", "empty"])
@pytest.mark.parametrize(
    "name",
    [
        "prior/diffusion_pytorch_model.safetensors",
        "trunk/model.safetensors",
        "sae/sae.safetensors",
        "pool/pool.parquet",
    ],
)
def test_damaged_files_are_named(cli, folder: Path, damaged: Path, name: str, what: str) -> None:
    path = damaged / name
    content = bytearray(path.read_bytes())
    if what == "truncated":
        path.write_bytes(content[:-1])
    elif what == "bit-flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif what == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    done = cli(
        "explain", FEATURE, "--steps", "2", "--num", "2", "--calibration", "pool", "--quiet", "--bundle", damaged
    )
    assert done.code == 2
    assert name in one_line(done.err)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "held"),
    [(b"", "bundle.json"), (b"{", "bundle.json"), (b"[]", "bundle.json"), (b'{"schema_version": 99}', "99")],
    ids=["empty", "half", "a list", "a later schema"],
)
def test_a_damaged_description(cli, damaged: Path, content: bytes, held: str) -> None:
    (damaged / "bundle.json").write_bytes(content)
    done = cli("explain", FEATURE, "--quiet", "--bundle", damaged)
    assert done.code == 2
    assert held in one_line(done.err)


@pytest.mark.parametrize(
    "command", [SAMPLE, ("explain", FEATURE, "--steps", "2", "--num", "2", "--lam", "1")], ids=["sample", "explain"]
)
class TestOut:
    """OUT is refused before anything is drawn, and stays as it was."""

    def refused(self, cli, command, tiny_bundle: Path, out: object) -> str:
        def draw(*_: object, **__: object) -> None:
            raise AssertionError("drawn before the folder was looked at")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tiltscope.engine.run.Run.draw", draw)
            done = self.call(cli, command, tiny_bundle, out)
        return one_line(done.err)

    def call(self, cli, command, tiny_bundle: Path, out: object) -> Any:
        done = cli(*command, "--quiet", "--bundle", tiny_bundle, "--out", out)
        assert done.code == 2, done.err
        return done

    def test_a_file(self, cli, folder: Path, tiny_bundle: Path, command) -> None:
        (folder / "out").write_text("mine")
        assert "out is a file" in self.refused(cli, command, tiny_bundle, "out")
        assert (folder / "out").read_text() == "mine"

    def test_inside_a_file(self, cli, folder: Path, tiny_bundle: Path, command) -> None:
        (folder / "file").write_text("mine")
        assert "cannot be written" in self.refused(cli, command, tiny_bundle, "file/out")

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that even root cannot write to")
    def test_not_writable(self, cli, tiny_bundle: Path, command) -> None:
        assert "cannot be written" in self.refused(cli, command, tiny_bundle, "/proc/tiltscope-out")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; shown here instead: test_not_writable")
    def test_no_permission(self, cli, folder: Path, tiny_bundle: Path, command) -> None:
        (folder / "locked").mkdir(mode=0o500)
        assert "cannot be written" in self.refused(cli, command, tiny_bundle, "locked/out")

    def test_of_another_run(self, cli, folder: Path, tiny_bundle: Path, command) -> None:
        assert cli(*command, "--quiet", "--bundle", tiny_bundle, "--out", "out").code == 0
        before = {each: each.read_bytes() for each in (folder / "out").rglob("*") if each.is_file()}
        message = self.refused(cli, (*command, "--seed", "5"), tiny_bundle, "out")
        assert "holds another run" in message
        assert {each: each.read_bytes() for each in (folder / "out").rglob("*") if each.is_file()} == before


@pytest.mark.parametrize(
    ("words", "held"),
    [
        (("explain", "nonsense"), "HOOK:KIND:INDEX"),
        (("sample", FEATURE, "--lam", "nan"), "lam: got nan"),
        (("sample", FEATURE, "--nope"), "--nope"),
    ],
)
def test_bad_input_in_a_process_of_its_own(folder: Path, tiny_bundle: Path, words: tuple[str, ...], held: str) -> None:
    command = [sys.executable, "-m", "tiltscope", *words, "--quiet", "--bundle", str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert held in one_line(done.stderr)
    assert list(folder.iterdir()) == []
