"""Damage of every kind to every file of a store: found by --verify and before training, and
repaired."""

import json
import random
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from processes import Command
from stores import assert_equal, attributes, cache_config, make_loader, write_root

from fpocli import UserError, cache
from fpocli.caching import block_scorer
from fpocli.report.describe import describe
from fpocli.store import distribution_rows
from fpocli.store.metadata import DOCUMENT, document_sums
from fpocli.store.place import Folder
from fpocli.store.reader import Store
from fpocli.store.schema import fingerprint
from fpocli.store.verify import find_damage

SITE = "layer_3.resid_post"


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Several chunks of distributions make up a file, although the store is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution_rows, "_CHUNK_BYTES", 2**12)
        yield


@pytest.fixture(scope="module")
def small(material, tmp_path_factory):
    """A store of seven pairs in three blocks, with distributions."""
    config = cache_config(
        material,
        tmp_path_factory.mktemp("small") / "ref.zarr",
        limit=7,
        block=3,
        top_k="8",
        distributions="8",
    )
    store = cache(config)
    rows = store.meta["distribution_rows"]
    assert rows["shard"] > rows["chunk"] and rows["padded"] == store.blocks * rows["shard"]
    return config, store.path


@pytest.fixture
def spoiled(small, tmp_path):
    """A copy that a test may damage, and the settings that made it."""
    config, path = small
    copy = shutil.copytree(path, tmp_path / "ref.zarr")
    return type(config)(**(vars(config) | {"out": str(copy)})), copy


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def verify(path: Path) -> list[str]:
    """The problems that `fpo inspect --verify` lists."""
    try:
        return [damage.message for damage in find_damage(Store.open(path))]
    except UserError as error:
        return [str(error)]


def train_on(path: Path) -> list[tuple]:
    """Everything that training reads of a store, up to where it stops."""
    read = []
    try:
        store = Store.open(path)
        store.require_complete()
        loader = make_loader(store, eval_fraction=0.0)
        for step in loader.steps(0, loader.steps_per_epoch, torch.device("cpu"), with_top=True):
            for micro in step:
                rows = micro.reference
                features = [f for site in rows.features.values() for f in vars(site).values()]
                arrays = (micro.batch.ids, rows.logp, rows.margin, *features, *micro.top)
                read.append(tuple(array.numpy().tobytes() for array in arrays))
    except UserError:
        read.append(("stopped",))
    return read


def sweep(path: Path, positions, rng: random.Random) -> Counter:
    """Damage one file after the other; returns the number of damages, and fails if one is not
    found.

    Args:
        path: of the store.
        positions: which bytes to change in a file of a given size.
        rng: draws the new values.
    """
    tried: Counter = Counter()
    whole = train_on(path)
    assert verify(path) == [] and ("stopped",) not in whole
    for file in files_of(path):
        good, name = file.read_bytes(), file.relative_to(path).as_posix()
        kinds = [("truncated", good[: rng.randrange(len(good))]), ("deleted", None)]
        for at in positions(len(good)):
            flipped = good[at] ^ rng.randrange(1, 256)
            kinds.append(("changed", bytes([*good[:at], flipped, *good[at + 1 :]])))
        for kind, data in kinds:
            file.unlink(missing_ok=True)
            if data is not None:
                file.write_bytes(data)
            reported = verify(path)
            assert reported, f"{name} {kind}"
            array = name.split("/c/")[0].removesuffix("/zarr.json")
            named = (array if array != name else str(path), "has no digest")
            assert any(part in line for part in named for line in reported), (name, reported)
            if "/c/" in name and not name.endswith(("mean/c/0", "frequency/c/0/0")):
                assert any("block " in line for line in reported), (name, reported)
            # Training reads correct values, or stops before.
            read = train_on(path)
            assert read[:-1] == whole[: len(read) - 1]
            assert read == whole or read[-1] == ("stopped",), f"{name} {kind}"
            tried[kind] += 1
        file.write_bytes(good)
    assert verify(path) == []
    return tried


@pytest.mark.slow
def test_damage_to_any_file_is_found(spoiled):
    """One byte of every file, and every file truncated and deleted; the long sweep changes every
    byte."""
    rng = random.Random(0)
    tried = sweep(spoiled[1], lambda size: [rng.randrange(size)], rng)
    assert min(tried.values()) == len(files_of(spoiled[1]))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(16))
def test_damage_to_any_byte_is_found(spoiled, first):
    """Every byte of every file is changed into another, drawn at random; a sixteenth of them in
    each test."""
    tried = sweep(spoiled[1], lambda size: range(first, size, 16), random.Random(first))
    print(f"{len(files_of(spoiled[1]))} files, all damage found: {dict(tried)}")


@pytest.mark.parametrize("edit", ["created", "writer", "model", "pairs", "data"])
def test_an_edited_attribute_is_found(spoiled, edit):
    document = spoiled[1] / "zarr.json"
    about = json.loads(document.read_text())
    about["attributes"]["fpo"][edit] = {"created": "2020-01-01T00:00:00+00:00"}.get(edit, {})
    document.write_text(json.dumps(about, indent=2))
    assert "was edited" in verify(spoiled[1])[0]


def test_chunks_in_the_wrong_place_are_found(spoiled):
    """Each file is complete and its checksum correct."""
    of_pairs = ("ref/logp/c/{}/0", "spans/c/{}/0", "ref/top/rows/c/{}/0", "ref/top/digest/c/{}")
    of_rows = ("ref/top/ids/c/{}/0", "ref/top/logp/c/{}/0", "ref/top/rest/c/{}")
    for name in (*of_pairs, *of_rows, "blocks/digest/c/{}"):
        one, other = (spoiled[1] / name.format(block) for block in "01")
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        assert verify(spoiled[1]), name
        one.write_bytes(first)
        other.write_bytes(second)
    assert verify(spoiled[1]) == []


REPAIRED = {
    "values of a block": ({"ref/logp/c/1/0": b"x"}, [1]),
    "values of two blocks, of one in two arrays": (
        {f"features/{SITE}/value/c/0/0/0": b"", "ref/margin/c/2": None, "ref/logp/c/2/0": b"1"},
        [0, 2],
    ),
    "a digest": ({"blocks/digest/c/1": b"damaged"}, [1]),
    "a missing digest": ({"blocks/digest/c/1": None}, [1]),
    "missing values of a block with a digest": ({f"features/{SITE}/index/c/2/0/0": None}, [2]),
    "distributions": (
        {"ref/top/ids/c/0/0": b"x" * 99, "ref/top/logp/c/2/0": None, "ref/top/rest/c/2": b""},
        [0, 2],
    ),
    "digests of pairs": ({"ref/top/digest/c/1": None, "ref/top/digest/c/2": b"x"}, [1, 2]),
    "rows of pairs": ({"ref/top/rows/c/0/0": None, "ref/top/rows/c/2/0": b"x"}, []),
    "a block's totals": ({f"blocks/{SITE}/sum/c/0/0": None}, [0]),
    "a mean over all blocks": ({f"features/{SITE}/mean/c/0": b"?"}, []),
    "tokens": ({"tokens/c/0": b"", "spans/c/1/0": None, "source_row/c/0": b"no"}, []),
    "metadata": ({"spans/zarr.json": b"{}", "ref/zarr.json": None}, []),
    "the root's metadata": ({"zarr.json": b"{"}, []),
}


@pytest.mark.parametrize("what", REPAIRED)
def test_repair_scores_the_damaged_blocks_alone(spoiled, small, monkeypatch, what):
    """Afterwards the store is as it was."""
    config, path = spoiled
    damages, expected = REPAIRED[what]
    for name, data in damages.items():
        if data is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(data)
    assert verify(path)
    scored, real = [], block_scorer.score_block

    def counting(*arguments, **settings):
        scored.append(int(arguments[3].source_row[0]) // 3)
        return real(*arguments, **settings)

    monkeypatch.setattr(block_scorer, "score_block", counting)
    cache(type(config)(**(vars(config) | {"repair": True})))
    assert scored == expected
    assert verify(path) == []
    assert_equal(path, small[1])
    assert not path.with_name("ref.zarr.repair").exists()


def test_totals_of_another_block_are_found_and_repaired(spoiled, small):
    """Complete, with a correct checksum, but their mean would be wrong."""
    config, path = spoiled
    sums = path / f"blocks/{SITE}/sum/c"
    shutil.copy(sums / "1/0", sums / "0/0")
    assert "blocks/totals, block 0 (pairs 0 to 2)" in verify(path)[0]
    cache(type(config)(**(vars(config) | {"repair": True})))
    assert_equal(path, small[1])


def test_repair_of_other_settings_is_refused(spoiled, material):
    config, path = spoiled
    other = {"repair": True, "max_length": 99}
    with pytest.raises(UserError, match=r"limits\.max_length is 2048 there, 99 here"):
        cache(type(config)(**(vars(config) | other)))
    (path / "zarr.json").write_text("{}")
    with pytest.raises(UserError, match="too damaged to check which settings"):
        cache(type(config)(**(vars(config) | other)))


def test_inspect_lists_all_damage_and_fails(spoiled):
    path = spoiled[1]
    (path / "ref/logp/c/0/0").write_bytes(b"x")
    (path / "spans/c/2/0").unlink()
    for flags in ((), ("--json",)):
        command = Command("inspect", str(path), "--verify", *flags)
        assert command.wait(60) == 2
        reported = command.printed()
        assert "the array ref/logp, block 0 (pairs 0 to 2), of" in reported
        assert "the array spans, block 2 (pairs 6 to 6), of" in reported
        assert "--repair" in reported and "Traceback" not in reported
        command.close()


# -- made-up metadata ------------------------------------------------------------------------------

LEAVES = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -1e300, float("nan"), float("inf"),
    "", "../..", "/etc", "uint8", "object", "x" * 20, "\x00\u2028\U0001f600",
)  # fmt: skip


def made_up(rng: random.Random, depth: int = 0):
    """A JSON value."""
    kind = rng.random()
    if kind < 0.7 or depth == 2:
        return rng.choice([*LEAVES, rng.randrange(-(2**40), 2**40), rng.gauss(0, 1e6)])
    values = [made_up(rng, depth + 1) for _ in range(rng.randrange(4))]
    return values if kind < 0.85 else {f"{rng.choice(LEAVES)}"[:9]: value for value in values}


def places(value, path=()):
    """The path to every value of a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items:
        yield (*path, name)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, name))


def change(document, rng: random.Random) -> None:
    """Replace or delete one value of a document."""
    place = rng.choice(list(places(document)))
    inside = document
    for name in place[:-1]:
        inside = inside[name]
    if rng.random() < 0.5:
        inside[place[-1]] = made_up(rng)
    else:
        del inside[place[-1]]


def made_up_metadata(path: Path, whole: list[tuple], seed: int) -> None:
    """Change metadata and correct its checksums: the store is refused, or read as before."""
    rng = random.Random(seed)
    about = attributes(path)
    names = ["", *sorted(about["documents"])]
    files = {path / name / DOCUMENT for name in names}
    before = {file: file.read_bytes() for file in files}
    try:
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(names)
            document = about if name == "" else json.loads((path / name / DOCUMENT).read_text())
            if document:
                change(document, rng)
            if name:
                (path / name / DOCUMENT).write_text(json.dumps(document))
        with suppress(LookupError, TypeError):
            about["fingerprint"] = fingerprint(about)
        about["documents"] = document_sums(Folder(path))
        write_root(path, about)
        if not verify(path):
            assert train_on(path) in (whole, [("stopped",)])
            json.dumps(describe(Store.open(path)))
    finally:
        for file, text in before.items():
            file.write_bytes(text)


@pytest.fixture(scope="module")
def documents(small, tmp_path_factory):
    """A copy whose metadata files are changed, and what training reads of it before."""
    copy = shutil.copytree(small[1], tmp_path_factory.mktemp("documents") / "ref.zarr")
    return copy, train_on(copy)


# zarr's, of a fill value that is too large; no value of a store is one.
FILL = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


@FILL
def test_made_up_metadata_is_refused_or_changes_nothing(documents):
    # One that once was an OverflowError of zarr's.
    for seed in (*range(60), 1701):
        made_up_metadata(*documents, seed)


@FILL
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_much_made_up_metadata_is_refused_or_changes_nothing(documents):
    for seed in range(60, 3060):
        made_up_metadata(*documents, seed)
