"""Files written whole, and folders that are gone at once."""

from fpocli.files import remove_folder, replace_text


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "file"
    replace_text(file, "one")
    replace_text(file, "zwei ü")
    assert file.read_text(encoding="utf-8") == "zwei ü"
    assert list(tmp_path.iterdir()) == [file]


def test_a_removed_folder_takes_what_an_earlier_removal_left(tmp_path):
    for name in ("run", "run.removed"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text("x")
    remove_folder(tmp_path / "run")
    remove_folder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
