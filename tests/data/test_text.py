"""Byte-level text: what is in the splits, how it is cut, and what is refused."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.data import ByteText
from zoo.errors import DataError

TRAIN = ("a.txt", "b.txt", "c.txt", "sub/d.txt")  # in the order of their names; a name must never change its split
VAL = ("another.txt", "sub/e.txt")


@pytest.fixture(scope="module")
def library() -> ByteText:
    data = ByteText()
    data.setup("fit")
    return data


@pytest.fixture
def folder(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in (*TRAIN, *VAL, "ignored.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(torch.randint(256, (100 + len(name),), generator=generator).tolist()))
    return tmp_path


def _bytes(text: Tensor) -> bytes:
    return bytes(text.tolist())


def _read(folder: Path, names: tuple[str, ...]) -> bytes:
    return b"".join((folder / name).read_bytes() for name in names)


def test_library_is_split_without_its_tests(library):
    root = Path(sysconfig.get_path("stdlib"))
    train, val = (text.numpy().tobytes() for text in (library.train_set.text, library.val_set.text))
    assert 5e6 < len(train) < 20e6
    assert 0.08 < len(val) / (len(train) + len(val)) < 0.22
    for name in ("os.py", "asyncio/tasks.py", "email/message.py", "typing.py"):
        content = (root / name).read_bytes()
        assert (content in train) != (content in val)
    assert (root / "unittest" / "case.py").read_bytes() in train + val
    for absent in root.glob("test/test_os*.py"):
        assert absent.read_bytes() not in train + val


def test_library_leaves_out_what_is_not_its_source(tmp_path, monkeypatch):
    not_source = ("site-packages", "dist-packages", "test", "pkg/tests", "pkg/idle_test", "pydoc_data")
    for folder in (".", "pkg", *not_source):
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        (tmp_path / folder / "x.py").write_text(f"# {folder} " + "." * 200)
    (tmp_path / "_sysconfigdata__linux_.py").write_text("# flags " + "." * 200)
    (tmp_path / "x.txt").write_text("# text " + "." * 200)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    data = ByteText(context=8)
    content = ByteText.decode(torch.cat([data.train_set.text, data.val_set.text]))
    assert content.replace(".", "").split() == ["#", "pkg", "#"]


def test_library_is_the_same_every_time(library):
    again = ByteText()
    assert torch.equal(again.train_set.text, library.train_set.text)
    assert torch.equal(again.val_set.text, library.val_set.text)


def test_library_has_windows_for_the_recipe(library):
    assert len(library.train_set) >= 400 * 16
    assert len(library.val_set) == 1024
    inputs, targets = next(iter(library.train_dataloader()))
    assert inputs.shape == targets.shape == (16, 96)
    assert inputs.dtype == targets.dtype == torch.int64
    assert 0 <= inputs.min() <= inputs.max() < ByteText.vocab_size == 256


def test_folder_is_split_by_name_and_joined_in_the_order_of_names(folder):
    data = ByteText(folder, context=8, val_fraction=0.5)
    assert _bytes(data.train_set.text) == _read(folder, TRAIN)
    assert _bytes(data.val_set.text) == _read(folder, VAL)


def test_split_does_not_depend_on_the_order_of_the_file_system(folder, monkeypatch):
    expected = ByteText(folder, context=8, val_fraction=0.5)
    expected.setup()
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    data = ByteText(folder, context=8, val_fraction=0.5)
    assert torch.equal(data.train_set.text, expected.train_set.text)
    assert torch.equal(data.val_set.text, expected.val_set.text)


def test_a_file_stays_in_its_split_when_others_come_and_go(folder):
    (folder / "a.txt").unlink()
    (folder / "f.txt").write_bytes(b"+" * 50)
    data = ByteText(folder, context=8, val_fraction=0.5)
    train, val = _bytes(data.train_set.text), _bytes(data.val_set.text)
    assert train == _read(folder, ("b.txt", "c.txt", "f.txt", "sub/d.txt"))
    assert val == _read(folder, VAL)


def test_pattern_chooses_the_files(folder):
    data = ByteText(str(folder), pattern="*.md", context=8, val_fraction=0.5)
    assert _bytes(torch.cat([data.train_set.text, data.val_set.text])) == (folder / "ignored.md").read_bytes()


def test_a_file_is_split_by_position_and_held_once(tmp_path):
    content = bytes(i % 251 for i in range(1000))
    (tmp_path / "book").write_bytes(content)
    data = ByteText(tmp_path / "book", context=8, val_fraction=0.2)
    train, val = data.train_set.text, data.val_set.text
    assert train.dtype == val.dtype == torch.uint8
    assert _bytes(train) == content[:800]
    assert _bytes(val) == content[800:]
    assert train.untyped_storage().data_ptr() == val.untyped_storage().data_ptr()
    assert train.untyped_storage().nbytes() == 1000


def test_a_folder_of_one_file_is_split_by_position(folder):
    data = ByteText(folder, pattern="a.txt", context=8, val_fraction=0.2)
    content = (folder / "a.txt").read_bytes()
    assert _bytes(data.train_set.text) == content[:84]
    assert _bytes(data.val_set.text) == content[84:]


def test_a_split_too_short_for_one_sample_falls_back_to_position(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 100)
    (tmp_path / "another.txt").write_bytes(b"b" * 8)  # validates by its name, but a sample reads 9 bytes
    data = ByteText(tmp_path, context=8, val_fraction=0.5)
    assert _bytes(data.train_set.text) == b"a" * 54
    assert _bytes(data.val_set.text) == b"a" * 46 + b"b" * 8
    (tmp_path / "another.txt").write_bytes(b"b" * 9)
    assert _bytes(ByteText(tmp_path, context=8, val_fraction=0.5).val_set.text) == b"b" * 9


def test_targets_are_the_inputs_one_byte_later(folder):
    data = ByteText(folder, context=10, val_fraction=0.5)
    text = data.train_set.text.long()
    for i, (inputs, targets) in enumerate(data.train_set):
        assert torch.equal(inputs, text[10 * i : 10 * i + 10])
        assert torch.equal(targets, text[10 * i + 1 : 10 * i + 11])


@pytest.mark.parametrize(("length", "windows"), [(11, 1), (20, 1), (21, 2), (30, 2), (31, 3)])
def test_windows_tile_the_text_and_stay_inside(tmp_path, length, windows):
    (tmp_path / "text").write_bytes(bytes(2 * length))
    data = ByteText(tmp_path / "text", context=10, val_fraction=0.5)
    assert len(data.train_set) == len(data.val_set) == windows
    assert all(len(inputs) == len(targets) == 10 for inputs, targets in data.val_set)


def test_stride_sets_the_distance_of_training_windows_only(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(200)))
    data = ByteText(tmp_path / "text", context=10, stride=3, val_fraction=0.5)
    starts = [int(inputs[0]) for inputs, _ in data.train_set]
    assert starts == list(range(0, 90, 3))
    assert [int(inputs[0]) for inputs, _ in data.val_set] == list(range(100, 190, 10))


def test_val_samples_are_spread_evenly(tmp_path):
    (tmp_path / "text").write_bytes(bytes(4000))
    data = ByteText(tmp_path / "text", context=10, val_fraction=0.5, val_samples=4)
    assert list(data.val_set.starts) == [0, 490, 990, 1490]
    for all_of_them in (None, 199, 10_000):
        data = ByteText(tmp_path / "text", context=10, val_fraction=0.5, val_samples=all_of_them)
        assert list(data.val_set.starts) == list(range(0, 1990, 10))


def test_test_split_is_the_validation_split(folder):
    data = ByteText(folder, context=8, val_fraction=0.5)
    for (a, b), (c, d) in zip(data.val_dataloader(), data.test_dataloader(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_workers_do_not_change_the_batches(folder):
    alone = ByteText(folder, context=8, val_fraction=0.5, batch_size=4)
    helped = ByteText(folder, context=8, val_fraction=0.5, batch_size=4, num_workers=2)
    for name in ("train_dataloader", "val_dataloader"):
        for (a, b), (c, d) in zip(getattr(alone, name)(), getattr(helped, name)(), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)


def test_text_is_read_once(folder, monkeypatch):
    data = ByteText(folder, context=8, val_fraction=0.5)
    data.setup("fit")
    monkeypatch.setattr(ByteText, "_read", None)
    data.setup("test")


def test_encode_and_decode():
    text = "naïve 数\n"
    ids = ByteText.encode(text)
    assert ids.dtype == torch.int64
    assert ids.tolist() == list(text.encode())
    assert ByteText.decode(ids) == ByteText.decode(ids.tolist()) == text
    assert ByteText.decode(ids[:3]) == "na�"  # half a character
    assert ByteText.decode(ByteText.encode("")) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "ByteText: context must be at least 1, got 0"),
        ({"batch_size": 0}, "ByteText: batch_size must be at least 1, got 0"),
        ({"stride": 0}, "ByteText: stride must be at least 1, got 0"),
        ({"val_samples": 0}, "ByteText: val_samples must be at least 1, got 0"),
        ({"num_workers": -1}, "ByteText: num_workers must not be negative, got -1"),
        ({"val_fraction": 0.0}, "ByteText: val_fraction must lie between 0 and 1, both excluded, got 0.0"),
        ({"val_fraction": 1.0}, "ByteText: val_fraction must lie between 0 and 1, both excluded, got 1.0"),
        ({"path": "no/such"}, "no text at no/such; pass a file, a folder, or nothing for Python's sources"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(DataError) as error:
        ByteText(**arguments)
    assert str(error.value) == message


def _message(data: ByteText) -> str:
    with pytest.raises(DataError) as error:
        data.setup()
    return str(error.value)


def test_a_folder_without_a_matching_file_is_refused(folder):
    expected = f"text folder {folder} holds no file matching '*.rst'; pass pattern= or another path"
    assert _message(ByteText(folder, pattern="*.rst")) == expected


def test_an_absolute_pattern_is_refused(folder):
    expected = "ByteText: pattern must be a relative glob such as '*.txt', got '/*.txt'"
    assert _message(ByteText(folder, pattern="/*.txt")) == expected


def test_empty_files_are_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    assert _message(ByteText(tmp_path)) == f"all 2 files matching '*.txt' in {tmp_path} are empty; pass another path"
    file = tmp_path / "a.txt"
    assert _message(ByteText(file)) == f"the text file {file} is empty; pass another path"


def test_a_text_shorter_than_a_sample_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * 50)
    cure = "lower context, change val_fraction or add text"
    assert _message(ByteText(file)) == (
        f"the text of {file} holds 50 bytes, 42 of them for training, but a sample reads 97; {cure}"
    )
    assert _message(ByteText(tmp_path, context=20)) == (
        f"the text of {tmp_path} holds 50 bytes, 8 of them for validation, but a sample reads 21; {cure}"
    )


def test_an_unreadable_file_is_named(folder, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert _message(ByteText(folder)) == f"cannot read {folder / 'a.txt'}: Permission denied"


def test_a_python_without_sources_asks_for_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    expected = f"this Python has no sources of its standard library in {tmp_path / 'python.zip'}"
    assert _message(ByteText()) == f"{expected}; pass path= with a text"
