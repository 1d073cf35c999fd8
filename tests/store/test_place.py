"""A folder and a bucket do the same."""

import pytest
from buckets import s3_server

from fpocli.store.place import place_of


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    if request.param == "folder":
        yield place_of(tmp_path / "parent/ref.zarr")
        return
    with s3_server() as url:
        yield place_of(f"{url}/parent/ref.zarr")


def test_files(place):
    assert not place.exists() and place.is_empty() and list(place.files()) == []
    with pytest.raises(FileNotFoundError):
        place.read("zarr.json")
    place.delete("zarr.json")
    for key, content in (
        ("zarr.json", b"1"),
        ("a/c/0/0", b"22"),
        ("a/c/1/0", b""),
        ("ab/c/0", b"3"),
    ):
        place.write(key, content)
        assert place.exists(key) and place.read(key) == content
    assert (
        place.exists()
        and not place.is_empty()
        and not place.exists("a/c/2/0")
        and not place.exists("a/c")
    )
    assert sorted(place.files("a/c/")) == ["a/c/0/0", "a/c/1/0"]
    place.write("a/c/0/0", b"4")
    assert place.read("a/c/0/0") == b"4"
    place.delete("a/c/0/0")
    assert sorted(place.files()) == ["a/c/1/0", "ab/c/0", "zarr.json"]
    place.clear()
    assert not place.exists() and list(place.files()) == []
    place.clear()


def test_what_is_beside_is_no_part_of_it(place):
    place.write("zarr.json", b"1")
    assert place.read_beside(".dropped.jsonl") == ""
    place.write_beside(".dropped.jsonl", "é\n")
    assert place.read_beside(".dropped.jsonl") == "é\n"
    assert place.beside(".dropped.jsonl").endswith("parent/ref.zarr.dropped.jsonl")
    assert list(place.files()) == ["zarr.json"]
    place.clear()
    assert place.read_beside(".dropped.jsonl") == "é\n"
    place.write_beside(".dropped.jsonl", "")
    assert place.read_beside(".dropped.jsonl") == ""
    place.write_beside(".dropped.jsonl", "")


def test_a_file_and_a_folder_of_folders_are_not_empty(tmp_path):
    """They may be somebody's."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder/inside").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert not place_of(tmp_path / "file").is_empty()
    assert not place_of(tmp_path / "folder").is_empty()
    assert place_of(tmp_path / "empty").is_empty()
