"""Pictures in folders and archives: the order, the augmentation, the cache, and what is refused."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.data import ImageFolder
from zoo.data import folder as module
from zoo.data.folder import _padded_crop, _resized_crop
from zoo.data.loader import ResumableLoader
from zoo.data.sources import Archive, Entry, Folder
from zoo.errors import DataError

CLASSES = ("ant", "bee", "cow")
COUNTS = {"train": (4, 2, 3), "val": (1, 2, 1)}  # pictures of each class
SIZE = 8


def noise(key: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(key), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # lossless: a test can tell every picture
    return buffer.getvalue()


def contents(width: int = SIZE, height: int = SIZE) -> dict[str, bytes]:
    """Name and bytes of every picture; no two are alike."""
    files = {}
    for split, counts in COUNTS.items():
        for label, count in zip(CLASSES, counts, strict=True):
            for i in range(count):
                files[f"{split}/{label}/{i}.png"] = encoded(noise(len(files), width, height))
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_archive(path: Path, files: dict[str, bytes], mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ZOO_DATA", raising=False)
    return tmp_path / "cache" / "pictures"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures", contents())


def small(root: Path | str, **options: object) -> ImageFolder:
    return ImageFolder(**{"root": str(root), "size": SIZE, "batch_size": 2, **options})  # type: ignore[arg-type]


def stacked(data: ImageFolder, split: str = "train") -> Tensor:
    pictures = data.train_set if split == "train" else data.val_set
    return torch.stack([pictures[i][0] for i in range(len(pictures))])


def expected(names: list[str]) -> Tensor:
    files = contents()
    images = [torch.frombuffer(bytearray(Image.open(io.BytesIO(files[n])).tobytes()), dtype=torch.uint8) for n in names]
    return torch.stack([image.view(SIZE, SIZE, 3).permute(2, 0, 1) for image in images]) / 255


# Classes take turns: the first of each, the second of each, and so on.
TURNS = ["ant/0", "bee/0", "cow/0", "ant/1", "bee/1", "cow/1", "ant/2", "cow/2", "ant/3"]


def test_the_pictures_take_turns_by_class(root: Path) -> None:
    data = small(root)
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    assert torch.equal(stacked(data), expected([f"train/{name}.png" for name in TURNS]))
    assert data.train_set.targets.tolist() == [CLASSES.index(name[:3]) for name in TURNS]
    assert torch.equal(stacked(data, "val"), expected([f"val/{n}.png" for n in ("ant/0", "bee/0", "cow/0", "bee/1")]))


def test_a_limit_takes_a_balanced_beginning(root: Path) -> None:
    assert torch.equal(stacked(small(root, limit=5)), stacked(small(root))[:5])
    assert len(small(root, limit=5).val_set) == 4
    assert len(small(root, limit=99).train_set) == 9


def test_held_out_pictures_validate_and_do_not_train(root: Path) -> None:
    held = small(root, holdout=4)
    assert torch.equal(stacked(held, "val"), expected([f"train/{name}.png" for name in TURNS[:4]]))
    assert torch.equal(stacked(held), expected([f"train/{name}.png" for name in TURNS[4:]]))
    assert torch.equal(stacked(small(root, holdout=4, limit=2)), stacked(held)[:2])
    assert torch.equal(stacked(small(root, holdout=4, limit=2), "val"), stacked(held, "val"))
    test = torch.cat([pictures for pictures, _ in held.test_dataloader()])
    assert torch.equal(test, stacked(small(root), "val"))
    assert torch.equal(torch.cat([pictures for pictures, _ in held.predict_dataloader()]), test)
    validated = torch.cat([pictures for pictures, _ in held.val_dataloader()])
    assert torch.equal(validated, stacked(held, "val"))
    with pytest.raises(DataError, match="holdout must leave some of the 9 pictures below train, got 9"):
        small(root, holdout=9).setup()


def test_the_cache_knows_what_is_held_out(root: Path, cache: Path) -> None:
    first = {holdout: (stacked(data := small(root, holdout=holdout)), stacked(data, "val")) for holdout in (0, 3, 4)}
    files = len(list(cache.iterdir()))
    assert files == 3
    for holdout, (train, val) in first.items():
        again = small(root, holdout=holdout)
        again.setup()
        assert not again.train_set.entries  # from the cache
        assert torch.equal(stacked(again), train)
        assert torch.equal(stacked(again, "val"), val)
        assert len(again.test_set) == 4
    assert len(list(cache.iterdir())) == files


def test_without_holdout_the_test_pictures_validate(root: Path) -> None:
    data = small(root)
    assert data.test_set is data.val_set


@pytest.mark.parametrize("packed", [False, True])
def test_held_out_pictures_are_not_augmented(packed: bool, root: Path, tmp_path: Path) -> None:
    where = write_archive(tmp_path / "a.tar", contents(), "w") if packed else root
    data = small(where, augment="resized_crop", holdout=3)  # which decodes one by one
    assert torch.equal(stacked(data, "val"), expected([f"train/{name}.png" for name in TURNS[:3]]))


def test_flip_mirrors_half_of_the_pictures_and_changes_nothing_else(root: Path) -> None:
    plain, data = stacked(small(root)), small(root, augment="flip")
    mirrored = 0
    for epoch in range(40):
        data.train_set.set_epoch(epoch)
        for before, after in zip(plain, stacked(data), strict=True):
            flipped = torch.equal(after, before.flip(-1))
            assert flipped or torch.equal(after, before)
            mirrored += flipped
    assert 140 < mirrored < 220  # of 360: four standard errors


def test_half_the_size_is_an_average_that_knows_of_every_pixel(tmp_path: Path) -> None:
    """Resizing to half filters before it samples: a fine check pattern becomes grey, not black or white."""
    board = Image.new("RGB", (16, 16))
    board.putdata([(255, 255, 255) if (x + y) % 2 else (0, 0, 0) for y in range(16) for x in range(16)])
    files = {f"{split}/{label}/0.png": encoded(board) for split in COUNTS for label in CLASSES}
    halved = stacked(small(write_folder(tmp_path / "board", files), size=8))
    assert (halved - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_an_archive_holds_what_the_folder_does(name: str, mode: str, root: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    files = {f"./{n}" if mode == "w" else n: content for n, content in reversed(contents().items())}
    packed = small(write_archive(tmp_path / name, files, mode))
    for split in ("train", "val"):
        assert torch.equal(stacked(packed, split), stacked(small(root), split))
    written = {p.name for p in set(tmp_path.rglob("*")) - before if p.is_file()}
    assert {Path(n).suffix for n in written - {name}} == {".safetensors"}  # nothing was unpacked


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_too_many_for_the_memory_are_decoded_one_by_one(
    packed: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    held = stacked(small(root, augment="crop"))
    shutil.rmtree(cache)
    where = write_archive(tmp_path / "a.tar", contents(), "w") if packed else root
    monkeypatch.setattr(module, "_MEMORY", 3 * SIZE**2 * 12)
    lazy = small(where, augment="crop")
    assert lazy.train_set.held is None
    assert torch.equal(stacked(lazy), held)
    monkeypatch.setattr(module, "_MEMORY", 3 * SIZE**2 * 13)
    assert small(where).train_set.held is not None


def test_a_compressed_archive_too_large_for_the_memory_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar.gz", contents(), "w:gz")
    with pytest.raises(DataError, match="resized_crop needs to read pictures one by one, which the compressed archive"):
        small(path, augment="resized_crop").setup()
    assert len(small(path, augment="crop").train_set) == 9


def test_the_cache_is_read_until_the_pictures_change(root: Path, tmp_path: Path, cache: Path) -> None:
    path = write_archive(tmp_path / "a.tar.xz", contents(), "w:xz")
    first = {where: stacked(small(where, std=(0.5,) * 3)) for where in (root, path)}
    assert len(list(cache.iterdir())) == 2
    content = path.read_bytes()
    time = path.stat().st_mtime_ns
    path.write_bytes(
        b"\0" * len(content)
    )  # an empty archive of the same size and time: only the cache has the pictures
    os.utime(path, ns=(time, time))
    again = small(path, std=(0.5,) * 3)
    assert torch.equal(stacked(again), first[path])
    assert again.class_names == CLASSES
    os.utime(path, ns=(time, time + 1))
    with pytest.raises(DataError, match="has no train/<class>/ folder"):
        small(path).setup()
    changed = root / "train/ant/0.png"
    changed.write_bytes(encoded(noise(1000)))
    assert not torch.equal(stacked(small(root))[0], first[root][0] * 0.5)
    small(root, limit=3).setup()
    assert len(list(cache.iterdir())) == 4  # other options, another file


def test_a_spoilt_cache_is_named(root: Path, cache: Path) -> None:
    small(root).setup()
    (file,) = cache.iterdir()
    file.write_bytes(b"spoilt")
    with pytest.raises(DataError, match=f"cannot read the decoded pictures in {file}: .*; delete the file"):
        small(root).setup()


def test_mean_and_std_are_of_each_channel(root: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    found = stacked(small(root, mean=mean, std=std))
    torch.testing.assert_close(
        found * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1), stacked(small(root))
    )


def test_the_middle_is_taken(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (4, 0, 12, 8))
    files = {f"{split}/{label}/0.png": encoded(image) for split in COUNTS for label in CLASSES}
    data = small(write_folder(tmp_path / "wide", files))
    assert stacked(data).min() == 1  # nothing of the black sides
    image.paste("black", (5, 1, 11, 7))  # a white frame around the middle
    files = {name: encoded(image) for name in files}
    data = small(write_folder(tmp_path / "framed", files), size=6, centre_share=0.75)
    assert stacked(data).max() == 0


@pytest.mark.parametrize("augment", ["flip", "crop", "resized_crop"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(augment: str, root: Path) -> None:
    def epochs(**options: object) -> list[Tensor]:
        loader = small(root, augment=augment, batch_size=3, **options).train_dataloader()
        found = []
        for epoch in range(3):
            loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            found.append(torch.cat([pictures for pictures, _ in loader]))
        return found

    torch.manual_seed(1)
    before = torch.get_rng_state()
    alone = epochs()
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(alone, epochs(num_workers=2), strict=True):
        assert torch.equal(a, b)
    other = epochs(seed=1)
    data = small(root, augment=augment)
    drawn = []
    for epoch in range(3):
        data.train_set.set_epoch(epoch)
        drawn.append(stacked(data))

    def distinct(*epochs: Tensor) -> set[bytes]:
        return {picture.numpy().tobytes() for pictures in epochs for picture in pictures}

    assert [distinct(pictures) for pictures in alone] == [distinct(pictures) for pictures in drawn]
    assert len(distinct(*drawn)) > (12 if augment == "flip" else 20)  # of 27, of 18 if mirrored alone
    if augment != "flip":
        assert len(distinct(*drawn) & distinct(*other)) < 20  # a crop of so few pixels has 18 forms
    assert not torch.equal(stacked(small(root, augment=augment, seed=1)), drawn[0])
    assert torch.equal(stacked(data, "val"), stacked(small(root), "val"))


def test_a_resumed_loader_draws_what_the_whole_run_drew(root: Path) -> None:
    def loader() -> ResumableLoader:
        made = small(root, augment="crop").train_dataloader()
        assert isinstance(made, ResumableLoader)
        made.batch_sampler.set_epoch(2)  # type: ignore[union-attr]
        return made

    whole = loader()
    batches = iter(whole)
    next(batches)
    state = whole.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    for (a, b), (c, d) in zip(batches, resumed, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_a_padded_crop_moves_and_mirrors() -> None:
    picture = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8).expand(3, 8, 8)
    centre = torch.tensor([0.9, 0.5, 0.5])
    assert torch.equal(_padded_crop(picture, centre), picture)
    assert torch.equal(_padded_crop(picture, torch.tensor([0.1, 0.5, 0.5])), picture.flip(-1))
    moved = _padded_crop(picture, torch.tensor([0.9, 0.99, 0.0]))
    assert torch.equal(moved[:, 1:, :-1], picture[:, :-1, 1:])
    assert moved[:, 0].max() == moved[:, :, -1].max() == 0


def test_a_resized_crop_stays_inside_and_covers_all_sizes() -> None:
    # Red tells the column, green the row: what was cropped can be read off its corners.
    side = 200
    ramp = torch.arange(side, dtype=torch.uint8)
    pixels = torch.stack(
        [ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side).byte()], -1
    )
    image = Image.fromarray(pixels.numpy())
    areas, aspects, mirrored = [], [], 0
    for _ in range(400):
        picture = _resized_crop(image, 32, torch.rand(24)).float()
        left, right = picture[0, :, 0].mean(), picture[0, :, -1].mean()
        height = (picture[1, -1].mean() - picture[1, 0].mean()) * 32 / 31
        width = (right - left) * 32 / 31
        mirrored += bool(width < 0)
        areas.append(float(width.abs() * height / side**2))
        aspects.append(float(width.abs() / height))
    assert min(areas) > 0.05
    assert max(areas) < 1.03
    assert sum(area < 0.54 for area in areas) > 180  # uniform from 0.08 on, the largest refused more often
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4
    assert 160 < mirrored < 240


def test_a_resized_crop_of_a_strip_falls_back_on_its_middle() -> None:
    image = Image.new("RGB", (100, 3), "black")
    image.paste("white", (48, 0, 52, 3))
    assert _resized_crop(image, 4, torch.full((24,), 0.99)).min() > 200


def spoilt(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    if name == "no val":
        return {n: content for n, content in files.items() if not n.startswith("val")}
    if name == "no train":
        return {n: content for n, content in files.items() if not n.startswith("train")}
    if name == "classes differ":
        return {n: content for n, content in files.items() if not n.startswith("val/bee")}
    if name == "empty class":
        return {n: content for n, content in files.items() if not n.startswith("val/bee")} | {"val/bee/notes.txt": b""}
    if name == "truncated":
        return files | {"train/bee/1.png": files["train/bee/1.png"][:100]}
    return files | {"train/bee/1.png": b"no picture"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no val", "{root} has no val/<class>/ folder; pass root= with one, or val= with another name"),
        ("no train", "{root} has no train/<class>/ folder; pass root= with one"),
        ("classes differ", "the splits train and val of {root} differ in their classes, by 1: bee; give both the same"),
        ("empty class", "the class folder val/bee of {root} holds no picture; add some (.bmp, .gif, "),
        ("truncated", "cannot decode the picture {root}/train/bee/1.png: "),
        ("malformed", "cannot decode the picture {root}/train/bee/1.png: cannot identify image file"),
    ],
)
def test_what_is_wrong_with_the_pictures_is_said(name: str, message: str, packed: bool, tmp_path: Path) -> None:
    files = spoilt(name, contents())
    root = tmp_path / ("a.tar" if packed else "pictures")
    root = write_archive(root, files, "w") if packed else write_folder(root, files)
    data = small(root)
    with pytest.raises(DataError) as error:
        data.setup()
    assert str(error.value).startswith(message.format(root=root))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/train/ant/9.png", "../train/ant/9.png", "train/ant/../../9.png"])
def test_an_archive_that_names_files_outside_of_itself_is_refused(name: str, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar", contents() | {name: encoded(noise(99))}, "w")
    with pytest.raises(DataError, match="names a file outside of itself"):
        small(path).setup()


def test_links_of_an_archive_are_not_followed(root: Path, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar", contents(), "w")
    with tarfile.open(path, "a") as archive:
        for name, kind in (("train/ant/8.png", tarfile.SYMTYPE), ("train/ant/9.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    assert len(small(path).train_set) == 9


def test_what_is_no_picture_is_passed_over(root: Path) -> None:
    for name in ("train/ant/notes.txt", "train/ant/._0.png", "train/notes.png", "notes.png"):
        (root / name).write_bytes(b"no picture")
    (root / "train/.hidden").mkdir()
    nested = root / "train/ant/more"
    nested.mkdir()
    (nested / "4.PNG").write_bytes(encoded(noise(77)))
    assert len(small(root).train_set) == 10


@pytest.mark.parametrize("content", [b"", b"no archive at all", None])
def test_an_unreadable_archive_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar.gz", contents(), "w:gz")
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    with pytest.raises(DataError) as error:
        small(path).setup()
    assert str(error.value).startswith(f"cannot read the archive {path}: ")
    assert "\n" not in str(error.value)


def test_a_relative_root_is_looked_for_here_then_in_zoo_data(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert small("pictures").root == Path("pictures")
    with pytest.raises(DataError, match="there is no other here, nor below ZOO_DATA, which is not set; pass root="):
        small("other")
    monkeypatch.setenv("ZOO_DATA", str(root.parent))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert small("pictures").root == root
    with pytest.raises(DataError, match=f"there is no other here, nor in ZOO_DATA, {root.parent}; pass root="):
        small("other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "ImageFolder: size must be at least 1, got 0"),
        ({"batch_size": 0}, "ImageFolder: batch_size must be at least 1, got 0"),
        ({"limit": 0}, "ImageFolder: limit must be at least 1, got 0"),
        ({"num_workers": -1}, "ImageFolder: num_workers must not be negative, got -1"),
        (
            {"augment": "mirror"},
            "ImageFolder: augment must be one of none, flip, crop, resized_crop, got 'mirror'",
        ),
        ({"holdout": -1}, "ImageFolder: holdout must not be negative, got -1"),
        ({"std": (1, 1)}, "ImageFolder: mean and std must be 3 numbers, std positive, got (0.0, 0.0, 0.0) and (1, 1)"),
        ({"centre_share": 0}, "ImageFolder: centre_share must lie in (0, 1], got 0"),
        ({"val": "../val"}, "ImageFolder: val must name a folder beside train, got '../val'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str, root: Path) -> None:
    with pytest.raises(DataError) as error:
        small(root, **arguments)
    assert str(error.value) == message


CIFAR = Path(os.environ.get("ZOO_DATA", ""), "cifar10_images.tar.xz")


@pytest.mark.skipif(not CIFAR.is_file(), reason="needs cifar10_images.tar.xz in the folder of ZOO_DATA")
def test_the_real_archive_is_read() -> None:
    entries, content = [], []
    with tarfile.open(CIFAR) as archive:  # its beginning: all of it takes seconds to decompress
        while len(entries) < 5:
            member = archive.next()
            assert member is not None
            if member.isfile():
                split, label, _ = member.name.split("/")
                entries.append(Entry(split, label, member.name, member.size, member.offset_data))
                content.append(archive.extractfile(member).read())  # type: ignore[union-attr]
    source = Archive(CIFAR)
    assert not source.seekable
    assert [found for _, found in source.read(entries)] == content
    assert Image.open(io.BytesIO(content[0])).size == (32, 32)


def test_both_sources_say_the_same_of_the_same_pictures(root: Path, tmp_path: Path) -> None:
    archive = Archive(write_archive(tmp_path / "a.tar", contents(), "w"))
    for source in (archive, Folder(root)):
        entries, classes = source.index(("train",))
        assert sorted(entry.name for entry in entries) == sorted(n for n in contents() if n.startswith("train"))
        assert classes == {("train", label) for label in CLASSES}
        read = {entries[i].name: content for i, content in source.read(entries)}
        assert read == {name: content for name, content in contents().items() if name in read}
