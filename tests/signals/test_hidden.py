"""Hidden states beside the shards: their code's bound, and the same discipline as the log-probs'."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from signals_synthetic import LENGTH, SHARD_ROWS, BigramEngine, capture, write_corpus

from lmdistill.errors import IntegrityError, StageError
from lmdistill.signals.hidden import HiddenLayout, int8_error_bound
from lmdistill.signals.hidden_files import BLOCK_BYTES, HiddenWriter
from lmdistill.signals.inspect import describe, verify
from lmdistill.signals.reader import SignalsReader
from lmdistill.teachers.engine import TopKWithHidden

ROWS, WIDTH, LAYERS = 10, 700, (0, 2)  # a row is more than a block in float16, less in int8
LAYOUTS = {dtype: HiddenLayout(LAYERS, WIDTH, dtype) for dtype in ("float16", "int8")}


class HiddenEngine(BigramEngine):
    """Its hidden states are a function of the tokens, so that a test can say what they must be."""

    def score(self, tokens_BT, starts_BT):
        return TopKWithHidden(**vars(super().score(tokens_BT, starts_BT)), hidden_BTLD=states(tokens_BT))


def states(tokens_BT):
    angle = (tokens_BT[..., None, None] + 1) * (np.arange(WIDTH) + 1) * np.array([1.0, 0.3])[:, None]
    return (np.sin(angle) * np.array([1.0, 50.0])[:, None]).astype(np.float32)


def capturing(corpus, out, dtype, engine=None):
    run = capture(corpus, out, engine or HiddenEngine())
    run.layout = replace(run.layout, hidden=LAYOUTS[dtype])
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, {"train": BigramEngine().text(1, ROWS)})
    return folder


@pytest.fixture(scope="module", params=["float16", "int8"])
def cache(request, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    capturing(corpus, out, request.param).run()
    return request.param, out


FINITE = arrays.arrays(
    np.float32, (1, 3, 2, 5), elements=st.floats(-60000, 60000, width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32)
)


@settings(max_examples=300, deadline=None)
@given(FINITE)
def test_int8_is_within_its_bound(hidden_RTLD):
    """|x̂ − x| ≤ s/2, s the scale that a token's largest value in a layer sets; zeros stay zeros."""
    layout = HiddenLayout((0, 1), 5, "int8")
    found = layout.decode(layout.encode(hidden_RTLD))
    bound = int8_error_bound(np.abs(hidden_RTLD).max(axis=-1, keepdims=True))
    assert (np.abs(found.astype("f8") - hidden_RTLD) <= bound).all()
    assert (found[hidden_RTLD == 0] == 0).all()
    np.testing.assert_array_equal(layout.encode(found)["scales"] > 0, np.abs(found).max(axis=-1) > 0)


@settings(max_examples=200, deadline=None)
@given(FINITE)
def test_float16_is_within_half_a_step(hidden_RTLD):
    """2⁻¹¹ of each value, or half a subnormal step."""
    layout = HiddenLayout((0, 1), 5, "float16")
    found = layout.decode(layout.encode(hidden_RTLD)).astype("f8")
    assert (np.abs(found - hidden_RTLD) <= np.maximum(np.abs(hidden_RTLD) * 2.0**-11, 2.0**-25)).all()


@pytest.mark.parametrize(("value", "dtype"), [(7e4, "float16"), (np.inf, "int8"), (np.nan, "int8"), (9e6, "int8")])
def test_what_cannot_be_said_is_refused(value, dtype):
    """Never stored as infinity: an error that names the way out."""
    hidden_RTLD = np.full((1, 1, 2, 5), value, np.float32)
    with pytest.raises(StageError, match=f"do not fit {dtype}") as refused:
        HiddenLayout((0, 1), 5, dtype).encode(hidden_RTLD)
    assert "hidden_dtype: int8" in refused.value.fix


def test_rows_come_back_in_any_order(cache, corpus):
    """Asked for by row, across shards, as the engine gave them to within the code; log-probs as without them."""
    dtype, out = cache
    reader = SignalsReader(out)
    rows = [7, 0, 9, 3]
    expected = states(reader.read(rows).tokens_RT)
    bound = np.abs(expected).max(axis=-1, keepdims=True) * (2.0**-11 if dtype == "float16" else 1 / 253)
    found = reader.hidden(rows)
    assert found.shape == (4, LENGTH, 2, WIDTH)
    assert found.dtype == np.float32
    assert (np.abs(found - expected) <= bound).all()
    np.testing.assert_array_equal(reader.hidden(slice(2, 5)), reader.hidden([2, 3, 4]))


def test_the_cache_says_what_it_holds(cache):
    """Layers, dtype and bytes a token; the file has exactly those bytes; nothing is wrong with it."""
    dtype, out = cache
    per_token = 2 * WIDTH * 2 if dtype == "float16" else 2 * (WIDTH + 2)
    about = describe(out)["hidden"]
    assert about == {"layers": LAYERS, "width": WIDTH, "dtype": dtype, "bytes_per_token": per_token}
    assert sum(path.stat().st_size for path in out.glob("*.hid")) == ROWS * LENGTH * per_token
    assert verify(out) == []


def test_log_probs_are_read_without_them(cache, tmp_path):
    """A reader that is not asked for hidden states never opens their files."""
    _, out = cache
    for path in out.iterdir():
        if path.suffix != ".hid":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    reader = SignalsReader(tmp_path)
    assert len(reader.read([0, 5]).rows) == 2
    with pytest.raises(IntegrityError, match=r"train-00000\.hid: missing"):
        reader.hidden([0])
    assert verify(tmp_path) == [f"train-0000{shard}.hid: missing" for shard in range(3)]


def test_every_flipped_byte_is_found_and_located(cache, tmp_path):
    """100 single-byte flips at random places: each is named by file, block, rows and byte range."""
    _, out = cache
    for name, data in contents(out).items():
        (tmp_path / name).write_bytes(data)
    rng = np.random.default_rng(0)
    files = sorted(tmp_path.glob("*.hid"))
    row_bytes = sum(file.stat().st_size for file in files) // ROWS
    for _ in range(100):
        file = files[rng.integers(len(files))]
        data = bytearray(file.read_bytes())
        at, whole = int(rng.integers(len(data))), bytes(data)
        data[at] ^= int(rng.integers(1, 256))
        file.write_bytes(data)
        [problem] = verify(tmp_path)
        block, row = at // BLOCK_BYTES, files.index(file) * SHARD_ROWS + at // row_bytes
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, len(data))
        assert problem.startswith(f"{file.name}: block {block} (rows ")
        assert problem.endswith(f"bytes {start}–{stop - 1}: crc32 differs")
        first, last = problem.split("(rows ")[1].split(")")[0].split("–")
        assert int(first) <= row <= int(last)
        with pytest.raises(IntegrityError, match="hidden states of shard"):
            SignalsReader(tmp_path).hidden([row])
        file.write_bytes(whole)
    assert verify(tmp_path) == []


def test_a_damaged_record_is_named_once(cache, tmp_path):
    """The crc32s of hidden states are in the shard's record, and that is proven by the manifest."""
    _, out = cache
    for name, data in contents(out).items():
        (tmp_path / name).write_bytes(data)
    record = tmp_path / "train-00001.json"
    record.write_bytes(record.read_bytes().replace(b'"hidden"', b'"hiddem"'))
    [problem] = verify(tmp_path)
    assert problem.startswith("train-00001.json: ")


def test_a_damaged_file_alone_is_made_again(cache, corpus, tmp_path):
    """A flip, a loss and a crash before the record: those shards are scored again, and the bytes are the same."""
    dtype, out = cache
    for name, data in contents(out).items():
        (tmp_path / name).write_bytes(data)
    first = tmp_path / "train-00000.hid"
    first.write_bytes(b"\x01" + first.read_bytes()[1:])
    (tmp_path / "train-00001.hid").unlink()
    (tmp_path / "train-00002.json").unlink()
    (tmp_path / ".train-00002.hid.tmp").write_bytes(b"half")
    engine = HiddenEngine()
    capturing(corpus, tmp_path, dtype, engine).run()
    assert engine.rows_scored == ROWS
    assert contents(tmp_path) == contents(out)
    again = HiddenEngine()
    capturing(corpus, tmp_path, dtype, again).run()
    assert again.rows_scored == 0


def test_other_settings_are_another_cache(cache, corpus, tmp_path):
    """A shard finished with other hidden states, or none, is not taken for this one's."""
    dtype, out = cache
    for name, data in contents(out).items():
        (tmp_path / name).write_bytes(data)
    engine = HiddenEngine()
    capturing(corpus, tmp_path, "int8" if dtype == "float16" else "float16", engine).run()
    assert engine.rows_scored == ROWS
    assert verify(tmp_path) == []


def test_a_cache_without_them_says_so(corpus, tmp_path):
    """Its manifest has no word of them, and asking for them is one clear error."""
    capture(corpus, tmp_path, BigramEngine()).run()
    assert "hidden" not in json.loads((tmp_path / "signals.json").read_text())["layout"]
    assert describe(tmp_path)["hidden"] is None
    with pytest.raises(IntegrityError, match="holds no hidden states") as refused:
        SignalsReader(tmp_path).hidden([0])
    assert "hidden_layers" in refused.value.fix


def test_an_engine_that_gives_none_is_refused(corpus, tmp_path):
    """Rather than a cache that lacks what it promises."""
    with pytest.raises(StageError, match="gave no hidden states"):
        capturing(corpus, tmp_path, "int8", BigramEngine()).run()


def test_a_full_disk_is_one_clear_error(corpus, tmp_path, monkeypatch):
    """No unfinished file is left, and the size that is told counts hidden states."""

    def full(self, exact):
        self._file = self._part.open("wb")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HiddenWriter, "append", full)
    with pytest.raises(StageError, match="No space left") as refused:
        capturing(corpus, tmp_path, "float16").run()
    assert f"{SHARD_ROWS * LENGTH * (2 * WIDTH * 2) / 1e6:.1f} MB" in refused.value.why
    assert list(tmp_path.glob(".*.tmp")) == []
