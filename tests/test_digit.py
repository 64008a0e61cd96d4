"""results/digit.py on pictures with strokes of their own: what it answers, tells and refuses."""

import os
import sys

import digit
import pytest
import torch
from conftest import call
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

STROKES = {1: [(270, 120), (250, 300)], 7: [(190, 130), (310, 120), (240, 300)],
           4: [(220, 120), (190, 230), (310, 230), (285, 230), (290, 140), (280, 310)]}


def draw(number, ink=(40, 40, 40), paper=(210, 210, 200), mode="RGB", size=(500, 400)):
    """Return a page with a digit on it."""
    picture = Image.new(mode, size, paper)
    ImageDraw.Draw(picture).line(STROKES[number], fill=ink, width=20, joint="curve")
    return picture


@pytest.mark.parametrize("number", STROKES)
def test_pictures_of_many_kinds_get_the_right_answer(number, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flat, clear, exif = draw(number), draw(number, "black", (0, 0, 0, 0), "RGBA"), Image.Exif()
    shade = 1 - 0.5 * (torch.linspace(-30, 20, 500) + torch.linspace(-9, 9, 400)[:, None]).sigmoid()
    exif[0x0112] = 6  # to be turned by a quarter
    flat.rotate(90, expand=True).save("turned.jpg", exif=exif)
    Image.fromarray(pil_to_tensor(flat)[0].numpy().astype("uint16") * 257).save("16 bits.png")
    for name, picture in {
            "flat.jpg": flat, "palette.gif": flat.convert("P"), "clear.png": clear,
            "grey.png": clear.convert("LA"), "small.png": draw(number, size=(1000, 1100)),
            "white.png": draw(number, "white", (255, 255, 255, 0), "RGBA"),
            "light.webp": draw(number, (230, 230, 230), (40, 60, 50)),
            "red on green.png": draw(number, (200, 60, 60), (90, 160, 90)),
            "shadow.jpg": to_pil_image((pil_to_tensor(flat) * shade).byte())}.items():
        picture.save(name)
    paths = [f"./{path.name}" for path in tmp_path.iterdir()]
    assert digit.main(paths) == 0
    shown, errors = capsys.readouterr()
    assert [path for path in paths if f"\n{path}: {number} (" not in shown] == [] and not errors


def test_what_cannot_be_read_gets_a_line_and_the_others_an_answer(tmp_path):
    draw(7).save(tmp_path / "7 é.png")
    Image.new("RGB", (300, 200), "white").save(tmp_path / "blank.png")
    to_pil_image(torch.randint(160, 240, (3, 300, 400)).byte()).save(tmp_path / "noise.png")
    Image.radial_gradient("L").save(tmp_path / "shade.png")
    (tmp_path / "text.png").write_text("7")
    (tmp_path / "photo.heic").write_bytes(bytes(4) + b"ftypheic")
    bad = ["./missing.png", "blank.png", "noise.png", "shade.png", "text.png", "photo.heic"]
    status, shown, errors = call(sys.executable, digit.__file__, *bad, "./7 é.png", cwd=tmp_path,
                                 env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert status == 1 and "\n./7 ?.png: 7 (" in shown and "export it as JPEG" in errors
    assert [line.partition(": ")[0] for line in errors.splitlines()] == bad, errors


def test_two_digits_are_told_weights_are_chosen_and_mnists_own_is_taken_as_it_is(tmp_path, capsys):
    pair, own = draw(1, size=(700, 400)), str(tmp_path / "own.pt")
    pair.paste(draw(7).crop((180, 0, 500, 400)), (380, 0))
    pair.save(tmp_path / "two.png")
    torch.save({name: 0 * each for name, each in digit.Net().state_dict().items()}, own)
    assert digit.main([str(tmp_path / "two.png"), "--weights", own]) == 0
    assert "10 % sure" in (told := "".join(capsys.readouterr())) and "one digit" in told
    (tmp_path / "own.pt").write_text("no weights")
    with pytest.raises(SystemExit, match=r"^.*own.pt: .+$"):
        digit.main([str(tmp_path / "two.png"), "--weights", own])
    image = F.pad(torch.arange(200, 251, dtype=torch.uint8).view(1, 17, 3), (17, 8, 3, 8))
    assert digit.prepare(to_pil_image(image)).equal(image)
