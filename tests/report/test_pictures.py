"""What a task shows, inside the page."""

import base64

import pytest

import niwaki.report
from niwaki.errors import FileDamagedError

JPEG = b"\xff\xd8\xff\xe0 and so on"
ROWS = [
    {"row": "a.jpg", "words": "3 objects", "file": "pictures/0.jpg"},
    {"row": "a.jpg", "words": "after: <2> found", "file": "pictures/1.jpg"},
    {"row": "b.jpg", "words": "no object", "file": "pictures/0.jpg"},
]


@pytest.fixture
def folder(save, made):
    place = save(data=made() | {"pictures": ROWS})
    (place / "pictures").mkdir()
    for name in ("0.jpg", "1.jpg"):
        (place / "pictures" / name).write_bytes(JPEG)
    return place


def test_pictures_are_inside_the_page(folder):
    text = niwaki.report.html(folder)
    assert text.count(f'<img src="data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}"') == 3
    assert text.count('<div class="row"><figure><img') == 2  # a row a picture
    assert "after: &lt;2&gt; found" in text and "img-src data:" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"<svg onload=...>"),
        lambda path: path.write_bytes(JPEG + bytes(1 << 19)),
    ],
)
def test_files_that_are_no_small_pictures_are_refused(folder, change):
    change(folder / "pictures" / "1.jpg")
    with pytest.raises(FileDamagedError, match=r"pictures/1\.jpg"):
        niwaki.report.html(folder)


def test_no_file_of_another_folder_is_read(save, made):
    rows = [{"row": "a", "words": "", "file": "../secret.jpg"}]
    place = save(data=made() | {"pictures": rows})
    (place.parent / "secret.jpg").write_bytes(JPEG)
    with pytest.raises(FileDamagedError, match="secret"):
        niwaki.report.html(place)


def test_the_figure_that_a_task_judges_by_is_told(save, made):
    data = made() | {"metric": "AP50"}
    for side, value in (("before", 61.5), ("after", 60.25)):
        data[side]["AP50"] = {"value": value, "unit": "%", "definition": "d"}
    text = niwaki.report.html(save(data=data))
    assert "AP50 61.50 → 60.25\u00a0%" in text and "<h2>AP50 and cost</h2>" in text
    data["after"]["AP50"]["unit"] = "m"  # no share of anything: plots stand on percent
    assert "<h2>Accuracy and cost</h2>" in niwaki.report.html(save("two", data=data))
