"""Files that appear complete, and folders that disappear at once."""

from pathlib import Path

from fpocli.system.files import remove_folder, replace_text, resolve_last_part


def test_a_file_is_replaced_atomically(tmp_path):
    file = tmp_path / "file"
    replace_text(file, "one")
    replace_text(file, "zwei ü")
    assert file.read_text(encoding="utf-8") == "zwei ü"
    assert list(tmp_path.iterdir()) == [file]


def test_a_removed_folder_takes_what_an_earlier_removal_left(tmp_path):
    for name in ("run", ".run.fpo-removed"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text("x")
    remove_folder(tmp_path / "run")
    remove_folder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_path_stays_as_typed_except_links_and_dots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_last_part("ref.zarr") == Path("ref.zarr")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    assert resolve_last_part("link") == (tmp_path / "scratch").resolve()
    assert resolve_last_part(".") == tmp_path.resolve()
    assert resolve_last_part("scratch/..") == tmp_path.resolve()
